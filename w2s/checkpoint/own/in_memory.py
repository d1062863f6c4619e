"""The newest checkpoint in the memory of the hosts, for ranks that are started again on them.

/dev/shm/w2s-…-memory/RUN/rank-3.step-400.CRC32.safetensors   what rank 3 holds: on its own host, and on the next one

The folder bears the number of the process that starts the ranks, and goes with it (`w2s/processes/cleanup.py`). Each
rank keeps its tensors as they lie in its layout, with no other rank's help, so that one of several hosts may be lost.
The older checkpoint goes when all ranks have the newer.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from w2s.checkpoint.own.checkpoint_folders import Meta
from w2s.checkpoint.safetensors_header import safetensors_header
from w2s.config.sections import Config
from w2s.errors import CheckpointError, ConfigError
from w2s.files import checksum
from w2s.megatron.parallel.process_groups import Ranks
from w2s.processes.cleanup import in_memory
from w2s.processes.forks import started_by
from w2s.redaction import resolved

_NAME = re.compile(r"rank-(\d+)\.step-(\d+)\.([0-9a-f]{8})\.safetensors")
_GENERATIONS = 2
"""Checkpoints that are there while the newer one is written."""
_LAYOUT = ("parallel", "precision")
"""Sections that say how tensors lie on the ranks."""
_GIB = 2**30


class Part(NamedTuple):
    """What one rank holds of a checkpoint."""

    rank: int
    step: int


class Copy(NamedTuple):
    """A file with a part."""

    name: str
    size: int


class HostMemory:
    """The checkpoints of a run in memory; every rank makes one, and calls what follows together with the others.

    Args:
        config: the run's.
        run: its folder.
        ranks: this process among all.
        root: where this host keeps them.

    Attributes:
        meta: of the checkpoint that `find` has found.
    """

    def __init__(self, config: Config, run: Path, ranks: Ranks, root: Path | None = None) -> None:
        self._config, self._ranks = config, ranks
        self._root = root or in_memory(started_by())
        self._folder = self._root / hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        self._on_host = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
        self.meta: Meta | None = None

    @property
    def _several_hosts(self) -> bool:
        return self._on_host < self._ranks.world_size

    def check_room(self, size: int) -> None:
        """Refuse to begin where the memory could not hold what this host has to keep.

        Args:
            size: bytes of this rank's part.

        Raises:
            ConfigError: it is too small.
        """
        needed, place = _GENERATIONS * (1 + self._several_hosts) * self._on_host * size, self._root.parent
        room = shutil.disk_usage(place).total if place.is_dir() else 0
        if needed > room:
            raise ConfigError(
                f"checkpoint.memory=true needs {needed / _GIB:.3g} GiB in {place}, which has {room / _GIB:.3g}: make "
                "it larger (docker run --shm-size, mount -o remount,size=), or leave checkpoint.memory out"
            )

    def keep(self, meta: Meta, tensors: Mapping[str, Tensor]) -> int:
        """Keep this rank's part, here and with a rank of the next host; then let the older ones go.

        Returns:
            Its bytes.

        Raises:
            CheckpointError: the memory is full; on every rank, and the older checkpoint stays.
        """
        copy, refused, save = Copy("", 0), "", self._ranks.broadcast(uuid4().hex)
        try:
            copy = self._write(meta, tensors, save)
        except OSError as error:
            refused = str(error)
        self._agree(refused, meta.step)
        if self._several_hosts:
            self._agree(self._exchange(copy), meta.step)
        for part, older in self._listed().items():
            if part.step != meta.step and part.rank in self._kept_here:
                (self._folder / older.name).unlink()
        return copy.size

    @property
    def _kept_here(self) -> set[int]:
        """The ranks whose parts this rank takes care of on its host."""
        rank, size = self._ranks.rank, self._ranks.world_size
        return {rank, (rank - self._on_host) % size} if self._several_hosts else {rank}

    def _write(self, meta: Meta, tensors: Mapping[str, Tensor], save: str) -> Copy:
        rank, head = self._ranks.rank, safetensors_header(tensors, {"meta": json.dumps(asdict(meta)), "save": save})
        target = self._new(rank, len(head) + sum(tensor.nbytes for tensor in tensors.values()))
        parts = target.split([len(head), *(tensor.nbytes for tensor in tensors.values())])
        parts[0].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
        # Straight from where they are; the writer of safetensors copies first, and refuses what shares memory.
        for part, tensor in zip(parts[1:], tensors.values(), strict=True):
            part.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        crc = zlib.crc32(target.numpy().data)
        return self._named(rank, Copy(f"rank-{rank}.step-{meta.step}.{crc:08x}.safetensors", len(target)))

    def _new(self, rank: int, size: int) -> Tensor:
        """Bytes for a rank's part; all memory is taken now, as a write where there is none would be fatal."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = self._folder / f"rank-{rank}.partial"
        with partial.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_file(str(partial), shared=True, size=size, dtype=torch.uint8)

    def _named(self, rank: int, copy: Copy) -> Copy:
        """Give a part that is whole its name; one of the same step, from before a rollback, goes."""
        of_step = copy.name.rsplit(".", 2)[0]
        for path in self._folder.glob(f"{of_step}.*.safetensors"):
            path.unlink()
        (self._folder / f"rank-{rank}.partial").rename(self._folder / copy.name)
        return copy

    def _exchange(self, copy: Copy) -> str:
        """Give a rank of the next host this one's part and take that of the host before; say what was refused."""
        rank, size, group = self._ranks.rank, self._ranks.world_size, self._ranks.control_group
        following, before = (rank + self._on_host) % size, (rank - self._on_host) % size
        theirs = self._ranks.gather(copy)[before]
        sent = dist.isend(_bytes_of(self._folder / copy.name, copy.size), following, group=group)
        refused = self._take(before, theirs, before)
        if sent is not None:
            sent.wait()
        return refused

    def _take(self, rank: int, copy: Copy, source: int) -> str:
        """Receive a rank's part from another one; say what was refused."""
        refused = ""
        try:
            target = self._new(rank, copy.size)
        except OSError as error:
            target, refused = torch.empty(copy.size, dtype=torch.uint8), str(error)
        dist.recv(target, source, group=self._ranks.control_group)
        if not refused:
            self._named(rank, copy)
        return refused

    def _agree(self, refused: str, step: int) -> None:
        """Let all ranks fail where one has."""
        reason = next(filter(None, self._ranks.gather(refused)), "")
        if reason:
            for path in [*self._folder.glob(f"*.step-{step}.*"), *self._folder.glob("*.partial")]:
                path.unlink(missing_ok=True)
            raise CheckpointError(f"step {step} is not kept in {self._root.parent} ({reason}): give it more memory")

    def find(self, at_least: int) -> Meta | None:
        """Find the newest checkpoint of this layout that the hosts hold whole, and bring this rank's part here.

        Args:
            at_least: step; older ones are not wanted.
        """
        everyone = self._ranks.gather(self._listed())
        steps = {part.step for listed in everyone for part in listed if part.step >= at_least}
        for step in sorted(steps, reverse=True):
            parts = {part for listed in everyone for part in listed if part.step == step}
            if parts == {Part(rank, step) for rank in range(self._ranks.world_size)}:
                self._fetch(sorted(parts), everyone)
                meta, save = self._verified(step)
                saves = set(self._ranks.gather(save))
                if len(saves) == 1 and save:
                    self.meta = meta
                    return meta
        return None

    def _fetch(self, parts: Iterable[Part], everyone: list[dict[Part, Copy]]) -> None:
        for part in parts:
            if part in everyone[part.rank]:
                continue
            source = next(rank for rank, listed in enumerate(everyone) if part in listed)
            copy = everyone[source][part]
            if self._ranks.rank == source:
                dist.send(_bytes_of(self._folder / copy.name, copy.size), part.rank, group=self._ranks.control_group)
            elif self._ranks.rank == part.rank:
                self._take(part.rank, copy, source)

    def _listed(self) -> dict[Part, Copy]:
        """What this host holds."""
        copies = {}
        for path in self._folder.glob("*.safetensors"):
            named = _NAME.fullmatch(path.name)
            with suppress(FileNotFoundError):  # another rank has let it go
                if named:
                    copies[Part(int(named[1]), int(named[2]))] = Copy(path.name, path.stat().st_size)
        return copies

    def _own(self, step: int) -> Path | None:
        copy = self._listed().get(Part(self._ranks.rank, step))
        return self._folder / copy.name if copy else None

    def _verified(self, step: int) -> tuple[Meta | None, str]:
        """What is known of this rank's part, and which save it is of; nothing if it is damaged or another layout's."""
        path = self._own(step)
        if path is None or f".{checksum(path).crc32}." not in path.name:
            return None, ""
        with safe_open(path, "pt") as file:
            about = file.metadata()
        content = json.loads(about["meta"])
        now = asdict(self._config)
        if any(content["config"].get(section) != json.loads(json.dumps(now[section])) for section in _LAYOUT):
            return None, ""
        return Meta(**{**content, "config": resolved(content["config"])}), about["save"]

    def read(self) -> dict[str, Tensor]:
        """Return this rank's part of the checkpoint that was found."""
        path = self._own(self.meta.step) if self.meta else None
        if path is None:
            raise CheckpointError(f"{self._folder} holds no checkpoint of rank {self._ranks.rank}: it has been removed")
        with safe_open(path, "pt") as file:
            names: list[str] = file.keys()
            return {name: file.get_tensor(name) for name in names}

    def forget(self) -> None:
        """Let all go that this host holds of the run."""
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def host_memory(config: Config, run: Path, ranks: Ranks) -> Iterator[HostMemory | None]:
    """Give the memory where the configuration wants one; it is for a run that fails, and goes where one has ended."""
    memory = HostMemory(config, run, ranks) if config.checkpoint.memory else None
    yield memory
    if memory is not None:
        memory.forget()


def _bytes_of(path: Path, size: int) -> Tensor:
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
