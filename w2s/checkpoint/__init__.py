"""Stage checkpoints and the hand-over between stages."""
