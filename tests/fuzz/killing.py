"""A process that has imported everything, and forks a child for each command: fifty kills in the time of a few starts.

Run with `serve` it reads requests from standard input, a line of JSON each, and answers each with a line of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
IMPORTED = (
    "mlx_lm.cache_prompt", "mlx_lm.generate", "scipy.stats", "torch", "transformers", "rich.progress",
    "kvpred_mlx.cli.making", "kvpred_mlx.bench.evaluate.run", "kvpred_mlx.bench.front.pareto",
    "kvpred_mlx.convert.checkpoint", "kvpred_mlx.making.as_used", "kvpred_mlx.making.card", "kvpred_mlx.making.fit",
    "kvpred_mlx.making.joint", "kvpred_mlx.making.recording", "kvpred_mlx.pair.loading",
)  # fmt: skip
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: its exit code, -9 if it was killed.
        seconds: that it took.
        operations: changes of files and folders that it began.
        output: standard output and standard error.
    """

    code: int
    seconds: float
    operations: int
    output: str


class Commands:
    """Commands of processes that can be killed; made by `commands`."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def __call__(self, *arguments: Any, seconds: float | None = None, operation: int | None = None) -> Ended:
        """Run a command, and kill it after so many seconds, or before it changes a file for the nth time."""
        request = {"arguments": [*map(str, arguments)], "seconds": seconds, "operation": operation}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Ended(**json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def commands(folder: Path) -> Iterator[Commands]:
    """The process that forks them; what children write and count goes to files in `folder`."""
    path = [str(HERE.parent), str(HERE)]
    code = f"import sys; sys.path[:0] = {path!r}; import killing; killing.serve({str(folder)!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # of tiny models: threads wait for each other
    )  # fmt: skip
    try:
        yield Commands(process)
    finally:
        process.stdin.close()
        process.wait(60)


def serve(folder: str) -> None:
    """Answer requests until there are no more."""
    import backend  # noqa: F401 - before mlx_lm

    for name in IMPORTED:
        importlib.import_module(name)
    sys.modules[
        "kvpred_mlx.making.fit"
    ].SAVE_SECONDS = 0.0  # sums after each batch: there is something to resume
    output, noted = Path(folder, "output"), Path(folder, "noted")
    for line in sys.stdin:
        request = json.loads(line)
        noted.unlink(missing_ok=True)
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(request["arguments"], request["operation"], output, noted)
        code, seconds = _wait(pid, request["seconds"]), time.monotonic() - begun
        operations, modules = json.loads(noted.read_text()) if noted.exists() else (0, [])
        for name in modules:  # the next one need not import them
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        print(
            json.dumps({
                "code": code, "seconds": seconds, "operations": operations, "output": output.read_text(),
            }),
            flush=True,
        )  # fmt: skip


def _child(arguments: list[str], operation: int | None, output: Path, noted: Path) -> None:
    """Run a command, note how often it changed files and what it imported, and end."""
    code = 1
    try:
        null, file = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, target in ((null, 0), (file, 1), (file, 2)):
            os.dup2(number, target)
        count = _watch(operation)
        code = _run(arguments)
        sys.stdout.flush()
        noted.write_text(json.dumps([count(), [*sys.modules]]))
    finally:
        os._exit(code)


def _run(arguments: list[str]) -> int:
    """A command of this project's, or `cache_prompt`, mlx-lm's; its exit code."""
    from mlx_lm import cache_prompt

    from kvpred_mlx import cli

    name, *rest = arguments
    main, words = (cache_prompt.main, rest) if name == "cache_prompt" else (cli.main, arguments)
    sys.argv = [name, *words]
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _watch(operation: int | None) -> Any:
    """Count changes of files, and kill this process before the nth."""
    done = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event not in CHANGES or (event == "open" and not _writes(arguments)):
            return
        done += 1
        if done == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: done


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, mode, flags = arguments
    if str(path).startswith("/dev"):
        return False
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else not mode.startswith("r")


def _wait(pid: int, seconds: float | None) -> int:
    """A process's exit code, or -9: it was killed."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() >= until:
            os.kill(pid, signal.SIGKILL)
            until = None
        time.sleep(0.001)
