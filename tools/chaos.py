"""Faults of a cluster on small runs of this machine: what survives, what is lost, how soon it is back.

    python tools/chaos.py                        # everything: half an hour on two cores; writes .chaos/trials.jsonl
    python tools/chaos.py --kills 3 --stops 0    # fewer
    python tools/chaos.py --table                # the table for docs/reliability.md of what .chaos holds

Two ranks train `model=tiny` for 48 steps with a checkpoint every 6, in every layout, stage and kind of checkpoint, and
are hit. A trial has survived when the run, repeated where it had ended, comes to its end; when each step's loss, norm
and rate are those of the run that nothing befell, bit for bit, or, where a flipped bit has gone into an update before
replicas are compared, the last ten losses are within 1 % in the mean; when no process that it started is there 30 s
after each end, and at last no temporary folder or semaphore. The same command continues with the trials that are
missing. Commands are forked from this process, which has imported what takes seconds.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from chaos_faults import Fault

from w2s import cli, launch
from w2s.processes.cleanup import temporary

FORK = multiprocessing.get_context("fork")
STEPS, EVERY, TIMEOUT = 48, 6, 5
LAST = 10
"""Losses that are compared where not every step can be the same."""
DEADLINE = 180
OPTIONS = (
    "model=tiny",
    "hardware=cpu",
    f"hardware.timeout={TIMEOUT}",
    "eval.shards=",
    "eval.knn_shards=",
    "train.global_batch=24",
    "train.log_every=1",
    f"train.check_replicas={EVERY}",
    "optim.warmup=4",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep=3",
    "tracking.enabled=false",
    "tracking.system_metrics=false",
    "data.workers=0",
)
STAGES = {"mim": ["teacher.source=eva:tiny"], "clip": ["init.vision=none"]}
LAYOUTS = {
    "DP2": (2, ["train.micro_batch=12"]),
    "TP2": (2, ["train.micro_batch=24", "parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["train.micro_batch=12", "parallel.pipeline=2"]),
    "DP3": (3, ["train.micro_batch=8", "data.lanes=12"]),
}
DAMAGES = ("cut", "emptied", "zeroed", "removed", "with a flipped bit", "garbled")
LONG = 240
"""Steps of flips: where one goes into an update it takes some to catch up."""


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    layout: str
    stage: str
    background: bool
    steps: int = STEPS

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.stage}-{self.layout}-{'async' if self.background else 'sync'}-{self.steps}"

    @property
    def arguments(self) -> list[str]:
        """The arguments of the command."""
        ranks, layout = LAYOUTS[self.layout]
        length = [f"train.steps={self.steps}", f"optim.spike_window={self.steps // 6}"]
        saving = f"checkpoint.async_save={str(self.background).lower()}"
        return ["stage", self.stage, *OPTIONS, *STAGES[self.stage], *layout, *length, saving, "--nproc", str(ranks)]


SETTINGS = [Setting(*each) for each in itertools.product(("DP2", "TP2", "PP2"), STAGES, (False, True))]


@dataclass(frozen=True)
class Trial:
    """How one fault ended."""

    fault: str
    number: int
    setting: str
    detail: str
    survived: bool
    steps_lost: int | None
    """Steps that were done again or not at all."""
    seconds: float | None
    """From the fault to the next step that was new to the run."""
    word: str
    """What the run said of it, or what went wrong."""


Act = Callable[[], tuple[int, float, str]]
"""Steps that were lost, seconds until the run was back, and what it said."""


class Failed(Exception):
    """The run did not do what it should."""


class Run:
    """A run of the command that can be hit and repeated."""

    def __init__(self, folder: Path, setting: Setting, fault: Fault | None = None, **options: object) -> None:
        self.setting, self.folder, self.fault = setting, folder / setting.name, fault
        self._options = [f"{key.replace('__', '.')}={value}" for key, value in options.items()]
        self.log = self.folder.with_suffix(".log")
        self._seen: dict[int, psutil.Process] = {}

    def start(self) -> None:
        """Start or repeat the command."""
        place = [f"run.root={self.folder.parent}", f"run.name={self.folder.name}"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")  # what an earlier command has said is not said again
        arguments = [*self.setting.arguments, *place, *self._options]
        self.process = FORK.Process(target=_command, args=(arguments, self.log, self.fault))
        self.process.start()

    def steps(self) -> list[dict[str, Any]]:
        """What is logged of each step."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [record for record in map(json.loads, lines) if "loss" in record]

    @property
    def step(self) -> int:
        """The last step that is logged."""
        return max((record["step"] for record in self.steps()), default=0)

    def family(self) -> list[psutil.Process]:
        """All processes that run for it now, the launcher first."""
        try:
            launcher = psutil.Process(self.process.pid)
            family = [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self._seen |= {process.pid: process for process in family}
        return family

    def wait_for(self, happens: Callable[[], bool], what: str) -> None:
        """Wait until something happens while the command runs."""
        end = time.monotonic() + DEADLINE
        while not happens():
            self.family()
            if not self.process.is_alive() and not happens():
                raise Failed(f"ended before {what}: {self.last_word()}")
            if time.monotonic() > end:
                raise Failed(f"no {what} within {DEADLINE} s")
            time.sleep(0.02)

    def end(self, within: float = DEADLINE) -> int:
        """Wait for the end of the command and of all that it started; return its exit code."""
        end = time.monotonic() + within
        while self.process.is_alive():
            self.family()
            if time.monotonic() > end:
                raise Failed(f"no end within {within:.0f} s")
            self.process.join(0.05)
        until = time.monotonic() + 30
        while (left := [each for each in self._seen.values() if _runs(each)]) and time.monotonic() < until:
            time.sleep(0.05)
        if left:
            raise Failed(f"left behind: {', '.join(' '.join(each.cmdline())[:60] for each in left)}")
        self._seen = {}
        return int(self.process.exitcode or 0)

    def last_word(self) -> str:
        """The last line that is an error, a warning or a note."""
        lines = [line for line in self.log.read_text().splitlines() if re.match("error|warning|note", line)]
        return lines[-1] if lines else ""

    def said(self, pattern: str) -> bool:
        """Whether the command has said something."""
        return re.search(pattern, " ".join(self.log.read_text().split())) is not None

    def kill(self) -> None:
        """End whatever is left of it."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.join()


def _command(arguments: Sequence[str], log: Path, fault: Fault | None) -> None:
    """Be the command `w2s` in a process of its own, whose ranks are forks of it."""
    os.setsid()
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if fault:
        fault.inject()
    config = launch.LaunchConfig
    launch.LaunchConfig = lambda **named: config(**{**named, "start_method": "fork"})  # type: ignore[misc]
    sys.argv = ["w2s", *arguments]
    cli.main()


def _of_dead(path: Path) -> bool:
    pid = re.fullmatch(r"(?:sem\.)?w2s-[0-9a-f]+-([0-9a-f]+)-.*", path.name)
    return pid is not None and not psutil.pid_exists(int(pid[1], 16))


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Chaos:
    """All trials, and the folder that keeps them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trials = folder / "trials.jsonl"
        self.random = random.Random(0)
        folder.mkdir(parents=True, exist_ok=True)

    def done(self) -> list[Trial]:
        """The trials so far."""
        lines = self.trials.read_text().splitlines() if self.trials.is_file() else []
        return [Trial(**json.loads(line)) for line in lines]

    def reference(self, setting: Setting) -> list[dict[str, Any]]:
        """The steps of the run that nothing befalls."""
        run = Run(self.folder / "reference", setting)
        if not (run.folder / "result.json").is_file():
            shutil.rmtree(run.folder, ignore_errors=True)
            run.start()
            if run.end() != 0:
                raise SystemExit(f"the run without a fault failed: {run.last_word()}, see {run.folder}.log")
        return run.steps()

    def check(self, run: Run, exact: bool) -> None:
        """Compare a finished run with the one that nothing befell."""
        left = [path for place in (temporary(), Path("/dev/shm")) for path in place.glob("*w2s-*") if _of_dead(path)]
        if left:
            raise Failed(f"left behind: {left[0]}")
        found, expected = run.steps(), self.reference(run.setting)
        if exact:
            keys = ("step", "samples_seen", "loss", "grad_norm", "lr")
            for ours, theirs in itertools.zip_longest(found, expected, fillvalue={}):
                wrong = [key for key in keys if ours.get(key) != theirs.get(key)]
                if wrong:
                    raise Failed(f"step {ours.get('step')}: {wrong[0]} is {ours.get(wrong[0])}")
            return
        ours, theirs = (statistics.fmean(record["loss"] for record in each[-LAST:]) for each in (found, expected))
        if abs(ours - theirs) > 0.01 * abs(theirs):
            raise Failed(f"the last {LAST} losses are {ours:.4f}, not {theirs:.4f}")

    def repeat(self, fault: str, count: int, settings: Sequence[Setting], act: Callable[..., Trial]) -> None:
        """Do the trials of a fault that are missing, the settings in turn."""
        there = {trial.number for trial in self.done() if trial.fault == fault}
        for index in range(count):
            if index in there:
                continue
            self.random.seed(f"{fault} {index}")
            setting = settings[index % len(settings)]
            self.reference(setting)
            folder = self.folder / fault.replace(" ", "-") / str(index)
            shutil.rmtree(folder, ignore_errors=True)
            trial = act(fault, index, setting, folder)
            with self.trials.open("a") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
            verdict = "survived" if trial.survived else "FAILED"
            print(f"{fault} {index + 1}/{count} {setting.name} {trial.detail}: {verdict}, {trial.word[:150]}")
            if trial.survived:
                shutil.rmtree(folder)

    def trial(self, fault: str, index: int, run: Run, detail: str, act: Act) -> Trial:
        """Judge what an act on a run comes to."""
        survived, lost, seconds = True, None, None
        try:
            lost, seconds, word = act()
        except Failed as failed:
            run.kill()
            survived, word = False, str(failed)
        return Trial(fault, index, run.setting.name, detail, survived, lost, seconds, word)

    def back(self, run: Run, reached: int, since: float) -> tuple[int, float]:
        """Repeat the command after a fault; return the steps that are done again and the seconds until a new one."""
        run.start()
        run.wait_for(lambda: run.said(r"step +\d+/") or run.step > reached, "step of the repeated command")
        steps = re.findall(r"step +(\d+)/", run.log.read_text())  # none yet where metrics.jsonl had later ones
        resumed = min((int(found) for found in steps), default=reached + 1) - 1
        run.wait_for(lambda: run.step > reached, f"step {reached + 1}")
        return reached - resumed, time.monotonic() - since

    def finish(self, run: Run, exact: bool = True) -> None:
        """Wait for the end of a run, which must be a good one."""
        if run.end() != 0:
            raise Failed(run.last_word())
        self.check(run, exact)

    def killed(self, fault: str, index: int, setting: Setting, folder: Path) -> Trial:
        """SIGKILL of a rank, the launcher, all processes, a reading process, a watcher or a writer."""
        targets = ["rank 0", "rank 1", "launcher", "all", "reader", "watcher", *(["writer"] * setting.background)]
        target = targets[(index + index // len(SETTINGS)) % len(targets)]
        at = EVERY * self.random.randint(2, STEPS // EVERY - 3)
        if target != "writer":
            at += self.random.randrange(EVERY)
        dying = Fault("writer", at, index % 2) if target == "writer" else None
        tracked = index % 5 == 0
        run = Run(folder, setting, dying, data__workers=int(target == "reader"), tracking__enabled=str(tracked).lower())

        def act() -> tuple[int, float, str]:
            run.start()
            if target != "writer":
                run.wait_for(lambda: run.step >= at, f"step {at}")
                for process in _targets(run, target):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            since = time.monotonic()
            code, word = run.end(), run.last_word()
            # The run itself need not mind; of replicas one may have nothing to write.
            if code == 0 and target in ("reader", "watcher", "writer"):
                self.check(run, exact=True)
                return 0, 0.0, word
            run.fault = None  # it has done its work
            lost, seconds = self.back(run, run.step, since)
            self.finish(run)
            if tracked:
                _check_mlflow(run)
            return lost, seconds, word

        return self.trial(fault, index, run, f"{target} at step {at}", act)

    def stopped(self, fault: str, index: int, setting: Setting, folder: Path) -> Trial:
        """SIGSTOP of a rank: all end within the time, and the rank is named."""
        run, rank, at = Run(folder, setting), index % 2, self.random.randint(EVERY + 1, STEPS - 2 * EVERY)

        def act() -> tuple[int, float, str]:
            run.start()
            run.wait_for(lambda: run.step >= at, f"step {at}")
            since = time.monotonic()
            for process in _targets(run, f"rank {rank}"):
                process.suspend()
            run.end(TIMEOUT + 10)
            word = run.last_word()
            if f"rank {rank} " not in word:
                raise Failed(f"rank {rank} is not named: {word}")
            lost, seconds = self.back(run, run.step, since)
            self.finish(run)
            return lost, seconds, word

        return self.trial(fault, index, run, f"rank {rank} at step {at}", act)

    def full(self, fault: str, index: int, setting: Setting, folder: Path) -> Trial:
        """A disk that is full for a while, or that stays full until the run has ended."""
        disk = folder / "disk"
        disk.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192M", "tmpfs", str(disk)], check=True)
        # Where one checkpoint stands, and no other is at its last, small files: these end a run (docs/reliability.md).
        run, stays, at = Run(disk, setting), index % 2 == 1, EVERY * self.random.randint(2, STEPS // EVERY // 2) + 2
        run.log = folder / "log"  # not on the full disk

        def act() -> tuple[int, float, str]:
            run.start()
            run.wait_for(lambda: run.step >= at, f"step {at}")
            _fill(disk / "filler")
            run.wait_for(lambda: run.said("training continues"), "word of the full disk")
            word, lost, seconds = run.last_word(), 0, 0.0
            if stays:
                code, word, since = run.end(), run.last_word(), time.monotonic()
                if code != 2 or not word.startswith("error: cannot write"):
                    raise Failed(f"exit code {code}: {word}")
                (disk / "filler").unlink()
                lost, seconds = self.back(run, run.step, since)
            else:
                (disk / "filler").unlink()
            self.finish(run)
            return lost, seconds, word

        try:
            return self.trial(fault, index, run, f"from step {at}, {'to the end' if stays else 'for a while'}", act)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)

    def damaged(self, fault: str, index: int, setting: Setting, folder: Path) -> Trial:
        """A file of the newest checkpoint, or what stands beside it, is damaged while the run is away."""
        run = Run(folder, setting)
        shutil.copytree(self._stopped_run(setting), run.folder)
        newest = max((run.folder / "checkpoints").glob("step-*"))
        files = [*sorted(newest.iterdir()), run.folder / "checkpoints" / "latest", run.folder / "metrics.jsonl"]
        path, how = files[index % len(files)], DAMAGES[index // 3 % len(DAMAGES)]

        def act() -> tuple[int, float, str]:
            _damage(path, how, self.random)
            lost, seconds = self.back(run, int(newest.name.removeprefix("step-")), time.monotonic())
            word = run.last_word()
            # Lines of metrics.jsonl that are gone stay so: what is computed after them is compared.
            self.finish(run, exact=path.name != "metrics.jsonl")
            return lost, seconds, word

        return self.trial(fault, index, run, f"{path.name} {how}", act)

    def _stopped_run(self, setting: Setting) -> Path:
        """The folder of a run with three checkpoints that was asked to stop."""
        run = Run(self.folder / "stopped", setting)
        if not run.folder.is_dir():
            run.start()
            run.wait_for(lambda: run.step >= 5 * EVERY, f"step {5 * EVERY}")
            run.process.terminate()
            run.end()
        return run.folder

    def bad_step(self, fault: str, index: int, setting: Setting, folder: Path) -> Trial:
        """One rank's gradients are not numbers, or far too large."""
        kind, at, rank = ("nan", "spike", "loud")[index % 3], self.random.randint(STEPS // 4, STEPS // 2), index % 2
        run = Run(folder, setting, Fault(kind, at, rank))

        def act() -> tuple[int, float, str]:
            run.start()
            self.finish(run)
            skipped, before = (steps[-1].get("skipped_steps", 0) for steps in (run.steps(), self.reference(setting)))
            if skipped != before + 1:
                raise Failed(f"{skipped} steps were skipped, without the fault {before}")
            if not run.said(f"step {at} was skipped; repeated, it is not reproducible"):
                raise Failed(run.last_word())
            return 1, 0.0, run.last_word()

        return self.trial(fault, index, run, f"{kind} on rank {rank} at step {at}", act)

    def flipped(self, fault: str, index: int, setting: Setting, folder: Path) -> Trial:
        """A bit of a weight in one of two or three replicas, when they are compared and between that."""
        due, rank = index % 3 < 2, index % 2
        at = EVERY * self.random.randint(LONG // 4 // EVERY, LONG // 2 // EVERY) - (0 if due else 3)
        run = Run(folder, setting, Fault("flip", at, rank))

        def act() -> tuple[int, float, str]:
            run.start()
            self.finish(run, exact=due)
            if due and not run.said(r"step \d+: \S+ differs on ranks"):
                raise Failed("nobody noticed")
            lost = EVERY if run.said("rolled back to step") else 0
            return lost, 0.0, run.last_word() or "the next update has overwritten it"

        return self.trial(fault, index, run, f"rank {rank} at step {at}", act)


def _check_mlflow(run: Run) -> None:
    """Each value of each step is in the store, once."""
    with closing(sqlite3.connect(run.folder.parent / "mlflow.db")) as store:
        found = store.execute("select step from metrics where key = 'loss' order by step").fetchall()
    if [step for (step,) in found] != [record["step"] for record in run.steps()]:
        raise Failed(f"MLflow has {len(found)} losses of {len(run.steps())} steps")


def _targets(run: Run, target: str) -> list[psutil.Process]:
    """The processes that a name means."""
    family = run.family()
    if not family:
        return []
    launcher = family[0]
    with suppress(psutil.NoSuchProcess):
        ranks = [each for each in launcher.children() if each.cmdline() == launcher.cmdline()]
        if target == "launcher":
            return [launcher]
        if target == "all":
            return family
        if target.startswith("rank"):
            index = int(target.split()[1])
            return sorted(ranks, key=lambda each: each.pid)[index : index + 1]
        below = [child for rank in ranks for child in rank.children(recursive=True)]
        marks = {"reader": "w2s.data.stream.reader", "watcher": "w2s.processes.liveness.watcher"}
        return [each for each in below if marks[target] in " ".join(each.cmdline())][:1]
    return []


def _fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            return


def _damage(path: Path, how: str, chance: random.Random) -> None:
    """Damage a file in one of the ways of `DAMAGES`."""
    size = path.stat().st_size
    if how == "removed":
        path.unlink()
    elif how == "with a flipped bit":
        content = bytearray(path.read_bytes())
        content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif how in ("zeroed", "garbled"):
        path.write_bytes(bytes(size) if how == "zeroed" else chance.randbytes(size))
    else:
        os.truncate(path, size // 2 if how == "cut" else 0)


def table(trials: Sequence[Trial]) -> str:
    """The table of docs/reliability.md."""
    lines = [
        "| fault | tried | survived | steps lost, median (most) | seconds to be back, median (most) |",
        "|---|---|---|---|---|",
    ]
    for fault in dict.fromkeys(trial.fault for trial in trials):
        of_fault = [trial for trial in trials if trial.fault == fault]
        survived = [trial for trial in of_fault if trial.survived]
        lost = [trial.steps_lost for trial in survived if trial.steps_lost is not None]
        seconds = [trial.seconds for trial in survived if trial.seconds]
        lines.append(f"| {fault} | {len(of_fault)} | {len(survived)} | {_middle(lost)} | {_middle(seconds)} |")
    return "\n".join(lines)


def _middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({max(values):.0f})" if values else "-"


def main(
    folder: Annotated[Path, typer.Option(help="Where runs and results go.")] = Path(".chaos"),
    kills: int = 50,
    stops: int = 10,
    full_disks: int = 10,
    damaged: int = 50,
    bad_steps: int = 10,
    flips: int = 10,
    only_table: Annotated[bool, typer.Option("--table", help="Print the table of what is there.")] = False,
) -> None:
    """Hit small runs with the faults of a cluster."""
    torch.set_num_threads(1)
    for stage in STAGES:
        importlib.import_module(f"w2s.stages.{stage}")
    chaos = Chaos(folder.absolute())
    if not only_table:
        replicas = [Setting(layout, stage, False, LONG) for layout in ("DP2", "DP3") for stage in STAGES]
        chaos.repeat("SIGKILL", kills, SETTINGS, chaos.killed)
        chaos.repeat("SIGSTOP", stops, SETTINGS, chaos.stopped)
        chaos.repeat("bad step", bad_steps, SETTINGS, chaos.bad_step)
        chaos.repeat("flipped bit", flips, replicas, chaos.flipped)
        chaos.repeat("damaged checkpoint", damaged, SETTINGS, chaos.damaged)
        if os.geteuid() == 0:
            chaos.repeat("full disk", full_disks, SETTINGS, chaos.full)
        elif full_disks:
            print("full disks are left out: only root can mount a small one")
    print(table(chaos.done()))
    if any(not trial.survived for trial in chaos.done()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
