"""Many requests from many clients of all kinds to `kvpred-mlx serve`: `python -m kvpred_mlx.bench.studies.soak`.

Starts the server on a free port of 127.0.0.1 with two pairs, and asks it alone for the text of each well-formed
request.  Then clients send all at once: well-formed requests, streamed or not, to either pair, predicted and exact,
some that stop at a string; malformed ones; clients that go away in the middle of an answer, and slow ones.  Prompts
come again and again, so that they are found in cache.  (None is so short that only a batch would predict it.)

Prints one line of JSON: how many requests were lost (no answer, or another than the documented one), how many texts
were not the one that was given alone, how many requests came per second, and the server's resident memory once it is
warm (after a fifth of the requests), at most, and at the end.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import psutil
import typer

from kvpred_mlx.bench.common import command
from kvpred_mlx.console import progress_bar
from kvpred_mlx.pair.locating import find_pair
from kvpred_mlx.progress import ProgressCallback, no_progress

TEXT = """\
import os


def read_lines(path):
    with open(path) as file:
        return file.readlines()


"""
START_SECONDS = 120
ANSWER_SECONDS = 600
PROMPTS = 12
KINDS = {"plain": 9, "stream": 4, "stop": 2, "exact": 2, "slow": 1, "cancelled": 1, "malformed": 2}  # shares
MALFORMED: list[tuple[str, Any]] = [
    ("/v1/completions", b"{no json"),
    ("/v1/completions", b"[" * 5000),
    ("/v1/completions", {"prompt": 7}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 10**20}),
    ("/v1/completions", {"prompt": "x", "temperature": "hot"}),
    ("/v1/completions", {"prompt": "x", "stop": "\ud83d"}),
    ("/v1/completions", {"prompt": "x", "model": "nobody"}),
    ("/v1/completions", {"prompt": "x", "xtc_probability": 2, "stream": True}),
    ("/v1/chat/completions", {"messages": "hello"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": None, "tool_calls": ["f"]}]}),
    ("/v1/nothing", {}),
]
SLOW_SECONDS = 0.02  # between the pieces of a slow client's request, and of what it reads


def main(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="Pair; repeatable. Without it, the bundled demo pair twice, by two names."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 3000,
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Tokens to generate.")] = 8,
) -> None:
    """Send a server many requests of all kinds, and see what is lost, what is wrong and what memory it takes."""
    with tempfile.TemporaryDirectory() as folder:
        names = model or ["pycode", str(_second_name(Path(folder)))]
        named = [word for name in names for word in ("--model", name)]
        with server(*named) as (url, process), progress_bar("asking") as progress:
            found = soak(url, process, requests, clients, max_tokens, names, progress)
    print(json.dumps(found))


def _second_name(folder: Path) -> Path:
    """The bundled pair by another name, which makes it another pair for the server."""
    other = folder / "second"
    other.symlink_to(find_pair("pycode"), target_is_directory=True)
    return other


def soak(
    url: str,
    process: psutil.Process,
    requests: int,
    clients: int,
    max_tokens: int,
    models: list[str],
    progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Send `requests` requests from `clients` threads; memory in bytes, times in seconds."""
    finished, memory, tally = count(1), dict[int, int](), Tally()
    mixed = Requests(url, max_tokens, models)
    expected = {key: mixed.alone(key) for key in mixed.known()}
    started = time.perf_counter()

    def one(i: int) -> None:
        rng = random.Random(i)
        kind = rng.choices([*KINDS], [*KINDS.values()])[0]
        try:
            mixed.send(kind, rng, expected, tally)
        except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
            tally.lost.append(f"{kind}: {type(error).__name__}: {error}")
        done = next(finished)
        tally.kinds[kind] += 1
        memory[done] = process.memory_info().rss
        progress(done, requests, "asking")

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
    seconds = time.perf_counter() - started
    return {
        "requests": requests,
        "clients": clients,
        "kinds": dict(sorted(tally.kinds.items())),
        "lost": len(tally.lost),
        "compared": tally.compared,
        "wrong": len(tally.wrong),
        "examples": [*tally.lost[:3], *tally.wrong[:3]],
        "requests_per_second": round(requests / seconds, 2),
        "ttft_median": round(median(tally.ttfts), 3) if tally.ttfts else None,
        "ttft_95": round(quantiles(tally.ttfts, n=20)[-1], 3) if len(tally.ttfts) > 1 else None,
        "resident_bytes_warm": memory[max(1, requests // 5)],
        "resident_bytes_most": max(memory.values()),
        "resident_bytes_end": memory[requests],
    }


@dataclass
class Tally:
    """What came back, from all threads: lists that are only appended to."""

    kinds: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    compared: int = 0

    def compare(self, kind: str, text: str, expected: str) -> None:
        """Note whether a text is the one that was given alone."""
        self.compared += 1
        if text != expected:
            self.wrong.append(f"{kind}: {text!r}, alone {expected!r}")


Key = tuple[str, int, bool]  # a model's name, a prompt's number, exact or not


@dataclass(frozen=True)
class Requests:
    """The clients' requests.

    Args:
        url: of the server.
        max_tokens: of each answer.
        models: names that it serves.
    """

    url: str
    max_tokens: int
    models: list[str]

    def known(self) -> list[Key]:
        """All well-formed requests."""
        return [(m, i, exact) for m in self.models for i in range(PROMPTS) for exact in (False, True)]

    def alone(self, key: Key) -> str:
        """The text that a request gets when there is no other."""
        return self._answer(self._post("/v1/completions", self._body(key)))["choices"][0]["text"]

    def send(self, kind: str, rng: random.Random, expected: dict[Key, str], tally: Tally) -> None:
        """Send a request of a kind, and note what came back.

        Raises:
            OSError, ValueError, LookupError, HTTPException: no answer, or not the documented one.
        """
        key = (rng.choice(self.models), rng.randrange(PROMPTS), kind == "exact")
        body, text = self._body(key), expected[key]
        if kind == "malformed":
            self._refused(*rng.choice(MALFORMED))
        elif kind == "cancelled":
            connection = self._post("/v1/completions", body | {"stream": True, "max_tokens": 200})
            connection.getresponse().readline()
            connection.close()
        elif kind == "stream":
            tally.compare(kind, self._streamed(body), text)
        else:
            if kind == "stop" and len(text) > 2:
                body["stop"] = text[len(text) // 2 :][:3]
                text = text[: text.find(body["stop"])]
            answer = self._answer(
                self._post("/v1/completions", body, slow=kind == "slow"), slow=kind == "slow"
            )
            tally.ttfts.append(answer["usage"]["ttft"])
            tally.compare(kind, answer["choices"][0]["text"], text)

    def _body(self, key: Key) -> dict[str, Any]:
        model, i, exact = key
        prompt = f"# {i} is the number of this file\n" + TEXT * (1 + i % 4) + f"def function_{i}(value):\n"
        return {"model": model, "prompt": prompt, "max_tokens": self.max_tokens, "kvpred": {"exact": exact}}

    def _post(self, path: str, body: Any, slow: bool = False) -> http.client.HTTPConnection:
        """A connection on which a request has been sent; a slow client sends it in pieces."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=ANSWER_SECONDS)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        pieces = [data] if not slow else [data[i : i + 40] for i in range(0, len(data), 40)]
        connection.request("POST", path, _slowly(pieces) if slow else data, headers)
        return connection

    def _answer(self, connection: http.client.HTTPConnection, slow: bool = False) -> dict[str, Any]:
        response = connection.getresponse()
        data = b"".join(_slowly(iter(lambda: response.read(60), b""))) if slow else response.read()
        connection.close()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {data[:200]!r}")
        return json.loads(data)

    def _streamed(self, body: dict[str, Any]) -> str:
        connection = self._post("/v1/completions", body | {"stream": True})
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        events = [line[6:] for line in lines if line.startswith("data: ")]
        if events.pop() != "[DONE]":
            raise ValueError("a stream without an end")
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    def _refused(self, path: str, body: Any) -> None:
        connection = self._post(path, body)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        if response.status not in (400, 404) or not answer["error"]["message"]:
            raise ValueError(f"status {response.status} for {body!r:.60}: {answer}")


def _slowly(pieces: Any) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        time.sleep(SLOW_SECONDS)


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


if __name__ == "__main__":
    command.run(main)
