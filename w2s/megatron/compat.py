"""Private names of Megatron-Core and Transformer Engine, and what differs between their releases, 0.16.1 and 0.19.

The only place that says them; torch's are in `w2s/compat.py`. `tests/megatron/test_compat.py` tries each.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer as fsdp_buffers
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import TrainingState
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.distributed import ProcessGroup

# 0.16 warns of every MLP that is not its own, 0.19 of every wrapper that works out its buffers itself and of its saves.
for name in (
    "transformer.transformer_layer",
    "distributed.distributed_data_parallel",
    "dist_checkpointing.strategies.torch",
):
    logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)
# It logs what it raises as well.
logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)


def replace_rng_tracker(tracker: Any) -> None:
    """Make `tracker` the keeper of Megatron's random states."""
    megatron_random._CUDA_RNG_STATE_TRACKER = tracker
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def ignore_rng_states() -> None:
    """Let recomputed activations save and restore no random state of a GPU."""
    megatron_random._get_cuda_rng_state = lambda *_, **__: None
    megatron_random._set_cuda_rng_state = lambda *_, **__: None


def begin_save(state: dict[str, Any], folder: str) -> Any:
    """Begin a distributed checkpoint; return what has to be done for it."""
    options: dict[str, Any] = {"async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # 0.19
        options["async_strategy"] = "mcore"
    return dist_checkpointing.save(state, folder, **options)


def report_writing_to(results: Any) -> None:
    """Make `results`, with `put` and `get_nowait`, the queue that Megatron's writers report to.

    Megatron would start a server process for it, seconds of imports; after a SIGKILL of this process it would stay for
    ever.
    """
    filesystem_async._results_queue = results


def mlp_spec(mlp: type[MLP], linear_fc1: type, linear_fc2: type) -> Any:
    """Return the specification of an MLP of some class out of its two linears."""
    submodules = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)
    if hasattr(MLP, "as_mlp_submodule"):  # 0.19
        return partial(mlp.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=mlp, submodules=submodules)


def leave_gradients_alone(layer: nn.Module) -> None:
    """Keep a layer from turning gradients on for its residual additions: passes without any would keep their norms."""
    layer.bias_dropout_add_exec_handler = nullcontext  # type: ignore[assignment]


