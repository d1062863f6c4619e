"""The loader beside open_clip's own where shards come over a slow network, and from the disk."""

import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from w2s.bench.loaders.data import BATCH, Shards, open_clip_images, our_images, spec
from w2s.bench.loaders.photographs import cut_shards
from w2s.bench.loaders.server import serve
from w2s.tracking.tables import Table

LANES = 8
WINDOW = 256
SHARDS = 4 * LANES
_DISTINCT = 1024
"""Images after which the same come again, under other names."""


def measure(
    photographs: Path, *, latency: float, bandwidth: float, samples: int, workers: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure both loaders over a server and from the disk, with the same shards.

    Args:
        photographs: folder of photographs.
        latency: seconds before each answer of the server.
        bandwidth: bytes a second of each connection.
        samples: an eighth of the images of about 500 x 400 pixels that each loader gives: enough for whole windows.
        workers: reading processes.

    Returns:
        By place and loader: `per_second`, images a second after the first batch; `first`, seconds to the first batch;
        `longest_wait`, the longest one for a batch after it, in seconds.
    """
    torch.set_num_threads(1)
    wanted = spec((0.9, 1.0))
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        # Whole batches for each process, so that both loaders read every image once.
        count = max(1, 8 * samples // (BATCH * SHARDS)) * BATCH * SHARDS
        pattern = cut_shards(photographs, shards, 500, 400, count, shards=SHARDS, distinct=_DISTINCT)
        names = pattern.removeprefix(str(shards))
        with serve(shards, latency=latency, bandwidth=bandwidth) as url:
            for place, folder_or_url in (("server", url), ("disk", str(shards))):
                read = Shards(place, f"{folder_or_url}{names}", count)
                figures[place] = {
                    "open_clip": _figures(open_clip_images(read, None, workers)),
                    "w2s": _figures(our_images(read, wanted, lanes=LANES, shuffle=WINDOW, workers=workers)),
                }
    return figures


def _figures(load: Iterator[torch.Tensor]) -> dict[str, float]:
    times = [time.perf_counter()]
    for _ in load:
        times.append(time.perf_counter())
    waits = [after - before for before, after in pairwise(times)]
    return {
        "per_second": (len(waits) - 1) * BATCH / sum(waits[1:]),
        "first": waits[0],
        "longest_wait": max(waits[1:]),
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print the figures."""
    rows = [
        [place, name, f"{row['per_second']:.0f}", f"{row['first']:.1f}", f"{row['longest_wait']:.2f}"]
        for place, loaders in figures.items()
        for name, row in loaders.items()
    ]
    columns = ("shards on", "loader", "images / s", "first batch, s", "longest wait after it, s")
    Console().print(Table("images of about 500x400", columns, rows).to_rich())
