"""w2s checkpoint list, verify, prune."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from w2s.cli.app import Debug, Root, app, one_line, print_table
from w2s.cli.completion import complete_run
from w2s.errors import W2SError

if TYPE_CHECKING:
    from w2s.checkpoint.own.upkeep import Found

checkpoint = typer.Typer(help="List, verify and prune the checkpoints of a run.")
app.add_typer(checkpoint, name="checkpoint")


OneRun = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, or its name below --root.", autocompletion=complete_run)
]


@checkpoint.command("list")
def checkpoint_list(run: OneRun, root: Root = "runs", debug: Debug = False) -> None:
    """List a run's checkpoints; damage is told from names and sizes alone, as no file is read."""
    with one_line(debug):
        _look_at(run, root, quick=True)


@checkpoint.command("verify")
def checkpoint_verify(run: OneRun, root: Root = "runs", debug: Debug = False) -> None:
    """Read every file of a run's checkpoints; exit code 1 if one is damaged."""
    with one_line(debug):
        path, checkpoints = _look_at(run, root, quick=False)
        damaged = [each for each in checkpoints if each.damage]
        for each in damaged:
            print(f"{each.path}: {', '.join(each.damage)}")
        if damaged:
            raise W2SError(f"{len(damaged)} of {len(checkpoints)} checkpoints of {path} are damaged: see above")


def _look_at(run: str, root: str, *, quick: bool) -> "tuple[Path, list[Found]]":
    """Print a run's checkpoints; return its folder and them."""
    from w2s.checkpoint.find import find_run
    from w2s.checkpoint.own.upkeep import COLUMNS, look_at

    path = find_run(run, Path(root).expanduser())
    checkpoints = look_at(path, quick=quick)
    print_table(str(path), COLUMNS, [each.row() for each in checkpoints])
    return path, checkpoints


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

    The one that the run continues from stays, and what checkpoint.keep_at keeps for other runs.
    """
    with one_line(debug):
        from w2s.checkpoint.find import find_run
        from w2s.checkpoint.own.upkeep import prune

        path = find_run(run, Path(root).expanduser())
        removed = prune(path, keep)
        for each in removed:
            print(f"removed {each.path.name}: {each.state}")
        print(f"{sum(each.bytes for each in removed):,} bytes freed in {path}")
