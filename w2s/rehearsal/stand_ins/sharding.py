"""Megatron's FSDP on a rank without numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from w2s.compat import coalescing_manager, unset_fake_temporarily
from w2s.megatron import compat
from w2s.megatron.parallel.fully_sharded import FullySharded


@contextmanager
def sharded_as_on_gpus() -> Iterator[None]:
    """Let meshes have the numbers of their ranks, and weights and gradients be waited for where GPUs would wait."""
    lay_out: Any = getattr(FullySharded, compat.FSDP_MESHES)

    def with_numbers(chunk: FullySharded, groups: Any) -> Any:
        with unset_fake_temporarily():
            return lay_out(chunk, groups)

    with mock.patch.object(FullySharded, compat.FSDP_MESHES, with_numbers), compat.coalescing_with(coalescing_manager):
        yield
