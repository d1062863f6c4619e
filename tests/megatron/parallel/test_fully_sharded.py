"""Shares of weights, gradients and optimizer states on two ranks: what they hold, keep and give back."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.spawn import SHAPE, make_batch, make_student, run_split
from w2s.config.sections import OptimConfig, ParallelConfig
from w2s.megatron.checkpoint import state
from w2s.megatron.parallel.optimizer import Optimizer
from w2s.megatron.parallel.pipeline_schedule import forward_backward
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import ShardedTower, unsharded

FULL, OPTIMIZER = ParallelConfig(shard="full"), ParallelConfig()


def _train(tower: ShardedTower[Any], optimizer: Optimizer, batch: dict[str, Tensor], steps: int) -> list[float]:
    """Losses of some steps on a batch."""
    losses: list[float] = []
    places = batch["masks"].nonzero()[:, 1].view(len(batch["masks"]), -1)

    def forward(part: Any, micro: dict[str, Tensor]) -> Any:
        def loss(outputs: Any) -> Any:
            wanted = micro["targets"].gather(1, places[..., None].expand(-1, -1, micro["targets"].shape[-1]))
            patches, *_ = outputs
            value = (patches - wanted).square().mean()
            losses.append(value.item())
            return value, {}

        return part(micro["images"], micro["masks"], places), loss

    for _ in range(steps):
        optimizer.zero_grad()
        forward_backward(tower, [batch], forward, len(batch["images"]) * (1 + SHAPE.patches))
        optimizer.step(1.0)
    return losses


def _made(parallel: ParallelConfig) -> tuple[ShardedTower[Any], Optimizer]:
    tower = make_student(parallel)
    return tower, Optimizer({"vision": tower}, OptimConfig(lr=1e-3), torch.float32)


def _weights(tower: ShardedTower[Any]) -> dict[str, Tensor]:
    with unsharded([tower]):
        return {name: parameter.detach().clone() for name, parameter in tower.chunks[0].named_parameters()}


def _bytes_between_steps(ranks: Ranks) -> tuple[int, int, int]:
    """Weights, gradients, and moments with master weights; numbers of the model."""
    tower, optimizer = _made(FULL)
    _train(tower, optimizer, make_batch(ranks), 1)
    optimizer.sharded.copy_master_to_model()  # lets go of what is gathered for the next pass
    shares = [share for chunk in tower.wrapped for share in chunk.shares.values()]
    gathered = sum(parameter.untyped_storage().nbytes() for parameter in tower.chunks[0].parameters())
    return sum(s.weight.numel() for s in shares), gathered, sum(p.numel() for p in tower.chunks[0].parameters())


def test_a_rank_keeps_a_share_between_steps() -> None:
    (own, gathered, numbers), (others, *_) = run_split(_bytes_between_steps, 2)
    assert own + others == numbers
    assert gathered == 0
    assert own < 0.65 * numbers, "shares end at whole rows"


def _went_on(ranks: Ranks) -> tuple[list[float], list[float], bool]:
    tower, optimizer = _made(FULL)
    batch = make_batch(ranks)
    _train(tower, optimizer, batch, 2)
    kept = {name: tensor.clone() for name, tensor in state.own_tensors({"vision": tower}, optimizer, {}).items()}
    losses = _train(tower, optimizer, batch, 2)
    again, other = _made(FULL)
    state.restore(kept, {"vision": again}, other, 2)
    same = _train(again, other, batch, 2)
    one, two = _weights(tower), _weights(again)
    return losses, same, all(torch.equal(one[name], two[name]) for name in one)


def test_what_was_kept_in_memory_resumes_bit_for_bit() -> None:
    for losses, same, equal in run_split(_went_on, 2):
        assert losses == same and losses[0] != losses[1]
        assert equal


def _written(ranks: Ranks) -> tuple[list[float], list[float], bool]:
    """Losses after weights were written, by both kinds of data parallelism, and whether they are kept."""
    losses, kept = [], False
    for parallel in (FULL, OPTIMIZER):
        tower, optimizer = _made(parallel)
        with unsharded([tower]):
            with unsharded([tower]):  # as where a checkpoint is loaded while a stage begins
                for parameter in tower.chunks[0].parameters():
                    parameter.mul_(0.25)
            for parameter in tower.chunks[0].parameters():
                parameter.mul_(2)
        optimizer.copy_model_to_master()
        expected = {name: value / 2 for name, value in _weights(make_student()).items()}
        kept = all(torch.equal(value, expected[name]) for name, value in _weights(tower).items())
        losses.append(_train(tower, optimizer, make_batch(ranks), 3))
    return losses[0], losses[1], kept


def test_what_is_written_into_whole_weights_stays() -> None:
    for full, optimizer, kept in run_split(_written, 2):
        # Gradients are summed in another order: a few units of 6e-8 a step.
        assert full == pytest.approx(optimizer, rel=1e-6) and kept
