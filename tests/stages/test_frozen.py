"""A tower, or its lowest layers, that does not move in the first steps."""

import pytest
import torch
from torch import Tensor

from tests.stages.layout_steps import Steps, run_layouts
from tests.stages.runs import QUIET, history, run_stage

STEPS, FROZEN = 5, 3
RELATIVE = 1e-5
"""As in test_layouts.py."""
VISION = [f"optim.vision_frozen_steps={FROZEN}"]
LOWEST = [f"optim.text_frozen_steps={FROZEN}", "optim.text_frozen_layers=1"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]


@pytest.fixture(scope="module")
def common(tiny: list[str]) -> list[str]:
    return [
        *tiny,
        "train.steps=20",
        "clip.patch_dropout=0.5",
        "optim.lr=1e-3",
        "optim.warmup=1",
        "optim.weight_decay=0.1",
        # As in test_sharded_lamb_is_lamb: gradients that are rounding error stay small.
        "optim.eps=1e-2",
        "optim.clip_grad=0.1",
    ]


def moved(before: Steps, after: Steps) -> set[str]:
    return {name for name, weight in after.weights.items() if not torch.equal(weight, before.weights[name])}


def lowest_of_text(name: str) -> bool:
    return name.startswith(("text.token_embedding", "text.positional_embedding", "text.blocks.0."))


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("lamb", marks=pytest.mark.slow)])
def test_what_is_frozen_does_not_move_by_a_bit(common: list[str], optimizer: str) -> None:
    case = ("clip", [*common, f"optim.name={optimizer}", *VISION, *LOWEST])
    start, still, later = (run_layouts(1, {"one": case}, steps)["one"] for steps in (0, FROZEN, FROZEN + 1))
    free = {name for name in start.weights if not name.startswith("vision.") and not lowest_of_text(name)}
    assert moved(start, still) == free
    assert moved(still, later) == set(start.weights)


def relative_error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    assert ours.keys() == reference.keys()
    return max(float((ours[n] - x).abs().max() / x.abs().max().clamp_min(1e-30)) for n, x in reference.items())


@pytest.mark.slow
def test_every_layout_freezes_alike(common: list[str]) -> None:
    options = [*common, "optim.name=lamb", *VISION, *LOWEST]
    alone, free = run_layouts(
        1, {"one": ("clip", options), "free": ("clip", [*common, "optim.name=lamb"])}, STEPS
    ).values()
    layouts = {
        "data, overlapped": ["train.micro_batch=4", *OVERLAP],
        "tensor": ["parallel.tensor=2"],
        "pipeline": ["parallel.pipeline=2", "train.micro_batch=8"],
    }
    split = run_layouts(2, {name: ("clip", [*options, *changes]) for name, changes in layouts.items()}, STEPS)
    for name, steps in split.items():
        assert steps.losses == pytest.approx(alone.losses, rel=RELATIVE), name
        assert relative_error(steps.weights, alone.weights) < RELATIVE, name
    assert relative_error(free.weights, alone.weights) > 1e2 * RELATIVE


@pytest.mark.slow
def test_a_run_resumes_across_the_end_of_freezing(base: list[str]) -> None:
    """Bit for bit, and with the frozen weights' own moments; the norm is that of what moves."""
    options = [*base, *QUIET, "init.vision=none", "optim.name=lamb", "optim.schedule=constant", "optim.cooldown=0"]
    options += ["train.steps=6", "checkpoint.keep_at=[2]"]
    whole = run_stage("clip", [*options, *VISION, *LOWEST, "run.name=frozen"])
    begun = f"init.checkpoint={whole}/checkpoints/step-00000002"
    part = run_stage("clip", [*options, *VISION, *LOWEST, begun, "run.name=frozen-on"])
    for name in ("loss", "grad_norm", "lr"):
        assert history(part, name) == history(whole, name)[2:], name
    free = run_stage("clip", [*options, "run.name=free"])
    assert history(whole, "grad_norm")[0] < history(free, "grad_norm")[0]
    thawed = run_stage("clip", [*options, begun, "run.name=thawed"])
    assert history(thawed, "loss")[0] == history(whole, "loss")[2]
    assert history(thawed, "loss")[1:] != history(whole, "loss")[3:], "this run freezes nothing"
