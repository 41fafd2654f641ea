"""A model with random numbers in its small weights for a while: a weight that is zero hides what it would multiply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.taps.candidates import has_large_weight
from kvpred_mlx.taps.shadows import lock


@contextmanager
def shaken(model: nn.Module) -> Iterator[None]:
    """Put other numbers into norms, convolutions, decays and biases; projections, experts and embeddings stay.

    A model may not have its weights yet, and some begin as zeros.
    """
    small = [
        (module, name, array)
        for module in model.modules()
        if not has_large_weight(module)
        for name, array in module.items()
        if isinstance(array, mx.array) and mx.issubdtype(array.dtype, mx.floating)
    ]
    with lock:
        try:
            for i, (module, name, array) in enumerate(small):
                numbers = mx.random.normal(array.shape, key=mx.random.key(i)) * 0.5
                module[name] = numbers.astype(array.dtype)
            yield
        finally:
            for module, name, array in small:
                module[name] = array