class OwnProduct:
    """Mixed into one of Megatron's linears: while it is trained, `product` stands in for its matrix product."""

    training: bool

    def product(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, allreduce_dgrad: bool, sequence_parallel: bool
    ) -> Tensor:
        """Multiply what tensor-parallel ranks have of the input; communication is as the flags say."""
        raise NotImplementedError

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **megatron: Any,
    ) -> Tensor:
        if self.training:
            return self.product(input, weight, bias, allreduce_dgrad, sequence_parallel)
        options = {"allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel, **megatron}
        return super()._forward_impl(input, weight, bias=bias, **options)  # type: ignore[misc]


def one_group_for_all(group: ProcessGroup) -> AbstractContextManager[None]:
    """Inside, Megatron takes `group` wherever it would make one."""
    return _replaced(parallel_state, "create_group", lambda *_, **__: group)


class _WeightGradient:
    """Stands in for Apex's module: the product that is a weight's gradient, added to what there is of it."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input: Tensor, grad_output: Tensor, gradient: Tensor) -> None:
        """Add grad_output.T @ input to `gradient`."""
        gradient.addmm_(grad_output.t(), input)


def accumulate_in_products(module: nn.Module) -> None:
    """Without a GPU, let Megatron's linears of float32 add to DDP's gradients themselves: one pass over memory less.

    Their weights' gradients are then in `main_grad` alone, as Transformer Engine's are on a GPU. Autograd gets memory
    that nobody has written: `torch.autograd.grad` with respect to such a weight returns that. DDP drops it, and with it
    the gradient of whatever else a loss makes of the weight, such as a penalty on its norm.
    """
    if torch.cuda.is_available():  # what autograd gets would be on the GPU
        return
    megatron_layers.fused_weight_gradient_mlp_cuda = _WeightGradient
    for linear in module.modules():
        if isinstance(linear, megatron_layers.ColumnParallelLinear | megatron_layers.RowParallelLinear):
            linear.gradient_accumulation_fusion = linear.weight.dtype == torch.float32


def delayed_scale(linear: Any, kind: str) -> Tensor:
    """Return the scale by which Transformer Engine's delayed recipe rounds a linear's input, weight or gradient."""
    state = linear.fp8_meta["scaling_bwd" if kind == "gradient" else "scaling_fwd"]
    scale: Tensor = state.scale[1 if kind == "weight" else 0]
    return scale


def messages_through(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> AbstractContextManager[None]:
    """Inside, the messages between pipeline stages are posted by what `wrap` makes of Megatron's function for it."""
    return _replaced(p2p_communication, "_p2p_ops", wrap(p2p_communication._p2p_ops))


def gradients_for_norm(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Return the gradients that this rank answers for: what is shared or replicated counts on one rank only."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):  # 0.19
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()


def replace_torch_of_schedules(stand_in: Any) -> None:
    """Make `stand_in` what Megatron's schedules know as torch."""
    schedules.torch = stand_in


class OpenDistributedOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer, whose states of a parameter can be read and set."""

    def copy_local_master_to_model(self) -> None:
        """Copy this rank's share of the master weights into the weights; the other ranks' shares stay as they are."""
        self._copy_main_params_to_model_params()

    def states_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return this rank's share of a parameter's master weight and moments, by name."""
        states: dict[str, Tensor] = self._get_main_param_and_optimizer_states(parameter)
        return states

    def set_states_of(self, parameter: nn.Parameter, states: dict[str, Tensor]) -> None:
        """Set what `states_of` returns."""
        self._set_main_param_and_optimizer_states(parameter, states)


class OpenFullySharded(FullyShardedDataParallel):
    """Megatron's FSDP, whose parameters stay what they are: no DTensors of shares stand in for them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _without_dtensors():
            super().__init__(*args, **kwargs)
        self.module._replace_param_with_raw_if_needed()
        self.module._replace_param_with_distributed_if_needed = _nothing
        self.module.attach_grad_to_optimizer_state = _nothing


def release_gathered(chunk: FullyShardedDataParallel) -> None:
    """Let go of all weights that a fully sharded chunk has gathered: the next pass gathers them anew.

    Megatron-Core 0.19 would keep those outside of layers, which are old after an update.
    """
    reset, name = chunk.module.all_gather_pipeline.reset, "preserve_non_fsdp_units"
    reset(**({name: False} if name in inspect.signature(reset).parameters else {}))


def is_to_go_back(layer: nn.Module) -> bool:
    """Return whether a backward pass has begun that has still to go through an FSDP layer, or is in it."""
    return layer._training_state is TrainingState.PRE_BACKWARD


def begin_of_share(buffer: Any, index: int) -> int:
    """Return where this rank's share of a parameter of an FSDP buffer begins, in the flattened parameter."""
    begin, _ = buffer._get_item_slice_in_shard(index)
    return int(begin)


def coalesce_with(manager: Any) -> None:
    """Make `manager` what FSDP exchanges several tensors together with."""
    fsdp_buffers._coalescing_manager = manager


def coalescing_with(manager: Any) -> AbstractContextManager[None]:
    """Inside, `manager` is what FSDP exchanges several tensors together with."""
    return _replaced(fsdp_buffers, "_coalescing_manager", manager)


FSDP_MESHES = "_init_dist_index"
"""The method of FSDP that makes its device meshes."""


def answer_for_cuda(answers: dict[str, Any]) -> None:
    """Put functions and classes in the place of those of `torch.cuda`, which Megatron-Core asks by name."""
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def _nothing() -> None:
    """Do nothing."""


def _without_dtensors() -> AbstractContextManager[None]:
    """Inside, no DTensors are made of shares: nobody needs them, ranks would compare each, and scalars are refused."""
    return _replaced(fsdp_buffers, "make_fsdp_dtensor", lambda local_tensor, *unused, **unused_too: local_tensor)


@contextmanager
def _replaced(module: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Inside, `stand_in` is what a module of Megatron's has under a name."""
    genuine = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, genuine)
