import os
import signal
import sys
from contextlib import nullcontext, suppress
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from w2s.errors import DataError, StopRun, UserError
from w2s.processes.elastic import _WARM, RankError, adopt_slurm, check_torchrun, is_rank, launch
from w2s.processes.forks import started_by


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what adopt_slurm sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def _sum_of_ranks(folder: Path) -> None:
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    (folder / f"{os.environ['LOCAL_RANK']}").write_text(f"{total.item()} of {os.environ['LOCAL_WORLD_SIZE']}")
    dist.destroy_process_group()


def _bad_shard_on_rank_1(_: object) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise DataError("shard 000003.tar is missing: fetch it")
    dist.barrier()


def _failure_on_rank_1(_: object) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("a\nb")
    dist.barrier()


def _killed_on_rank_1(_: object) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _failure_beside_a_rank_that_hangs(_: object) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("boom")
    signal.pause()


def _save_when_told_to_stop(folder: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 0:
        os.kill(started_by(), signal.SIGTERM)
    number = signal.sigwait({signal.SIGTERM, signal.SIGINT})
    (folder / f"{dist.get_rank()}").write_text("saved")
    with suppress(RuntimeError):  # one that leaves earlier would break the other's first barrier
        dist.barrier()
    raise StopRun("stopped by SIGTERM at step 3: repeat the command to resume", number)


def _interrupt_the_launcher(_: object) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it may come before it is waited for
    os.kill(started_by(), signal.SIGINT)
    signal.sigwait({signal.SIGINT})
    raise KeyboardInterrupt


def _killed_on_rank_1_beside_one_that_stops(_: object) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    number = signal.sigwait({signal.SIGTERM})
    raise StopRun("stopped by SIGTERM: repeat the command to resume", number)


def _leave(_: object) -> None:
    os._exit(7)


def test_ranks_find_each_other(tmp_path: Path) -> None:
    launch(_sum_of_ranks, tmp_path, 2)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3 of 2", "3 of 2"]
    assert "RANK" not in os.environ


def test_the_error_of_the_rank_that_failed_first_is_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError) as caught:
        launch(_bad_shard_on_rank_1, None, 2)
    assert str(caught.value) == "shard 000003.tar is missing: fetch it"
    assert caught.value.exit_code == 2
    assert "error" not in capfd.readouterr().err.lower()


def test_any_other_exception_names_the_rank_and_keeps_the_traceback() -> None:
    with pytest.raises(RankError) as caught:
        launch(_failure_on_rank_1, None, 2)
    assert str(caught.value) == "rank 1: ValueError: a b"
    assert caught.value.exit_code == 1
    assert "_failure_on_rank_1" in caught.value.rank_traceback


def test_a_killed_rank_is_the_cause_and_not_the_connections_that_it_broke() -> None:
    with pytest.raises(RankError, match=r"^rank 1 was killed by SIGKILL") as caught:
        launch(_killed_on_rank_1, None, 2)
    assert caught.value.exit_code == 128 + signal.SIGKILL


def test_a_killed_rank_is_the_cause_and_not_the_others_that_were_asked_to_stop() -> None:
    with pytest.raises(RankError, match=r"^rank 1 was killed by SIGKILL"):
        launch(_killed_on_rank_1_beside_one_that_stops, None, 2)


def test_a_rank_that_hangs_is_ended() -> None:
    with pytest.raises(RankError, match=r"^rank 1: ValueError: boom$"):
        launch(_failure_beside_a_rank_that_hangs, None, 2)


def test_an_exit_without_a_word() -> None:
    with pytest.raises(RankError, match=r"^rank 0 ended with exit code 7$") as caught:
        launch(_leave, None, 1)
    assert caught.value.exit_code == 7


def test_sigterm_reaches_every_rank_and_they_save_first(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRun, match=r"^stopped by SIGTERM at step 3") as caught:
        launch(_save_when_told_to_stop, tmp_path, 2)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["saved", "saved"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_before_there_is_anything_to_save() -> None:
    with pytest.raises(StopRun) as caught:
        launch(_interrupt_the_launcher, None, 1)
    assert caught.value.exit_code == 128 + signal.SIGINT


def test_ranks_that_do_not_stop_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    with pytest.raises(StopRun, match=r"^stopped by SIGTERM, nothing new was saved: repeat the command"):
        launch(_ignore_the_signal, None, 1)


def _ignore_the_signal(_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(started_by(), signal.SIGTERM)
    while True:
        signal.pause()


def _killed_the_first_time(folder: Path) -> None:
    (folder / "warm").write_text(str(all(name in sys.modules for name in _WARM)))
    if (folder / "killed").exists():
        (folder / os.environ["RANK"]).write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
    elif os.environ["RANK"] == "1":
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        signal.pause()


def _mistake(folder: Path) -> None:
    with (folder / "calls").open("a") as file:
        file.write("x")
    raise DataError("shard 000003.tar is missing: fetch it")


def test_ranks_are_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    forkserver._forkserver._stop()  # type: ignore[attr-defined] # ranks print where the server did at its start
    launch(_killed_the_first_time, tmp_path, 2, restarts=1)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "1"]
    assert (tmp_path / "warm").read_text() == "True", "what takes seconds is imported once, by the server"
    assert "note: a rank was killed; all ranks are started again (1 of 1)\n" in capfd.readouterr().out


def _meet(folder: Path) -> None:
    """Add up over the ranks; one is killed the first time."""
    dist.init_process_group("gloo")
    total = torch.ones(())
    dist.all_reduce(total, group=dist.new_group([0, 1]))
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    (folder / os.environ["RANK"]).write_text(f"{total.item()}")


def test_ranks_that_are_started_again_find_each_other(tmp_path: Path) -> None:
    launch(_meet, tmp_path, 2, restarts=1)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2.0", "2.0"]


@pytest.mark.parametrize(
    ("restarts", "kept", "refused"), [("3", "True", True), ("0", "True", False), ("3", "False", False)]
)
def test_torchruns_ranks_could_be_started_again(
    monkeypatch: pytest.MonkeyPatch, restarts: str, kept: str, refused: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", kept)
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") if refused else nullcontext():
        check_torchrun()


@pytest.mark.slow
def test_a_mistake_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"shard 000003\.tar is missing") as caught:
        launch(_mistake, tmp_path, 1, restarts=2)
    assert caught.value.exit_code == 2
    assert (tmp_path / "calls").read_text() == "x"


def test_srun_with_several_tasks_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_NODELIST": "gpu-a[03,07-08],gpu-b1",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_GTIDS": "8,9,10,11",
        "SLURM_JOB_ID": "123456",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert not is_rank()
    adopt_slurm()
    assert is_rank()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["9", "16", "1", "4", "gpu-a03", "23456"]


def test_one_slurm_task_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    adopt_slurm()
    assert not is_rank()
