"""A web server of a folder that is as slow as asked: `python -m w2s.bench.loaders.server FOLDER LATENCY BANDWIDTH`."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, cast

_CHUNK = 1 << 15


class SlowHandler(SimpleHTTPRequestHandler):
    """Answers each request after a while, and each connection no faster than so many bytes a second."""

    protocol_version = "HTTP/1.1"
    latency = 0.0
    """Seconds before an answer."""
    bandwidth = float("inf")
    """Bytes a second of a connection."""

    def do_GET(self) -> None:
        """Send a file, or what a `Range: bytes=N-` asks of it."""
        time.sleep(self.latency)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        size = path.stat().st_size
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(size - start))
        self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            self.send_body(file)
        return None

    def send_body(self, file: IO[bytes]) -> None:
        """Send the rest of a file."""
        began, sent = time.perf_counter(), 0
        while chunk := file.read(_CHUNK):
            self.wfile.write(chunk)
            sent += len(chunk)
            time.sleep(max(0.0, began + sent / self.bandwidth - time.perf_counter()))

    def handle(self) -> None:
        """Serve a connection until it ends, however it ends."""
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serve(folder: Path, *, latency: float, bandwidth: float) -> Iterator[str]:
    """Serve a folder, in a process of its own, while the block runs; gives its URL, without a slash at its end.

    See `SlowHandler` for latency and bandwidth.
    """
    command = [sys.executable, "-m", "w2s.bench.loaders.server", str(folder), str(latency), str(bandwidth)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield cast("IO[str]", process.stdout).readline().strip()
        finally:
            process.kill()


def main(folder: str, latency: str, bandwidth: str) -> None:
    """Serve for ever, and print the URL."""
    SlowHandler.latency, SlowHandler.bandwidth = float(latency), float(bandwidth)
    ThreadingHTTPServer.request_queue_size = 128
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowHandler, directory=folder)) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
