"""A run that is killed, stopped or fails, and the same command again."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.stages.conftest import Refused, Run
from tests.stages.runs import (
    QUIET,
    history,
    interrupt,
    killed_at_each_update,
    records,
    result,
    run_stage,
    start_command,
)
from w2s.checkpoint.own import checkpoint_folders
from w2s.errors import StopRun, UserError
from w2s.stages.mim import MaskedStage

STEPS = 40
EVERY = 5
"""Steps between checkpoints."""


def status(client: MlflowClient, run: Path) -> str:
    return str(client.get_run((run / "mlflow_run_id").read_text().strip()).info.status)


@pytest.mark.parametrize(
    ("stage", "signals", "workers"),
    [
        pytest.param("clip", [signal.SIGKILL], (0, 1), marks=pytest.mark.slow),
        pytest.param("mim", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], (1, 0), marks=pytest.mark.slow),
    ],
)
def test_interrupted_runs_give_the_numbers_of_one_that_was_not(
    stage: str,
    signals: list[signal.Signals],
    workers: tuple[int, int],
    base: list[str],
    root: Path,
    client: MlflowClient,
) -> None:
    """Bit for bit: loss, gradient norm and learning rate of every step; also with another number of workers."""
    options = [*base, "eval.shards=", "eval.knn_shards=", f"train.steps={STEPS}", f"checkpoint.every={EVERY}"]
    options.append("model.vision.drop_path=0.3")
    by_stage = {
        "mim": ["teacher.target_norm=standardize", "mim.summary_weight=0.5"],
        "clip": ["init.vision=none", "checkpoint.async_save=true"],
    }
    options += by_stage[stage]
    whole = run_stage(stage, [*options, f"run.name={stage}-whole", "tracking.enabled=false"])
    run, again = root / f"{stage}-broken", [*options, f"run.name={stage}-broken"]
    step = 0
    for signum in signals:
        command = start_command("stage", stage, *again, f"data.workers={workers[0]}")
        code, error = interrupt(command, signum, run, step + 2 * EVERY + 1)  # the next save waits for the one before
        saved = checkpoint_folders.latest(run)
        assert saved is not None
        done = records(run)[-1]["step"]
        step = checkpoint_folders.read_meta(saved).step
        assert EVERY <= step < STEPS
        assert not (run / "result.json").exists()
        if signum == signal.SIGKILL:
            assert code == -signal.SIGKILL
            assert (done > step, step % EVERY) == (True, 0)
        else:
            assert code == 128 + signum
            # Libraries may warn before it.
            assert [line for line in error.splitlines() if line.startswith("error")] == [
                f"error: stopped by {signum.name} at step {step}, saved in {run}: repeat the command to resume"
            ]
            assert (done, status(client, run)) == (step, "KILLED")
    run_stage(stage, [*again, f"data.workers={workers[1]}"])

    for name in ("step", "samples_seen", "loss", "grad_norm", "lr"):
        assert history(run, name) == history(whole, name), name
    assert len(set(history(run, "loss"))) == STEPS
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"run_name = '{run.name}'")
    assert [(one.info.run_id, one.info.status) for one in runs] == [
        ((run / "mlflow_run_id").read_text().strip(), "FINISHED")
    ]
    logged = client.get_metric_history(runs[0].info.run_id, "loss")
    assert {point.step: point.value for point in logged} == dict(enumerate(history(whole, "loss"), start=1))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_checkpoints_saves_at_the_step(
    signum: signal.Signals, base: list[str], root: Path, client: MlflowClient
) -> None:
    name = f"stopped-{signum.name}"
    options = [*base, "eval.shards=", "eval.knn_shards=", f"run.name={name}", "checkpoint.every=100"]
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with killed_at_each_update(signum), pytest.raises(StopRun) as caught:
        run_stage("mim", options)
    assert caught.value.exit_code == 128 + signum
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert checkpoint_folders.latest(root / name) == root / name / "checkpoints" / "step-00000001"
    assert status(client, root / name) == "KILLED"
    run_stage("mim", options)
    assert history(root / name, "step") == [1, 2, 3, 4]
    assert status(client, root / name) == "FINISHED"


def test_a_run_whose_loss_is_no_number_fails(w2s: Run, base: list[str], root: Path, client: MlflowClient) -> None:
    options = [*base, "eval.shards=", "eval.knn_shards=", "run.name=diverged", "optim.lr=1e30"]
    options += ["train.log_every=4", "checkpoint.every=3"]
    code, _, error = w2s("stage", "mim", *options)
    assert (code, error.count("\n")) == (1, 1)
    assert error.startswith(
        "error: step 4: loss or gradient norm of the last 2 steps was not a number, or a spike, and"
    )
    assert error.endswith("there is no checkpoint: lower optim.lr, lengthen optim.warmup or look at the data\n")
    assert status(client, root / "diverged") == "FAILED"
    assert not (root / "diverged" / "result.json").exists()
    assert checkpoint_folders.latest(root / "diverged") is None, "what is not a number is not saved"
    assert (root / "diverged" / "report.html").is_file()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_the_steps_is_no_failure(
    signum: signal.Signals,
    w2s: Run,
    base: list[str],
    root: Path,
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MaskedStage, "finish", lambda *_: signal.raise_signal(signum))
    options = [*base, "eval.shards=", "eval.knn_shards=", f"run.name={signum.name}", "train.steps=2"]
    code, _, error = w2s("stage", "mim", *options)
    assert (code, error) == (128 + signum, f"error: stopped by {signum.name}: repeat the command to resume\n")
    assert status(client, root / signum.name) == "KILLED"


def test_a_run_in_the_folder_of_another_one_is_refused(refused: Refused, base: list[str], root: Path) -> None:
    path = root / "owned" / ".owner"
    path.parent.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        error = refused("stage", "mim", *base, *QUIET, "run.name=owned")
        other.kill()
    assert error.startswith(f"error: {path.parent} is in use by another run: wait for its end")


def test_a_finished_run_is_not_run_again(base: list[str], root: Path) -> None:
    options = [*base, *QUIET, "train.steps=2"]
    run = run_stage("mim", [*options, "run.name=done"])
    with pytest.raises(UserError, match=r"^run\.name=done: .*/done is finished: choose another name$"):
        run_stage("mim", [*options, "run.name=done"])
    assert result(run)["stage"] == "mim"
    # Without a name the same command makes the next run.
    before = set(root.glob("mim-tiny-*"))
    run_stage("mim", options)
    run_stage("mim", options)
    first, second = sorted(set(root.glob("mim-tiny-*")) - before)
    assert second.name == f"{first.name}-2"
    assert history(first, "loss") == history(second, "loss")
