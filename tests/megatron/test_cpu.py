"""Megatron's questions about CUDA, answered on a CPU."""

from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from torch.overrides import TorchFunctionMode

from w2s.megatron.cpu import without_function_mode
from w2s.megatron.parallel.process_groups import Ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is replaced")


def test_cuda_devices_become_the_cpu(alone: Ranks) -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2).to("cuda:0").device.type == "cpu"
    assert torch.zeros(2).cuda().device.type == "cpu"
    assert torch.empty(2, device=torch.device("cuda", 3)).device.type == "cpu"


def test_tensor_types_have_cuda_names(alone: Ranks) -> None:
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2).type(torch.int32).dtype == torch.int32


def test_streams_and_counts_have_stand_ins(alone: Ranks) -> None:
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.IntTensor([3]).tolist() == [3]


def test_a_step_asks_no_function_mode_and_its_schedule_needs_none(alone: Ranks) -> None:
    with without_function_mode():
        assert torch.zeros(2).type() == "torch.FloatTensor"
        assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"


class _OnMeta(TorchFunctionMode):
    """Another mode, which answers for devices itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (
            func(*args, **{**(kwargs or {}), "device": "meta"}) if func is torch.zeros else func(*args, **kwargs or {})
        )


def test_a_step_under_another_mode_asks_it(alone: Ranks) -> None:
    with _OnMeta(), without_function_mode():
        assert torch.zeros(2).device.type == "meta"
        assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type == "meta"
