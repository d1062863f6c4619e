import io
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from rich.console import Console

import w2s.bench.doctor
from w2s.bench.doctor import Finding, examine, print_report
from w2s.config.gpu import Card
from w2s.megatron.fp8 import transformer_engine
from w2s.tracking.mlflow.store import connect

HOPPER = Card("NVIDIA H100", (9, 0))


@pytest.fixture(autouse=True)
def no_store_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def finding(name: str, root: Path) -> Finding:
    (found,) = (row for row in examine(root) if row.name == name)
    return found


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = w2s.bench.doctor._installed
    names = {name.replace("_", "-"): found for name, found in versions.items()}
    monkeypatch.setattr(w2s.bench.doctor, "_installed", lambda name: names[name] if name in names else real(name))


def test_everything_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    names = [row.name for row in examine(tmp_path / "runs")]
    for name in (
        "Python",
        "torch",
        "megatron-core",
        "CUDA",
        "cores",
        "memory",
        "disk",
        "MLflow store",
        "demo packages",
    ):
        assert name in names
    assert list(tmp_path.iterdir()) == []


def test_missing_pieces_say_what_they_would_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, transformer_engine=None, resvg_py=None, megatron_core=None)
    transformer_engine = finding("Transformer Engine", tmp_path)
    assert (transformer_engine.state, transformer_engine.value) == (
        "missing",
        "not installed",
    ) and "w2s[gpu]" in transformer_engine.note
    demo = finding("demo packages", tmp_path)
    assert demo.state == "missing" and "resvg-py" in demo.value and "w2s[demo]" in demo.note
    assert finding("megatron-core", tmp_path).state == "broken"


def test_tools_that_fetch_the_showcase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apt-get", "dpkg-deb"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = finding("showcase tools", tmp_path)
    assert (found.state, found.value) == ("missing", "without npm") and "Fluent Emoji" in found.note
    (tmp_path / "npm").symlink_to(tmp_path / "apt-get")
    assert finding("showcase tools", tmp_path).state == "ok"


def test_a_broken_transformer_engine_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = "libcudart.so: not found"
    pretend_installed(monkeypatch, transformer_engine="2.12.0")
    row = finding("Transformer Engine", tmp_path)
    assert (row.state, row.value) == ("missing", "2.12.0, not loaded without a GPU")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("w2s.bench.doctor.cards", lambda: [])
    monkeypatch.setattr("w2s.config.gpu.card", lambda: HOPPER)
    monkeypatch.setattr(transformer_engine, "_problems", [problem])
    row = finding("Transformer Engine", tmp_path)
    assert row.state == "broken" and "2.12.0" in row.value
    assert row.note.startswith(f"{problem}; install the release that was built for torch")


def test_the_linear_layers_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finding("linear layers", tmp_path).value == "Megatron-Core's own: there is no GPU"
    monkeypatch.setattr("w2s.config.gpu.card", lambda: HOPPER)
    monkeypatch.setattr("w2s.config.gpu.transformer_engine_installed", lambda: True)
    assert finding("linear layers", tmp_path).value == "Transformer Engine's: NVIDIA H100 with Transformer Engine"
    monkeypatch.setattr(transformer_engine, "_problems", ["libcudart.so: not found"])
    broken = finding("linear layers", tmp_path)
    assert (broken.value, broken.state) == ("Transformer Engine's, which cannot be loaded", "broken")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    row = finding("disk", tmp_path / "file" / "runs")
    assert row.state == "broken" and "run.root=" in row.note


def test_a_store_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        row = finding("MLflow store", tmp_path)
    assert row.state == "broken" and "does not answer" in row.value


def test_a_store_that_answers_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has just been started takes longer than a request may."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    asked = []

    def search(_: object, max_results: int) -> None:
        asked.append(max_results)
        if len(asked) < 3:
            try:
                raise TimeoutError("timed out")
            except TimeoutError as error:
                raise MlflowException("API request failed") from error

    monkeypatch.setattr(MlflowClient, "search_experiments", search)
    assert finding("MLflow store", tmp_path) == Finding("MLflow store", "http://127.0.0.1:9")
    assert len(asked) == 3
    monkeypatch.setattr("w2s.bench.doctor._PATIENCE", -1.0)
    asked.clear()
    late = finding("MLflow store", tmp_path)
    assert late.state == "broken" and "TimeoutError: timed out" in late.note


def test_a_store_that_answers(tmp_path: Path) -> None:
    new = finding("MLflow store", tmp_path)
    assert new.state == "ok" and "made by the first run" in new.value
    connect(f"sqlite:///{tmp_path / 'mlflow.db'}").search_experiments()
    assert finding("MLflow store", tmp_path).value == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_store_of_sqlite_is_read_without_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("MLflow was asked")

    connect(f"sqlite:///{tmp_path / 'mlflow.db'}").search_experiments()
    monkeypatch.setattr("w2s.bench.doctor.load_mlflow", refuse)
    monkeypatch.setattr("w2s.bench.doctor.connect", refuse)
    assert finding("MLflow store", tmp_path).state == "ok"


def test_a_file_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, and long enough to be taken for the head of one" * 20)
    row = finding("MLflow store", tmp_path)
    assert row.state == "broken" and "DatabaseError: file is not a database" in row.note


def test_the_printed_table(tmp_path: Path) -> None:
    text = io.StringIO()
    print_report(tmp_path, Console(file=text, width=200))
    assert "Python" in text.getvalue()
    assert "w2s[gpu]" in text.getvalue()
