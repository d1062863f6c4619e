"""Stage checkpoints, the hand-over between stages, and other people's formats in and out."""
