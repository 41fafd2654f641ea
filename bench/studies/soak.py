"""Many short requests from many clients to `kvpred-mlx serve`: `python -m kvpred_mlx.bench.studies.soak`.

Starts the server on a free port of 127.0.0.1, sends the requests, and prints one line of JSON: how many
answers were lost, how many came per second, and the server's resident memory once it is warm (after a fifth
of the requests), at most, and at the end.  Every tenth request asks for exact prompts, so that the server
changes its mode under load.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from statistics import median, quantiles
from typing import Annotated, Any

import psutil
import typer

from kvpred_mlx.bench.common import command
from kvpred_mlx.console import progress_bar
from kvpred_mlx.progress import ProgressCallback, no_progress

TEXT = """\
import os


def read_lines(path):
    with open(path) as file:
        return file.readlines()


"""
START_SECONDS = 120


def main(
    model: command.Model = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Tokens to generate.")] = 8,
) -> None:
    """Send a server many requests, and see what is lost and what memory it takes."""
    with server(*([model] if model else [])) as (url, process), progress_bar("asking") as progress:
        found = soak(url, process, requests, clients, max_tokens, progress)
    print(json.dumps(found))


def soak(
    url: str,
    process: psutil.Process,
    requests: int,
    clients: int,
    max_tokens: int,
    progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Send `requests` requests from `clients` threads; memory in bytes, times in seconds."""
    finished, memory = count(1), dict[int, int]()
    started = time.perf_counter()

    def one(i: int) -> float | None:
        try:
            return _complete(url, i, max_tokens)["usage"]["ttft"]
        except (OSError, ValueError, LookupError):
            return None
        finally:
            done = next(finished)
            memory[done] = process.memory_info().rss
            progress(done, requests, "asking")

    with ThreadPoolExecutor(clients) as pool:
        ttfts = list(pool.map(one, range(requests)))
    answered = [t for t in ttfts if t is not None]
    seconds = time.perf_counter() - started
    return {
        "requests": requests,
        "clients": clients,
        "lost": requests - len(answered),
        "requests_per_second": round(requests / seconds, 2),
        "ttft_median": round(median(answered), 3) if answered else None,
        "ttft_95": round(quantiles(answered, n=20)[-1], 3) if len(answered) > 1 else None,
        "resident_bytes_warm": memory[max(1, requests // 5)],
        "resident_bytes_most": max(memory.values()),
        "resident_bytes_end": memory[requests],
    }


@contextmanager
def server(*arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """`kvpred-mlx serve` with these arguments on a free port: its URL and its process.

    Raises:
        ChildProcessError: it did not start.
    """
    port = _free_port()
    serve = [sys.executable, "-m", "kvpred_mlx", "serve", *arguments]
    url = f"http://127.0.0.1:{port}"
    quietly = ["--port", str(port), "--log-level", "ERROR"]
    process = subprocess.Popen([*serve, *quietly], stderr=subprocess.DEVNULL)
    try:
        _wait(url, process)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).read()
            return
        except OSError:
            time.sleep(0.1)
    raise ChildProcessError(f"the server did not start (exit code {process.poll()})")


def _complete(url: str, i: int, max_tokens: int) -> dict[str, Any]:
    prompt = f"# request {i}\n" + TEXT * (i % 3) + f"def function_{i}(value):\n"
    body = {"prompt": prompt, "max_tokens": max_tokens, "kvpred": {"exact": i % 10 == 9}}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


if __name__ == "__main__":
    command.run(main)
