"""A sample as a shard has it, whatever kind of file the shard is."""

from dataclasses import dataclass

DONE = -1
"""Place in a shard behind which nothing comes."""


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


def caption_file(caption_key: str) -> str:
    """Return the extension of the file that holds a caption: of `json.KEY` it is `json`."""
    return "json" if caption_key.startswith("json.") else caption_key
