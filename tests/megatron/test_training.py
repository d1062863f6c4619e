"""The distributed optimizer, the schedules, save and load: however the work is split, the numbers are the same."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.spawn import SHAPE, make_batch, make_student, run_split
from w2s.config.sections import OptimConfig
from w2s.errors import CheckpointError, W2SError
from w2s.megatron.checkpoint import state
from w2s.megatron.parallel.optimizer import Optimizer
from w2s.megatron.parallel.pipeline_schedule import Loss, Metrics, forward_backward, forward_only
from w2s.megatron.parallel.process_groups import Ranks
from w2s.objectives.masked_loss import masked_cosine_loss
from w2s.towers.masked_student import MaskedStudent, gather_patches, masked_patch_indices

RELATIVE = 1e-5
"""Float32 sums in another order: 1e-7 a sum, grown over five steps of an optimizer that divides by small roots."""


class Run:
    """A student in training on the same global batch, split over ranks and micro-batches."""

    def __init__(self, ranks: Ranks, optim: OptimConfig, dtype: torch.dtype = torch.float32) -> None:
        self.ranks = ranks
        self.student = make_student(dtype=dtype)
        (self.tower,) = self.student.chunks
        self.optimizer = Optimizer({"vision": self.student}, optim, dtype)
        self.batch = make_batch(ranks)

    def step(self, micro_batches: int = 1) -> tuple[float, float]:
        """Return the loss over the global batch and the gradient norm."""
        parts = [
            dict(zip(self.batch, values, strict=True))
            for values in zip(*(tensor.chunk(micro_batches) for tensor in self.batch.values()), strict=True)
        ]
        self.optimizer.zero_grad()
        rows = len(parts[0]["images"]) * (1 + SHAPE.patches)
        reports = forward_backward(self.student, parts, masked_forward, rows)
        loss = torch.stack([report["loss"] for report in reports]).mean()
        norm = self.optimizer.step(1.0)
        torch.distributed.all_reduce(loss, group=self.ranks.data_group)
        return float(loss) / self.ranks.data_size, float(norm)

    def steps(self, count: int, micro_batches: int = 1) -> list[tuple[float, float]]:
        return [self.step(micro_batches) for _ in range(count)]

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.tower.named_parameters()}


def masked_forward(student: MaskedStudent, part: dict[str, Tensor]) -> tuple[Any, Loss]:
    places = masked_patch_indices(part["masks"], int(part["masks"][0].sum()))

    def loss(predictions: tuple[Tensor, ...]) -> tuple[Tensor, Metrics]:
        value = masked_cosine_loss(predictions[0], gather_patches(part["targets"], places))
        return value, {"loss": value.detach()}

    return student(part["images"], part["masks"], places), loss


def optim(name: str, **changes: Any) -> OptimConfig:
    return OptimConfig(name=name, lr=1e-2, clip_grad=0.1, **changes)  # type: ignore[arg-type]


def train(
    ranks: Ranks, config: OptimConfig, micro_batches: int = 1
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    run = Run(ranks, config)
    return run.steps(5, micro_batches), run.weights()


def assert_same(ours: tuple[Any, dict[str, Tensor]], theirs: tuple[Any, dict[str, Tensor]]) -> None:
    assert torch.tensor(ours[0]).allclose(torch.tensor(theirs[0]), rtol=RELATIVE), (ours[0], theirs[0])
    for name, value in theirs[1].items():
        # Adam's first steps are sign-like: where a gradient is rounding noise, a weight may differ by a part of lr.
        torch.testing.assert_close(ours[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_two_data_parallel_ranks_train_as_one(alone: Ranks, name: str) -> None:
    one = train(alone, optim(name))
    first, second = run_split(train, 2, optim(name))
    assert_same(first, one)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])


def test_accumulation_is_one_batch(alone: Ranks) -> None:
    assert_same(train(alone, optim("adamw"), micro_batches=4), train(alone, optim("adamw")))


def test_training_lowers_the_loss(alone: Ranks) -> None:
    losses, _ = train(alone, optim("lamb"))
    assert losses[-1][0] < losses[0][0] - 0.02


def test_clipping_bounds_the_update(alone: Ranks) -> None:
    config = OptimConfig(lr=1e-2, clip_grad=0.0)
    unclipped, clipped = Run(alone, config), Run(alone, OptimConfig(lr=1e-2, clip_grad=1e-9))
    assert unclipped.step()[1] == pytest.approx(clipped.step()[1]), "the norm is measured before clipping, also without"
    change = [
        (run.tower.lm_head.weight - make_student().chunks[0].lm_head.weight).abs().max() for run in (unclipped, clipped)
    ]
    # At a norm of 1e-9 the gradients vanish beside Adam's eps of 1e-6; what is left is the weight decay.
    assert change[0] > 0.5e-2
    assert change[1] < 1e-4


def test_forward_only_gives_outputs_and_no_gradients(alone: Ranks) -> None:
    run = Run(alone, optim("adamw"))
    run.optimizer.zero_grad()

    def predict(student: MaskedStudent, images: Tensor) -> Tensor:
        places = torch.tensor([3, 9]).expand(len(images), -1)
        return student.predict(images, torch.zeros(len(images), 16, dtype=torch.bool), places)

    outputs = forward_only(run.student, list(run.batch["images"].split(4)), predict, 4 * (1 + SHAPE.patches))
    torch.testing.assert_close(torch.cat(outputs), predict(run.tower, run.batch["images"]))
    assert not any(output.requires_grad for output in outputs)
    assert all(float(parameter.main_grad.abs().max()) == 0 for parameter in run.tower.parameters())


def resumed(ranks: Ranks, folder: Path, config: OptimConfig) -> list[tuple[float, float]]:
    run = Run(ranks, config)
    extra = state.load(folder, {"vision": run.student}, run.optimizer, step=3)
    assert extra["statistics"].tolist() == [1.0, 2.0]
    return run.steps(3)


def interrupted(ranks: Ranks, folder: Path, config: OptimConfig) -> list[tuple[float, float]]:
    run = Run(ranks, config)
    run.steps(3)
    state.save(folder, {"vision": run.student}, run.optimizer, {"statistics": torch.tensor([1.0, 2.0])}).finish()
    return run.steps(3)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_resume_is_bit_exact(alone: Ranks, tmp_path: Path, name: str) -> None:
    assert interrupted(alone, tmp_path, optim(name)) == resumed(alone, tmp_path, optim(name))


def test_a_checkpoint_of_one_rank_resumes_with_two(alone: Ranks, tmp_path: Path) -> None:
    expected = interrupted(alone, tmp_path, optim("lamb"))
    for rank in run_split(resumed, 2, tmp_path, optim("lamb")):
        assert torch.tensor(rank).allclose(torch.tensor(expected), rtol=RELATIVE)


def test_a_background_write_holds_the_moment_it_began(alone: Ranks, tmp_path: Path) -> None:
    run = Run(alone, optim("adamw"))
    run.steps(3)
    writing = state.save(
        tmp_path, {"vision": run.student}, run.optimizer, {"statistics": torch.tensor([1.0, 2.0])}, True
    )
    after = run.steps(3)
    writing.finish()
    assert writing.written
    assert resumed(alone, tmp_path, optim("adamw")) == after


def test_a_background_write_that_fails_is_one_line(alone: Ranks, tmp_path: Path) -> None:
    run = Run(alone, optim("adamw"))
    run.step()
    (tmp_path / "__0_0.distcp").mkdir()  # where the first file should go
    writing = state.save(tmp_path, {"vision": run.student}, run.optimizer, {}, background=True)
    with pytest.raises(CheckpointError, match=rf"^cannot write {tmp_path} .*(Is a directory|IsADirectoryError)"):
        writing.finish()


def test_a_background_write_whose_process_is_killed_is_one_line(alone: Ranks, tmp_path: Path) -> None:
    run = Run(alone, optim("adamw"))
    run.step()
    file = tmp_path / "__0_0.distcp"
    os.mkfifo(file)  # the writer waits for a reader
    before = set(multiprocessing.active_children())
    writing = state.save(tmp_path, {"vision": run.student}, run.optimizer, {}, background=True)
    (process,) = set(multiprocessing.active_children()) - before
    process.kill()
    with pytest.raises(W2SError, match=rf"^the process that wrote {tmp_path} .* was killed by SIGKILL") as caught:
        writing.finish()
    assert "\n" not in str(caught.value)
    os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))  # what the writer has started ends


def test_names_and_shapes_in_a_checkpoint(alone: Ranks, tmp_path: Path) -> None:
    run = Run(alone, optim("adamw"))
    run.step()
    state.save(tmp_path, {"vision": run.student}, run.optimizer, {}).finish()
    shapes = state.saved_shapes(tmp_path)
    assert shapes == state.tower_shapes({"vision": run.student})
    assert shapes["vision.blocks.layers.1.mlp.linear_fc1.weight"] == (64, 32)


def test_bfloat16_keeps_float32_master_weights(alone: Ranks) -> None:
    run = Run(alone, OptimConfig(lr=1e-5, weight_decay=0.0), torch.bfloat16)
    before = run.weights()["patch_embed.weight"]
    run.steps(20)
    (masters,) = [
        value
        for group in run.optimizer.sharded.shard_fp32_from_float16_groups
        for value in group
        if value is not None and value.numel() == before.numel()
    ][:1]
    # Twenty steps of 1e-5 are far below bfloat16's spacing for many weights, yet none of them is lost.
    moved = (masters.float().flatten() - before.float().flatten()).abs()
    assert masters.dtype == torch.float32
    assert float(moved.median()) == pytest.approx(20e-5, rel=0.5)
