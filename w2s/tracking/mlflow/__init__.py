"""A run in MLflow's store. Read `run.py` first: nothing that fails here stops training."""
