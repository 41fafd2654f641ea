"""A command in a terminal, whichever it is: what was given, failures in one line, a bar while it works."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from kvpred_mlx.errors import one_line
from kvpred_mlx.progress import ProgressCallback

LINE_SECONDS = 20.0  # between two lines where there is no terminal


def run(app: typer.Typer, program: str) -> NoReturn:
    """Run a command line and exit: code 2 for wrong usage, 1 for failures, 130 when interrupted."""
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # noqa: BLE001 - a traceback helps no user; KVPRED_MLX_DEBUG shows it
        if os.environ.get("KVPRED_MLX_DEBUG"):
            traceback.print_exc()
        code = _report(error, program)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception, program: str) -> int:
    """Print one line for `error` and return the exit code."""
    usage = getattr(error, "format_message", None)  # typer's own errors, in every version of it
    if usage is not None:
        if told := " ".join(usage().split()):  # nothing where the help has been shown instead
            print(f"{program}: error: {told}{_given(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    known = isinstance(error, OSError | ValueError | ImportError | MemoryError | ArithmeticError)
    told = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
    print(f"{program}: error: {told}", file=sys.stderr)
    return 1


def _given(error: Exception) -> str:
    """What was given, where typer's newer versions tell only what they expected."""
    errors = getattr(error.__cause__, "errors", None)  # pydantic's
    found = errors() if callable(errors) else []
    return f", given {found[0]['input']!r}" if found and "input" in found[0] else ""


def numbers(option: str, given: list[str], least: int) -> list[int]:
    """Comma lists and repeated options as one list of numbers, in order, without repeats."""
    words = [word.strip() for text in given for word in text.split(",")]
    bad = [word for word in words if not (word.isascii() and word.isdigit() and int(word) >= least)]
    if bad:
        raise typer.BadParameter(
            f"{', '.join(map(repr, bad))}, expected numbers from {least} on, such as 512,2048",
            param_hint=option,
        )
    return list(dict.fromkeys(map(int, words)))


def read_text(option: str, path: Path) -> str:
    """The text of a file that was given with `option`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise typer.BadParameter(f"{path}: {reason}, expected a text file", param_hint=option) from error


@contextmanager
def progress_bar(what: str) -> Iterator[ProgressCallback]:
    """A bar on standard error while the block runs; where that is no terminal, a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines(what)
        return
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, what=None: bar.update(task, completed=done, total=total, description=what)


class _Lines:
    """Progress where nobody sees a bar: `fitting: 12 of 96, 3.1 min left`, at most every `LINE_SECONDS`."""

    def __init__(self, what: str):
        self._what, self._begun = what, time.monotonic()
        self._told, self._first = self._begun, 0

    def __call__(self, done: int, total: int, what: str | None = None) -> None:
        now = time.monotonic()
        if what is not None and what != self._what:
            self._what, self._begun, self._first = what, now, done
        if now - self._told < LINE_SECONDS or not total:
            return
        self._told = now
        made = done - self._first
        left = f", {(now - self._begun) / made * (total - done) / 60:.1f} min left" if made > 0 else ""
        print(f"{self._what}: {done} of {total}{left}", file=sys.stderr, flush=True)
