"""Finding a checkpoint by what a user calls it: a path, a run's name, an MLflow run id, or `latest`."""

from collections.abc import Iterator
from pathlib import Path

from w2s.checkpoint.own.checkpoint_folders import all_of, checkpoints_of, latest, read_meta
from w2s.checkpoint.weights.tensor_files import SUFFIXES, holds_weights
from w2s.config.naming import run_folder
from w2s.config.sections import Config
from w2s.errors import CheckpointError
from w2s.files import read_json


def find(what: str, root: Path, *, key: str, stage: str) -> Path | None:
    """Return the checkpoint that `what` names.

    Args:
        what: a checkpoint's or a run's path, a run's name below `root`, an MLflow run id, other people's weights (a
            file, an index, or a folder of them), `latest` (the newest finished run of `stage`), or `none`.
        root: folder of the runs.
        key: the configuration key that holds `what`, for messages.
        stage: stage whose newest run `latest` means.

    Returns:
        The checkpoint's folder, or the path of other people's weights, or None for `none`.

    Raises:
        CheckpointError: nothing is found.
    """
    if what == "none":
        return None
    if what == "latest":
        return _newest_finished(root, key, stage)
    for path in (Path(what).expanduser(), root / what):
        if (path / "meta.json").is_file() or path.is_file() or holds_weights(path):
            return path
        if path.is_dir():
            return _latest_of(path, key)
    for run in _runs(root):
        if _mlflow_run_id(run) == what:
            return _latest_of(run, key)
    raise CheckpointError(
        f"{key}={what} is neither a path, nor a run below {root}, nor the MLflow run id of one: see `ls {root}`"
    )


def find_any(what: str, root: Path, *, key: str) -> Path:
    """Return the checkpoint that `what` names, as `find` does; `latest` is the newest finished clip run.

    Raises:
        CheckpointError: nothing is found.
    """
    checkpoint = find(what, root, key=key, stage="clip")
    if checkpoint is None:
        raise CheckpointError(f"{key}=none names nothing: give a path, a run's name, or an MLflow run id")
    return checkpoint


def find_run(what: str, root: Path) -> Path:
    """Return the run of that path, or of that name below `root`.

    Raises:
        CheckpointError: there is none, or it has no checkpoint.
    """
    for path in (Path(what).expanduser(), root / what):
        if all_of(path):
            return path
    raise CheckpointError(f"RUN={what} is not a run with a checkpoint, nor one below {root}: see `ls {root}`")


def is_finished(run: Path) -> bool:
    """Whether a run has come to its end. One whose result is damaged has not."""
    return _stage_of(run) is not None


def unfinished_folder(config: Config) -> Path:
    """Return the folder of the run of a configuration; for one without a name, of the first that is not finished."""
    first = folder = run_folder(config)
    count = 1
    while config.run.name == "auto" and is_finished(folder):
        count += 1
        folder = first.with_name(f"{first.name}-{count}")
    return folder


def _latest_of(run: Path, key: str) -> Path:
    newest = latest(run)
    if newest is None:
        raise CheckpointError(
            f"{key}={run} holds no checkpoint: there is no meta.json, no checkpoints/step-… and no file of weights "
            f"({', '.join(SUFFIXES)}); {_what_it_is(run)}"
        )
    return newest


def _what_it_is(folder: Path) -> str:
    """Say what a folder without a checkpoint looks like, and what to give instead."""
    runs = [path.parent.name for path in sorted(folder.glob("*/config.yaml"))]
    if runs:
        return f"it holds the runs {', '.join(runs[:3])}{', …' if runs[3:] else ''}: give {folder / runs[0]}"
    if (folder / "config.yaml").is_file():
        return "it is a run that has saved none: give one that has"
    if checkpoints_of(folder.parent) == folder and all_of(folder.parent):
        return f"it holds the checkpoints of a run: give {folder.parent}"
    names = sorted(path.name for path in folder.iterdir())
    holds = f"holds {', '.join(names[:3])}{', …' if names[3:] else ''}" if names else "is empty"
    return f"it {holds}: give a run, a checkpoint or a file"


def _newest_finished(root: Path, key: str, stage: str) -> Path:
    finished = [run for run in _runs(root) if _stage_of(run) == stage]
    if not finished:
        raise CheckpointError(
            f"{key}=latest: there is no finished {stage} run in {root}: run `w2s stage {stage}` first, "
            f"give a run, or start from scratch with {key}=none"
        )
    newest = max(finished, key=lambda run: (run / "result.json").stat().st_mtime_ns)
    return _latest_of(newest, key)


def _runs(root: Path) -> Iterator[Path]:
    """Yield the run folders below `root`: direct ones, and those of a `w2s run` one level down."""
    yield from (path.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for path in sorted(root.glob(pattern)))


def _stage_of(run: Path) -> str | None:
    """Return the stage of a finished run, by its result."""
    stage = read_json(run / "result.json").get("stage")
    return stage if isinstance(stage, str) else None


def _mlflow_run_id(run: Path) -> str | None:
    checkpoint = latest(run)
    try:
        return read_meta(checkpoint).mlflow_run_id if checkpoint else None
    except CheckpointError:  # the run that is looked for may be another one
        return None
