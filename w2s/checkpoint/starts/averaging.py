"""`w2s average`: the mean of the last checkpoints of a run, as a checkpoint.

Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407) of what is on the disk already.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from w2s.checkpoint.own.checkpoint_folders import FORMAT, all_of, read_meta, seal
from w2s.checkpoint.own.verifying import verify
from w2s.errors import CheckpointError
from w2s.files import new_folder
from w2s.megatron.checkpoint.tensor_store import TensorStore, write_tensors


def average_checkpoints(run: Path, last: int, out: Path) -> list[Path]:
    """Write the mean of the weights of a run's newest checkpoints; return these, the newest last.

    It is in float32, has no optimizer states, and the step of the newest. No more than one tensor is in memory at a
    time.

    Args:
        run: the run's folder.
        last: how many, at least 2.
        out: the new folder.

    Raises:
        CheckpointError: the run has fewer checkpoints, or one of them is damaged or another model's.
        UserError: `out` exists already.
    """
    checkpoints = all_of(run)
    if len(checkpoints) < last:
        fix = f"use --last {len(checkpoints)}, or" if len(checkpoints) > 1 else "use"
        raise CheckpointError(
            f"--last {last}: {run} has only {len(checkpoints)} (checkpoint.keep and checkpoint.keep_at say which "
            f"stay): {fix} a run that keeps more"
        )
    chosen = checkpoints[-last:]
    for checkpoint in chosen:
        verify(checkpoint)
    stored = [TensorStore(checkpoint) for checkpoint in chosen]
    _refuse_others(stored)
    meta = {name: torch.empty_like(tensor, dtype=torch.float32) for name, tensor in stored[-1].meta.items()}
    with new_folder(out) as folder:
        write_tensors(folder, meta, lambda name: _mean(name, stored))
        about = replace(read_meta(chosen[-1]), stage="average", parent=" and ".join(map(str, chosen)), format=FORMAT)
        seal(folder, about, {})
    return chosen


def _mean(name: str, stored: Sequence[TensorStore]) -> Tensor:
    total = torch.zeros(stored[-1].meta[name].shape, dtype=torch.float64)
    for each in stored:
        total += each.read(name)
    return (total / len(stored)).float()


def _refuse_others(stored: Sequence[TensorStore]) -> None:
    """Refuse checkpoints of different weights, which a run of one name may have left."""
    shapes = [{name: tensor.shape for name, tensor in each.meta.items()} for each in stored]
    for each, shapes_of_each in zip(stored, shapes, strict=True):
        if shapes_of_each != shapes[-1]:
            raise CheckpointError(f"{each.folder} and {stored[-1].folder} are of different models: use fewer of --last")
