"""What a measured step comes to: samples and FLOPs a second, and how much of the card that is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from w2s.bench.step import Row
from w2s.config.sections import Config
from w2s.planning.model.teacher import PlannedTeacher, flops_with_teachers
from w2s.planning.time.cards import Card, cards

_TOWERS = ("student", "vision", "text")


@dataclass(frozen=True)
class Speed:
    """Figures of a step; TFLOP/s are those of one rank."""

    milliseconds: float
    samples_per_second: float
    """Of all ranks."""
    model_tflops: float
    """What training needs at least: nothing that is computed twice."""
    hardware_tflops: float
    """What runs: recomputed layers and second forward passes too."""
    towers_tflops: float
    """Model TFLOP/s of the forward and backward passes of the trained towers alone."""
    mfu: float | None
    """`model_tflops` over the dense BF16 peak of the card, in FP8 too; null where no peak is known, as on a CPU."""
    hfu: float | None
    """`hardware_tflops` over the same peak."""
    towers_mfu: float | None
    """`towers_tflops` over the same peak."""
    memory_gib: float
    """See `w2s.bench.step.Row`."""
    parts: dict[str, float]
    """Milliseconds by part."""


def speed(config: Config, teachers: Sequence[PlannedTeacher], device: str, row: Row, world_size: int) -> Speed | None:
    """Work out the figures of a median step on a card, or `cpu`; None where the memory did not suffice."""
    if not row.parts:
        return None
    seconds = row.milliseconds / 1e3
    flops = flops_with_teachers(config, world_size, teachers)
    per_rank = row.global_batch / world_size / 1e12
    towers = sum(part.model for name, part in flops.parts.items() if name in _TOWERS)
    passes = (row.parts["forward"] + row.parts["backward"]) / 1e3
    model, hardware = per_rank * flops.model / seconds, per_rank * flops.hardware / seconds
    alone, peak = per_rank * towers / passes, bf16_peak(device)
    return Speed(
        milliseconds=row.milliseconds,
        samples_per_second=row.global_batch / seconds,
        model_tflops=model,
        hardware_tflops=hardware,
        towers_tflops=alone,
        mfu=model / peak if peak else None,
        hfu=hardware / peak if peak else None,
        towers_mfu=alone / peak if peak else None,
        memory_gib=row.memory_gib,
        parts=row.parts,
    )


def bf16_peak(device: str) -> float | None:
    """Return the dense BF16 peak in TFLOP/s of a card that torch names so; None for one that is not in cards.yaml."""
    card = card_of(device)
    return card.bf16_tflops if card else None


def card_of(device: str) -> Card | None:
    """Return the card of cards.yaml that torch names so.

    Those there are SXM cards: the PCIe and NVL cards of the same name have lower peaks.
    """
    for card in cards().values():
        family = card.name.split()[0]
        if re.search(rf"\b{family}\b", device) and not re.search(r"PCIe|NVL", device):
            return card
    return None
