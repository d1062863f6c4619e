"""w2s report."""

from pathlib import Path
from typing import Annotated

import typer

from w2s.cli.app import Debug, Root, app, one_line
from w2s.cli.completion import complete_run


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs, or the folder of a `w2s run`: paths, or names below --root.",
            autocompletion=complete_run,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; without it report.html in the run's folder, or of several in --root.")
    ] = None,
    root: Root = "runs",
    debug: Debug = False,
) -> None:
    """Write report.html of a run at any time, or a page with several runs side by side."""
    with one_line(debug):
        from w2s.tracking.report.report import write_comparison, write_report
        from w2s.tracking.run_group import find_runs, runs_of

        folder = Path(root).expanduser()
        folders = find_runs(runs, folder)
        if len(folders) == 1:
            path = write_report(folders[0], out)
        else:
            path = out or folder / "report.html"
            write_comparison(path, [run for each in folders for run in runs_of(each)])
        print(f"report: {path}")
