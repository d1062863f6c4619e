"""w2s import, w2s export, w2s average, w2s inspect, w2s encode."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from w2s.cli.app import Debug, Nproc, Overrides, Root, app, one_line, print_table
from w2s.cli.completion import complete_run
from w2s.errors import UserError
from w2s.processes.stopping import stop_at_once


@app.command(name="import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A weights file, an index, a folder, or a run.", autocompletion=complete_run
        ),
    ],
    model: Annotated[str, typer.Option(help="What it holds: a name of configs/model, or a path that ends in .yaml.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    image_size: Annotated[int | None, typer.Option(min=1, help="Resize to images of this side in pixels.")] = None,
    patch_size: Annotated[int | None, typer.Option(min=1, help="Resize to patches of this side in pixels.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="A name, or a pattern with *, that may be missing or unexpected.")
    ] = None,
    root: Root = "runs",
    debug: Debug = False,
) -> None:
    """Turn weights of EVA-CLIP, open_clip, timm or transformers into a checkpoint that every stage can start from."""
    with one_line(debug), stop_at_once():
        from w2s.checkpoint.find import find_any
        from w2s.checkpoint.weights.importing import import_checkpoint, with_size
        from w2s.config.load import named_model

        path, held = find_any(source, Path(root).expanduser(), key="SRC"), named_model(model)
        imported = import_checkpoint(path, with_size(held, image_size, patch_size), out, allowed=allow or [])
        print_table(f"{path} -> {out}", ["", "tensors", "names"], imported.rows())


@app.command()
def export(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run, a checkpoint, or an MLflow run id.", autocompletion=complete_run),
    ],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    format: Annotated[
        str, typer.Option(help="open_clip, timm, transformers, onnx, torch_export, eva or safetensors.")
    ] = "open_clip",
    weights: Annotated[
        Literal["last", "ema"], typer.Option(help="The last weights, or their moving average (optim.ema).")
    ] = "last",
    head: Annotated[
        str, typer.Option(help="A teacher of a masked run: with the head for it, to stand in its place.")
    ] = "",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16 instead of the checkpoint's own.")] = "",
    hub: Annotated[str, typer.Option(help="OWNER/NAME that the folder will have on a hub.")] = "",
    license: Annotated[
        str, typer.Option(help="Licence of the weights, as the hub calls it: apache-2.0, ...")
    ] = "unknown",
    root: Root = "runs",
    debug: Debug = False,
) -> None:
    """Write a checkpoint as a folder that open_clip, timm, transformers, a server or the EVA-CLIP code loads."""
    with one_line(debug), stop_at_once():
        from w2s.checkpoint.export.exporting import export_checkpoint
        from w2s.checkpoint.find import find_any

        path = find_any(run, Path(root).expanduser(), key="RUN")
        exported = export_checkpoint(
            path, format, out, weights=weights, head=head, precision=precision, hub=hub, licence=license
        )
        rows = [[name, f"{size:,}"] for name, size in exported.files.items()]
        print_table(f"{path} -> {out}", ["file", "bytes"], rows)
        first = exported.guide.snippets[0]
        print(f"{first.peer} (more in {out / 'README.md'}):\n\n{first.code.replace('FOLDER', str(out))}")


@app.command()
def average(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run's folder, or its name below --root.", autocompletion=complete_run),
    ],
    last: Annotated[int, typer.Option(min=2, help="How many of its newest checkpoints.")] = 5,
    out: Annotated[Path | None, typer.Option(help="The new folder; without it RUN-last-N beside the run.")] = None,
    root: Root = "runs",
    debug: Debug = False,
) -> None:
    """Average the last checkpoints of a run: a checkpoint that can be evaluated, exported, taken over and teach."""
    with one_line(debug), stop_at_once():
        from w2s.checkpoint.find import find_run
        from w2s.checkpoint.starts.averaging import average_checkpoints

        path = find_run(run, Path(root).expanduser())
        made = out or path.with_name(f"{path.name}-last-{last}")
        for checkpoint in average_checkpoints(path, last, made):
            print(f"{checkpoint.name} of {path}")
        print(f"averaged: {made}")


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A run, a checkpoint, or anybody's weights.", autocompletion=complete_run),
    ],
    root: Root = "runs",
    debug: Debug = False,
) -> None:
    """Tell what a checkpoint is: format, model, parameters, step, samples, parent."""
    with one_line(debug):
        from w2s.checkpoint.find import find_any
        from w2s.checkpoint.weights.inspecting import inspect as inspect_checkpoint

        checkpoint = find_any(path, Path(root).expanduser(), key="PATH")
        about = inspect_checkpoint(checkpoint)
        print_table(str(checkpoint), ["", ""], [[name, value] for name, value in about.items()])


@app.command()
def encode(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A run, a checkpoint, or anybody's weights.", autocompletion=complete_run
        ),
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    overrides: Overrides = None,
    images: Annotated[str, typer.Option(help="Image files or shards: a glob, braces, or a folder of shards.")] = "",
    texts: Annotated[Path | None, typer.Option(help="A file with a text a line.")] = None,
    model: Annotated[str | None, typer.Option(help="What other people's weights are: a name of configs/model.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=2**20, help="Images or texts of one forward pass.")] = 64,
    nproc: Nproc = 1,
    root: Root = "runs",
    debug: Debug = False,
) -> None:
    """Write the features of images and texts."""
    with one_line(debug):
        from w2s.checkpoint.find import find_any
        from w2s.evaluation.encode import EncodeJob, configured, run
        from w2s.processes.elastic import adopt_slurm, is_rank, launch

        if not images and texts is None:
            raise UserError("w2s encode asks for nothing: give --images, --texts, or both")
        path = find_any(checkpoint, Path(root).expanduser(), key="CHECKPOINT")
        adopt_slurm()
        ranks = int(os.environ["WORLD_SIZE"]) if is_rank() else nproc
        job = EncodeJob(path, configured(path, model, overrides or [], ranks), images, texts, out, batch_size)
        if is_rank() or nproc == 1:
            run(job)
        else:
            launch(run, job, nproc)
