"""A tower that the ranks of a tensor-parallel group run together, each on inputs of its own."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


class TensorParallelGather:
    """Gathers the inputs of a tensor-parallel group, and gives each rank the outputs of its own.

    All ranks make one, and those of a group call it together. Their batches may differ in size.
    """

    def __init__(self) -> None:
        self.group = parallel_state.get_tensor_model_parallel_group()
        # Tensor-parallel ranks stand next to each other. Sizes go over the CPU: nobody waits for a GPU to learn them.
        self.sizes, _ = dist.new_subgroups(dist.get_world_size(self.group), backend="gloo")

    def __call__(self, run: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Return `run` of this rank's inputs.

        Args:
            run: a function of the inputs [n, ...] of the whole group that needs all its ranks; returns [n, ...].
            inputs: [m, ...], this rank's.
        """
        counts = [torch.empty(1, dtype=torch.int64, device="cpu") for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(counts, torch.tensor([len(inputs)]), group=self.sizes)
        sizes = [int(count) for count in counts]
        padded = torch.cat([inputs, inputs.new_zeros(max(sizes) - len(inputs), *inputs.shape[1:])])
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self.group)
        outputs = run(torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]))
        return outputs.split(sizes)[dist.get_rank(self.group)]
