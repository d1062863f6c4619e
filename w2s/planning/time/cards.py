"""The GPUs that the planner knows: what a data sheet promises, and how much of it software gets."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import yaml

from w2s.config.fields import nearest
from w2s.errors import UserError

End = Literal["slow", "expected", "fast"]
"""A bad cluster, one as expected, and a good one."""

GPUS_PER_NODE = 8
"""GPUs that NVLink joins."""


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Shares of a card's figures that software reaches, and what is around it: guesses, explained in cards.yaml."""

    memory: float
    hbm: float
    nvlink: float
    network: float
    products: float
    attention: float
    fp32: float
    teacher: float
    pcie: float
    storage_gbs: float
    """GB/s that a node writes to storage that all share."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU; sources and estimates are in cards.yaml."""

    name: str
    memory_gib: float
    """Capacity in GiB."""
    processors: int
    """Streaming multiprocessors."""
    bf16_tflops: float
    """Dense peak."""
    fp8_tflops: float
    """Dense peak; 0 where there is none."""
    bf16_gemm: float
    """TFLOP/s of the best product that was measured."""
    fp8_gemm: float
    """The same in FP8."""
    fp32_tflops: float
    """Peak of float32 without tensor cores."""
    hbm_tbs: float
    """Memory bandwidth in TB/s."""
    nvlink_gbs: float
    """GB/s in one direction."""
    network_gbs: float
    """GB/s in one direction."""
    pcie_gbs: float
    """GB/s to the host."""
    narrow: float
    """Width of layers that take twice as long as their operations do in wide ones."""
    launch: float
    """Seconds that a kernel takes to be launched."""
    estimates: Estimates

    @property
    def usable_bytes(self) -> float:
        """Bytes that tensors can have."""
        return self.memory_gib * 2**30 * self.estimates.memory

    @property
    def memory_bandwidth(self) -> float:
        """Bytes that elementwise kernels move in a second."""
        return self.hbm_tbs * 1e12 * self.estimates.hbm

    def at(self, end: End) -> "Card":
        """Return the card on a bad or a good cluster."""
        return replace(self, estimates=estimates(end))

    def slowdown(self, width: int) -> float:
        """How many times longer layers of a width take than their operations do in wide ones."""
        return 1 + (self.narrow / width) ** 2

    def attention(self, tokens: int) -> float:
        """FLOP/s of attention over sequences of a length: kernels that work on tiles of them get faster with it."""
        return self.bf16_tflops * 1e12 * self.estimates.attention * tokens / (tokens + 256)

    def bandwidth(self, within_node: bool) -> float:
        """Bytes that a GPU sends in a second, over NVLink or over the network."""
        if within_node:
            return self.nvlink_gbs * 1e9 * self.estimates.nvlink
        return self.network_gbs * 1e9 * self.estimates.network


def card(name: str) -> Card:
    """Return a card of cards.yaml.

    Raises:
        UserError: there is none of that name.
    """
    known = cards()
    if name not in known:
        raise UserError(f"--card {name} is unknown: did you mean {nearest(name, known)}? There are {', '.join(known)}")
    return known[name]


@cache
def cards() -> Mapping[str, Card]:
    """Return all cards by name."""
    common = {"estimates": estimates("expected"), "launch": _content()["launch"]}
    return {name: Card(**figures, **common) for name, figures in _content()["cards"].items()}


@cache
def estimates(end: End) -> Estimates:
    """Return what software reaches on a bad cluster (`slow`), on one as expected, or on a good one (`fast`)."""
    place = get_args(End).index(end)
    return Estimates(**{name: values[place] for name, values in _content()["estimates"].items()})


@cache
def _content() -> dict[str, Any]:
    text = (files("w2s.planning.time") / "cards.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content
