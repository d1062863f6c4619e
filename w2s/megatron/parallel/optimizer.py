"""Megatron's distributed optimizer around AdamW or LAMB, for towers split in any way."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import OptimizerConfig
from torch import Tensor
from torch.nn.utils import get_total_norm

from w2s.config.sections import OptimConfig
from w2s.megatron import compat
from w2s.megatron.model.initialize import global_name
from w2s.megatron.parallel.fully_sharded import FullySharded
from w2s.megatron.parallel.fully_sharded_optimizer import FullyShardedOptimizer
from w2s.megatron.parallel.gradients import clip_or_skip
from w2s.megatron.parallel.process_groups import gather
from w2s.megatron.parallel.shard_boxes import joined, optimizer_boxes
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.optim.average import WeightAverage
from w2s.optim.guard import StepGuard
from w2s.optim.lamb import Lamb
from w2s.optim.parameter_groups import has_trust_ratio, parameter_groups

Towers = Mapping[str, ShardedTower[Any]]
"""Towers by name (`vision`, `text`)."""


class Optimizer:
    """AdamW or LAMB with float32 master weights, sharded over the data-parallel group.

    Args:
        towers: the towers, wrapped for data parallelism.
        config: the optimizer's settings.
        dtype: type of the weights.
        scratch: names of the towers that start from scratch.
        bounds: least and largest value that parameters may have after an update, by global name.

    Attributes:
        guard: what judges the steps, and counts those that were skipped.
        average: the moving average of the weights, sharded as the master weights are; None without `ema`.
    """

    def __init__(
        self,
        towers: Towers,
        config: OptimConfig,
        dtype: torch.dtype,
        scratch: Collection[str] = (),
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        wrapped = [chunk for tower in towers.values() for chunk in tower.wrapped]
        self.wrapped = [chunk for chunk in wrapped if isinstance(chunk, (DistributedDataParallel, FullySharded))]
        parameters = _named_parameters(towers)
        groups = parameter_groups(parameters, config, _union_over_stages)
        for group in groups:
            # Megatron tells the groups of a checkpoint apart by these.
            group.update(
                lr=group["peak_lr"],
                frozen=False,
                lr_mult=group["peak_lr"],
                wd_mult=float(group["weight_decay"] > 0),
                max_lr=group["peak_lr"],
                min_lr=0.0,
                is_expert_parallel=False,
                is_decoupled_lr=group["scalars"],
                default_config=True,
            )
        lamb, adamw = partial(Lamb, trust_ratio=config.trust_ratio), partial(torch.optim.AdamW, fused=True)
        kind = lamb if config.name == "lamb" else adamw
        self.updates = 0
        base_optimizer = kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        self.guard = StepGuard(config.spike_window, config.spike_deviations, parameters[0][-1].device)
        self.sharded = _shard_optimizer(base_optimizer, self.wrapped, config, dtype, self.guard)
        self._settings = [{key: group[key] for key in group if key != "params"} for group in self.sharded.param_groups]
        slices = self.sharded.slices()
        if isinstance(base_optimizer, Lamb):
            exempt = {p for tower, _, _, p in parameters if not has_trust_ratio(tower, p, config.trust_1d, scratch)}
            _configure_lamb(base_optimizer, slices, [parameter for *_, parameter in parameters], exempt)
        limits = {
            slices[p]: (bounds or {})[name] for _, name, _, p in parameters if name in (bounds or {}) and p in slices
        }
        base_optimizer.register_step_post_hook(lambda *_: _clamp(limits))
        self.average = average = WeightAverage(base_optimizer, config.ema) if config.ema else None
        if average is not None:
            base_optimizer.register_step_post_hook(lambda *_: average.update())

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.sharded.zero_grad()

    def step(self, lr_factor: float, loss: Tensor | None = None) -> Tensor:
        """Clip, update and gather the weights; nothing is read back from a GPU.

        A step that the guard does not take leaves weights and moments as they were, on all ranks. What is frozen has a
        rate of 0 and no part in the norm; its moments follow its gradients, so that its first step is not cold.

        Args:
            lr_factor: fraction of the peak learning rates.
            loss: the loss, on the ranks that have it: where it is not a number, neither is the norm.

        Returns:
            The global gradient norm before clipping, a scalar.
        """
        for group in self.sharded.param_groups:
            group["frozen"] = self.updates < group["frozen_steps"]
            group["lr"] = 0.0 if group["frozen"] else group["peak_lr"] * lr_factor
        self.updates += 1
        self.sharded.loss = loss
        _, grad_norm, _ = self.sharded.step()
        return grad_norm

    def local_norm(self) -> Tensor:
        """Norm of the gradients that this rank has accumulated, where they have not been reduced: a scalar."""
        return get_total_norm([buffer.grad_data for chunk in self.wrapped for buffer in chunk.buffers])

    @property
    def highest_lr(self) -> float:
        """The highest learning rate of all groups in the last step: that of a tower's head."""
        return max(float(group["lr"]) for group in self.sharded.param_groups)

    def gather_weights(self) -> None:
        """All-gather the weights where the last step left that to the next training pass."""
        for chunk in self.wrapped:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def prepare_to_load(self) -> None:
        """Make the moments of every slice, so that a checkpoint has a place to go to before the first step."""
        _zero_moments(self.sharded.optimizer)

    def load(self, saved: dict[str, Any], step: int) -> None:
        """Load moments and master weights as they were after `step` steps, of which the guard knows those skipped.

        Rates, decays and betas stay this run's own, which may continue from a run that had different ones.
        """
        saved["optimizer"]["param_groups"] = [{**settings, "step": step} for settings in self._settings]
        self.sharded.load_state_dict(saved)
        for group, settings in zip(self.sharded.param_groups, self._settings, strict=True):
            group.update(settings)  # Megatron tells groups apart by some settings alone, and mixes up the rest
        self.resume_at(step)

    def slices(self) -> dict[str, Tensor]:
        """Master weights and moments of this rank's share, by their place: the tensors themselves."""
        self.prepare_to_load()
        base_optimizer = self.sharded.optimizer
        slices: dict[str, Tensor] = {}
        for index, group in enumerate(base_optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                moments = {name: base_optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")}
                parts = {"weight": parameter.data, **moments}
                slices |= {f"{index}.{place}.{name}": part for name, part in parts.items()}
        return slices

    def resume_at(self, step: int) -> None:
        """Count from `step` on, of which the guard knows those skipped."""
        self.updates = step
        self._set_step(step - int(self.guard.skipped))

    def clear_skipped(self) -> None:
        """Forget the last step, which was skipped: it is taken again."""
        self.updates -= 1
        self.guard.clear_skipped()

    def _set_step(self, step: int) -> None:
        """Say how many updates were made (for the bias correction): Megatron keeps it only for some optimizers."""
        for parameter, state in self.sharded.optimizer.state.items():
            state["step"] = torch.full((), float(step), device=parameter.device)  # each its own: they are counted up

    def copy_master_to_model(self) -> None:
        """Copy the master weights into the towers' weights, on all ranks."""
        self.sharded.copy_master_to_model()

    def copy_model_to_master(self) -> None:
        """Copy the towers' weights into the master weights, after weights were loaded; an average begins there."""
        self.sharded.reload_model_params()
        if self.average is not None:
            self.average.restart()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the towers hold the average in place of the weights; every rank calls.

        An error leaves them so: it ends the run, and the other ranks may not come to give the weights back.

        Raises:
            ValueError: no average is kept.
        """
        if self.average is None:
            raise ValueError("this optimizer keeps no average of the weights")
        self._exchange(self.average)
        yield
        self._exchange(self.average)

    def _exchange(self, average: WeightAverage) -> None:
        self.gather_weights()  # an all-gather that is still due would overwrite what is copied
        average.exchange()
        self.copy_master_to_model()


class _DistributedOptimizer(compat.OpenDistributedOptimizer):
    """Megatron's distributed optimizer, with five things changed.

    Megatron's reshardable checkpoints forget that torch's AdamW keeps a `step`, and gather the whole state on every
    rank; it waits for the gradient norm; it has no groups that are frozen for a while; and it cannot skip a step
    without waiting for the device.
    """

    guard: StepGuard
    """What judges the steps."""
    loss: Tensor | None = None
    """The loss of the step, on the ranks that have it."""

    def get_parameters(self) -> list[torch.nn.Parameter]:
        """Return what is trained: the norm of the gradients is over these."""
        return [parameter for group in self.param_groups if not group["frozen"] for parameter in group["params"]]

    def clip_grad_norm(self, clip_grad: float) -> Tensor:
        """Scale the gradients so that their global norm is at most `clip_grad`; return the norm before that."""
        trainable, group = compat.gradients_for_norm(self), self.grad_stats_parallel_group
        return clip_or_skip(self.optimizer, trainable, self.guard, clip_grad, group, self.loss)

    def slices(self) -> dict[torch.nn.Parameter, Tensor]:
        """Return this rank's slice of the master weight of each parameter that it has one of."""
        return {
            parameter: self.optimizer.param_groups[group]["params"][place]
            for parameter, (group, place) in self.model_param_group_index_map.items()
        }

    def ranges(self) -> dict[torch.nn.Parameter, tuple[int, Tensor]]:
        """Return where this rank's share of each flattened parameter begins, and its numbers in the model's type."""
        maps = (bucket["param_map"] for buffer in self.gbuf_ranges for buckets in buffer.values() for bucket in buckets)
        return {
            parameter: (places["param"].start, _own_range(parameter, places["param"]))
            for each in maps
            for parameter, places in each.items()
        }

    def copy_master_to_model(self) -> None:
        """Copy the master weights into the weights, on all ranks."""
        self.copy_local_master_to_model()
        for chunk in self.model_chunks:
            chunk.start_param_sync(force_sync=True)

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
    ) -> Any:
        """Describe this rank's master weights and moments as parts of whole tensors; Megatron's gathers all of them."""
        states = (
            (parameter, begin, {name: part for name, part in self.states_of(parameter).items() if name != "step"})
            for parameter, (begin, _) in self.ranges().items()
        )
        return optimizer_boxes(model_sharded_state_dict, states)

    @torch.no_grad()
    def load_parameter_state_from_fully_reshardable(self, state_dict: Any) -> None:
        """Load what was read into the parts that `sharded_param_state_fully_reshardable` describes."""
        for parameter, parts in zip(self.ranges(), state_dict.values(), strict=True):
            self.set_states_of(parameter, {name: joined(boxes) for name, boxes in parts.items()})

    def set_states_of(self, parameter: torch.nn.Parameter, states: dict[str, Tensor]) -> None:
        """Set master weight and moments; the number of updates stays."""
        group, place = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        super().set_states_of(parameter, {"step": state["step"], **states})


def _named_parameters(towers: Towers) -> list[tuple[str, str, int, torch.nn.Parameter]]:
    return [
        (tower_name, global_name(part, name), part.config.num_layers, parameter)
        for tower_name, tower in towers.items()
        for part in tower.chunks
        for name, parameter in part.named_parameters()
    ]


def _union_over_stages(kinds: set[Any]) -> set[Any]:
    """Join what the pipeline stages have: they must agree on the groups, or no other layout could load them."""
    return set().union(*gather(kinds, parallel_state.get_pipeline_model_parallel_group()))


def _own_range(parameter: torch.nn.Parameter, places: Any) -> Tensor:
    """This rank's share of a flattened parameter; of weights in FP8, which lie in scales for the whole, none."""
    if is_float8tensor(parameter):
        return torch.empty(0)
    return parameter.detach().flatten()[places.start : places.end]


def _clamp(limits: Mapping[Tensor, tuple[float, float]]) -> None:
    with torch.no_grad():
        for parameter, (least, largest) in limits.items():
            parameter.clamp_(least, largest)


def _shard_optimizer(
    base_optimizer: torch.optim.Optimizer,
    chunks: list[Any],
    config: OptimConfig,
    dtype: torch.dtype,
    guard: StepGuard,
) -> "_DistributedOptimizer | FullyShardedOptimizer":
    # Without a limit Megatron would not measure the norm either.
    limit = config.clip_grad or float("inf")
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if isinstance(chunks[0], FullySharded):
        return FullyShardedOptimizer(base_optimizer, chunks, limit, guard, group)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        clip_grad=limit,
        use_distributed_optimizer=True,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        fp8_recipe=chunks[0].config.fp8_recipe if chunks[0].config.fp8 else None,
    )
    optimizer = _DistributedOptimizer(
        base_optimizer,
        settings,
        None,
        _zero_moments,
        model_chunks=chunks,
        per_model_buffers={index: chunk.buffers for index, chunk in enumerate(chunks)},
        data_parallel_group=group,
        data_parallel_group_gloo=group,
        data_parallel_group_idx=parallel_state.get_model_parallel_group().rank(),
        distributed_optimizer_instance_id=0,
    )
    # The gradient norm is summed over every rank: each holds its own slices.
    optimizer.grad_stats_parallel_group = dist.group.WORLD
    optimizer.guard = guard
    optimizer.tp_group = parallel_state.get_tensor_model_parallel_group()
    return optimizer


