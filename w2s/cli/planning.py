"""w2s plan, w2s rehearse."""

import json
from pathlib import Path
from typing import Annotated

import typer

from w2s.cli.app import Debug, Json, Overrides, app, one_line, warn_of_doubts
from w2s.errors import UserError


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
    top: Annotated[
        int, typer.Option(min=0, help="Splits that are shown, each in its fastest layout; 0 shows all layouts.")
    ] = 10,
    out: Annotated[Path | None, typer.Option(help="Write the fastest layout as a file for hardware=FILE.")] = None,
    eval_images: Annotated[
        int, typer.Option(min=0, help="Images of eval.shards, where the shards are not on this machine.")
    ] = 0,
    simulate: Annotated[int | None, typer.Option(min=8, help="Plan on 8, 16, ... up to this many GPUs too.")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Show what the planner says of runs that others have published.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell which layouts of a stage fit on GPUs and how fast they should be; no GPU is needed."""
    with one_line(debug):
        from w2s.planning import hardware_file, report, scaling
        from w2s.planning.plan import find_plans
        from w2s.planning.request import request
        from w2s.planning.run_time import counted
        from w2s.planning.time.cards import card as card_of

        if published:
            if arguments or gpus:
                raise UserError("--published takes no stage and no GPUs: its runs have their own, leave them out")
            from w2s.planning.published import print_rows

            print_rows(as_json)
            return
        if not gpus:
            raise UserError("w2s plan asks for no GPUs: say how many with --gpus N")
        asked = request(arguments or [], gpus, card, batch or [])
        if out and out.suffix != ".yaml":
            raise UserError(f"--out {out} must end in .yaml, as hardware=FILE wants it: use {out.with_suffix('.yaml')}")
        _check_folder("--out", out)
        kind = card_of(card)
        images = {stage: counted(asked.config(stage, gpus), eval_images) for stage in asked.stages}
        by_stage = {
            stage: find_plans(asked.config(stage, gpus), kind, gpus, asked.fixed, top) for stage in asked.stages
        }
        for stage in asked.stages:
            warn_of_doubts(asked.config(stage, gpus))
        curves = {stage: scaling.simulate(asked, stage, simulate) for stage in asked.stages} if simulate else {}
        if out:
            hardware_file.write(out, asked, [plans.fastest[0] for plans in by_stage.values()])
        answer = report.Answer(asked, kind, by_stage, images, curves)
        if as_json:
            print(json.dumps(report.document(answer), indent=2))
        else:
            report.print_report(answer)


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
    data: Annotated[
        bool,
        typer.Option("--data/--no-data", help="Look for the shards, as the run does at its start."),
    ] = True,
    trace: Annotated[
        Path | None, typer.Option(help="Write the simulated steps as a trace for Perfetto or chrome://tracing.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rehearse a job for a cluster on this machine: will it start, fit, hang, and how long does a step take?"""
    with one_line(debug):
        from w2s.planning.request import TRAINED, Request
        from w2s.planning.time.cards import card as card_of
        from w2s.rehearsal import report
        from w2s.rehearsal.kinds import chosen
        from w2s.rehearsal.rehearsal import run as run_rehearsal
        from w2s.rehearsal.trace import write_trace

        if name not in TRAINED:
            raise UserError(f"stage {name} is not one that is rehearsed: use mim or clip, as in `w2s rehearse mim`")
        _check_folder("--trace", trace)
        config = Request((name,), tuple(overrides or ()), gpus, card, {}).config(name, gpus)
        rehearsed = run_rehearsal(config, gpus, card_of(card), chosen(ranks, config.parallel, gpus), steps, data=data)
        if as_json:
            print(json.dumps(report.document(rehearsed), indent=2))
        else:
            report.print_report(rehearsed)
        if trace and rehearsed.timeline.steps:
            write_trace(trace, rehearsed)
    if rehearsed.wrong:
        raise typer.Exit(1)


def _check_folder(option: str, path: Path | None) -> None:
    """Refuse a file without a folder at the start, before minutes of work."""
    if path and not path.parent.is_dir():
        raise UserError(f"{option} {path} cannot be written: there is no folder {path.parent}, make it first")
