"""Which weights of a contrastive stage LAMB rescales: those of a tower from scratch have to leave zero."""

import pytest
import torch
from torch import Tensor

from tests.stages.layout_steps import STAGES, Steps, run_alone
from w2s.config.load import load
from w2s.megatron.parallel.process_groups import Ranks

STEPS = 12


@pytest.fixture
def start(tiny: list[str]) -> list[str]:
    return [*tiny, "train.steps=100", "optim.lr=1e-2", "optim.warmup=4"]


def weights(ranks: Ranks, overrides: list[str]) -> dict[str, Tensor]:
    steps: Steps = run_alone(load("clip", overrides), ranks, STEPS)
    return steps.weights


def started_from_zero(ranks: Ranks, overrides: list[str]) -> set[str]:
    stage = STAGES["clip"](load("clip", overrides), ranks)
    towers = {name: dict(sharded.chunks[0].named_parameters()) for name, sharded in stage.towers.items()}
    # Without K's bias, whose gradient is rounding noise.
    return {
        f"{tower}.{name}".replace("blocks.layers.", "blocks.")
        for tower, parameters in towers.items()
        for name, weight in parameters.items()
        if not weight.any() and "qkv" not in name
    }


def size(found: dict[str, Tensor], names: set[str]) -> float:
    return float(torch.cat([found[name].flatten() for name in names]).square().mean().sqrt())


def test_biases_from_scratch_grow_as_adamws_do(alone: Ranks, start: list[str]) -> None:
    zeros = started_from_zero(alone, start)
    assert {name.partition(".")[0] for name in zeros} == {"vision", "text"}
    adamw = size(weights(alone, [*start, "optim.name=adamw"]), zeros)
    # Both take steps of about the rate, 0.25 to 1 times 1e-2, along gradients that differ more and more.
    assert size(weights(alone, start), zeros) == pytest.approx(adamw, rel=0.5)
    # With the ratio they stay where the first step, at a quarter of the rate, has put them.
    assert size(weights(alone, [*start, "optim.trust_1d=always"]), zeros) < 0.1 * adamw
