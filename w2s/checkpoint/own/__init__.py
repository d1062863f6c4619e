"""Checkpoints of our own runs: written whole, verified, kept in memory, removed. Read `checkpoint_folders.py` first."""
