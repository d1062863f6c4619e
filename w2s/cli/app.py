"""The `w2s` command itself, and what its commands share."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from w2s import __version__
from w2s.cli.completion import complete_override
from w2s.processes.failure import INTERRUPTED, describe
from w2s.redaction import redact, shown

if TYPE_CHECKING:
    from w2s.config.sections import Config


app = typer.Typer(
    help="Grow a bigger CLIP out of a smaller one: masked feature distillation, then contrastive training.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, or model=NAME for configs/model/NAME.yaml.", autocompletion=complete_override),
]
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
def one_line(debug: bool) -> Iterator[None]:
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


def warn_of_doubts(config: "Config") -> None:
    """Say on the error stream what is hardly meant."""
    from w2s.config.checks import doubts

    for doubt in doubts(config, world_size=1):
        print(f"warning: {doubt}", file=sys.stderr)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    from rich.console import Console

    from w2s.tracking.tables import Table

    Console(highlight=False).print(Table(title, columns, rows).to_rich())
