import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.shard_files import write_shards

SCRIPT = """
import os, signal, sys
from w2s.config.sections import DataConfig
from w2s.data.samples.sample import SampleSpec
from w2s.data.stream.stream import Stream

def main(shards, ending):
    global stream
    data = DataConfig(train=shards, image_key="png", lanes=2, workers=2)
    stream = Stream(data, SampleSpec(image_size=16, grid=2), global_batch=4, seed=0, rank=0, size=1)
    stream.next()
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "raise":
        raise RuntimeError("a failed run")
    for index in (signal.SIGINT, signal.SIGTERM):
        signal.signal(index, lambda *_: None)
        os.killpg(os.getpgid(0), index)
    for _ in range(20):
        stream.next()
    stream.close()
    print("read on")

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("ending", "code", "output"),
    [("kill", -signal.SIGKILL, ""), pytest.param("raise", 1, "", marks=pytest.mark.slow), ("stop", 0, "read on\n")],
)
def test_workers_outlive_stop_signals_and_end_with_the_trainer(
    tmp_path: Path, ending: str, code: int, output: str
) -> None:
    folder = write_shards(tmp_path / "a", [4, 4])
    (tmp_path / "script.py").write_text(SCRIPT)
    # The workers hold the other end of the output, so this returns only when every one of them is gone.
    command = [sys.executable, str(tmp_path / "script.py"), str(folder), ending]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert result.returncode == code, result.stderr
    assert result.stdout == output
