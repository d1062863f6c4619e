import errno
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests.stages.shape_images import write_shapes
from w2s import __version__, cli
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.errors import CheckpointError, StopRun
from w2s.objectives.masked_loss import LOSSES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def w2s(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: exit code, standard output, standard error."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["w2s", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Config], None]], None]:
    """Put a function in the place of the masked stage."""

    def replace(function: Callable[[Config], None]) -> None:
        module = types.ModuleType("w2s.stages.mim")
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "w2s.stages.mim", module)

    return replace


def raiser(error: BaseException) -> Callable[[Config], None]:
    def run(config: Config) -> None:
        raise error

    return run


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys; from w2s import cli\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch', 'omegaconf', 'mlflow', 'rich', 'numpy', 'megatron'} & set(sys.modules)))"
    )
    for option, text in (("--help", "doctor"), ("--version", __version__)):
        result = subprocess.run([sys.executable, "-c", script, option], capture_output=True, text=True, check=True)
        assert text in result.stdout
        assert result.stdout.endswith("[]\n")


def test_print_config_is_the_resolved_configuration(w2s: Run) -> None:
    code, output, error = w2s("stage", "clip", "model=tiny", "train.steps=77", "--print-config")
    assert (code, error) == (0, "")
    printed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(output)))
    assert printed == load("clip", ["model=tiny", "train.steps=77"])
    assert printed.train.steps == 77


def test_print_config_refuses_what_would_be_refused_anywhere(w2s: Run) -> None:
    code, output, error = w2s("stage", "mim", "mim.summary_weight=-1", "--print-config")
    assert (code, output) == (2, "") and error == "error: mim.summary_weight=-1 must be at least 0\n"
    code, output, error = w2s("run", "default", "clip:optim.cooldown=2", "--print-config")
    assert (code, output) == (2, "") and "optim.cooldown=2 must be in [0, 1]" in error


def test_a_rehearsal_of_what_cannot_start_gives_its_line_and_exit_code_1(w2s: Run) -> None:
    code, output, error = w2s("rehearse", "mim", "model=tiny", "parallel.pipeline=3", "--gpus", "4")
    assert (code, error) == (1, "")
    assert "wrong: parallel.tensor=1 x parallel.pipeline=3 needs a multiple of 3 ranks" in " ".join(output.split())


FIXED = ("parallel.tensor=1", "parallel.pipeline=4", "parallel.virtual_pipeline=1", "train.micro_batch=32")
"""One layout is planned sooner than all."""


@pytest.mark.parametrize("command", [("stage", "clip", "--print-config"), ("plan", "clip", "--gpus", "256", *FIXED)])
def test_a_random_text_tower_at_a_low_rate_is_doubted_before_anything_runs(w2s: Run, command: Sequence[str]) -> None:
    code, output, error = w2s(*command, "model=eva_18b")
    assert code == 0 and output
    assert error.startswith("warning: the text tower starts from random weights at optim.text_lr=4e-05")


def test_run_prints_the_configuration_of_every_step(w2s: Run) -> None:
    overrides = ["model=tiny", "clip:train.steps=77", "hardware=h100"]
    code, output, error = w2s("run", "default", *overrides, "--print-config")
    assert (code, error) == (0, "")
    documents = output.split("---\n")
    titles = [document.splitlines()[0] for document in documents]
    assert titles[:3] == ["# weak: w2s stage clip", "# mim: w2s stage mim", "# clip: w2s stage clip"]
    printed = [OmegaConf.create(document) for document in documents]
    steps = ["weak", "mim", "clip", "scratch", "eval_weak", "eval", "eval_scratch"]
    assert [config.run.name for config in printed] == steps
    assert printed[2].train.steps == 77
    assert printed[2].init.vision.endswith(f"{printed[0].run.group}/mim")


def test_a_stage_runs_in_this_process(w2s: Run, stage: Callable[..., None]) -> None:
    seen: list[Config] = []
    stage(seen.append)
    assert w2s("stage", "mim", "train.steps=77", "hardware=cpu") == (0, "", "")
    assert [config.train.steps for config in seen] == [77]


def test_under_torchrun_it_is_a_rank(w2s: Run, stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    stage(seen.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = w2s("stage", "mim", "hardware=cpu", "train.micro_batch=24")
    assert (code, error.startswith("error: train.micro_batch=24 does not divide the 32 samples")) == (2, True)
    assert w2s("stage", "mim", "hardware=cpu")[0] == 0
    assert len(seen) == 1
    code, _, error = w2s("stage", "mim", "--nproc", "2")
    assert (code, error) == (2, "error: --nproc 2 under torchrun or srun, which start the ranks: leave --nproc out\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage", "mim", "train.stepz=3"], "unknown key train.stepz: did you mean train.steps?"),
        (["stage", "mim", "--nproc", "0"], "Invalid value for '--nproc'"),
        (["stage", "mmi"], "stage mmi does not exist: did you mean mim? There are mim, clip, eval"),
        (["stage"], "Missing argument"),
        (["stage", "mim", "--nprox", "2"], "No such option: --nprox"),
        (["stages"], "No such command 'stages'"),
        (["run", "deflaut"], "run=deflaut does not exist: did you mean run=default?"),
        (
            ["data", "make", "x", "--out", "y", "--like", "pets"],
            "--split, --like and --prompt are for a test set: add --layout clip_benchmark",
        ),
        (
            ["data", "make", "x", "--out", "y", "--layout", "clip_benchmark", "--split", "a/b"],
            "--split a/b: use test or train",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(w2s: Run, arguments: list[str], message: str) -> None:
    code, output, error = w2s(*arguments)
    assert (code, output) == (2, "")
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (CheckpointError("no run x: use latest"), 2, "error: no run x: use latest\n"),
        (StopRun("stopped by SIGTERM at step 3", signal.SIGTERM), 143, "error: stopped by SIGTERM at step 3\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (RuntimeError("size mismatch\n  of two"), 1, "error: RuntimeError: size mismatch of two\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a"),
            2,
            "error: cannot use /runs/a: No space left on device: free it, or choose another folder with "
            "run.root=FOLDER\n",
        ),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS)),
            2,
            "error: cannot use the run folder: Read-only file system: free it, or choose another folder with "
            "run.root=FOLDER\n",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/x"),
            1,
            "error: FileNotFoundError: [Errno 2] No such file: '/x'\n",
        ),
    ],
)
def test_a_failure_is_one_line(
    w2s: Run, stage: Callable[..., None], failure: BaseException, code: int, line: str
) -> None:
    stage(raiser(failure))
    assert w2s("stage", "mim", "hardware=cpu") == (code, "", line)


