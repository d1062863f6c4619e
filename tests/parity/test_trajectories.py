"""Our stages against twenty training steps of the released EVA code: losses, norms, rates and final weights.

Every file of the folder W2S_TRAJECTORIES is followed, in one process and split over two; a stage is built from a file's
settings alone.
"""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.distributed import run_ranks
from tests.parity.trajectories import Reference, Trajectory, follow, join, options
from w2s.config.load import load

SHARED = Path(__file__).parents[3] / "shared" / "fixtures" / "trajectory"
FOLDER = Path(os.environ.get("W2S_TRAJECTORIES", SHARED))
FILES = sorted(FOLDER.glob("*.safetensors"))
REPETITIONS = 10
"""A file's noise is the largest of three repetitions with the samples in another order. Another layout, and another way
to write the same sum, is such a change at every layer."""
ROUNDING = 2.0**-24

# A folder that was named must hold some; the default one may be missing.
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir() and "W2S_TRAJECTORIES" not in os.environ, reason=f"there is no {FOLDER}"
)


def test_there_are_trajectories() -> None:
    assert FILES, f"no .safetensors in {FOLDER}"


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "data": (2, ["train.micro_batch=8"]),
    "TP2": (2, ["parallel.tensor=2"]),
    "PP2": (2, ["parallel.pipeline=2", "train.micro_batch=4"]),
}


@functools.cache
def everyone(layout: str) -> dict[Path, list[dict[str, Any]]]:
    """What the ranks of a layout have to say about every file that it can split."""
    count, changes = LAYOUTS[layout]
    paths = [path for path in FILES if not_split(path, layout) is None]
    ranks = run_ranks(follow_all, count, paths, changes)
    return {path: [rank[path] for rank in ranks] for path in paths}


def follow_all(paths: list[Path], changes: list[str]) -> dict[Path, dict[str, Any]]:
    return {path: follow(path, changes) for path in paths}


def not_split(path: Path, layout: str) -> str | None:
    """Why a layout cannot split the towers of a file."""
    reference = Reference.read(path)
    config = load(reference.stage, [*options(reference), *LAYOUTS[layout][1]])
    towers = {"vision": config.model.vision, "text": config.model.text}
    uneven = [
        f"the {tower} tower has {shape.heads} heads, which {config.parallel.tensor} ranks do not share"
        for tower, shape in towers.items()
        if shape.heads % config.parallel.tensor and (reference.stage == "clip" or tower == "vision")
    ]
    return uneven[0] if uneven else None


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] if ranks > 1 else []) for name, (ranks, _) in LAYOUTS.items()],
)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_released_trajectory(path: Path, layout: str) -> None:
    reason = not_split(path, layout)
    if reason:
        pytest.skip(reason)
    reference = Reference.read(path)
    ours, theirs = join(reference, everyone(layout)[path]), reference.run
    assert ours.decays == pytest.approx(theirs.decays, rel=1e-12)
    for step, rates in enumerate(theirs.rates):
        assert ours.rates[step] == pytest.approx(rates, rel=1e-12), f"rates of step {step}"
    loss = float((ours.losses - theirs.losses).abs().max())
    assert loss <= REPETITIONS * reference.loss_noise + 2e-5
    norm = float((ours.norms / theirs.norms - 1).abs().max())
    assert norm <= REPETITIONS * reference.norm_noise + 1e-4
    assert ours.weights.keys() == theirs.weights.keys()
    apart = {name: distance(reference, ours, name) for name in theirs.weights}
    beyond = {name: value for name, value in apart.items() if value > limit(reference, name)}
    assert not beyond, f"of their path apart: {beyond}"


def distance(reference: Reference, ours: Trajectory, name: str) -> float:
    """How far a final weight is from the released one, as a share of the path that it has gone."""
    theirs = reference.run.weights[name].double()
    return float((ours.weights[name].double() - theirs).norm()) / path_length(reference, name)


def path_length(reference: Reference, name: str) -> float:
    moved: Tensor = reference.run.weights[name].double() - reference.start[name].double()
    return float(moved.norm())


def limit(reference: Reference, name: str) -> float:
    """The file's own noise, and the rounding of the weight itself at every step (norms move little from 1)."""
    rounding = ROUNDING * float(reference.start[name].double().norm()) * len(reference.run.losses) ** 0.5
    return REPETITIONS * reference.noise[name] + 2e-5 + 3 * rounding / path_length(reference, name)
