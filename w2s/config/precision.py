"""Types of numbers."""

import torch

from w2s.config.sections import PrecisionConfig


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Return the type of weights and activations in the forward and backward pass."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.compute]
