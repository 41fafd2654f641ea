"""On MLX's CPU backend many tokens meet quantized weights in full precision, and get what MLX gives."""

from __future__ import annotations

import backend
import mlx.core as mx
import mlx.nn as nn
import pytest

from kvpred_mlx.scans import quantized_linear, when
from kvpred_mlx.scans.quantized_linear import multiply

mlx_s_own = nn.QuantizedLinear.__call__.__wrapped__
on_cpu_only = pytest.mark.skipif(not backend.ON_CPU, reason="other devices use MLX's own")


def layer(dtype, bias=True, group_size=64, bits=4, mode="affine"):
    linear = nn.Linear(128, 48, bias=bias)
    linear.weight = mx.random.normal((48, 128), key=mx.random.key(1))
    linear.set_dtype(dtype)
    return nn.QuantizedLinear.from_linear(linear, group_size, bits, mode=mode)


@pytest.fixture(autouse=True)
def mlx_s_own_product(monkeypatch):
    """The tests' process has another (see backend.py)."""
    monkeypatch.setattr(mx, "quantized_matmul", backend._quantized_matmul)


@on_cpu_only
@pytest.mark.parametrize("shape", [(9, 128), (2, 5, 128), (1, 40, 128)])
@pytest.mark.parametrize(
    "form", [{}, {"bits": 8, "group_size": 32}, {"bits": 3}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}]
)
@pytest.mark.parametrize(
    "dtypes",
    [
        (mx.float32, mx.float32),
        (mx.bfloat16, mx.bfloat16),
        (mx.float32, mx.bfloat16),
        (mx.bfloat16, mx.float16),
    ],
    ids=str,
)
def test_as_mlx_multiplies(dtypes, form, shape):
    of_x, of_weights = dtypes
    quantized, x = layer(of_weights, **form), mx.random.normal(shape, key=mx.random.key(2)).astype(of_x)
    found, expected = quantized(x), mlx_s_own(quantized, x)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = 2e-6 if dtypes == (mx.float32, mx.float32) else 5e-2  # MLX adds up in half precision
    assert mx.abs(found - expected).max() <= tolerance * mx.abs(expected).max()


@on_cpu_only
def test_gradients():
    quantized, x = layer(mx.float32), mx.random.normal((20, 128), key=mx.random.key(2))
    found, expected = (
        mx.grad(lambda x, call=call: (call(quantized, x) ** 2).sum())(x) for call in (multiply, mlx_s_own)
    )
    assert mx.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_few_tokens_and_other_devices_are_mlx_s_own(monkeypatch):
    monkeypatch.setattr(quantized_linear, "multiply", None)
    quantized = layer(mx.float32, bias=False)
    assert quantized(mx.ones((1, when.FEW_TOKENS, 128))).shape == (1, 8, 48)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert quantized(mx.ones((1, 40, 128))).shape == (1, 40, 48)
    monkeypatch.undo()
    monkeypatch.setenv(when.OPT_OUT, "1")
    assert mx.array_equal(quantized(mx.ones((2, 40, 128))), mlx_s_own(quantized, mx.ones((2, 40, 128))))
