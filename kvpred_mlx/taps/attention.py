"""Attention calls of a model, seen from outside: mlx-lm's `scaled_dot_product_attention` as the models call it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

NAME = "scaled_dot_product_attention"
_lock = threading.RLock()  # one shadow at a time: originals must come back in order


class AttentionCalls:
    """Lets a function stand in the place of attention for the length of a block, on the thread that enters it.

    mlx-lm's model files import `scaled_dot_product_attention` by name, so it is a global of each of their modules.

    Args:
        model: any mlx-lm model.
    """

    def __init__(self, model: nn.Module):
        modules = {sys.modules[type(m).__module__] for m in model.modules()}
        self._modules = [m for m in modules if hasattr(m, NAME)]

    @contextmanager
    def seen_by(self, on_call: Callable[..., mx.array]) -> Iterator[None]:
        """Every call becomes `on_call(attention, queries, keys, values, cache, scale, mask, sinks)`."""
        thread = threading.get_ident()

        def shadow(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
            def call(
                queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None
            ) -> mx.array:
                if threading.get_ident() != thread:
                    return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
                return on_call(original, queries, keys, values, cache, scale, mask, sinks)

            return call

        with _lock:
            originals = [(module, getattr(module, NAME)) for module in self._modules]
            try:
                for module, original in originals:
                    setattr(module, NAME, shadow(original))
                yield
            finally:
                for module, original in originals:
                    setattr(module, NAME, original)
