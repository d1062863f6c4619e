"""Private names of Megatron-Core are there, and do what `w2s/megatron/compat.py` says of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp import megatron_fsdp
from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer as fsdp_buffers
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from tests.megatron.spawn import make_student
from w2s.megatron import compat
from w2s.megatron.cpu import NoRngTracker
from w2s.megatron.parallel.process_groups import Ranks


def test_every_name_that_is_set_was_there_before() -> None:
    """What is put in the place of a name that is gone would change nothing."""
    for owner, names in {
        parallel_state: ("create_group",),
        megatron_random: ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED", "_get_cuda_rng_state",
                          "_set_cuda_rng_state"),
        filesystem_async: ("_results_queue",),
        p2p_communication: ("_p2p_ops",),
        schedules: ("torch",),
        DistributedOptimizer: ("_copy_main_params_to_model_params", "_get_main_param_and_optimizer_states",
                               "_set_main_param_and_optimizer_states"),
        fsdp_buffers.DataParallelBuffer: ("_get_item_slice_in_shard",),
        fsdp_buffers: ("_coalescing_manager", "make_fsdp_dtensor"),
        megatron_fsdp.MegatronFSDP: ("_replace_param_with_raw_if_needed",
                                     "_replace_param_with_distributed_if_needed", "attach_grad_to_optimizer_state"),
        megatron_fsdp.TrainingState: ("PRE_BACKWARD",),
        FullyShardedDataParallel: (compat.FSDP_MESHES,),
        ColumnParallelLinear: ("forward",),
    }.items():  # fmt: skip
        for name in names:
            assert hasattr(owner, name), f"{owner} has no {name}"


def test_the_tracker_of_random_states_is_ours(alone: Ranks) -> None:
    assert isinstance(get_cuda_rng_tracker(), NoRngTracker)
    compat.ignore_rng_states()
    assert megatron_random._get_cuda_rng_state() is None


def test_writers_report_to_our_queue() -> None:
    results = object()
    compat.report_writing_to(results)
    # 0.16 and 0.19.
    names = "_get_write_results_queue", "get_write_results_queue"
    queue_of_writers = next(getattr(filesystem_async, name) for name in names if hasattr(filesystem_async, name))
    assert queue_of_writers() is results
    filesystem_async._results_queue = None


@pytest.mark.parametrize("base", [ColumnParallelLinear, RowParallelLinear])
def test_a_product_of_our_own_stands_in_while_a_linear_is_trained(alone: Ranks, base: Any) -> None:
    class Own(compat.OwnProduct, base):  # type: ignore[misc]
        def product(self, input: Tensor, weight: Tensor, bias: Tensor | None, *flags: bool) -> Tensor:
            return 2 * (input @ weight.T)

    config = make_student().chunks[0].config
    others = {"input_is_parallel": True} if base is RowParallelLinear else {}
    linear = Own(16, 16, config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=True, **others)
    torch.nn.init.normal_(linear.weight)
    inputs = torch.randn(3, 1, 16)
    twice, _ = linear.train()(inputs)
    once, _ = linear.eval()(inputs)
    torch.testing.assert_close(twice, 2 * once, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", [ColumnParallelLinear, RowParallelLinear])
def test_a_linear_adds_to_its_gradient_within_the_product(alone: Ranks, base: Any) -> None:
    config = make_student().chunks[0].config
    others = {"input_is_parallel": True} if base is RowParallelLinear else {}
    linear = base(16, 16, config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=True, **others)
    torch.nn.init.normal_(linear.weight)
    linear.weight.main_grad = torch.ones_like(linear.weight)
    compat.accumulate_in_products(linear)
    inputs, gradient = torch.randn(3, 1, 16), torch.randn(3, 1, 16)
    linear(inputs)[0].backward(gradient)
    expected = 1 + gradient[:, 0].T @ inputs[:, 0]
    torch.testing.assert_close(linear.weight.main_grad, expected, atol=1e-5, rtol=1e-5)
    assert linear.weight.grad is None  # no tensor of its own


def test_messages_go_through_what_is_put_in_their_place() -> None:
    genuine, seen = p2p_communication._p2p_ops, []

    def wrap(post: Any) -> Any:
        seen.append(post)
        return lambda **_: "ours"

    with compat.messages_through(wrap):
        assert p2p_communication._p2p_ops() == "ours"  # type: ignore[call-arg]
    assert seen == [genuine] and p2p_communication._p2p_ops is genuine


def test_tensors_are_exchanged_together_with_what_is_given_for_it() -> None:
    before = fsdp_buffers._coalescing_manager
    with compat.coalescing_with("ours"):
        assert fsdp_buffers._coalescing_manager == "ours"
    assert fsdp_buffers._coalescing_manager is before


def test_layers_leave_gradients_off(alone: Ranks) -> None:
    (part,) = make_student().chunks
    for layer in part.blocks.layers:
        assert "bias_dropout_add_exec_handler" in vars(layer)
        with torch.no_grad(), layer.bias_dropout_add_exec_handler():
            assert not torch.is_grad_enabled()


def test_the_scale_of_the_delayed_recipe_is_found_by_what_is_rounded() -> None:
    """As Transformer Engine 2.12 keeps it; `tests/megatron/fp8/test_transformer_engine_gpu.py` asks the real one."""
    forward, backward = (SimpleNamespace(scale=torch.tensor(values)) for values in ([1.0, 2.0, 3.0], [4.0, 5.0]))
    linear = SimpleNamespace(fp8_meta={"scaling_fwd": forward, "scaling_bwd": backward})
    assert [float(compat.delayed_scale(linear, kind)) for kind in ("input", "weight", "gradient")] == [1, 2, 4]
