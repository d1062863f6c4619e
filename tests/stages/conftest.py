import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.stages.shape_images import write_shapes
from w2s import cli
from w2s.config.sections import HardwareConfig, ParallelConfig
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.tracking.mlflow.store import connect

if TYPE_CHECKING:  # a bare GPU machine has no MLflow and no matplotlib, and its tests need none
    from mlflow import MlflowClient

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@dataclass(frozen=True)
class Material:
    """What every run here is made of."""

    train: Path
    """8 shards of 24 drawn shapes with their names."""
    test: Path
    """Another 24."""
    teacher: Path
    """Weights of timm's smallest ViT, drawn at random."""
    store: Path
    """An MLflow store without runs, where MLflow is installed; a copy is at hand much sooner than a new one."""


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("stages")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit").state_dict(), folder / "teacher.safetensors")
    if find_spec("mlflow"):
        connect(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return Material(
        write_shapes(folder / "train", shards=8, seed=0),
        write_shapes(folder / "test", shards=1, seed=1),
        folder / "teacher.safetensors",
        folder / "mlflow.db",
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """As the commands in processes of their own have it, so that sums come in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A handler of an earlier test writes to that test's standard output, which is closed.
    monkeypatch.setattr(logging.getLogger("w2s"), "handlers", [])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, material: Material) -> Path:
    """A folder of runs with an MLflow store."""
    folder = tmp_path_factory.mktemp("runs")
    if material.store.exists():
        shutil.copy(material.store, folder / "mlflow.db")
    return folder


@pytest.fixture(scope="module")
def client(root: Path) -> "MlflowClient":
    return connect(f"sqlite:///{root / 'mlflow.db'}")


@pytest.fixture(scope="module")
def vit(material: Material) -> str:
    """A vision teacher with a feature for each of the student's patches."""
    return f"{{name: vit, source: 'timm:test_vit@{material.teacher}', image_size: 64, target_norm: standardize}}"


@pytest.fixture(scope="module")
def two(vit: str) -> str:
    """Beside it a CLIP of another kind, grid (6 x 6 patches) and width, by another loss."""
    clip = "{name: clip, source: 'eva:tiny', image_size: 48, target_norm: phi_s, loss: mse, weight: 0.5}"
    return f"teachers=[{vit}, {clip}]"


@pytest.fixture(scope="module")
def common(material: Material) -> list[str]:
    """Overrides for a masked stage with teachers of its own."""
    return [
        "model=tiny",
        "model.vision.layers=4",
        "hardware=cpu",
        "data.builtin=none",
        f"data.train={material.train}",
        "data.workers=0",
        "eval.shards=",
        "eval.knn_shards=",
        "train.steps=3",
        "train.global_batch=16",
        "train.micro_batch=16",
        "optim.warmup=1",
        "optim.lr=1e-4",
        "init.post_norm=0.5",
        "mim.summary_weight=0.5",
    ]


@pytest.fixture(scope="module")
def base(root: Path, material: Material) -> list[str]:
    """Overrides for the smallest runs: four steps of 16 samples."""
    return [
        f"run.root={root}",
        "model=tiny",
        "hardware=cpu",
        f"teacher.source=timm:test_vit@{material.teacher}",
        "teacher.image_size=64",
        "data.builtin=none",
        f"data.train={material.train}",
        "data.lanes=4",
        "data.workers=0",
        f"eval.shards={material.test}",
        f"eval.knn_shards={material.train}",
        "train.steps=4",
        "train.global_batch=16",
        "train.micro_batch=16",
        "train.log_every=1",
        "optim.warmup=1",
        "tracking.system_metrics=false",
        "tracking.pictures=2",
    ]


@pytest.fixture(scope="module")
def tiny(material: Material) -> list[str]:
    """Overrides for the smallest trainings that are not measured: 16 samples a step, the vision tower from scratch."""
    return [
        "model=tiny",
        "hardware=cpu",
        "data.builtin=none",
        f"data.train={material.train}",
        "data.workers=0",
        "eval.shards=",
        "train.global_batch=16",
        "train.micro_batch=16",
        "init.vision=none",
    ]


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """One process with Megatron's groups, for one test: the runs of other tests make their own."""
    with process_groups.init_distributed(ParallelConfig(), HardwareConfig(device="cpu")) as ranks:
        yield ranks


@pytest.fixture
def w2s(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["w2s", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run


@pytest.fixture
def refused(w2s: Run) -> Refused:
    """Run a command that is refused: exit code 2, and the one line that it says."""

    def run(*arguments: str) -> str:
        code, _, error = w2s(*arguments)
        assert (code, error.count("\n")) == (2, 1)
        return error

    return run
