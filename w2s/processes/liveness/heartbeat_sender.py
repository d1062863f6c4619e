"""A rank's side of being watched: a thread that beats once a second, and the watcher's process that it beats to."""

import json
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

import w2s
from w2s.config.sections import HardwareConfig
from w2s.errors import StopRun
from w2s.megatron.parallel.process_groups import Ranks
from w2s.processes.cleanup import temporary
from w2s.processes.failure import FAILURE_FILE
from w2s.processes.liveness.activity import Signs
from w2s.processes.liveness.heartbeat import Board, Heartbeat
from w2s.processes.liveness.watcher import Beat, Setup
from w2s.processes.stopping import signals_blocked

_BEAT_SECONDS = 1.0
_END_SECONDS = 2.0
"""How long a watcher may take to end."""
_ROOT = str(Path(w2s.__file__).parent.parent)
_WATCHER = f"import sys; sys.path.append({_ROOT!r}); from w2s.processes.liveness.watcher import main; main()"


@contextmanager
def watched(hardware: HardwareConfig, ranks: Ranks) -> Iterator[Heartbeat]:
    """Have this rank watched while the block runs; every rank calls.

    Each rank has a watcher, a process without torch, that a rank which is stopped or hangs cannot hold up. The one of
    rank 0 listens on a port; those of the others tell it once a second what they know of theirs (`verdict.py` has the
    rule) and learn whether the run is ended. A watcher ends its rank, which may be stopped, and the rank's helpers, and
    leaves a line for the user. If a rank is killed, its helpers are too.

    Yields:
        Where the rank's thread, the one that calls, notes what it does.
    """
    heartbeat, beating = _begin(hardware, ranks)
    try:
        yield heartbeat
    except StopRun:
        beating.end(failed=False)
        raise
    except BaseException:
        beating.end(failed=True)
        raise
    beating.end(failed=False)


def _begin(hardware: HardwareConfig, ranks: Ranks) -> "tuple[Heartbeat, _Beating]":
    host = os.environ.get("MASTER_ADDR", "localhost")
    listener = _listen(host) if ranks.main and ranks.world_size > 1 else None
    port, token = ranks.broadcast((listener.getsockname()[1] if listener else 0, secrets.token_hex(16)))
    with listener or nullcontext(), tempfile.TemporaryFile() as memory:  # the watcher keeps them open
        memory.write(bytes(Board.SIZE))  # a full disk says so here, and not when it is written to as memory
        memory.flush()
        heartbeat = Heartbeat(Board(memory.fileno()))
        setup = Setup(
            rank=ranks.rank,
            world_size=ranks.world_size,
            pid=os.getpid(),
            timeout=hardware.timeout,
            slow_timeout=hardware.slow_timeout,
            hub=(host, port),
            token=token,
            board=memory.fileno(),
            listener=listener.fileno() if listener else None,
            failure_file=os.environ.get(FAILURE_FILE, ""),
            temporary=str(temporary()),
        )
        return heartbeat, _Beating(setup, heartbeat, Signs(heartbeat, threading.get_ident()))


def _listen(host: str) -> socket.socket:
    """Listen on any free port; where all ranks are on this machine, for this machine alone."""
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


class _Beating:
    """The watcher of this rank, and the thread that tells it what the rank does."""

    def __init__(self, setup: Setup, heartbeat: Heartbeat, signs: Signs) -> None:
        self._setup, self._heartbeat, self._signs = setup, heartbeat, signs
        self._lock, self._ended = threading.Lock(), False
        # What stops the whole process group leaves it alone: its rank may take long to save.
        with signals_blocked():
            self._watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WATCHER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[setup.board, *([] if setup.listener is None else [setup.listener])],
                bufsize=0,
            )
        # Pipes were asked for, so they are there.
        self._beats, self._commands = cast(IO[bytes], self._watcher.stdin), cast(IO[bytes], self._watcher.stdout)
        self._send(asdict(setup))
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        with suppress(OSError, ValueError):  # the watcher is gone, and its pipes
            while not self._ended:
                readable, _, _ = select.select([self._commands], [], [], _BEAT_SECONDS)
                told = os.read(self._commands.fileno(), 64).decode() if readable else "nothing"
                if "end " in told:
                    os._exit(int(told.rpartition("end ")[2]))
                if not told:
                    return
                self._signs.look()
                self._send(self._state(with_stack=told.startswith("stack")))

    def _state(self, with_stack: bool) -> dict[str, Any]:
        beat = Beat(
            count=self._signs.count,
            signal=self._heartbeat.signals[0] if self._heartbeat.signals else 0,
            helpers=self._signs.helpers(),
            pids=tuple(self._heartbeat.all_helpers()),
            report=str(self._heartbeat.report or ""),
            stack=self._signs.stack() if with_stack else "",
            frame=self._signs.place() if with_stack else "",
            in_collective=with_stack and self._signs.in_collective(),
        )
        return asdict(beat)

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            os.write(self._beats.fileno(), json.dumps(message).encode() + b"\n")

    def end(self, failed: bool) -> None:
        """Let the watcher go. Where this rank failed and others run it stays, and sees to it that all end."""
        self._ended = True
        stays = failed and self._setup.world_size > 1
        with suppress(OSError):
            self._send({"end": "failed" if stays else "done"})
        if stays:
            return
        try:
            self._watcher.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._watcher.kill()
            self._watcher.wait()
        for pipe in (self._beats, self._commands):
            pipe.close()
