"""Megatron's FSDP on a rank without numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed import _coalescing_manager

from w2s.megatron.cpu import fsdp_buffers
from w2s.megatron.fully_sharded import FullySharded


@contextmanager
def sharded_as_on_gpus() -> Iterator[None]:
    """Let meshes have the numbers of their ranks, and weights and gradients be waited for where GPUs would wait."""
    lay_out = FullySharded._init_dist_index

    def with_numbers(chunk: FullySharded, groups: Any) -> Any:
        with unset_fake_temporarily():
            return lay_out(chunk, groups)

    with (
        mock.patch.object(FullySharded, "_init_dist_index", with_numbers),
        mock.patch.object(fsdp_buffers, "_coalescing_manager", _coalescing_manager),
    ):
        yield
