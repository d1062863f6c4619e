"""Fused operators: Triton on a GPU, and beside each its twin in plain PyTorch, which runs elsewhere."""
