"""Runs code that a model wrote, in a process that can do little harm (see candidate.py).

Why not lm-eval's own: its `humaneval` scores with the `code_eval` of Hugging Face's `evaluate`, which is a
script that is fetched from the hub when it is used, so nothing can be evaluated without a network.  Its
`reliability_guard` says of itself that it is no sandbox: it puts None in the place of some functions of
`os`, `shutil` and `subprocess`, leaves sockets and `open(path, "w")` as they are, and is called without a
limit of memory.  On Linux it runs candidates in children that are forked from the process that holds the
models, with all their memory and MLX's threads.  Here a candidate has an interpreter of its own that never
saw the models; time, memory and files have limits; and network, processes and files elsewhere are refused,
by the kernel too where it can.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

CANDIDATE = Path(__file__).with_name("candidate.py")
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Limits:
    """What a candidate may use.

    Args:
        seconds: of wall-clock time, and of processor time.
        memory_bytes: of address space, and of resident memory.
        file_bytes: of each file that it writes, inside its folder.
    """

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why."""

    passed: bool
    reason: str


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program in a process, a session and an empty folder of its own.

    It passes by ending normally, which neither `sys.exit` nor `os._exit` is.  Whatever it has started is
    killed at the end.
    """
    limits = limits or Limits()
    nonce = secrets.token_hex(16)
    task = {
        "program": program,
        "nonce": nonce,
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
    }
    with tempfile.TemporaryDirectory(prefix="kvpred-candidate-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(CANDIDATE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            stopped = _watch(process, json.dumps(task).encode(), limits)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        with process.stdout as report:
            return stopped or _outcome(report.read(), nonce)


def _watch(process: subprocess.Popen[bytes], task: bytes, limits: Limits) -> Outcome | None:
    """Wait for the end; an outcome if the process has to be stopped before."""
    until = time.monotonic() + limits.seconds
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(task)
    while process.poll() is None:
        if time.monotonic() > until:
            return Outcome(False, f"timed out after {limits.seconds:g} s")
        with contextlib.suppress(psutil.Error):
            if psutil.Process(process.pid).memory_info().rss > limits.memory_bytes:
                return Outcome(False, f"out of memory: more than {limits.memory_bytes} bytes")
        time.sleep(POLL_SECONDS)
    return None


def _outcome(report: bytes, nonce: str) -> Outcome:
    try:
        told = json.loads(report)
    except ValueError:
        told = {}
    if told.get("nonce") != nonce:
        return Outcome(False, "ended before its tests were done")
    return Outcome(told["passed"], told["reason"])
