"""What a laptop has not, stood in for: a GPU and its streams, other ranks, Transformer Engine, Triton."""