def _zero_moments(base_optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give every slice that has none zero moments."""
    for group in base_optimizer.param_groups:
        for parameter in group["params"]:
            if not base_optimizer.state[parameter]:
                base_optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                base_optimizer.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
                base_optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)


def _configure_lamb(
    lamb: Lamb,
    local_slices: Mapping[torch.nn.Parameter, Tensor],
    weights: list[torch.nn.Parameter],
    exempt: Collection[torch.nn.Parameter],
) -> None:
    """Tell LAMB which weight each of this rank's slices belongs to, and how norms add up over the ranks.

    The weights of `exempt` have no trust ratio.
    """
    index_of = {parameter: index for index, parameter in enumerate(weights)}
    slices = {part: index_of[whole] for whole, part in local_slices.items()}
    split = torch.tensor([bool(getattr(weight, "tensor_model_parallel", False)) for weight in weights])

    def reduce_norms(squares: Tensor) -> Tensor:
        if parallel_state.get_data_parallel_world_size() > 1:
            dist.all_reduce(squares, group=parallel_state.get_data_parallel_group())
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            return squares
        # A weight that every tensor-parallel rank holds whole counts once.
        summed = squares.clone()
        dist.all_reduce(summed, group=parallel_state.get_tensor_model_parallel_group())
        return torch.where(split.to(squares.device, non_blocking=True), summed, squares)

    lamb.share(slices, len(weights), reduce_norms, {index_of[weight] for weight in exempt})
