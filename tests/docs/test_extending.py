"""docs/extending.md, followed to the letter: its files written, its commands run."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def test_the_afternoon(tmp_path: Path) -> None:
    blocks = re.findall(r'^```(\w+)(?: title="(\S+)")?\n(.*?)^```$', PAGE.read_text(encoding="utf-8"), re.S | re.M)
    for language, title, content in blocks:
        if language == "python":
            (tmp_path / title).write_text(content, encoding="utf-8")
    commands = "".join(content for language, _, content in blocks if language == "bash")
    assert commands.count("w2s stage mim") == 3 and commands.count("pytest") == 2
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^step \d: -?\d+\.\d{4}$", done.stdout, re.M), "what the callback has left"
    assert len(list((tmp_path / "runs").glob("*/config.yaml"))) == 3
