"""Megatron's schedules: a pass over micro-batches, forward only or forward and backward."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from w2s.megatron.fp8.fp8_emulation import cached_weights
from w2s.megatron.fp8.linears import without_fp8
from w2s.megatron.parallel.p2p import keep_until_sent
from w2s.megatron.parallel.sharded import ShardedTower, start_param_gather

Metrics = dict[str, Tensor]
"""What the loss of a micro-batch tells the caller of the pass."""

Loss = Callable[[Any], tuple[Tensor, Metrics]]
"""Takes a micro-batch's output, returns its loss and what to report; called on the last pipeline stage."""

Forward = Callable[[Any, Any], tuple[Any, Loss]]
"""Takes a chunk of the model and a micro-batch, returns the output (packed tokens, except on the last pipeline stage),
and the loss that it goes into."""


def forward_backward(
    tower: ShardedTower[Any], micro_batches: Sequence[Any], forward: Forward, num_tokens: int
) -> list[Metrics]:
    """Accumulate the gradients of the mean loss over micro-batches and reduce them over the data-parallel ranks.

    Args:
        tower: the model.
        micro_batches: what `forward` takes, on every rank.
        forward: one forward pass.
        num_tokens: tokens of a micro-batch, those of all its images together.

    Returns:
        What each micro-batch reported; empty except on the last pipeline stage.
    """
    return _run(tower, micro_batches, forward, num_tokens, forward_only=False)


def means(reports: Sequence[Metrics]) -> Metrics:
    """Return the mean over the micro-batches of each thing that they reported."""
    names = dict.fromkeys(name for report in reports for name in report)
    return {name: torch.stack([report[name] for report in reports if name in report]).mean() for name in names}


def start_pass(tower: ShardedTower[Any]) -> None:
    """Tell a model that takes part in another's pass that its weights are new, as `forward_backward` tells its own.

    Transformer Engine rounds them to FP8 once a pass.
    """
    start_param_gather(tower)
    for chunk in tower.chunks:
        chunk.set_is_first_microbatch()


def reduce_gradients(tower: ShardedTower[Any]) -> None:
    """Reduce the gradients of a model that took part in another's pass, as `forward_backward` does for its own."""
    tower.chunks[0].config.finalize_model_grads_func(tower.wrapped)


@contextmanager
def no_grad_sync(towers: Iterable[ShardedTower[Any]]) -> Iterator[None]:
    """Inside, passes leave each data-parallel rank's gradients unreduced, to be looked at; no update may follow."""
    with ExitStack() as stack:
        for tower in towers:
            driver = tower.chunks[0].config
            stack.callback(setattr, driver, "finalize_model_grads_func", driver.finalize_model_grads_func)
            stack.callback(setattr, driver, "no_sync_func", driver.no_sync_func)
            driver.finalize_model_grads_func, driver.no_sync_func = _no_op, nullcontext
            for wrapped in tower.wrapped:
                if isinstance(wrapped, DistributedDataParallel):
                    stack.enter_context(wrapped.no_sync())
        yield


def _no_op(*_: object, **__: object) -> None:
    """Reduce nothing."""


@torch.no_grad()
def forward_only(
    tower: ShardedTower[Any], micro_batches: Sequence[Any], forward: Callable[[Any, Any], Tensor], num_tokens: int
) -> list[Tensor]:
    """Return the model's output of each micro-batch, without gradients; empty except on the last pipeline stage."""

    def keep(chunk: nn.Module, micro_batch: Any) -> tuple[Tensor, Loss]:
        output = forward(chunk, micro_batch)
        return output, lambda output: (output.new_zeros(()), {"output": output})

    return [reported["output"] for reported in _run(tower, micro_batches, keep, num_tokens, forward_only=True)]


def infer(tower: ShardedTower[Any], inputs: Sequence[Tensor], forward: Callable[..., Tensor], seq_len: int) -> Tensor:
    """Return the output of a tower for a batch of any size, without FP8, on every rank of the model-parallel group.

    Args:
        tower: the model.
        inputs: tensors [n, ...], the same on every rank of the group.
        forward: takes a chunk and slices of `inputs`; its last chunk returns the output [n, ...].
        seq_len: tokens of one sample.
    """
    # Every stage has a micro-batch to work on, and the tokens of each divide over the tensor-parallel ranks.
    count, parts = len(inputs[0]), tower.chunks[0].config.microbatch_group_size_per_vp_stage
    size = math.ceil(count / parts)
    if tower.chunks[0].config.sequence_parallel:
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        size = math.ceil(size / tensor) * tensor
    missing = parts * size - count
    padded = [torch.cat([each, each[-1:].expand(missing, *each.shape[1:])]) if missing else each for each in inputs]
    micro_batches = list(zip(*(whole.split(size) for whole in padded), strict=True))
    with without_fp8(tower.chunks):
        outputs = forward_only(tower, micro_batches, lambda chunk, micro: forward(chunk, *micro), size * seq_len)
    return _broadcast_from_last_stage(outputs)[:count]


def _broadcast_from_last_stage(outputs: list[Tensor]) -> Tensor:
    """Join the outputs that the last pipeline stage has, and give them to the others, which have none."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return torch.cat(outputs)
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    whole = torch.cat(outputs) if outputs else torch.empty(0)
    form = [(whole.shape, whole.dtype)]
    dist.broadcast_object_list(form, src=source, group=group)
    if not outputs:
        shape, dtype = form[0]
        whole = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    dist.broadcast(whole, src=source, group=group)
    return whole


def _run(
    tower: ShardedTower[Any], micro_batches: Sequence[Any], forward: Forward, num_tokens: int, forward_only: bool
) -> list[Metrics]:
    def step(batches: Iterator[Any], wrapped: nn.Module) -> tuple[Any, Loss]:
        # The wrapper adds nothing to a forward pass: its hooks sit on the layers.
        output, loss = forward(bare[wrapped], next(batches))

        def reported_apart(output: Any) -> tuple[Tensor, Metrics]:
            value, reported = loss(output)
            # Megatron divides the loss by the number of micro-batches in place.
            return value, {name: tensor.clone() for name, tensor in reported.items()}

        return output, reported_apart

    start_param_gather(tower)
    bare = dict(zip(tower.wrapped, tower.chunks, strict=True))
    iterators = [iter(micro_batches) for _ in tower.wrapped]
    with cached_weights(tower.chunks), keep_until_sent():
        result: list[Metrics] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=tower.wrapped,
            num_microbatches=len(micro_batches),
            seq_length=num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return result
