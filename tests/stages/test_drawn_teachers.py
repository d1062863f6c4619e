"""Teachers of a part of the samples: the numbers of every layout, of an interrupted run, and what each rank does."""

from collections.abc import Mapping

import pytest

from tests.stages.conftest import Material
from tests.stages.layouts import Steps, run_alone, run_layouts
from tests.stages.test_layouts import PIPELINE, RELATIVE, TENSOR, relative_error
from w2s.config.load import load
from w2s.config.sections import ParallelConfig
from w2s.megatron import groups

STEPS = 3
ONE = ["teachers.draw=one", "teachers.vit.share=2"]
LAYERS = ["mim.layers=[{student: 1, teacher: 1}]", "mim.layers_weight=1"]
LAYOUTS = {
    "data": ["train.micro_batch=4"],
    "tensor": [TENSOR],
    "pipeline": [PIPELINE, "train.micro_batch=4"],
    "fully sharded": ["parallel.shard=full", "train.micro_batch=8"],
}


@pytest.fixture(scope="module")
def sources(material: Material) -> list[str]:
    """Two sources, of which the CLIP teaches the second alone."""
    halves = [f"{material.train}/00000{{{first}..{first + 3}}}.tar" for first in (0, 4)]
    mix = [f"data.train={'::'.join(halves)}", "data.weights=[0.6,0.4]", "data.lanes=4"]
    return [*mix, "teachers.clip.sources=[train-2]"]


@pytest.fixture(scope="module")
def variants(common: list[str], two: str, sources: list[str]) -> dict[str, list[str]]:
    return {
        "one": [*common, two, *ONE, *LAYERS],
        "sources": [*common, two, *sources],
        "one, sources": [*common, two, *sources, *ONE, "teachers.clip.target_norm=standardize"],
    }


@pytest.fixture(scope="module")
def alone(variants: dict[str, list[str]]) -> Mapping[str, Steps]:
    """All variants on one process in one micro-batch."""
    with groups.start(ParallelConfig(), load("mim", ["hardware=cpu"]).hardware) as ranks:
        return {name: run_alone(load("mim", options), ranks, STEPS) for name, options in variants.items()}


def test_layouts(alone: Mapping[str, Steps], variants: dict[str, list[str]]) -> None:
    cases = {
        f"{name}/{layout}": ("mim", [*options, *changes])
        for name, options in variants.items()
        for layout, changes in LAYOUTS.items()
        if not (layout == "fully sharded" and any("mim.layers=" in o for o in options))
    }
    for name, steps in run_layouts(2, cases, STEPS).items():
        whole = alone[name.partition("/")[0]]
        print(name, steps.losses, whole.losses, relative_error(steps.gradients, whole.gradients), steps.teacher_images)
