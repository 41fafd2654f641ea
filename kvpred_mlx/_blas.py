"""A fast BLAS for MLX's CPU backend on Linux.

The `mlx[cpu]` wheel for Linux carries a reference BLAS of about 2 GFLOP/s.  A real OpenBLAS whose symbols
are global *before* `mlx.core` is first imported takes its place.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes.util import find_library

OPT_OUT = "KVPRED_MLX_NO_OPENBLAS"
_loaded: str | None = None


def preload() -> None:
    """Load OpenBLAS on Linux, unless `KVPRED_MLX_NO_OPENBLAS` is set or MLX is already imported."""
    global _loaded
    if not sys.platform.startswith("linux") or os.environ.get(OPT_OUT) or "mlx.core" in sys.modules:
        return
    for name in ("libopenblas.so.0", find_library("openblas")):
        try:
            ctypes.CDLL(name or "libopenblas.so", ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded = name
        return


def name() -> str:
    """The BLAS that MLX's CPU backend calls in this process, for reports."""
    if sys.platform == "darwin":
        return "Accelerate"
    return f"OpenBLAS ({_loaded})" if _loaded else "the MLX wheel's own (reference, slow)"
