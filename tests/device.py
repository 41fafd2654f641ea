"""Importing this sets MLX's default device to KVPRED_MLX_TEST_DEVICE, cpu or gpu, if that is set.

Before mlx_lm is imported, which makes streams of the default device.  The tests' own process and the servers that
they start import it, so that both compute alike.
"""

from __future__ import annotations

import os

import kvpred_mlx  # noqa: F401  # first: it loads a fast BLAS on Linux before MLX

if name := os.environ.get("KVPRED_MLX_TEST_DEVICE"):
    import mlx.core as mx

    available = [kind for kind in ("cpu", "gpu") if mx.is_available(mx.Device(getattr(mx, kind)))]
    if name not in available:
        raise SystemExit(f"KVPRED_MLX_TEST_DEVICE is {name!r}, expected one of {', '.join(available)}")
    mx.set_default_device(mx.Device(getattr(mx, name)))
