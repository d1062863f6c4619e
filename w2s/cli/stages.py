"""w2s stage, w2s run."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from w2s.cli.app import Debug, Nproc, Overrides, PrintConfig, Restarts, app, one_line, warn_of_doubts
from w2s.cli.completion import complete_pipeline, complete_stage
from w2s.errors import UserError

if TYPE_CHECKING:
    from w2s.config.sections import Config


@app.command()
def stage(
    name: Annotated[str, typer.Argument(metavar="STAGE", help="mim, clip or eval.", autocompletion=complete_stage)],
    overrides: Overrides = None,
    nproc: Nproc = 1,
    restarts: Restarts = 0,
    print_config: PrintConfig = False,
    debug: Debug = False,
) -> None:
    """Run one stage. The same command continues an interrupted run; under torchrun or srun it runs as a rank."""
    with one_line(debug):
        from w2s.config.checks import check_settings
        from w2s.config.load import load, refuse_expanded_braces, to_yaml

        refuse_expanded_braces(overrides or [])
        config = load(name, overrides or [])
        if print_config:
            check_settings(config)
            print(to_yaml(config), end="")
            warn_of_doubts(config)
        else:
            _start(config, nproc, restarts)


def _start(config: "Config", nproc: int, restarts: int) -> None:
    from w2s.config.checks import check
    from w2s.launch import launch_stage, run_stage
    from w2s.processes.elastic import adopt_slurm, check_torchrun, is_rank
    from w2s.processes.host import keep_printing, prepare_cuda

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
            autocompletion=complete_pipeline,
        ),
    ] = None,
    nproc: Nproc = 1,
    restarts: Restarts = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew beside earlier results.")] = False,
    print_config: PrintConfig = False,
    debug: Debug = False,
) -> None:
    """Run a pipeline of stages, such as mim -> clip -> eval. The same command resumes where it was interrupted."""
    with one_line(debug):
        from w2s.config.load import refuse_expanded_braces
        from w2s.pipeline.runner import pipeline_yaml, run_pipeline
        from w2s.processes.host import keep_printing

        given = arguments or []
        name = given.pop(0) if given and "=" not in given[0] else "default"
        refuse_expanded_braces(given)
        if print_config:
            print(pipeline_yaml(name, given), end="")
        else:
            keep_printing()
            run_pipeline(name, given, ranks=nproc, fresh=fresh, restarts=restarts)
