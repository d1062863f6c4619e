"""The command line. Heavy imports happen inside the commands, so that `w2s --help` answers at once."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from w2s import __version__
from w2s.errors import UserError, W2SError
from w2s.failure import INTERRUPTED, describe
from w2s.redaction import redact, shown
from w2s.stopping import stop_at_once

if TYPE_CHECKING:
    from w2s.config.sections import Config

app = typer.Typer(
    help="Grow a bigger CLIP out of a smaller one: masked feature distillation, then contrastive training.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Measure this machine, beside a peer where there is one.")
app.add_typer(bench, name="bench")

data = typer.Typer(help="Make, count, check and show shards.")
app.add_typer(data, name="data")

checkpoint = typer.Typer(help="List, verify and prune the checkpoints of a run.")
app.add_typer(checkpoint, name="checkpoint")

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, or model=NAME for configs/model/NAME.yaml.")]
Nproc = Annotated[int, typer.Option(min=1, help="Ranks on this machine.")]
Restarts = Annotated[
    int, typer.Option(min=0, help="Times that all ranks are started again, from the last checkpoint, when one fails.")
]
Root = Annotated[str, typer.Option(help="Folder of the runs, where a run is given by its name.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the configuration and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Entry point of the `w2s` command: every failure is one line on stderr and an exit code."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="w2s", standalone_mode=False))
    except typer.TyperException as error:
        print(f"error: {shown(' '.join(error.format_message().split()))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        print("error: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextmanager
def _one_line(debug: bool) -> Iterator[None]:
    """Turn an exception into the line and the exit code that the user gets."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            print(getattr(error, "rank_traceback", "") or redact(traceback.format_exc()), file=sys.stderr, end="")
        message, exit_code = describe(error)
        print(f"error: {message}", file=sys.stderr)
        raise typer.Exit(exit_code) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"w2s {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `w2s` itself."""


@app.command()
def stage(
    name: Annotated[str, typer.Argument(metavar="STAGE", help="mim, clip or eval.")],
    overrides: Overrides = None,
    nproc: Nproc = 1,
    restarts: Restarts = 0,
    print_config: PrintConfig = False,
    debug: Debug = False,
) -> None:
    """Run one stage. The same command continues an interrupted run; under torchrun or srun it runs as a rank."""
    with _one_line(debug):
        from w2s.config.checks import check_settings
        from w2s.config.load import load, refuse_expanded_braces, to_yaml

        refuse_expanded_braces(overrides or [])
        config = load(name, overrides or [])
        if print_config:
            check_settings(config)
            print(to_yaml(config), end="")
            _warn(config)
        else:
            _start(config, nproc, restarts)


def _warn(config: "Config") -> None:
    """Say on the error stream what is hardly meant."""
    from w2s.config.checks import doubts

    for doubt in doubts(config, world_size=1):
        print(f"warning: {doubt}", file=sys.stderr)


def _start(config: "Config", nproc: int, restarts: int) -> None:
    from w2s.config.checks import check
    from w2s.host import keep_printing, prepare_cuda
    from w2s.launch import adopt_slurm, check_torchrun, is_rank, launch_stage, run_stage

    keep_printing()
    prepare_cuda(config.parallel.tensor, config.train.deterministic)
    adopt_slurm()
    if is_rank():
        check_torchrun()
        if nproc > 1:
            raise UserError(f"--nproc {nproc} under torchrun or srun, which start the ranks: leave --nproc out")
        if restarts:
            raise UserError(f"--restarts {restarts} under torchrun or srun: use torchrun --max-restarts, or requeue")
        world_size = int(os.environ["WORLD_SIZE"])
        check(config, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        run_stage(config)
        return
    check(config, nproc, nproc)
    if nproc == 1 and not restarts and not config.checkpoint.memory:
        run_stage(config)
    else:
        launch_stage(config, nproc, restarts)


@app.command()
def run(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME] OVERRIDES",
            help="A pipeline of configs/run, then key=value for all steps or STEP:key=value for one.",
        ),
    ] = None,
    nproc: Nproc = 1,
    restarts: Restarts = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew beside earlier results.")] = False,
    print_config: PrintConfig = False,
    debug: Debug = False,
) -> None:
    """Run a pipeline of stages, such as mim -> clip -> eval. The same command goes on where it was interrupted."""
    with _one_line(debug):
        from w2s.config.load import refuse_expanded_braces
        from w2s.host import keep_printing
        from w2s.pipeline.run import pipeline_yaml, run_pipeline

        given = arguments or []
        name = given.pop(0) if given and "=" not in given[0] else "default"
        refuse_expanded_braces(given)
        if print_config:
            print(pipeline_yaml(name, given), end="")
        else:
            keep_printing()
            run_pipeline(name, given, ranks=nproc, fresh=fresh, restarts=restarts)


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console

    from w2s.tracking.tables import Table

    Console(highlight=False).print(Table(title, columns, rows).to_rich())


