"""`w2s bench loss`: the tiled contrastive loss and its gradient with respect to features, beside open_clip's."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import rich.box
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from w2s.bench.call_cost import Cost, cost, in_fresh_process
from w2s.objectives.contrastive import contrastive_loss

BATCHES = (4096, 8192, 16384, 32768, 65536)
"""Batch sizes that are measured unless told otherwise."""
WIDTH = 1024
"""Width of the features."""
PEER_LARGEST = 16384
"""Largest batch that the peer is given: it keeps several matrices of batch x batch, 1 GiB each here."""

_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": contrastive_loss, "peer": ClipLoss()}
_WARM_UP = 64


@dataclass(frozen=True)
class Row:
    """Medians at one batch size, and ours as a fraction of the peer's; null where the peer does not run."""

    batch: int
    ours: Cost
    peer: Cost | None = None
    time_ratio: float | None = None
    memory_ratio: float | None = None


def measure(batch: int, repeats: int) -> Row:
    """Measure forward and backward at one batch size, ours and the peer's in turns, each in a fresh process.

    Above `PEER_LARGEST` ours runs alone, and once: no ratio depends on it.
    """
    if batch > PEER_LARGEST:
        return Row(batch, _cost_of("ours", batch))
    turns = [(_cost_of("ours", batch), _cost_of("peer", batch)) for _ in range(repeats)]
    ours, peer = (_median(costs) for costs in zip(*turns, strict=True))
    return Row(batch, ours, peer, ours.seconds / peer.seconds, ours.mib / peer.mib)


def report(rows: Sequence[Row]) -> dict[str, object]:
    """Return the rows, and what they were measured with, for JSON."""
    return {"width": WIDTH, "threads": torch.get_num_threads(), "rows": [asdict(row) for row in rows]}


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows for a reader."""
    names = ("batch", "time", "ClipLoss", "ratio", "memory", "ClipLoss", "ratio")
    table = Table(*(Column(name, justify="right") for name in names), box=rich.box.SIMPLE_HEAD, show_edge=False)
    for row in rows:
        peer_time, peer_memory = (f"{row.peer.seconds:.2f} s", f"{row.peer.mib:,.0f} MiB") if row.peer else ("", "")
        time_ratio = f"{row.time_ratio:.2f}" if row.time_ratio else ""
        memory_ratio = f"1/{1 / row.memory_ratio:.1f}" if row.memory_ratio else ""
        ours = f"{row.ours.seconds:.2f} s", f"{row.ours.mib:,.0f} MiB"
        table.add_row(f"{row.batch:,}", ours[0], peer_time, time_ratio, ours[1], peer_memory, memory_ratio)
    Console().print(table)


def _cost_of(name: str, batch: int) -> Cost:
    return in_fresh_process(_forward_and_backward, name, batch)


def _forward_and_backward(name: str, batch: int) -> Cost:
    _loss_of(name, _WARM_UP)()  # loads the libraries
    return cost(_loss_of(name, batch))


def _loss_of(name: str, batch: int) -> Callable[[], None]:
    """Return a call of one loss, forward and backward, on features that exist already."""
    generator = torch.Generator().manual_seed(batch)
    features = (F.normalize(torch.randn(batch, WIDTH, generator=generator), dim=-1) for _ in range(2))
    images, texts = (feature.requires_grad_() for feature in features)
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    return lambda: _LOSSES[name](images, texts, scale).backward()


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(median(cost.seconds for cost in costs), median(cost.mib for cost in costs))