def test_debug_shows_the_traceback_before_the_line(w2s: Run, stage: Callable[..., None]) -> None:
    stage(raiser(RuntimeError("boom")))
    code, _, error = w2s("stage", "mim", "hardware=cpu", "--debug")
    assert code == 1
    assert error.startswith("Traceback")
    assert error.endswith("error: RuntimeError: boom\n")


def test_a_failed_rank_gives_one_line_and_its_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "command.py"  # a file, as the installed command is: each rank imports it again
    script.write_text(
        "import os, sys, types\nfrom w2s.cli import main\nfrom w2s.errors import DataError\n"
        "def run(config):\n    if os.environ['RANK'] == '1': raise DataError('shard is missing')\n"
        "sys.modules['w2s.stages.mim'] = types.SimpleNamespace(run=run)\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    arguments = ["stage", "mim", "hardware=cpu", "train.micro_batch=32", "--nproc", "2"]
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: shard is missing\n")


def completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str, *words: str) -> set[str]:
    """What a shell is told of the last word; bash takes `=` for a word of its own."""
    if shell == "bash":
        variables = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    else:
        variables = {"_TYPER_COMPLETE_ARGS": " ".join(words), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    for name, value in {"_W2S_COMPLETE": f"complete_{shell}", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["w2s"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    return set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("shell", "words", "found"),
    [
        ("bash", ["w2s", "rep"], {"report"}),
        ("bash", ["w2s", "stage", "m"], {"mim"}),
        ("bash", ["w2s", "stage", "mim", "optim.weight"], {"optim.weight_decay="}),
        ("bash", ["w2s", "stage", "mim", "model", "=", "eva_8"], {"eva_8b", "eva_8b_448"}),
        ("bash", ["w2s", "stage", "mim", "mim.loss", "="], set(LOSSES)),
        ("fish", ["w2s", "stage", "mim", "model=eva_8"], {"model=eva_8b", "model=eva_8b_448"}),
        ("fish", ["w2s", "stage", "mim", "tracking.enabled=f"], {"tracking.enabled=false"}),
        ("fish", ["w2s", "run", "sh"], {"showcase"}),
    ],
)
def test_completion(
    shell: str,
    words: list[str],
    found: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert completed(monkeypatch, capsys, shell, *words) == found


def test_runs_are_completed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for folder, file in (("mim-1", "config.yaml"), ("run-2", "group.json"), ("run-2/clip", "config.yaml")):
        (tmp_path / "runs" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / folder / file).write_text("")
    monkeypatch.chdir(tmp_path)
    assert completed(monkeypatch, capsys, "bash", "w2s", "report", "run-2") == {"run-2", "run-2/clip"}
    assert completed(monkeypatch, capsys, "bash", "w2s", "inspect", "m") == {"mim-1"}


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "w2s", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"w2s {__version__}\n"


def test_the_data_commands_count_check_and_show_shards(w2s: Run, tmp_path: Path) -> None:
    shards, sheet = write_shapes(tmp_path / "shapes", 2, seed=0), tmp_path / "sheet.png"
    index = tmp_path / "index"
    code, out, _ = w2s("data", "index", "data=shards", f"data.train={shards}", f"data.index={index}")
    assert (code, out.split(": ", 1)[1]) == (0, "48 samples in 2 shards\n")
    assert [sum(json.loads(sizes.read_text()).values()) for sizes in index.rglob("*.json")] == [48]
    code, out, _ = w2s("data", "check", str(shards))
    assert code == 0 and "48" in out
    code, out, _ = w2s("data", "show", str(shards), "--out", str(sheet), "--count", "4")
    assert code == 0 and out.endswith(f"4 samples drawn: {sheet}\n")
    assert Image.open(sheet).format == "PNG"
    code, _, error = w2s("data", "check", str(shards), "--caption-key", "none")
    assert (code, error) == (
        1,
        "error: 48 of 48 samples are bad: see above; images alone are checked with --caption-key ''\n",
    )
    (shards / "000001.tar").write_bytes(b"no archive")
    code, _, error = w2s("data", "check", str(shards))
    assert code == 1 and error.startswith("error: ")
