"""Manifests that several ranks write and verify together, at once and in the background."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.saved import meta
from tests.distributed import run_ranks
from tests.megatron.spawn import SHAPE, TARGET_WIDTH
from w2s.checkpoint.own import manifest
from w2s.checkpoint.own.checkpoint_folders import Saving
from w2s.checkpoint.own.verifying import damage, recover
from w2s.config.sections import CheckpointConfig, OptimConfig, ParallelConfig, PrecisionConfig
from w2s.config.teacher_losses import Target
from w2s.errors import CheckpointError
from w2s.files import Checksum, checksum, checksums
from w2s.megatron.checkpoint import async_save, state
from w2s.megatron.checkpoint.safe_unpickling import read_metadata
from w2s.megatron.model.initialize import init_parameters
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.optimizer import Optimizer, Towers
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import data_parallel, shard
from w2s.towers.initial import vision_rule
from w2s.towers.masked_student import MaskedStudent


def make_towers(parallel: ParallelConfig) -> Towers:
    def chunk(index: int) -> MaskedStudent:
        student = MaskedStudent(SHAPE, [Target(TARGET_WIDTH)], parallel, torch.float32, index)
        init_parameters(student, vision_rule(SHAPE, post_norm=0.5), seed=1)
        return student

    return {"vision": data_parallel(shard(chunk, parallel, torch.device("cpu")), parallel, PrecisionConfig())}


def saved_and_verified(parallel: ParallelConfig, run: Path, background: bool) -> dict[str, Any]:
    with process_groups.initialize_groups(parallel, torch.device("cpu")) as ranks:
        return _saved_and_verified(ranks, make_towers(parallel), run, background)


def _saved_and_verified(ranks: Ranks, towers: Towers, run: Path, background: bool) -> dict[str, Any]:
    """Save at step 1, verify, damage a file, and verify again."""
    hashed: list[str] = []
    read: list[str] = []

    def noted(paths: Any) -> dict[str, Checksum]:
        found = checksums(paths)
        hashed.extend(found)
        return found

    def counted(path: Path) -> Checksum:
        read.append(path.name)
        return checksum(path)

    optimizer = Optimizer(towers, OptimConfig(), torch.float32)
    optimizer.zero_grad()
    optimizer.step(1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_save, "checksums", noted)
        patch.setattr(manifest, "checksum", counted)
        saving = Saving(
            run,
            meta(1),
            lambda folder: state.save(folder, towers, optimizer, {}, background),
            CheckpointConfig(),
            ranks,
        )
        path = saving.finish()
        whole = damage(path)
    ranks.barrier()
    if ranks.main:
        last = max(path.glob("*.distcp"))
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    ranks.barrier()
    try:
        recover(run, ranks, strict=True)
        refusal = ""
    except CheckpointError as error:
        refusal = str(error)
    written = state.written_bytes(towers, optimizer, {})
    return {"hashed": hashed, "read": read, "whole": whole, "refusal": refusal, "written": written}


@pytest.mark.parametrize(
    ("parallel", "background"),
    [(ParallelConfig(), False), (ParallelConfig(tensor=2), True)],  # replicas have shares of the same tensors
)
def test_each_rank_answers_for_its_own_files(parallel: ParallelConfig, background: bool, tmp_path: Path) -> None:
    first, second = run_ranks(saved_and_verified, 2, parallel, tmp_path, background)
    folder = tmp_path / "checkpoints" / "step-00000001"
    files = sorted(path.name for path in folder.iterdir())
    stored = [each for each in read_metadata(folder).state_dict_metadata.values() if hasattr(each, "size")]
    sizes = [each.size.numel() * each.properties.dtype.itemsize for each in stored]
    assert first["written"] + second["written"] == sum(sizes)
    tensors = [name for name in files if name.endswith(".distcp")]
    assert sorted({name[:4] for name in tensors}) == ["__0_", "__1_"]
    # In the background it is the writing process that takes the checksums, none in the training one.
    for rank, found in enumerate((first, second)):
        local = [name for name in tensors if name.startswith(f"__{rank}_")]
        assert sorted(found["hashed"]) == ([] if background else local)
    assert sorted(first["read"] + second["read"] + ["manifest.json"]) == files, "each file is read once"
    assert first["read"] and second["read"]
    assert first["whole"] == second["whole"] == []
    assert f"is damaged: {tensors[-1]} has changed since it was written: " in first["refusal"]
    assert first["refusal"] == second["refusal"]
