"""A fast BLAS for MLX's CPU backend on Linux.

The `mlx[cpu]` wheel for Linux carries a reference BLAS of about 2 GFLOP/s.  A real OpenBLAS whose symbols
are global *before* `mlx.core` is first imported takes its place.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library

OPT_OUT = "KVPRED_MLX_NO_OPENBLAS"
REFERENCE = "the MLX wheel's own (reference, slow)"
_openblas: ctypes.CDLL | None = None
_lock = threading.Lock()
_alone = 0  # how many threads are inside `one_thread`
_threads = 1  # OpenBLAS's own count, while some are


def preload() -> None:
    """Load OpenBLAS on Linux, unless `KVPRED_MLX_NO_OPENBLAS` is set or MLX is already imported."""
    global _openblas
    if not sys.platform.startswith("linux") or os.environ.get(OPT_OUT) or "mlx.core" in sys.modules:
        return
    for name in ("libopenblas.so.0", find_library("openblas")):
        try:
            _openblas = ctypes.CDLL(name or "libopenblas.so", ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        # MLX enqueues a wide graph breadth first, one stream's work before the other's: `cpu_prefill` needs
        # both streams fed in turn.
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1")
        return


def name() -> str:
    """The BLAS that MLX's CPU backend calls in this process, for reports."""
    if sys.platform == "darwin":
        return "Accelerate"
    if _openblas is None:
        return REFERENCE
    _openblas.openblas_get_config.restype = ctypes.c_char_p
    return " ".join(_openblas.openblas_get_config().decode().split())


def threads() -> int | None:
    """How many threads OpenBLAS uses; None if it is not OpenBLAS that MLX calls."""
    return _openblas.openblas_get_num_threads() if _openblas is not None else None


@contextmanager
def one_thread() -> Iterator[None]:
    """Let each OpenBLAS call in this process use one thread, for callers that run several at once."""
    global _alone, _threads
    assert _openblas is not None
    with _lock:
        _alone += 1
        if _alone == 1:
            _threads = _openblas.openblas_get_num_threads()
            _openblas.openblas_set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _alone -= 1
            if not _alone:
                _openblas.openblas_set_num_threads(_threads)
