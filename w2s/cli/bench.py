"""w2s bench loss, step, data."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from w2s.cli.app import Debug, Json, Nproc, Overrides, app, one_line

bench = typer.Typer(help="Measure this machine, beside a peer where there is one.")
app.add_typer(bench, name="bench")


@bench.command("loss")
def bench_loss(
    batch: Annotated[
        list[int] | None, typer.Option(min=1024, help="Batch size, given once or more; 4096 to 65536 without it.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median is taken.")] = 3,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time and peak memory of the tiled contrastive loss and its gradients on the CPU, beside open_clip's ClipLoss."""
    with one_line(debug):
        from w2s.bench.loss import BATCHES, measure, print_table, report

        rows = []
        for size in batch or BATCHES:
            print(f"batch {size}", file=sys.stderr)
            rows.append(measure(size, repeats))
        if as_json:
            print(json.dumps(report(rows), indent=2))
        else:
            print_table(rows)


@bench.command("step")
def bench_step(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="mim or clip.")],
    overrides: Overrides = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the vision tower; text tower and EVA teacher shrink with it.")
    ] = None,
    micro_batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Micro-batch, given once or more, in steps of one; without it, as configured."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of which the median is taken.")] = 10,
    data: Annotated[Literal["synthetic", "real"], typer.Option(help="Noise, or the training samples.")] = "synthetic",
    vs: Annotated[
        Literal["timm", "open_clip"] | None,
        typer.Option(help="The peer: timm for mim, open_clip for clip."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns with the peer, of which the median is taken.")] = 3,
    nproc: Nproc = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time, FLOPs, memory and parts of a stage's step at full width, on random weights; beside a peer if wanted."""
    with one_line(debug):
        from dataclasses import asdict

        from w2s.bench.report import bench_step as measure
        from w2s.bench.table import print_report
        from w2s.config.load import load

        report = measure(
            load(stage, overrides or []),
            layers=layers,
            micro_batches=micro_batch or [],
            steps=steps,
            data=data,
            peer=vs,
            rounds=rounds,
            ranks=nproc,
        )
        if as_json:
            print(json.dumps(asdict(report), indent=2))
        else:
            print_report(report)


@bench.command("data")
def bench_data(
    photographs: Annotated[str, typer.Argument(help="Folder of photographs; shards are cut out of them.")],
    samples: Annotated[
        int, typer.Option(min=16, help="Images of 500 x 400 (8 times as many over a server); a quarter of 1600 x 1200.")
    ] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median is taken.")] = 5,
    workers: Annotated[int, typer.Option(min=0, help="Reading processes of each.")] = 1,
    latency: Annotated[
        float | None, typer.Option(min=0, help="Milliseconds before each answer of a local server; reads over it too.")
    ] = None,
    bandwidth: Annotated[float, typer.Option(min=0.01, help="Megabytes a second of each connection to it.")] = 100.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Images per second of the loader on the CPU, beside open_clip's on the same shards, and how far they differ.

    With --latency: images per second and waits over a slow local server, beside those from the disk.
    """
    with one_line(debug):
        from w2s.bench.loaders import data, remote

        if latency is None:
            figures, print_table = (
                data.measure(Path(photographs), samples=samples, repeats=repeats, workers=workers),
                data.print_table,
            )
        else:
            figures, print_table = (
                remote.measure(
                    Path(photographs),
                    latency=latency / 1e3,
                    bandwidth=bandwidth * 1e6,
                    samples=samples,
                    workers=workers,
                ),
                remote.print_table,
            )
        if as_json:
            print(json.dumps(figures, indent=2))
        else:
            print_table(figures)
