"""A web server of a folder with the faults of a real one."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import IO, Any

from w2s.bench.loaders.server import SlowHandler


class Faults:
    """What goes wrong, and what was asked for."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.asked: Counter[str] = Counter()
        """Requests by the name of the file."""
        self.refusals: list[int] = []
        """Status codes of the next answers."""
        self.away_until = 0.0
        """Until when every answer is 503, by `time.monotonic`."""
        self.most: int | None = None
        """Bytes after which every connection is cut."""
        self.stalls: list[int] = []
        """Bytes after which the next connections give nothing more; 0 answers nothing at all."""
        self.ended = Event()


class _Handler(SlowHandler):
    def __init__(self, faults: Faults, *args: Any, **options: Any) -> None:
        self.faults = faults
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        with self.faults.lock:
            self.faults.asked[Path(self.path).name] += 1
            refusal = self.faults.refusals.pop() if self.faults.refusals else None
            self.stall = self.faults.stalls.pop() if self.faults.stalls and refusal is None else None
        if time.monotonic() < self.faults.away_until:
            refusal = 503
        if refusal is not None:
            return self.send_error(refusal)
        if self.stall == 0:
            self.faults.ended.wait()
            return None
        return super().do_GET()

    def send_body(self, file: IO[bytes]) -> None:
        most = self.stall or self.faults.most
        if most is None:
            return super().send_body(file)
        self.wfile.write(file.read(most))
        self.wfile.flush()
        if self.stall and file.read(1):
            self.faults.ended.wait()
        self.close_connection = True
        return None


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, Faults]]:
    """Serve a folder while the block runs; yield its URL and the faults, which may be changed meanwhile."""
    faults = Faults()
    handler = partial(_Handler, faults, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{web.server_port}", faults
        finally:
            faults.ended.set()
            web.shutdown()
            thread.join()
