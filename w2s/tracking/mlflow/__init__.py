"""A run in MLflow's store, and a CLIP in its registry. Read `run.py` first: nothing that fails here stops training."""
