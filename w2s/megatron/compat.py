"""What differs between Megatron-Core releases (0.16.1 on Python 3.11, 0.19 on 3.12 and newer)."""

import inspect
import logging
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.distributed import ProcessGroup

# 0.16 warns of every MLP that is not its own, 0.19 of every wrapper that works out its buffers itself.
for name in ("transformer.transformer_layer", "distributed.distributed_data_parallel"):
    logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)


def replace_rng_tracker(tracker: Any) -> None:
    """Make `tracker` the keeper of Megatron's random states."""
    megatron_random._CUDA_RNG_STATE_TRACKER = tracker
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def process_groups() -> list[ProcessGroup]:
    """Return the process groups that this rank belongs to, in the order in which they were made."""
    return list(dist.distributed_c10d._world.pg_map)


def begin_save(state: dict[str, Any], folder: str) -> Any:
    """Begin a distributed checkpoint; return what has to be done for it."""
    options: dict[str, Any] = {"async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # 0.19
        options["async_strategy"] = "mcore"
    return dist_checkpointing.save(state, folder, **options)


def mlp_spec(mlp: type[MLP], linear_fc1: type, linear_fc2: type) -> Any:
    """Return the specification of an MLP of some class out of its two linears."""
    submodules = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)
    if hasattr(MLP, "as_mlp_submodule"):  # 0.19
        return partial(mlp.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=mlp, submodules=submodules)


def gradients_for_norm(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Return the gradients that this rank answers for: what is shared or replicated counts on one rank only."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):  # 0.19
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()


def no_function_modes() -> AbstractContextManager[None]:
    """Inside, torch asks no function mode."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context
