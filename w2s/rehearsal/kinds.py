"""Which ranks of a layout are rehearsed: those that differ in what they do."""

from collections.abc import Iterable

from w2s.config.batching import data_parallel_size, ranks_per_stage
from w2s.config.sections import ParallelConfig
from w2s.errors import UserError


def chosen(text: str, parallel: ParallelConfig, world_size: int) -> list[int]:
    """Return the ranks that `--ranks` stands for.

    Args:
        text: `kinds` (of each stage of the pipeline the first and last tensor-parallel rank, of the first and last
            data-parallel rank), `pipeline` (one of each stage), or ranks, such as `0,64`.
        parallel: the layout.
        world_size: ranks in all.

    Raises:
        UserError: it is none of that.
    """
    data = data_parallel_size(parallel, world_size)
    if text == "kinds":
        return _ranks(parallel, data, {0, parallel.tensor - 1}, {0, data - 1})
    if text == "pipeline":
        return _ranks(parallel, data, {0}, {0})
    try:
        ranks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--ranks {text} is not understood: use kinds, pipeline, or ranks such as 0,1") from None
    if ranks[0] < 0 or ranks[-1] >= world_size:
        raise UserError(f"--ranks {text}: there are ranks 0 to {world_size - 1}")
    return ranks


def _ranks(parallel: ParallelConfig, data: int, tensors: Iterable[int], datas: Iterable[int]) -> list[int]:
    """Megatron numbers tensor-parallel ranks first, then data-parallel ones, then stages of the pipeline."""
    return sorted(
        tensor + parallel.tensor * (replica + data * stage)
        for stage in range(parallel.pipeline)
        for tensor in tensors
        for replica in datas
    )


def stage_of(rank: int, parallel: ParallelConfig, world_size: int) -> int:
    """Return a rank's stage of the pipeline."""
    return rank // ranks_per_stage(parallel, world_size)
