"""Things that stand in the place of a module's children for the length of one forward call, in one thread.

`nn.Module` keeps children in its dictionary and only asks it when ordinary attribute lookup fails, so an entry in
the instance's `__dict__` takes the child's place while parameters, quantization and LoRA never notice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Shadows are set and removed under one lock: two threads may build graphs of models that share modules.
lock = threading.RLock()


class Tap:
    """Stands in a projection's place; other attributes are still the projection's (`.weight` is read)."""

    def __init__(self, projection: nn.Module, on_call: Callable[..., Any]):
        self._projection, self._on_call = projection, on_call
        self._thread = threading.get_ident()

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return self._projection(x, *args, **kwargs)
        return self._on_call(self._projection, x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._projection, name)


@contextmanager
def shadowed(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    previous = owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if previous is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = previous
