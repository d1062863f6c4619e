"""Megatron's schedules: a pass over micro-batches, forward only or forward and backward."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

Reported = dict[str, Tensor]
"""What the loss of a micro-batch tells the caller of the pass."""

Loss = Callable[[Tensor], tuple[Tensor, Reported]]
"""Takes a micro-batch's output, returns its loss and what to report."""

Forward = Callable[[Any, Any], tuple[Tensor, Loss]]
"""Takes the model and a micro-batch, returns the output and the loss that it goes into."""


def forward_backward(model: nn.Module, micro_batches: Sequence[Any], forward: Forward) -> list[Reported]:
    """Accumulate the gradients of the mean loss over micro-batches; return what each reported (last stage only)."""
    return _run(model, micro_batches, forward, forward_only=False)


def finish_gradients(model: nn.Module) -> None:
    """Reduce the gradients of a model that took part in another's pass, as `forward_backward` does for its own."""
    finalize_model_grads([model])


@torch.no_grad()
def forward_only(model: nn.Module, micro_batches: Sequence[Any], forward: Callable[[Any, Any], Tensor]) -> list[Tensor]:
    """Return the model's output of each micro-batch, without gradients (last stage only)."""

    def keep(model: nn.Module, micro_batch: Any) -> tuple[Tensor, Loss]:
        output = forward(model, micro_batch)
        return output, lambda output: (output.new_zeros(()), {"output": output})

    return [reported["output"] for reported in _run(model, micro_batches, keep, forward_only=True)]


def _run(model: nn.Module, micro_batches: Sequence[Any], forward: Forward, forward_only: bool) -> list[Reported]:
    def step(batches: Iterator[Any], model: nn.Module) -> tuple[Tensor, Loss]:
        output, loss = forward(model, next(batches))

        def reported_apart(output: Tensor) -> tuple[Tensor, Reported]:
            value, reported = loss(output)
            # Megatron divides the loss by the number of micro-batches in place.
            return value, {name: tensor.clone() for name, tensor in reported.items()}

        return output, reported_apart

    result: list[Reported] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return result
