"""What a measurement ran on: machine, device, BLAS, versions, load, and the peak of its matrix products."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import psutil

from kvpred_mlx import _blas
from kvpred_mlx.scans.when import on_cpu

PACKAGES = ("kvpred-mlx", "mlx", "mlx-lm", "numpy", "scipy")
BUSY = 0.25  # share of the cores that others may use before the report warns


def describe() -> dict[str, Any]:
    """The machine, as data for `results.json`; names no host and no user."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": _device(),
        "device_info": {k: v for k, v in mx.device_info().items() if isinstance(v, str | int)},
        "blas": _blas.name(),
        "blas_threads": _blas.threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def busy_share() -> float:
    """How much of the processor is in use, 0 to 1, over a quarter of a second of doing nothing."""
    return psutil.cpu_percent(interval=0.25) / 100


def peak_resident_bytes(usage: resource.struct_rusage) -> int:
    """The most memory that was resident at a time, by what the system tells of a process."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes() -> int:
    """Memory that the device can still give to arrays."""
    if _device() == "cpu":
        return psutil.virtual_memory().available
    info: dict[str, Any] = dict(mx.device_info())
    names = ("max_recommended_working_set_size", "total_memory", "memory_size")
    limit = next((int(info[name]) for name in names if name in info), psutil.virtual_memory().available)
    return limit - mx.get_active_memory()


def matrix_product_peak(dtype: mx.Dtype, size: int = 2048, trials: int = 5) -> float:
    """FLOP/s of a product of two `size` x `size` matrices: the median of `trials` after a warm-up."""
    a, b = (mx.random.uniform(-1, 1, (size, size)).astype(dtype) for _ in range(2))
    mx.eval(a, b, a @ b)
    return 2 * size**3 / median(_seconds(a, b) for _ in range(trials))


def warnings(before: float) -> list[str]:
    """What speaks against trusting a measurement here.

    Args:
        before: `busy_share` when nothing was running yet.
    """
    found = []
    if _device() == "cpu" and _blas.name() == _blas.REFERENCE:
        found.append(
            "MLX's reference BLAS is in use, 20 to 80 times slower than OpenBLAS: install libopenblas0"
        )
    if before > BUSY:
        found.append(f"the machine was busy before the bench began: {before:.0%} of the processor in use")
    return found


def _seconds(a: mx.array, b: mx.array) -> float:
    start = time.perf_counter()
    mx.eval(a @ b)
    return time.perf_counter() - start


def _device() -> str:
    return "cpu" if on_cpu() else "gpu"


def _processor() -> str:
    if sys.platform == "darwin":
        brand = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(brand, capture_output=True, text=True, check=False).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
