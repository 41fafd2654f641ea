"""How MLX computes in the tests' own process and in those that they start: imported first, before mlx_lm.

KVPRED_MLX_TEST_DEVICE, cpu or gpu, sets the default device, of which mlx_lm makes streams when it is imported.

On the CPU `mx.compile` compiles nothing but where a test asks for it (the fixture `compiling`): each fused kernel takes
a second of g++, and the suite would make two hundred.  What the functions compute is the same.  There, too, products of
many rows with quantized weights are made with the weights in full precision: MLX's CPU backend is ten times slower with
quantized ones.  Those of few rows, as in decoding, are MLX's own.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # CUDA: products of float32 have 10 bits of mantissa otherwise

import kvpred_mlx  # noqa: F401  # first: it loads a fast BLAS on Linux before MLX

# isort: split
import mlx.core as mx

if name := os.environ.get("KVPRED_MLX_TEST_DEVICE"):
    available = [kind for kind in ("cpu", "gpu") if mx.is_available(mx.Device(getattr(mx, kind)))]
    if name not in available:
        raise SystemExit(f"KVPRED_MLX_TEST_DEVICE is {name!r}, expected one of {', '.join(available)}")
    mx.set_default_device(mx.Device(getattr(mx, name)))

ON_CPU = mx.default_device() == mx.Device(mx.cpu)
FEW_ROWS = 4
_quantized_matmul = mx.quantized_matmul


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    **rest: Any,
) -> mx.array:
    """What `mx.quantized_matmul` computes."""
    how = {"group_size": group_size, "bits": bits, "mode": mode}
    if x.size <= FEW_ROWS * x.shape[-1]:
        return _quantized_matmul(x, w, scales, biases, transpose=transpose, **how, **rest)
    whole = mx.dequantize(w, scales, biases, **how, dtype=x.dtype)
    return x @ (whole.swapaxes(-1, -2) if transpose else whole)


if ON_CPU:
    mx.disable_compile()
    mx.quantized_matmul = quantized_matmul