@app.command(name="import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A weights file, an index, a folder, or a run.")],
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
    """Turn EVA-CLIP's, open_clip's or timm's weights into a checkpoint that every stage can start from."""
    with _one_line(debug), stop_at_once():
        from w2s.checkpoint.find import find_any
        from w2s.checkpoint.importing import import_checkpoint, with_size
        from w2s.config.load import named_model

        path, held = find_any(source, Path(root).expanduser(), key="SRC"), named_model(model)
        found = import_checkpoint(path, with_size(held, image_size, patch_size), out, allowed=allow or [])
        _print_table(f"{path} -> {out}", ["", "tensors", "names"], found.rows())


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, a checkpoint, or an MLflow run id.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    format: Annotated[str, typer.Option(help="eva, open_clip, timm or safetensors.")] = "open_clip",
    root: Root = "runs",
    debug: Debug = False,
) -> None:
    """Write a checkpoint as a folder that open_clip, timm or the EVA-CLIP code loads."""
    with _one_line(debug), stop_at_once():
        from w2s.checkpoint.exporting import export_checkpoint
        from w2s.checkpoint.find import find_any

        path = find_any(run, Path(root).expanduser(), key="RUN")
        written = export_checkpoint(path, format, out)
        _print_table(f"{path} -> {out}", ["file", "bytes"], [[name, f"{size:,}"] for name, size in written.items()])


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A run, a checkpoint, or anybody's weights.")],
    root: Root = "runs",
    debug: Debug = False,
) -> None:
    """Tell what a checkpoint is: format, model, parameters, step, samples, parent."""
    with _one_line(debug):
        from w2s.checkpoint.find import find_any
        from w2s.checkpoint.inspecting import inspect as inspect_checkpoint

        found = find_any(path, Path(root).expanduser(), key="PATH")
        about = inspect_checkpoint(found)
        _print_table(str(found), ["", ""], [[name, value] for name, value in about.items()])


