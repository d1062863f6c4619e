"""tools/w2s.sbatch with stand-ins for Slurm's commands: when the job is queued again, and when it is not."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "w2s.sbatch"


def _run(folder: Path, code: int, count: int = 0) -> tuple[int, str, str]:
    """Exit code of the job, what it has told `scontrol`, and how `srun` was called."""
    for name, body in {
        "srun": f'echo "$@" > {folder}/srun\nexit {code}',
        "scontrol": f'echo "$@" > {folder}/scontrol',
    }.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    slurm = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(count), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SCRIPT), "stage", "mim", "run.name=a b"], env=os.environ | slurm, text=True)
    told = folder / "scontrol"
    return done.returncode, told.read_text().strip() if told.exists() else "", (folder / "srun").read_text().strip()


@pytest.mark.parametrize(
    ("code", "count", "told"),
    [
        (0, 0, ""),
        (2, 0, ""),
        (1, 0, "requeue 17"),
        (143, 3, "requeue 17"),
        (137, 19, "requeue 17"),
        (1, 20, ""),
    ],
)
def test_a_job_is_queued_again_where_that_helps(tmp_path: Path, code: int, count: int, told: str) -> None:
    ended, found, called = _run(tmp_path, code, count)
    assert found == told
    assert ended == (0 if told else code)
    assert called == "--kill-on-bad-exit=1 w2s stage mim run.name=a b"
