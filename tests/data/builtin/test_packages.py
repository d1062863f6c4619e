"""Packages that cannot be had are one reason each; fetched ones are unpacked. No network: the tools are scripts."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from w2s.data.builtin.packages import Package, SourceMissing, fetch_deb, fetch_npm


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where commands are looked for first, and of the rest only what scripts need."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin")
    return folder


def script(tools: Path, name: str, text: str) -> None:
    (tools / name).write_text(f"#!/bin/sh\n{text}\n")
    (tools / name).chmod(0o755)


def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_a_tool_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceMissing, match=r"^apt-get is not on this machine$"):
        fetch_deb("pictures", scratch(tmp_path))
    with pytest.raises(SourceMissing, match=r"^npm is not on this machine$"):
        fetch_npm("pictures", "1.0", tmp_path / "scratch")


def test_a_package_that_is_not_there(tmp_path: Path, tools: Path) -> None:
    script(tools, "apt-get", 'case "$*" in *download*) echo "E: Unable to locate package" >&2; exit 100;; esac')
    with pytest.raises(SourceMissing, match=r"^apt-get download pictures failed: E: Unable to locate package$"):
        fetch_deb("pictures", scratch(tmp_path))
    script(tools, "npm", "exit 7")
    with pytest.raises(SourceMissing, match=r"^npm pack @a/pictures@1\.0 failed: exit code 7$"):
        fetch_npm("@a/pictures", "1.0", tmp_path / "scratch")


def test_lists_that_cannot_be_had_are_the_reason_for_each_package(tmp_path: Path, tools: Path) -> None:
    script(tools, "apt-get", 'for last; do :; done; [ "$last" != update ] || { echo "E: no mirror" >&2; exit 100; }')
    folder = scratch(tmp_path)
    for package in ("pictures", "more"):
        with pytest.raises(SourceMissing, match=r"^apt-get -qq update failed: E: no mirror$"):
            fetch_deb(package, folder)


def test_a_deb_is_unpacked_and_the_lists_are_fetched_once(tmp_path: Path, tools: Path) -> None:
    log = tmp_path / "log"
    script(tools, "apt-get", f'for last; do :; done; echo "$last" >> {log}; [ "$last" = update ] || touch "$last.deb"')
    script(tools, "dpkg-deb", '[ "$1" = -f ] && echo 2.0-1 || { [ -f "$2" ] && touch "$3/unpacked"; }')
    folder = scratch(tmp_path)
    fetched = fetch_deb("pictures", folder)
    assert fetched == Package(folder / "pictures", "pictures 2.0-1")
    assert (fetched.folder / "unpacked").is_file()
    fetch_deb("more", folder)
    assert log.read_text().split() == ["update", "pictures", "more"]


def test_an_npm_package_is_unpacked(tmp_path: Path, tools: Path) -> None:
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/assets/1f600.webp"), io.BytesIO())
    script(tools, "npm", f"cp {tmp_path}/made.tgz pictures-1.0.tgz")
    fetched = fetch_npm("@a/pictures", "1.0", scratch(tmp_path))
    assert fetched.label == "@a/pictures 1.0"
    assert [path.name for path in (fetched.folder / "assets").iterdir()] == ["1f600.webp"]
