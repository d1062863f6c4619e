"""How many samples shards have: from files beside them, or counted once."""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import shard_folder, shard_name, without_secrets
from w2s.data.shards.storage import read_text
from w2s.errors import DataError

_THREADS = 16


def count_samples(shards: Sequence[str], index: Path) -> int | None:
    """Return the number of samples in shards, or None where nobody has counted them; no shard is asked for.

    It is taken from the index that `w2s data index` made, otherwise from `sizes.json` (shard name to count) beside the
    shards, otherwise from `__len__` (their sum) where all shards lie in one folder.

    Args:
        shards: paths or URLs.
        index: folder of the indices.
    """
    by_folder = _by_folder(shards)
    sizes = read_index(shards, index) or _listed_sizes(by_folder)
    if len(sizes) == len(shards):
        return sum(sizes.values())
    total = read_text(f"{next(iter(by_folder))}__len__") if len(by_folder) == 1 else None
    return int(total) if total is not None and total.strip().isdecimal() else None


def known_sizes(shards: Sequence[str]) -> dict[str, int]:
    """Return the samples of those shards that have `sizes.json` or img2dataset's `*_stats.json` beside them."""
    sizes = _listed_sizes(_by_folder(shards))
    missing = [shard for shard in shards if shard not in sizes]
    with ThreadPoolExecutor(_THREADS) as pool:
        stats = dict(zip(missing, pool.map(_read_stats, missing), strict=True))
    return sizes | {shard: size for shard, size in stats.items() if size is not None}


class Counting:
    """Samples of sources, added up in the background from img2dataset's `*_stats.json`, one file after the other.

    What is found is kept in the index, where the next run finds it.

    Args:
        sources: shards of each source by its name.
        index: folder of the indices.

    Attributes:
        ended: set when all is counted that can be.
    """

    def __init__(self, sources: Mapping[str, Sequence[str]], index: Path) -> None:
        self._sources, self._index = sources, index
        self._found: SimpleQueue[str] = SimpleQueue()
        self.ended = threading.Event()
        threading.Thread(target=self._count, daemon=True).start()

    def news(self) -> list[str]:
        """Return a line for each source that was counted since the last call."""
        return [self._found.get() for _ in range(self._found.qsize())]

    def _count(self) -> None:
        with suppress(DataError):  # a broken file is for `w2s data index` to complain about
            for name, shards in self._sources.items():
                sizes: dict[str, int] = {}
                for shard in shards:
                    size = _read_stats(shard)
                    if size is None:
                        break
                    sizes[shard] = size
                else:
                    _write_index(shards, sizes, self._index)
                    self._found.put(f"{name} has {sum(sizes.values()):,} samples in {len(shards):,} shards")
        self.ended.set()


def index_shards(shards: Sequence[str], index: Path) -> dict[str, int]:
    """Count the samples of shards by their headers, except where a file beside them says it, and keep the result.

    Raises:
        DataError: a shard cannot be read, or the index cannot be written.
    """
    sizes = known_sizes(shards)
    missing = [shard for shard in shards if shard not in sizes]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes |= dict(zip(missing, pool.map(_count, missing), strict=True))
    _write_index(shards, sizes, index)
    return sizes


def read_index(shards: Sequence[str], index: Path) -> dict[str, int]:
    """Return the index of exactly these shards; empty where there is none."""
    return _read_sizes(str(_index_file(shards, index)), shards, without_secrets)


def _write_index(shards: Sequence[str], sizes: Mapping[str, int], index: Path) -> None:
    path, kept = _index_file(shards, index), {without_secrets(shard): size for shard, size in sizes.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write the index {path} ({error.strerror}): choose another data.index") from error


def _index_file(shards: Sequence[str], index: Path) -> Path:
    digest = hashlib.sha256("\n".join(sorted(map(without_secrets, shards))).encode()).hexdigest()[:16]
    return index.expanduser() / f"{digest}.json"


def _count(shard: str) -> int:
    count = 0
    for sample in read_shard(shard, wanted=()):
        if sample.damage:
            raise DataError(f"{shard}: {sample.damage} after {count} samples: replace or remove it")
        count += 1
    return count


def _by_folder(shards: Sequence[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for shard in shards:
        folders.setdefault(shard_folder(shard), []).append(shard)
    return folders


def _listed_sizes(by_folder: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The samples of those shards that a `sizes.json` in their folder names."""
    sizes: dict[str, int] = {}
    for folder, shards in by_folder.items():
        sizes |= _read_sizes(f"{folder}sizes.json", shards, shard_name)
    return sizes


def _read_stats(shard: str) -> int | None:
    return _read_sizes(f"{shard.removesuffix('.tar')}_stats.json", [shard], lambda _: "successes").get(shard)


def _read_sizes(path: str, shards: Sequence[str], key: Callable[[str], str]) -> dict[str, int]:
    """The samples of those shards that a JSON file has under their keys; none where there is no such file."""
    text = read_text(path)
    try:
        content = json.loads(text) if text is not None else None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): repair or remove it") from error
    if not isinstance(content, dict):
        return {}
    sizes = {shard: content[name] for shard in shards if (name := key(shard)) in content}
    for shard, size in sizes.items():
        if not isinstance(size, int) or size < 0:
            raise DataError(
                f"{path} has {json.dumps(size)} for {key(shard)}, no number of samples: repair or remove it"
            )
    return sizes
