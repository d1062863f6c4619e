"""However a global batch is split over ranks, micro-batches and passes, the numbers are the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from w2s.config.load import load
from w2s.config.sections import Config
from w2s.data.samples.batch import require
from w2s.data.stream.stream import Stream
from w2s.megatron.parallel.process_groups import Ranks
from w2s.stages.clip import ContrastiveStage, encode_image, encode_text

TOLERANCE = 1e-6
"""Relative and absolute, of losses between 0.1 and 4 in float32 (a unit is 2.4e-7 at 4) summed in another order."""
GRADIENT = 1e-5
"""Of a gradient beside the largest of its tensor, for the same reason."""


def clip_step(config: Config, ranks: Ranks) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of the first step."""
    stage = ContrastiveStage(config, ranks)
    stream = Stream(config.data, stage.spec, global_batch=16, seed=0, rank=0, size=1)
    stage.optimizer.zero_grad()
    loss = stage.step(stream.next())["loss"].item()
    gradients = {
        f"{name}.{key}": parameter.main_grad.clone()
        for name, tower in stage.towers.items()
        for part in tower.chunks
        for key, parameter in part.named_parameters()
    }
    return loss, gradients


@pytest.mark.parametrize("split", [["clip.two_pass=always"], ["train.micro_batch=4"], ["clip.tile=5"]])
@pytest.mark.parametrize("dropout", ["0.5", "0"])
def test_two_passes_give_the_gradients_of_one(alone: Ranks, base: list[str], split: list[str], dropout: str) -> None:
    options = [*base, "init.vision=none", f"clip.patch_dropout={dropout}"]
    loss, gradients = clip_step(load("clip", options), alone)
    again, others = clip_step(load("clip", [*options, *split]), alone)
    assert again == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        assert (others[name] - gradient).abs().max().item() <= GRADIENT * scale, name


@pytest.mark.parametrize(
    "split", [["clip.tile=5"], ["clip.tile=5", "train.micro_batch=4"]], ids=["direct", "two passes"]
)
def test_a_step_is_the_naive_loss_in_float64(alone: Ranks, base: list[str], split: list[str]) -> None:
    """Loss and gradients of both towers, with patch dropout and a last tile that is not whole."""
    options = [*base, "init.vision=none", "clip.patch_dropout=0.5", "clip.equal_captions=negatives"]
    loss, gradients = clip_step(load("clip", [*options, *split]), alone)

    stage = ContrastiveStage(config := load("clip", options), alone)
    batch = Stream(config.data, stage.spec, global_batch=16, seed=0, rank=0, size=1).next()
    stage.optimizer.zero_grad()
    (vision,), (text,) = stage.vision.chunks, stage.text.chunks
    images, texts = (F.normalize(x.double(), dim=-1) for x in (encode_image(vision, batch), encode_text(text, batch)))
    logits, labels = text.logit_scale.double().exp() * images @ texts.T, torch.arange(16)
    naive = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    naive.backward()

    assert loss == pytest.approx(naive.item(), rel=TOLERANCE)
    for name, part in (("vision", vision), ("text", text)):
        for key, parameter in part.named_parameters():
            expected = parameter.main_grad
            error = (gradients[f"{name}.{key}"] - expected).abs().max().item()
            assert error <= GRADIENT * expected.abs().max().item(), key


def test_patch_dropout_changes_the_loss(alone: Ranks, base: list[str]) -> None:
    options = [*base, "init.vision=none"]
    losses = [clip_step(load("clip", [*options, f"clip.patch_dropout={p}"]), alone)[0] for p in (0, 0.5)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_repeated_captions_are_positives_or_negatives(alone: Ranks, base: list[str]) -> None:
    options = [*base, "init.vision=none"]
    config = load("clip", options)
    stream = Stream(config.data, ContrastiveStage(config, alone).spec, global_batch=16, seed=0, rank=0, size=1)
    assert len(require(stream.next().caption_hashes).unique()) < 16, "captions repeat in this batch"
    positives, _ = clip_step(load("clip", [*options, "clip.equal_captions=positives"]), alone)
    negatives, _ = clip_step(load("clip", [*options, "clip.equal_captions=negatives"]), alone)
    assert positives < negatives - 0.05, "captions that repeat are not to be told apart"
