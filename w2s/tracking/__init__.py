"""What a person sees of a run: MLflow, the console, pictures and the report."""
