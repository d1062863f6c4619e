"""What tools/release.sh builds: the wheel, installed alone, runs the demo; its tag says what has changed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

import w2s

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both archives, built from a copy of what git has."""
    copy = tmp_path_factory.mktemp("release") / "w2s"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(copy)], check=True)
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([copy / "tools" / "release.sh"], check=True, env=environment)
    return copy / "dist"


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment that has the wheel, and its dependencies from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # Paths in files of packages reached in this way are not followed: the checkout that is installed there is not seen.
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(folder / "bin" / "python"), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--disable-pip-version-check", str(wheel)], check=True)
    return folder / "bin"


@pytest.mark.slow
def test_the_sdist_has_what_the_wheel_is_built_of(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"setup.cfg", "README.md", "LICENSE", "configs/stage/mim.yaml", "w2s/stages/mim.py"} <= names


@pytest.mark.slow
def test_the_tag_has_the_text_of_the_version(dist: Path) -> None:
    command = ["git", "tag", "--list", "--format=%(contents)", f"v{w2s.__version__}"]
    text = subprocess.run(command, cwd=dist.parent, check=True, capture_output=True, text=True).stdout
    assert text.startswith(f"w2s {w2s.__version__} - ")
    assert "Added" in text and "Unreleased" not in text


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    """In an empty folder, with few steps."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = "import w2s, w2s.configs, w2s.stages.mim as mim; print(w2s.__file__, *w2s.configs.__path__, mim.__file__)"
    paths = subprocess.run(
        [installed / "python", "-c", where], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    assert all(Path(path).is_relative_to(installed.parent) for path in paths), paths
    steps = ["optim.warmup=0", *(f"{step}:train.steps=2" for step in ("weak", "mim", "clip"))]
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    shown = subprocess.run(
        [installed / "w2s", "run", *steps], cwd=tmp_path, env={**environment, "XDG_CACHE_HOME": cache},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    (report,) = re.findall(r"\S+report\.html", shown)
    assert (tmp_path / report).is_file()
    assert re.search(r"^.*\beval_scratch\b.*0\.\d+", shown, re.M)
    shutil.rmtree(tmp_path / "runs")
