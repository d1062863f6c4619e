"""One owner of a run folder: a second run in the same folder is refused."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from w2s.errors import UserError
from w2s.files import writing
from w2s.megatron.parallel.process_groups import Ranks

logger = logging.getLogger(__name__)

_NAME = ".owner"
_HELD = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def owned(run: Path, ranks: Ranks) -> Iterator[None]:
    """Own a run folder while the block runs; every rank calls, the main one holds the lock for all of them.

    It is a POSIX record lock (`fcntl`) on `.owner`, a file with host, process and time of the owner. The kernel gives
    it back when the process ends, however it ends, and no child inherits it: neither a writer of checkpoints nor a
    reading process keeps a folder for a run that was killed. NFS hands such locks to its server (version 4 itself,
    version 3 by lockd), so they hold between machines. There the lock of a *machine* that died is given back when its
    lease expires (version 4: after 90 s unless the server says otherwise) or when it has booted again (version 3). A
    file system without locks gets a note instead: there nobody watches.

    Raises:
        UserError: another process owns the folder, or it cannot be written; on every rank.
    """
    held: list[IO[str]] = []
    ranks.on_main(lambda: held.append(_take(run)))
    try:
        yield
    finally:
        for file in held:
            _leave(run, file)


def _leave(run: Path, file: IO[str]) -> None:
    """Give a folder back; one in which there is nothing, as of a run that was refused, is removed."""
    with suppress(OSError):  # another run has begun there, or the folder is gone
        if [path.name for path in run.iterdir()] == [_NAME]:
            (run / _NAME).unlink()
            run.rmdir()
    file.close()


def _take(run: Path) -> IO[str]:
    with writing(run / _NAME) as path:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                owner = _describe(file)
                file.close()
                raise UserError(
                    f"{run} is in use by {owner}: wait for its end, stop it, or choose another run.name"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s is on a file system without locks: start no second run there", run)
        if not _is_there(path, file):  # the owner before has removed it in this moment
            file.close()
            return _take(run)
        file.truncate(0)
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        file.write(json.dumps(mine))
        file.flush()
        return file


def _is_there(path: Path, file: IO[str]) -> bool:
    """Whether the open file is the one that others find at its path."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))


def _describe(file: IO[str]) -> str:
    file.seek(0)
    try:
        owner = json.load(file)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it has only just taken the lock
        return "another run"
