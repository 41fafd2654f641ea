"""What the tests start in processes of its own: Python code, the command line, servers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = str(Path(__file__).parent)


def python(code: str, *arguments: Any) -> list[str]:
    """A command that runs `code`, with tests/ in its path and without PyTorch."""
    begin = f"import sys; sys.path.append({TESTS!r}); import without_torch, quick_transformers\n"
    return [sys.executable, "-c", begin + code, *map(str, arguments)]


def command(*arguments: Any) -> list[str]:
    """The command line, on the device that is tested."""
    return python("import backend; from kvpred_mlx.cli import main; main()", *arguments)


@contextmanager
def serving(starting: list[str]) -> Iterator[tuple[str, subprocess.Popen, list[str]]]:
    """(URL, process, log) of a server; `starting` gets a free port of the loopback interface at its end.

    Its BLAS has one thread: on two it waits longer for itself than the products of small models take.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen([*starting, "--port", str(port)], stderr=subprocess.PIPE, text=True, env=env)
    log: list[str] = []
    threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True).start()
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        assert process.poll() is None, "the server stopped: " + "".join(log)[-2000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).read()
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    yield url, process, log
    process.terminate()
    process.wait(30)
    assert "Traceback" not in "".join(log), "".join(log)
