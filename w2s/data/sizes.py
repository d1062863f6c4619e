"""How many samples shards have: from files beside them, or counted once."""

import hashlib
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from w2s.data.containers import read_shard
from w2s.data.shards import shard_name, without_secrets
from w2s.data.storage import read_text
from w2s.errors import DataError

_THREADS = 16


def count_samples(shards: Sequence[str], index: Path) -> int | None:
    """Return the number of samples in shards, or None where nobody has counted them.

    It is taken from the index that `w2s data index` made, else from `sizes.json` (shard name to count) or img2dataset's
    `*_stats.json` beside the shards, else from `__len__` (their sum) where all shards lie in one folder.

    Args:
        shards: paths or URLs.
        index: folder of the indices.
    """
    sizes = read_index(shards, index) or known_sizes(shards)
    if len(sizes) == len(shards):
        return sum(sizes.values())
    folders = {_folder(shard) for shard in shards}
    total = read_text(f"{folders.pop()}__len__") if len(folders) == 1 else None
    return int(total) if total is not None and total.strip().isdecimal() else None


def known_sizes(shards: Sequence[str]) -> dict[str, int]:
    """Return the samples of those shards that have `sizes.json` or `*_stats.json` beside them."""
    sizes: dict[str, int] = {}
    for folder in sorted({_folder(shard) for shard in shards}):
        members = {shard_name(shard): shard for shard in shards if _folder(shard) == folder}
        sizes |= {members[name]: size for name, size in _read_sizes(f"{folder}sizes.json", members).items()}
    missing = [shard for shard in shards if shard not in sizes]
    with ThreadPoolExecutor(_THREADS) as pool:
        stats = pool.map(lambda shard: _read_sizes(f"{shard.removesuffix('.tar')}_stats.json", ["successes"]), missing)
        return sizes | {shard: found["successes"] for shard, found in zip(missing, stats, strict=True) if found}


def index_shards(shards: Sequence[str], index: Path) -> dict[str, int]:
    """Count the samples of shards by their headers, except where a file beside them says it, and keep the result.

    Raises:
        DataError: a shard cannot be read, or the index cannot be written.
    """
    sizes = known_sizes(shards)
    missing = [shard for shard in shards if shard not in sizes]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes |= dict(zip(missing, pool.map(_count, missing), strict=True))
    path, kept = _index_file(shards, index), {without_secrets(shard): size for shard, size in sizes.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write the index {path} ({error.strerror}): choose another data.index") from error
    return sizes


def read_index(shards: Sequence[str], index: Path) -> dict[str, int]:
    """Return the index of exactly these shards; empty where there is none."""
    names = {without_secrets(shard): shard for shard in shards}
    return {names[name]: size for name, size in _read_sizes(str(_index_file(shards, index)), names).items()}


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


def _folder(shard: str) -> str:
    return shard[: len(shard) - len(shard_name(shard))]


def _read_sizes(path: str, names: Collection[str]) -> dict[str, int]:
    """Return those of the named numbers that a JSON file has; none where there is no such file."""
    text = read_text(path)
    try:
        content = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): repair or remove it") from error
    sizes = {name: content[name] for name in names if name in content} if isinstance(content, dict) else {}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 0:
            raise DataError(f"{path} has {json.dumps(size)} for {name}, no number of samples: repair or remove it")
    return sizes
