"""The first steps of a stage on local ranks that share the work in any layout: losses, gradients, weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import means, run_ranks
from tests.megatron.pieces import Pieces, axis_of, join_pieces
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.data.stream.stream import Stream
from w2s.megatron.cpu import without_function_mode
from w2s.megatron.model.initialize import global_name
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.fully_sharded import Share
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import unsharded
from w2s.optim.lr_schedule import lr_factor
from w2s.stages.clip import ContrastiveStage
from w2s.stages.mim import MaskedStage

STAGES = {"mim": MaskedStage, "clip": ContrastiveStage}


@dataclass
class Steps:
    """What the first steps of a stage gave."""

    losses: list[float]
    """Loss of every step."""
    distances: list[float]
    """Loss of distillation in the steps that had a teacher beside the contrastive loss."""
    gradients: dict[str, Tensor]
    """Whole gradients of the first step, by tower and global name."""
    weights: dict[str, Tensor]
    """Whole weights after the last step."""
    teacher_images: float
    """Images that the teacher of a rank has seen in a step."""
    reports: list[dict[str, float]]
    """All that the stage reports of every step."""
    extra: dict[str, Tensor]
    """The stage's own state after the last step."""


def run_layouts(world_size: int, cases: dict[str, tuple[str, Sequence[str]]], steps: int) -> dict[str, Steps]:
    """Run each case (stage, overrides) on the same `world_size` ranks, one after the other."""
    configs = {name: load(stage, overrides) for name, (stage, overrides) in cases.items()}
    everyone = run_ranks(_all_cases, world_size, configs, steps)
    return {name: _join([results[name] for results in everyone]) for name in cases}


def run_alone(config: Config, ranks: Ranks, steps: int) -> Steps:
    """Run a case in this process."""
    return _join([_steps(config, ranks, steps)])


def _all_cases(configs: dict[str, Config], steps: int) -> dict[str, dict[str, Any]]:
    results = {}
    for name, config in configs.items():
        with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
            results[name] = _steps(config, ranks, steps)
    return results


def _steps(config: Config, ranks: Ranks, steps: int) -> dict[str, Any]:
    stage = STAGES[config.stage](config, ranks)
    stream = Stream(
        config.data,
        stage.spec,
        global_batch=config.train.global_batch,
        seed=config.run.seed,
        rank=ranks.data_reader_rank,
        size=ranks.world_size,
    )
    logs, gradients = [], {}
    for step in range(steps):
        stage.optimizer.zero_grad()
        with without_function_mode():
            logs.append(means(ranks, stage.step(stream.next())))
        if step == 0:
            gradients = _gradients(stage, ranks)
        with without_function_mode():
            stage.optimizer.step(lr_factor(step, config.train.steps, config.optim))
    stage.optimizer.gather_weights()
    with unsharded(stage.towers.values()):
        weights = _pieces(stage, lambda parameter: parameter.detach().clone())
    return {"logs": logs, "gradients": gradients, "weights": weights, "extra": stage.extra_state()}


def _gradients(stage: Any, ranks: Ranks) -> Pieces:
    """Every data-parallel rank has reduced its slices of the buffers alone: join them first."""
    if ranks.data_size > 1 and stage.config.parallel.shard == "full":
        shares = {p: share for tower in stage.towers.values() for c in tower.wrapped for p, share in c.shares.items()}
        return _pieces(stage, lambda parameter: _joined(parameter, shares[parameter], ranks))
    for tower in stage.towers.values():
        for buffer in (buffer for chunk in tower.wrapped for buffer in chunk.buffers):
            for bucket in buffer.buckets:
                local = bucket.grad_data.chunk(ranks.data_size)[ranks.data_rank].clone()
                dist.all_gather_into_tensor(bucket.grad_data, local, group=ranks.data_group)
    return _pieces(stage, lambda parameter: parameter.main_grad.clone())


def _joined(parameter: Tensor, share: Share, ranks: Ranks) -> Tensor:
    whole = torch.zeros(parameter.shape).flatten()
    whole[share.begin :][: share.gradient.numel()] = share.gradient
    dist.all_reduce(whole, group=ranks.data_group)
    return whole.view(parameter.shape)


def _pieces(stage: Any, take: Any) -> Pieces:
    return {
        f"{tower_name}.{global_name(part, name)}": (
            take(parameter),
            axis_of(parameter),
        )
        for tower_name, tower in stage.towers.items()
        for part in tower.chunks
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    }


def _join(everyone: list[dict[str, Any]]) -> Steps:
    logs = everyone[0]["logs"]
    assert all(each["logs"] == logs for each in everyone), "every rank logs the same"
    return Steps(
        losses=[log["loss"] for log in logs],
        distances=[log["distill_loss"] for log in logs if "distill_loss" in log],
        gradients=join_pieces([each["gradients"] for each in everyone]),
        weights=join_pieces([each["weights"] for each in everyone]),
        teacher_images=(logs or [{}])[0].get("teacher_images_per_rank", 0.0),
        reports=logs,
        extra=everyone[0]["extra"],
    )
