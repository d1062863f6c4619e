"""Data-parallel towers and Megatron's distributed optimizer around AdamW or LAMB."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from w2s.config.sections import OptimConfig
from w2s.megatron.initialize import global_name
from w2s.megatron.tower import Tower
from w2s.optim.groups import parameter_groups
from w2s.optim.lamb import Lamb


def data_parallel(tower: Tower) -> DistributedDataParallel:
    """Wrap a tower for data parallelism: float32 gradients in one buffer, averaged over the data-parallel group."""
    tower.config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(tower.config, settings, tower)


class Optimizer:
    """AdamW or LAMB with float32 master weights, sharded over the data-parallel group.

    Args:
        towers: the wrapped towers by name (`vision`, `text`).
        config: the optimizer's settings.
        dtype: type of the weights.
    """

    def __init__(self, towers: dict[str, DistributedDataParallel], config: OptimConfig, dtype: torch.dtype) -> None:
        self.towers = towers
        groups = parameter_groups(_named_parameters(towers), config)
        for group in groups:
            # Megatron tells the groups of a checkpoint apart by these.
            group.update(
                lr=group["peak_lr"],
                lr_mult=group["peak_lr"],
                wd_mult=float(group["weight_decay"] > 0),
                max_lr=group["peak_lr"],
                min_lr=0.0,
                is_expert_parallel=False,
                is_decoupled_lr=False,
                default_config=True,
            )
        kind = Lamb if config.name == "lamb" else torch.optim.AdamW
        inner = kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        self.sharded = _distribute(inner, list(towers.values()), config, dtype)
        if isinstance(inner, Lamb):
            _share_slices(inner, self.sharded, towers)

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for tower in self.towers.values():
            tower.zero_grad_buffer()
        self.sharded.zero_grad()

    def step(self, lr_factor: float) -> Tensor:
        """Clip, update and gather the weights.

        Args:
            lr_factor: fraction of the peak learning rates.

        Returns:
            The global gradient norm before clipping.
        """
        for group in self.sharded.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        _, grad_norm, _ = self.sharded.step()
        return torch.as_tensor(grad_norm)

    @property
    def highest_lr(self) -> float:
        """The highest learning rate of all groups in the last step: that of a tower's head."""
        return max(float(group["lr"]) for group in self.sharded.param_groups)

    def prepare_to_load(self) -> None:
        """Make the moments of every slice, so that a checkpoint has a place to go to before the first step."""
        _empty_state(self.sharded.optimizer)

    def set_step(self, step: int) -> None:
        """Say how many updates were made (for the bias correction): Megatron keeps it only for some optimizers."""
        for state in self.sharded.optimizer.state.values():
            state["step"] = torch.tensor(float(step))

    def reload_weights(self) -> None:
        """Take the towers' weights over into the master weights (after weights were loaded or clamped)."""
        self.sharded.reload_model_params()


class _ReshardableOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer, whose reshardable checkpoints forget that torch's AdamW keeps a `step`."""

    def _set_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
        group, place = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        super()._set_main_param_and_optimizer_states(model_param, {"step": state["step"], **tensors})


def _named_parameters(towers: dict[str, DistributedDataParallel]) -> list[tuple[str, str, int, torch.nn.Parameter]]:
    return [
        (tower_name, global_name(wrapped.module, name), wrapped.module.config.num_layers, parameter)
        for tower_name, wrapped in towers.items()
        for name, parameter in wrapped.module.named_parameters()
    ]


def _distribute(
    inner: torch.optim.Optimizer,
    towers: list[DistributedDataParallel],
    config: OptimConfig,
    dtype: torch.dtype,
) -> DistributedOptimizer:
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        # Without a limit Megatron would not measure the norm either.
        clip_grad=config.clip_grad or float("inf"),
        use_distributed_optimizer=True,
    )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    optimizer = _ReshardableOptimizer(
        inner,
        settings,
        None,
        _empty_state,
        model_chunks=towers,
        per_model_buffers={index: tower.buffers for index, tower in enumerate(towers)},
        data_parallel_group=group,
        data_parallel_group_gloo=group,
        data_parallel_group_idx=parallel_state.get_model_parallel_group().rank(),
        distributed_optimizer_instance_id=0,
    )
    # The gradient norm is summed over every rank: each holds its own slices.
    optimizer.grad_stats_parallel_group = dist.group.WORLD
    optimizer.tp_group = parallel_state.get_tensor_model_parallel_group()
    return optimizer


def _empty_state(inner: torch.optim.Optimizer, config: Any = None) -> None:
    """Give every slice that has none zero moments."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                inner.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
                inner.state[parameter]["step"] = torch.zeros(())


def _share_slices(lamb: Lamb, sharded: DistributedOptimizer, towers: dict[str, DistributedDataParallel]) -> None:
    """Tell LAMB which weight each of this rank's slices belongs to, and how norms add up over the ranks."""
    weights = [parameter for wrapped in towers.values() for parameter in wrapped.module.parameters()]
    number = {parameter: index for index, parameter in enumerate(weights)}
    slices = {}
    for whole_groups, slice_groups in (
        (sharded.model_fp32_groups, sharded.shard_fp32_groups),
        (sharded.model_float16_groups, sharded.shard_fp32_from_float16_groups),
    ):
        for wholes, parts in zip(whole_groups, slice_groups, strict=True):
            slices.update({part: number[whole] for whole, part in zip(wholes, parts, strict=True) if part is not None})
    split = torch.tensor([bool(getattr(weight, "tensor_model_parallel", False)) for weight in weights])

    def add_up(squares: Tensor) -> Tensor:
        dist.all_reduce(squares, group=parallel_state.get_data_parallel_group())
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            return squares
        # A weight that every tensor-parallel rank holds whole counts once.
        summed = squares.clone()
        dist.all_reduce(summed, group=parallel_state.get_tensor_model_parallel_group())
        return torch.where(split.to(squares.device), summed, squares)

    lamb.share(slices, len(weights), add_up)
