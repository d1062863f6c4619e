"""Linear layers in FP8: Transformer Engine's, and an emulation for machines without it."""
