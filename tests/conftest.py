"""Fixtures that several test files use."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import device  # noqa: F401  # first of all that imports MLX
import pytest

from kvpred_mlx import cli

DATA = Path(__file__).with_name("data")

# In a shell's background Ctrl-C is ignored, and what tests start would ignore it too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden_pair(tmp_path_factory):
    """The reference's tiny checkpoint, converted."""
    from kvpred_mlx.convert.checkpoint import convert_checkpoint

    path = tmp_path_factory.mktemp("golden") / "pair"
    convert_checkpoint(DATA / "golden_tiny/checkpoint.pt", DATA / "golden_tiny/config.yaml", path)
    return path


@pytest.fixture(scope="session")
def demo_pair():
    """The bundled pair, loaded once: (model, tokenizer)."""
    from kvpred_mlx import load
    from kvpred_mlx.pair.loading import DEMO_PAIR

    return load(DEMO_PAIR)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["kvpred-mlx", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return call


def fails(result, code, *parts):
    """One line on standard error (after the note on the demo pair), nothing like a traceback."""
    found, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith("Using the bundled")]
    assert (found, len(lines)) == (code, 1), err
    assert lines[0].startswith("kvpred-mlx: error: ")
    for part in parts:
        assert part in lines[0]
    assert out == ""
