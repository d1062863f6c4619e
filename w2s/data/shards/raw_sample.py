"""A sample as a shard has it, whatever kind of file the shard is, and what is said of one that cannot be used."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

DONE = -1
"""Place in a shard behind which nothing comes."""

_SIGNATURES = {
    "png": rb"\x89PNG",
    "webp": rb"RIFF....WEBP",
    "gif": rb"GIF8",
    "bmp": rb"BM",
    "tif": rb"II\*\x00|MM\x00\*",
    "mp4": rb"....ftyp",
    "mkv": rb"\x1aE\xdf\xa3",
    "avi": rb"RIFF....AVI ",
}
_NUMBERED = re.compile(r"(\d+)\.(.+)")


@dataclass(frozen=True)
class RawSample:
    """The files of one sample, or the place where a shard could not be read on."""

    key: str
    shard: str
    files: dict[str, bytes]
    """Contents by lower-case extension."""
    damage: str = ""
    """Why there are no files, or not all; empty for a sound sample."""
    end: int = DONE
    """Place in the shard at which the next sample begins, as its container counts: of a tar file, the byte."""

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(map(len, self.files.values()))


class BadSample(Exception):
    """A sample that is skipped. The message is a short reason, the same for all samples with the same defect."""


@dataclass(frozen=True)
class Skipped:
    """The record of a skipped sample, or of a connection that was opened again."""

    key: str
    shard: str
    reason: str


def caption_file(caption_key: str) -> str:
    """Return the extension of the file that holds a caption: of `json.KEY` it is `json`."""
    return "json" if caption_key.startswith("json.") else caption_key


def find_images(files: Mapping[str, bytes], image_key: str) -> list[bytes]:
    """Return the image or the video of a sample, or the numbered images of a clip in their order; none where none is.

    Args:
        files: contents by extension.
        image_key: extensions, separated by `;`: the first that is there is taken, without a number or with.
    """
    for name in image_key.split(";"):
        if name in files:
            return [files[name]]
        numbered = {
            int(match[1]): files[match[0]] for match in map(_NUMBERED.fullmatch, files) if match and match[2] == name
        }
        if numbered:
            return [numbered[index] for index in sorted(numbered)]
    return []


def kind(extension: str) -> str:
    """Return what a file is, by its extension: that of a numbered one (`000.jpg`) without the number."""
    numbered = _NUMBERED.fullmatch(extension)
    return numbered[2] if numbered else extension


def extension_of(data: bytes) -> str:
    """Return the extension of an image or a video by its first bytes; what is none of these is called a JPEG."""
    return next((name for name, mark in _SIGNATURES.items() if re.match(mark, data, re.DOTALL)), "jpg")
