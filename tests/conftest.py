"""Fixtures that several test files use."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path

# Collecting garbage takes half a second where so much is imported: not before the tests, and then only theirs.
gc.disable()

import pytest
import typer.main

# On two threads BLAS waits longer for itself than the products of tiny models take.  Of what the tests start servers
# keep to one, too (processes.py); the rest has as many threads as it wants, as users have them.
THREADS = "OPENBLAS_NUM_THREADS"

DATA = Path(__file__).with_name("data")
CHAT_TEMPLATE = (  # messages one after the other; tools and their calls as text, and a refusal
    "{% if 'refuse' in (messages[0].content or '') %}{{ raise_exception('no such talk') }}{% endif %}"
    "{% for t in tools or [] %}# {{ t.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.path }}){% endfor %}{% endfor %}"
)

# In a shell's background Ctrl-C is ignored, and what tests start would ignore it too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What every family is held to in `make test`, too.
OF_EVERY_FAMILY = "test_own_keys_and_values_injected_with_other_tokens_make_the_same_cache"


def pytest_collection_modifyitems(items):
    """Mark as slow what repeats in another setting what `make test` shows.

    Of a test with `variations` all cases but its first few; and a test of a family, if that is none of the quick ones:
    there are about ninety.
    """
    from families import INJECTABLE, QUICK

    seen = Counter()
    for item in items:
        if variations := item.get_closest_marker("variations"):
            seen[item.parent.nodeid, item.originalname] += 1
            if seen[item.parent.nodeid, item.originalname] > (variations.args or (1,))[0]:
                item.add_marker(pytest.mark.slow)
        if getattr(item, "originalname", "") == OF_EVERY_FAMILY:
            continue
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        named = {name for value in parameters for name in (value if isinstance(value, tuple) else (value,))
                 if isinstance(name, str)}  # fmt: skip
        if named & {*INJECTABLE} - QUICK:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config):
    """Import what computes, in this order, before the tests; not where other processes run them."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    chosen = THREADS in os.environ
    os.environ.setdefault(THREADS, "1")
    import backend  # noqa: F401  # first of all that imports MLX
    import numpy  # noqa: F401  # has a BLAS of its own
    import quick_transformers  # noqa: F401  # before transformers

    if not chosen:
        del os.environ[THREADS]


def pytest_collection_finish():
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def served():
    """(URL, process, log) of a server with the bundled pair, for all that does not ask for another."""
    from processes import command, serving

    with serving(command("serve", "--chat-template", CHAT_TEMPLATE)) as started:
        yield started


@pytest.fixture
def client(served):
    """OpenAI's own."""
    import openai

    url = f"{served[0]}/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0) as client:
        yield client


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
    from kvpred_mlx.pair.locating import DEMO_PAIR

    return load(DEMO_PAIR)


@pytest.fixture(scope="session")
def unquantized_pair():
    """The bundled pair without its quantization, which MLX's CPU backend is slow at: (model, tokenizer)."""
    from kvpred_mlx import load
    from kvpred_mlx.cli.making import dequantize
    from kvpred_mlx.pair.locating import DEMO_PAIR

    model, tokenizer = load(DEMO_PAIR)
    dequantize(model)
    return model, tokenizer


@pytest.fixture
def compiling():
    """`mx.compile` compiles, as it does outside the tests (see backend.py)."""
    import backend
    import mlx.core as mx

    mx.enable_compile()
    yield
    if backend.ON_CPU:
        mx.disable_compile()


@pytest.fixture(scope="session", autouse=True)
def small_peak():
    """The bench finds the peak of matrix products with small ones: large ones take a second each time."""
    from kvpred_mlx.bench.common import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "matrix_product_peak", partial(machine.matrix_product_peak, size=256))
        yield


@pytest.fixture(scope="session", autouse=True)
def commands_once():
    """The command line is made of its functions' signatures once for all tests: that takes a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (exit code, standard output, standard error)."""
    from kvpred_mlx import cli

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
