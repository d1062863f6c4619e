"""The arithmetic of a run: the type of its numbers, its linear layers, and in which of them FP8."""

from dataclasses import dataclass
from typing import Literal

import torch

from w2s.config import gpu
from w2s.config.sections import HardwareConfig, PrecisionConfig

INSTALL = "pip install 'w2s[gpu]'"
"""What brings Transformer Engine."""


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Return the type of weights and activations in the forward and backward pass."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.compute]


@dataclass(frozen=True)
class LinearChoice:
    """The linear layers of a run."""

    implementation: Literal["local", "te"]
    """Megatron's own, or Transformer Engine's."""
    reason: str
    """Why these."""


def choose_linears(precision: PrecisionConfig, hardware: HardwareConfig) -> LinearChoice:
    """Return the linear layers that a run takes on this machine."""
    if precision.linear != "auto":
        return LinearChoice(precision.linear, f"precision.linear={precision.linear}")
    if precision.fp8 == "emulated":
        return LinearChoice("local", "precision.fp8=emulated is made of them")
    if hardware.device == "cpu":
        return LinearChoice("local", "hardware.device=cpu")
    card = gpu.card()
    if card is None:
        return LinearChoice("local", "there is no GPU")
    if not card.hopper_or_newer:
        return LinearChoice("local", f"{card.name} is older than Hopper")
    if not gpu.transformer_engine_installed():
        return LinearChoice("local", f"Transformer Engine is not installed ({INSTALL})")
    return LinearChoice("te", f"{card.name} with Transformer Engine")


def fp8_format(precision: PrecisionConfig) -> Literal["hybrid", "e4m3"]:
    """Return the format that `precision.fp8_format` stands for."""
    if precision.fp8_format != "auto":
        return precision.fp8_format
    return "e4m3" if precision.fp8 == "blockwise" else "hybrid"


def bf16_layers(precision: PrecisionConfig, tower: str, layers: int) -> frozenset[int]:
    """Return the layers of a tower, from 0, that stay without FP8."""
    ends = [*range(precision.fp8_bf16_first), *range(layers - precision.fp8_bf16_last, layers)]
    named = [int(name.partition(".")[2]) for name in precision.fp8_bf16_layers if name.startswith(f"{tower}.")]
    return frozenset([*ends, *named])
