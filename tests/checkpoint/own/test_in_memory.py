"""Checkpoints in the memory of hosts: two ranks, each of which is a host with a folder of its own."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.spawn import make_student, run_split
from w2s.checkpoint.own.checkpoint_folders import Meta
from w2s.checkpoint.own.in_memory import HostMemory
from w2s.config.load import load
from w2s.config.naming import written
from w2s.config.sections import Config
from w2s.errors import CheckpointError, ConfigError
from w2s.megatron.checkpoint import state
from w2s.megatron.parallel.optimizer import Optimizer
from w2s.megatron.parallel.process_groups import Ranks


def _meta(config: Config, step: int) -> Meta:
    return Meta(
        stage="mim",
        step=step,
        samples=4 * step,
        config=written(config),
        data={"step": step},
        parent=None,
        mlflow_run_id=None,
        versions={},
    )


def _trained(config: Config, steps: int) -> tuple[Any, Optimizer]:
    """A student with gradients of its own in each step, after some of them."""
    towers = {"vision": make_student()}
    optimizer = Optimizer(towers, config.optim, torch.float32)
    for step in range(steps):
        _train(towers, optimizer, step)
    return towers, optimizer


def _train(towers: Any, optimizer: Optimizer, step: int) -> None:
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(step)
    for parameter in towers["vision"].chunks[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step(1.0)


def _weights(towers: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in towers["vision"].chunks[0].parameters()]


def _memory(config: Config, ranks: Ranks, folder: Path, host: int | None = None) -> HostMemory:
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    return HostMemory(config, folder / "run", ranks, folder / f"host-{ranks.rank if host is None else host}")


def _lose_and_go_on(ranks: Ranks, config: Config, folder: Path, lost: str) -> tuple[int | None, bool, list[str]]:
    """Step that is found after a loss, whether training continues bit for bit from there, and what each host holds."""
    towers, optimizer = _trained(config, 3)
    memory = _memory(config, ranks, folder)
    for step in (2, 3):
        memory.keep(_meta(config, step), state.own_tensors(towers, optimizer, {"seen": torch.tensor(step)}))
    held = sorted(path.name.partition(".")[0] for path in folder.glob(f"host-{ranks.rank}/*/*.safetensors"))
    ranks.barrier()
    host = folder / f"host-{ranks.rank}"
    if lost == "host 1" and ranks.rank == 1:
        shutil.rmtree(host)
    if lost == "both hosts":
        shutil.rmtree(host)
    if lost == "bits" and ranks.rank == 1:
        (path,) = host.glob("*/rank-1.step-*")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    ranks.barrier()
    config = load("mim", [*OPTIONS, "precision.compute=bf16"]) if lost == "layout" else config
    again, other = _trained(config, 0)
    found = _memory(config, ranks, folder)
    meta = found.find(4 if lost == "newer on disk" else 0)
    if meta is None:
        return None, False, held
    extra = state.restore(found.read(), again, other, meta.step)
    for step in (3, 4):
        _train(towers, optimizer, step)
        _train(again, other, step)
    both = [state.own_tensors(each, its, {}) for each, its in ((towers, optimizer), (again, other))]
    alike = both[0].keys() == both[1].keys() and all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    return meta.step, alike and int(extra["seen"]) == 3 and meta.data == {"step": 3}, held


OPTIONS = ["hardware=cpu", "train.steps=10", "optim.warmup=1"]


@pytest.mark.parametrize(
    ("lost", "step"),
    [("nothing", 3), ("host 1", 3), ("both hosts", None), ("bits", None), ("layout", None), ("newer on disk", None)],
)
@pytest.mark.parametrize("optimizer", ["lamb", pytest.param("adamw", marks=pytest.mark.slow)])
def test_what_two_hosts_hold(tmp_path: Path, lost: str, step: int | None, optimizer: str) -> None:
    config = load("mim", [*OPTIONS, f"optim.name={optimizer}", "optim.ema=0.9"])
    held = ["rank-0", "rank-1"]
    assert run_split(_lose_and_go_on, 2, config, tmp_path, lost) == [(step, step is not None, held)] * 2


def _saved_twice(ranks: Ranks, config: Config, folder: Path) -> list[int | None]:
    """Steps that are found after a step was saved twice, and where one rank has the second save of it alone."""
    towers, optimizer = _trained(config, 1)
    memory, host = _memory(config, ranks, folder), folder / f"host-{ranks.rank}"
    memory.keep(_meta(config, 1), state.own_tensors(towers, optimizer, {}))
    shutil.copytree(host, folder / f"first-{ranks.rank}")
    _train(towers, optimizer, 5)
    memory.keep(_meta(config, 1), state.own_tensors(towers, optimizer, {}))
    assert len(list(host.glob("*/*.safetensors"))) == 2, "of both ranks, the second save alone"
    found = [memory.find(0)]
    ranks.barrier()
    for path in folder.glob(f"host-{ranks.rank}/*/rank-1.*"):
        path.unlink()
    for path in folder.glob(f"first-{ranks.rank}/*/rank-1.*"):
        shutil.copy(path, next(host.iterdir()))
    ranks.barrier()
    return [meta and meta.step for meta in (*found, memory.find(0))]


def test_two_saves_of_a_step_are_not_mixed(tmp_path: Path) -> None:
    assert run_split(_saved_twice, 2, load("mim", OPTIONS), tmp_path) == [[1, None]] * 2


def _full(ranks: Ranks, config: Config, folder: Path) -> tuple[str, int | None]:
    towers, optimizer = _trained(config, 1)
    memory = _memory(config, ranks, folder)
    tensors = state.own_tensors(towers, optimizer, {})
    memory.keep(_meta(config, 1), tensors)
    if ranks.rank == 1:
        os.posix_fallocate = _refuse
    try:
        memory.keep(_meta(config, 2), tensors)
    except CheckpointError as error:
        found = memory.find(0)
        return str(error), found and found.step
    return "", None


def _refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_memory_that_is_full_keeps_the_older_one(tmp_path: Path) -> None:
    for error, step in run_split(_full, 2, load("mim", OPTIONS), tmp_path):
        assert "step 2 is not kept" in error and "No space left on device" in error
        assert step == 1


def test_a_memory_that_is_too_small_is_refused(alone: Ranks, tmp_path: Path) -> None:
    memory = HostMemory(load("mim", OPTIONS), tmp_path / "run", alone, tmp_path / "memory")
    memory.check_room(1 << 20)
    with pytest.raises(ConfigError, match=r"checkpoint\.memory=true needs 1\.05e\+06 GiB in .*: make it larger"):
        memory.check_room(1 << 49)
