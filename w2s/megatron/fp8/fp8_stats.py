"""What FP8 does to the numbers of each layer: largest magnitude, saturation and underflow, on logged steps.

Of each layer (`vision.7`) and kind of tensor (`input`, `weight`, `gradient`), over linears and ranks, of the first
micro-batch and a sixteenth of the rows of a large matrix, so that a logged step takes hardly longer than others:
`fp8/vision.7/input_amax`, the largest magnitude; `_saturation`, the share of values beyond the format's largest number;
`_underflow`, the share of values other than zero that become zero.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from w2s.megatron.fp8 import fp8_emulation, transformer_engine

Counts = dict[tuple[str, str], list[float]]
"""What `rounding_stats` gives, by layer and kind of tensor."""


def rounding_stats(tensor: Tensor, scale: Tensor, dtype: torch.dtype, copies: int) -> Tensor:
    """Count what rounding to FP8 does to a tensor, without waiting for the device.

    Args:
        tensor: any shape.
        scale: what its values are multiplied by first; a scalar, or of the tensor's shape.
        dtype: the format.
        copies: ranks that hold this same tensor: each counts its part of it.

    Returns:
        float64 [5]: largest magnitude; values, those beyond the format, those other than zero, those that become zero.
    """
    form = torch.finfo(dtype)
    magnitudes = tensor.detach().abs().float()
    scaled = magnitudes * scale
    # Half a unit in the last place above the largest number, 1.75 x 2^n in both formats; half of the smallest one.
    beyond = scaled > form.max * (1 + form.eps / 3.5)
    nonzero = magnitudes > 0
    lost = nonzero & (scaled <= form.smallest_normal * form.eps / 2)
    total = torch.full_like(nonzero.sum(), nonzero.numel())
    counts = torch.stack([total, beyond.sum(), nonzero.sum(), lost.sum()])
    return torch.cat([magnitudes.amax()[None].double(), counts.double() / copies])


def _joined(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.maximum(a[:1], b[:1]), a[1:] + b[1:]])


class Fp8Stats:
    """Watches the linears of some towers that multiply in FP8.

    Args:
        towers: the towers by name; each rank may hold other layers, or parts of them.
    """

    def __init__(self, towers: Mapping[str, Any]) -> None:
        self._layers = {
            f"{name}.{layer.layer_number - 1}": layer
            for name, tower in towers.items()
            for chunk in tower.chunks
            for layer in chunk.blocks.layers
            if fp8_emulation.emulated_linears(layer) or transformer_engine.fp8_linears(layer, chunk.config)
        }
        self._seen: dict[tuple[str, str], Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the tensors of the first micro-batch that are rounded to FP8 are counted."""
        handles = [handle for name, layer in self._layers.items() for handle in self._attach(name, layer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, name: str, layer: Any) -> Iterator[Any]:
        def record(kind: str, tensor: Tensor, scale: Tensor, dtype: torch.dtype, copies: int) -> None:
            counts = rounding_stats(tensor, scale, dtype, copies)
            before = self._seen.get((name, kind))
            self._seen[name, kind] = counts if before is None else _joined(before, counts)

        for linear in fp8_emulation.emulated_linears(layer):
            yield linear.record_with(record)
        for linear in transformer_engine.fp8_linears(layer, layer.config):
            yield transformer_engine.record_with(linear, layer.config, record)

    def read(self) -> Counts:
        """Return what this rank has counted since the last reading; waits for the device."""
        values = torch.stack(list(self._seen.values())).tolist() if self._seen else []
        local = dict(zip(self._seen, values, strict=True))
        self._seen.clear()
        return local


def fp8_metrics(gathered: Iterable[Counts]) -> dict[str, float]:
    """Return the metrics of what all ranks have counted; none where they have counted nothing.

    Beside those of each layer, `fp8_saturation` and `fp8_underflow` are the worst of all.
    """
    everywhere: dict[tuple[str, str], Tensor] = {}
    for each in gathered:
        for key, counts in each.items():
            local = torch.tensor(counts, dtype=torch.float64)
            everywhere[key] = _joined(everywhere[key], local) if key in everywhere else local
    return _metrics({key: counts.tolist() for key, counts in everywhere.items()})


def _metrics(counts: Counts) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for (layer, kind), (largest, total, beyond, nonzero, lost) in sorted(counts.items(), key=_place):
        metrics[f"fp8/{layer}/{kind}_amax"] = largest
        metrics[f"fp8/{layer}/{kind}_saturation"] = beyond / total
        metrics[f"fp8/{layer}/{kind}_underflow"] = lost / max(nonzero, 1)
    worst = {
        f"fp8_{what}": max(value for name, value in metrics.items() if name.endswith(what))
        for what in ("saturation", "underflow")
        if metrics
    }
    return worst | metrics


def _place(item: tuple[tuple[str, str], Any]) -> tuple[str, int, str]:
    (layer, kind), _ = item
    tower, _, index = layer.partition(".")
    return tower, int(index), kind
