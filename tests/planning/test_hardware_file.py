"""The files of configs/hardware that the planner made: they load, are legal, and come out of it again."""

import shlex
from dataclasses import asdict, fields, replace
from importlib.resources import files
from itertools import pairwise

import pytest

from w2s.config.checks import check
from w2s.config.load import load
from w2s.config.sections import ParallelConfig
from w2s.planning.hardware_file import text
from w2s.planning.plan import find_plans
from w2s.planning.request import Request, request
from w2s.planning.time.cards import card

NAMES = ["h100", "h100_node", "h100_64", "h100_256", "h100_360"]
LAYOUT = {f"parallel.{field.name}" for field in fields(ParallelConfig)} | {"train.micro_batch"}


def content(name: str) -> str:
    return (files("w2s.configs") / "hardware" / f"{name}.yaml").read_text()


def made_by(name: str) -> Request:
    """The command in the file's second line."""
    words = shlex.split(content(name).splitlines()[1].removeprefix("#"))[2:]
    options = dict(pairwise(words))
    arguments = words[: words.index("--gpus")]
    batches = [size for option, size in pairwise(words) if option == "--batch"]
    return request(arguments, int(options["--gpus"]), options["--card"], batches)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", ["mim", "clip"])
def test_a_planned_file_can_be_run(name: str, stage: str) -> None:
    asked = made_by(name)
    overrides = [*asked.overrides, f"hardware={name}", "data=shards", "data.train=shards"]
    config = load(stage, overrides)
    assert (config.hardware.name, config.hardware.device, config.precision.compute) == (name, "cuda", "bf16")
    # There is no GPU here; all else is checked as on the cluster.
    here = replace(config, hardware=replace(config.hardware, device="cpu"))
    check(here, asked.gpus, min(8, asked.gpus))


@pytest.mark.parametrize("name", NAMES)
def test_a_planned_files_figures_are_those_of_its_layout(name: str) -> None:
    asked = made_by(name)
    plans = []
    for stage in asked.stages:
        layout = load(stage, [*asked.overrides, f"hardware={name}"])
        config = replace(asked.config(stage, asked.gpus), parallel=layout.parallel)
        config = replace(config, train=replace(config.train, micro_batch=layout.train.micro_batch))
        (plan,) = find_plans(config, card(asked.card), asked.gpus, LAYOUT, top=0).fastest
        assert asdict(plan.config.parallel) == asdict(layout.parallel)
        plans.append(plan)
    assert text(name, asked, plans) == content(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_planned_file_holds_the_fastest_layouts(name: str) -> None:
    asked = made_by(name)
    plans = [
        find_plans(asked.config(stage, asked.gpus), card(asked.card), asked.gpus, asked.fixed).fastest[0]
        for stage in asked.stages
    ]
    assert text(name, asked, plans) == content(name)
