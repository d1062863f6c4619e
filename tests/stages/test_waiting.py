"""A step never waits for the device: values are read back where the loop logs, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_ranks
from tests.stages.layout_steps import STAGES
from tests.training.loops import start
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.megatron.parallel import process_groups
from w2s.training.loop import train
from w2s.training.training_run import TrainingRun

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
"""What a GPU would be waited for in: a value that the host reads, or a shape that depends on values."""


class NoWaiting(TorchDispatchMode):
    """Refuses operators whose result the host has to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func.overloadpacket in WAITS or masked:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def no_synchronize(*unused: Any) -> None:
    raise AssertionError("torch.cuda.synchronize waits for the device")


class Watched(TrainingRun):
    """A run that may not wait in a step; its log lines come after the steps."""

    def take_step(self) -> dict[str, Tensor]:
        with pytest.MonkeyPatch.context() as patch, NoWaiting():
            patch.setattr(torch.cuda, "synchronize", no_synchronize)
            return super().take_step()


def train_all(configs: list[Config], root: Path) -> list[int]:
    """Train each configuration to its end; return the steps done."""
    steps = []
    for index, config in enumerate(configs):
        with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
            run = start(Watched, STAGES[config.stage](config, ranks), config, root / str(index), ranks)
            train(run)
            steps.append(run.step)
    return steps


ONE_RANK = {
    "mim": ("mim", []),
    "mim, standardised targets, recomputed": ("mim", ["teacher.target_norm=standardize", "parallel.recompute=full"]),
    "mim, layers": ("mim", ["mim.predict=visible", "mim.layers=[{student: 0, teacher: 3}]"]),
    "mim in emulated FP8": ("mim", ["precision.compute=bf16", "precision.fp8=emulated"]),
    "clip in one pass": ("clip", ["optim.name=lamb", "parallel.recompute=selective"]),
    "clip in two passes": ("clip", ["train.micro_batch=4", "clip.equal_captions=positives", "precision.compute=bf16"]),
    "clip, frozen at first": ("clip", ["optim.vision_frozen_steps=2", "optim.name=lamb"]),
    "clip with a teacher": ("clip", ["clip.distill.source=eva:tiny", "clip.distill.until=0.5"]),
    "sigmoid": ("clip", ["clip.loss=sigmoid", "clip.logit_scale=10", "optim.clip_grad=0"]),
}
TWO_RANKS = {
    "mim, pipeline": ("mim", ["parallel.pipeline=2", "train.micro_batch=4"]),
    "mim, data": ("mim", ["train.micro_batch=4", "parallel.overlap_grad_reduce=true"]),
    "clip, tensor and sequence": ("clip", ["parallel.tensor=2", "parallel.sequence=true", "optim.name=lamb"]),
    "clip with a teacher, pipeline": (
        "clip",
        ["parallel.pipeline=2", "train.micro_batch=4", "clip.distill.source=eva:tiny", "clip.distill.kind=both"],
    ),
}


@pytest.mark.parametrize(("ranks", "cases"), [pytest.param(1, ONE_RANK, marks=pytest.mark.slow), (2, TWO_RANKS)])
def test_no_step_waits(base: list[str], tmp_path: Path, ranks: int, cases: dict[str, tuple[str, list[str]]]) -> None:
    quiet = [*base, "eval.shards=", "eval.knn_shards=", "tracking.enabled=false", "train.log_every=2"]
    vision = {"mim": [], "clip": ["init.vision=none"]}
    configs = [load(stage, [*quiet, *vision[stage], *changes]) for stage, changes in cases.values()]
    for steps in run_ranks(train_all, ranks, configs, tmp_path):
        assert steps == [4] * len(cases)


class WatchedOnGpu(TrainingRun):
    """A run in whose steps torch refuses to wait for the GPU, once kernels are compiled and memory is there."""

    def take_step(self) -> dict[str, Tensor]:
        torch.cuda.set_sync_debug_mode("error" if self.step >= 2 else "default")
        try:
            return super().take_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("stage", ["mim", "clip"])
def test_no_step_waits_for_a_gpu(base: list[str], tmp_path: Path, stage: str, optimizer: str) -> None:
    bf16 = ["hardware=auto", "precision.compute=bf16", f"optim.name={optimizer}", "train.steps=6"]
    quiet = ["eval.shards=", "eval.knn_shards=", "tracking.enabled=false", "init.vision=none"]
    config = load(stage, [*base, *bf16, *quiet])
    with process_groups.init_distributed(config.parallel, config.hardware) as ranks:
        run = start(WatchedOnGpu, STAGES[stage](config, ranks), config, tmp_path, ranks)
        train(run)
    assert run.step == 6


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
    ],
)
def test_what_waits_is_caught(read: Any) -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        read(torch.arange(4.0))
