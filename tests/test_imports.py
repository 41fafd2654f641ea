"""Whatever of the package is imported first, mlx-lm loads pairs: each name in a fresh process of its own."""

from __future__ import annotations

import pkgutil

import imported_first
import pytest

import kvpred_mlx
from kvpred_mlx.pair.locating import DEMO_PAIR

PUBLIC = [f"kvpred_mlx:{name}" for name in kvpred_mlx.__all__]
FOUND = [m.name for m in pkgutil.walk_packages(kvpred_mlx.__path__, "kvpred_mlx.")]
MODULES = [
    "kvpred_mlx",
    *(name for name in FOUND if not name.endswith("__main__")),
]  # a command, not a module
# One of each kind of beginning: nothing of mlx-lm, a module that the caches need, one in the middle, the command line.
QUICK = {
    "kvpred_mlx:ExactPositions", "kvpred_mlx:UnsupportedModelError", "kvpred_mlx:load", "kvpred_mlx.taps.kv",
    "kvpred_mlx.pair.auxiliary_cache", "kvpred_mlx.pair.family", "kvpred_mlx.cli", "kvpred_mlx.bench.common.flops",
}  # fmt: skip
NAMES = [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in [*PUBLIC, *MODULES]]


def outcome(name: str) -> tuple[str, str]:
    """("passed" | "missing" | "failed", what) of a process of its own."""
    context = imported_first.process_kind()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=imported_first.report, args=(name, str(DEMO_PAIR), theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        process.join()
        found = ("failed", f"the process ended with {process.exitcode}")
    process.join()
    return found


def test_every_quick_name_is_there():
    assert {*PUBLIC, *MODULES} >= QUICK and len(MODULES) > 90


@pytest.mark.parametrize("name", NAMES)
def test_mlx_lm_loads_a_pair_after(name):
    kind, what = outcome(name)
    if kind == "missing":
        pytest.skip(f"{name} needs {what}, which is not installed")
    assert kind == "passed", f"{name}: {what}"
