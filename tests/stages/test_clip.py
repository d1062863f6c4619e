"""The contrastive stage: logit scale, learning rates."""

import math

import pytest

from tests.stages.runs import QUIET, history, run_stage
from w2s.checkpoint.own.checkpoint_folders import latest
from w2s.config.load import load
from w2s.megatron.checkpoint.tensor_store import TensorStore
from w2s.megatron.parallel.process_groups import Ranks
from w2s.stages.clip import ContrastiveStage


@pytest.fixture(scope="module")
def options(base: list[str]) -> list[str]:
    return [*base, *QUIET, "init.vision=none"]


def test_the_logit_scale_never_exceeds_its_maximum(options: list[str]) -> None:
    # A step of 1 in the logarithm would carry the scale to e times its value.
    steep = ["optim.lr=1", "optim.vision_lr=1e-9", "optim.text_lr=1e-9", "optim.name=adamw", "clip.logit_scale_max=20"]
    run = run_stage("clip", [*options, *steep, "run.name=steep", "clip.logit_scale=5"])
    scales = history(run, "logit_scale")
    assert scales[0] == pytest.approx(5)
    assert min(scales[1:]) >= 1 - 1e-6
    assert max(scales) <= 20 * (1 + 1e-6)  # float32 of exp(log(20))
    assert any(math.isclose(scale, bound, rel_tol=1e-6) for scale in scales[1:] for bound in (1, 20)), scales


def test_a_fixed_logit_scale_stays_put(options: list[str]) -> None:
    fixed = ["clip.learn_logit_scale=false", "clip.logit_scale=100", "optim.lr=0.1", "optim.vision_lr=1e-3"]
    run = run_stage("clip", [*options, *fixed, "run.name=fixed"])
    scales = history(run, "logit_scale")
    assert len(set(scales)) == 1
    assert scales[0] == pytest.approx(100)
    # What is not trained is in the checkpoint all the same: evaluation, export and a run that continues need it.
    assert float(TensorStore(latest(run)).read("text.logit_scale")) == pytest.approx(math.log(100))


def test_learning_rates_of_towers_and_layers_reach_the_optimizer(alone: Ranks, options: list[str]) -> None:
    rates = ["optim.lr=5e-4", "optim.vision_lr=4e-4", "optim.text_lr=4e-5"]
    decays = ["optim.vision_layer_decay=0.9", "optim.text_layer_decay=0.75"]
    stage = ContrastiveStage(load("clip", [*options, *rates, *decays]), alone)
    # Two layers: embeddings, two layers, norm and head.
    expected = {4e-4 * 0.9**k for k in range(4)} | {4e-5 * 0.75**k for k in range(4)} | {5e-4}
    groups = stage.optimizer.sharded.param_groups
    assert sorted({group["peak_lr"] for group in groups}) == pytest.approx(sorted(expected))
    stage.optimizer.zero_grad()
    stage.optimizer.step(0.5)
    assert sorted({group["lr"] for group in groups}) == pytest.approx([rate / 2 for rate in sorted(expected)])


def test_a_random_text_tower_at_a_rate_for_a_finished_one_is_a_warning(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage("clip", [*options, "optim.vision_lr=1e-3", "optim.text_lr=1e-4", "run.name=warned", "train.steps=2"])
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: the text tower starts from random weights at optim.text_lr=0.0001, ")
