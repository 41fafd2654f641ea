"""How MLX computes in the tests' own process and in those that they start: imported first, before mlx_lm.

KVPRED_MLX_TEST_DEVICE, cpu or gpu, sets the default device, of which mlx_lm makes streams when it is imported.

On the CPU `mx.compile` compiles nothing but where a test asks for it (the fixture `compiling`): each fused kernel takes
a second of g++, and the suite would make two hundred.  What the functions compute is the same.
"""

from __future__ import annotations

import os

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
if ON_CPU:
    mx.disable_compile()