@app.command()
def encode(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A run, a checkpoint, or anybody's weights.")],
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
    with _one_line(debug):
        from w2s.checkpoint.find import find_any
        from w2s.encode import EncodeJob, configured, run
        from w2s.launch import adopt_slurm, is_rank, launch

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


@app.command()
def plan(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="STAGE... OVERRIDES", help="mim, clip or both, then key=value.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="Number of GPUs.")] = 0,
    card: Annotated[str, typer.Option(help="Their kind: a100-40, a100-80, h100, h200 or b200.")] = "h100",
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[STAGE=]N", help="Samples of a step; without it the configuration's, or the nearest legal."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Layouts that are shown; 0 shows all.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Write the fastest layout as a file for hardware=FILE.")] = None,
    simulate: Annotated[int | None, typer.Option(min=8, help="Plan on 8, 16, ... up to this many GPUs too.")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Show what the planner says of runs that others have published.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell which layouts of a stage fit on GPUs and how fast they should be; no GPU is needed."""
    with _one_line(debug):
        import json

        from w2s.planning import hardware_file, report, scaling
        from w2s.planning.cards import card as card_of
        from w2s.planning.plan import find_plans
        from w2s.planning.request import request

        if published:
            from w2s.planning.published import print_rows

            print_rows(as_json)
            return
        if not gpus:
            raise UserError("w2s plan asks for no GPUs: say how many with --gpus N")
        asked = request(arguments or [], gpus, card, batch or [])
        if out:
            hardware_file.check_name(out)
        kind = card_of(card)
        found = {stage: find_plans(asked.config(stage, gpus), kind, gpus, asked.fixed, top) for stage in asked.stages}
        for stage in asked.stages:
            _warn(asked.config(stage, gpus))
        curves = {stage: scaling.simulate(asked, stage, simulate) for stage in asked.stages} if simulate else {}
        if out:
            hardware_file.write(out, asked, [plans.fastest[0] for plans in found.values()])
        if as_json:
            print(json.dumps(report.document(asked, kind, found, curves), indent=2))
        else:
            report.print_report(asked, kind, found, curves)


@app.command()
def rehearse(
    name: Annotated[str, typer.Argument(metavar="STAGE", help="mim or clip.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 8,
    card: Annotated[str, typer.Option(help="Their kind: a100-40, a100-80, h100, h200 or b200.")] = "h100",
    ranks: Annotated[
        str, typer.Option(help="kinds: one of each kind; pipeline: one of each stage; or ranks such as 0,64.")
    ] = "kinds",
    steps: Annotated[int, typer.Option(min=2, help="Steps of each rank.")] = 2,
    trace: Annotated[
        Path | None, typer.Option(help="Write the simulated steps as a trace for Perfetto or chrome://tracing.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rehearse a job for a cluster on this machine: will it start, fit, hang, and how long does a step take?"""
    with _one_line(debug):
        import json

        from w2s.planning.cards import card as card_of
        from w2s.planning.request import request
        from w2s.rehearsal import report
        from w2s.rehearsal.kinds import chosen
        from w2s.rehearsal.run import run as run_rehearsal
        from w2s.rehearsal.trace import write_trace

        asked = request([name, *(overrides or [])], gpus, card)
        config = asked.config(name, gpus)
        found = run_rehearsal(config, gpus, card_of(card), chosen(ranks, config.parallel, gpus), steps)
        if trace:
            write_trace(trace, found)
        if as_json:
            print(json.dumps(report.document(found), indent=2))
        else:
            report.print_report(found)
    if found.wrong:
        raise typer.Exit(1)


@app.command()
def doctor(debug: Debug = False) -> None:
    """Show what this machine can do, and what each missing piece would bring."""
    with _one_line(debug):
        from w2s.doctor import print_report

        print_report()


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
    with _one_line(debug):
        import json

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
    with _one_line(debug):
        import json
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
    with _one_line(debug):
        import json
        from pathlib import Path

        from w2s.bench import data, remote

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


OneRun = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name below --root.")]


@checkpoint.command("list")
def checkpoint_list(run: OneRun, root: Root = "runs", debug: Debug = False) -> None:
    """List a run's checkpoints; damage is told from names and sizes alone, as no file is read."""
    with _one_line(debug):
        from w2s.checkpoint.find import find_run
        from w2s.checkpoint.upkeep import COLUMNS, look_at

        path = find_run(run, Path(root).expanduser())
        _print_table(str(path), COLUMNS, [found.row() for found in look_at(path, quick=True)])


@checkpoint.command("verify")
def checkpoint_verify(run: OneRun, root: Root = "runs", debug: Debug = False) -> None:
    """Read every file of a run's checkpoints; exit code 1 if one is damaged."""
    with _one_line(debug):
        from w2s.checkpoint.find import find_run
        from w2s.checkpoint.upkeep import COLUMNS, look_at

        path = find_run(run, Path(root).expanduser())
        checkpoints = look_at(path, quick=False)
        _print_table(str(path), COLUMNS, [found.row() for found in checkpoints])
        damaged = [found for found in checkpoints if found.damage]
        for found in damaged:
            print(f"{found.path}: {', '.join(found.damage)}")
        if damaged:
            raise W2SError(f"{len(damaged)} of {len(checkpoints)} checkpoints of {path} are damaged: see above")


@checkpoint.command("prune")
def checkpoint_prune(
    run: OneRun,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Whole checkpoints that stay; without it all of them.")
    ] = None,
    root: Root = "runs",
    debug: Debug = False,
) -> None:
    """Read a run's checkpoints and remove those that are damaged, and all but the newest whole ones.

    The one that the run goes on from stays, and what checkpoint.keep_at keeps for other runs.
    """
    with _one_line(debug):
        from w2s.checkpoint.find import find_run
        from w2s.checkpoint.upkeep import prune

        path = find_run(run, Path(root).expanduser())
        removed = prune(path, keep)
        for found in removed:
            print(f"removed {found.path.name}: {found.state}")
        print(f"{sum(found.bytes for found in removed):,} bytes freed in {path}")


Shards = Annotated[str, typer.Argument(help="What data.train takes: a folder, a glob, a brace pattern or a URL.")]
Workers = Annotated[int, typer.Option(min=1, help="Threads that work side by side.")]
IMAGE_KEY, CAPTION_KEY = "jpg;jpeg;png;webp;bmp;gif;tif;tiff;image", "txt;text;caption"  # as DataConfig's
ImageKey = Annotated[str, typer.Option(help="Extensions (columns) of the image, separated by ;")]
CaptionKey = Annotated[
    str, typer.Option(help="Extensions (columns) of the caption, or json.KEY; empty for images only.")
]


@data.command("make")
def data_make(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder of images, a .csv, .tsv or .jsonl table, a .parquet file.")
    ],
    out: Annotated[str, typer.Option(help="Folder for the shards.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the shuffling.")] = 0,
    workers: Workers = 1,
    split: Annotated[
        str, typer.Option(help="Make this split (test or train) of a test set, in CLIP_benchmark's layout.")
    ] = "",
    like: Annotated[str, typer.Option(help="Set of CLIP_benchmark whose class names and prompts it has.")] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt with {c} for the class name, or several.")] = None,
    debug: Debug = False,
) -> None:
    """Write images, captions and classes into shards. The same command goes on where it was interrupted."""
    with _one_line(debug):
        from pathlib import Path

        from w2s.data.benchmark import BenchmarkSet
        from w2s.data.make import make_shards

        if (like or prompt) and not split:
            raise UserError("--like and --prompt are for a test set: name its split, such as --split test")
        test_set = BenchmarkSet(split=split, like=like, prompts=prompt or []) if split else None
        sizes = make_shards(
            Path(source), Path(out), shard_size=shard_size, seed=seed, workers=workers, test_set=test_set
        )
        print(f"{sum(sizes.values())} samples in {len(sizes)} shards: {out}")


@data.command("build")
def data_build(
    name: Annotated[str, typer.Argument(help="emoji or showcase, as in data=NAME.")], debug: Debug = False
) -> None:
    """Build a data set that w2s makes from packages; one that lacks some of its sources is built again."""
    with _one_line(debug):
        import json

        from w2s.config.load import load
        from w2s.data.builtin.registry import ensure_builtin
        from w2s.launch import show_notes

        show_notes()
        folder = ensure_builtin(load("mim", [f"data={name}"]).data, renew=True)
        for sizes in sorted(folder.glob("*/sizes.json")):
            print(f"{sizes.parent}: {sum(json.loads(sizes.read_text()).values())} pairs")


@data.command("index")
def data_index(overrides: Overrides = None, debug: Debug = False) -> None:
    """Count the samples of data.train and keep the result in data.index, where runs find it."""
    with _one_line(debug):
        from pathlib import Path

        from w2s.config.load import load, refuse_expanded_braces
        from w2s.data.sizes import index_shards
        from w2s.data.sources import list_sources

        refuse_expanded_braces(overrides or [])
        section = load("mim", overrides or []).data
        for source in list_sources(section):
            sizes = index_shards(source.shards, Path(section.index))
            print(f"{source.name}: {sum(sizes.values())} samples in {len(sizes)} shards")


@data.command("check")
def data_check(
    shards: Shards,
    image_key: ImageKey = IMAGE_KEY,
    caption_key: CaptionKey = CAPTION_KEY,
    workers: Workers = 1,
    debug: Debug = False,
) -> None:
    """Read and decode every sample, and report what a run would skip; exit code 1 if there is something."""
    with _one_line(debug):
        from w2s.data.inspect import check_shards
        from w2s.data.shards import list_shards

        report = check_shards(list_shards(shards, "SHARDS"), image_key, caption_key or None, workers)
        print("\n".join(map(shown, report.lines())))
        if report.bad or report.wrong_sizes:
            raise W2SError(f"{sum(report.bad.values())} of {report.samples} samples are bad: see above")


@data.command("show")
def data_show(
    shards: Shards,
    out: Annotated[str, typer.Option(help="PNG file for a sheet of images with their captions.")] = "sheet.png",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Images in the sheet.")] = 24,
    image_key: ImageKey = IMAGE_KEY,
    caption_key: CaptionKey = CAPTION_KEY,
    debug: Debug = False,
) -> None:
    """Print what is inside of shards, and save a sheet of images with their captions."""
    with _one_line(debug):
        from pathlib import Path

        from w2s.data.inspect import describe_shards, draw_sheet
        from w2s.data.shards import list_shards

        found = list_shards(shards, "SHARDS")
        print("\n".join(map(shown, describe_shards(found))))
        drawn = draw_sheet(found, image_key, caption_key or None, count, Path(out))
        print(f"{drawn} samples drawn: {out}")
