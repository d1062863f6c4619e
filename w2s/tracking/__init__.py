"""What a person sees of a run: the console, files in its folder, MLflow and the report. Read `tracker.py` first."""
