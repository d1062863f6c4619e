"""Transformer Engine's own Python under w2s, on a CPU: no GPU has run it yet."""

import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.megatron.fp8.transformer_engine_on_cpu.stub import prepare

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.slow

RELEASES = {"2.12": "transformer-engine==2.12.*", "newest": "transformer-engine"}


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python sources of a release, from the package index."""
    folder = tmp_path_factory.mktemp("release")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, RELEASES[request.param]]
    if subprocess.run(fetch, capture_output=True).returncode:
        pytest.skip(f"the package index has no {RELEASES[request.param]}")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    prepare(folder)
    return folder


def test_what_is_called_has_the_signature_that_it_is_called_with(release: Path) -> None:
    command = [sys.executable, "-m", "tests.megatron.fp8.transformer_engine_on_cpu.signatures", release]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    compared = "\n".join(json.loads(done.stdout.splitlines()[-1]))
    for name in (
        "te.quantized_model_init",
        "te.autocast",
        "super().__init__",
        "super().forward",
        "Float8CurrentScaling",
    ):
        assert name in compared, compared


@pytest.mark.parametrize("ranks", [1, 2])
def test_its_linears_train_as_local_ones_do(release: Path, tmp_path: Path, ranks: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.megatron.fp8.transformer_engine_on_cpu.engine_steps", release, str(ranks)]
    running = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "FOUND": str(tmp_path / "found.json")}
        running.append(subprocess.Popen(command, env=shared | own, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * ranks, errors
    found = json.loads((tmp_path / "found.json").read_text())
    for mode in ("none", "selective", "full"):
        one = found[mode]
        # bfloat16 rounds at 2^-9; a layer's products come in another order, and three layers follow each other.
        assert one["loss"] < 1e-4 and one["gradients"] < 1e-2, mode
        # Twelve linears, whose gradients of the second micro-batch are added up within the product, or after it.
        assert one["accumulated"] >= 12 and one["fused"] < 1e-2, mode
        assert one["checkpoint"] == 1, mode
    fp8 = found["float8"]
    # The emulation rounds what the quantizers round: one rank differs where gradients of weights are added up alone. Of
    # two each adds up a part of a product, and a bit of bfloat16 is a step of FP8 now and then.
    loss, gradients = (1e-6, 5e-3) if ranks == 1 else (2e-3, 0.2)
    assert fp8["loss"] < loss and fp8["gradients"] < gradients
    assert fp8["blockwise loss"] < loss and fp8["blockwise gradients"] < gradients
    # Scales of the step before fit as well; FP8 itself is a tenth of a gradient away from bfloat16.
    assert fp8["delayed loss"] < 2e-3 and fp8["delayed gradients"] < 0.2
