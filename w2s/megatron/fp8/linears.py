"""The linear layers that a tower is made of: Megatron's own, Transformer Engine's, or those that rehearse FP8."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from w2s.config.precision import bf16_layers, choose_linears, fp8_format
from w2s.config.sections import Config, PrecisionConfig
from w2s.megatron.fp8 import fp8_emulation, transformer_engine
from w2s.megatron.fp8.whole_linears import ColumnLinear, RowLinear


@dataclass(frozen=True)
class Linears:
    """What the layers of one tower multiply with; parameters have the same names and shapes whatever it is."""

    implementation: Literal["local", "te"] = "local"
    """Whose classes they are."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Its FP8 settings."""
    bf16_layers: frozenset[int] = frozenset()
    """Layers, from 0 over all pipeline stages, that stay without FP8."""

    def column(self, layer: int) -> type:
        """Return the linear of a layer whose output tensor-parallel ranks share."""
        if self.implementation == "te":
            return transformer_engine.column_linear(self._without_fp8(layer))
        if self._without_fp8(layer):
            return ColumnLinear
        return fp8_emulation.column_linear(fp8_format(self.precision))

    def row(self, layer: int) -> type:
        """Return the linear of a layer whose input tensor-parallel ranks share."""
        if self.implementation == "te":
            return transformer_engine.row_linear(self._without_fp8(layer))
        return RowLinear if self._without_fp8(layer) else fp8_emulation.row_linear(fp8_format(self.precision))

    def settings(self) -> dict[str, Any]:
        """Return what Megatron's configuration of the tower has to say of them."""
        # Transformer Engine makes its weights on the GPU; Megatron's own come from the CPU, as our values for them do.
        # It also adds up gradients of weights within the product; for Megatron's own that takes Apex.
        settings: dict[str, Any] = {
            "use_cpu_initialization": self.implementation == "local",
            "gradient_accumulation_fusion": self.implementation == "te",
        }
        if self.implementation == "local" or self.precision.fp8 == "none":
            return settings
        return settings | {
            "fp8": fp8_format(self.precision),
            "fp8_recipe": self.precision.fp8,
            "fp8_amax_history_len": self.precision.fp8_history,
            "fp8_amax_compute_algo": "max",
            "fp8_margin": self.precision.fp8_margin,
            "fp8_param": self.precision.fp8_primary_weights,
        }

    def _without_fp8(self, layer: int) -> bool:
        return self.precision.fp8 == "none" or layer in self.bf16_layers


LOCAL = Linears()
"""Megatron's own linears, without FP8."""


def linears_of(config: Config, tower: str) -> Linears:
    """Return the linears of a tower (`vision`, `text`) as the configuration wants them on this machine.

    Raises:
        MissingPackageError: they are Transformer Engine's, and it cannot be loaded.
    """
    choice = choose_linears(config.precision, config.hardware)
    if choice.implementation == "te":
        transformer_engine.require()
    precision = config.precision if config.stage != "eval" else replace(config.precision, fp8="none")
    return Linears(choice.implementation, precision, bf16_layers(precision, tower, getattr(config.model, tower).layers))


@contextmanager
def without_fp8(parts: Sequence[Any]) -> Iterator[None]:
    """Inside, chunks of a tower compute without FP8: it is for training alone."""
    before = [(part, part.training, part.config.fp8) for part in parts]
    for part in parts:
        part.eval()
        part.config.fp8 = None
    try:
        yield
    finally:
        for part, training, fp8 in before:
            part.train(training)
            part.config.fp8 = fp8
