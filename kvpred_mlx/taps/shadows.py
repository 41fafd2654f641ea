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

    def __init__(self, projection: nn.Module, on_call: Callable[[nn.Module, mx.array], Any]):
        self._projection, self._on_call = projection, on_call
        self._thread = threading.get_ident()

    def __call__(self, x: mx.array) -> Any:
        if threading.get_ident() != self._thread:
            return self._projection(x)
        return self._on_call(self._projection, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._projection, name)


class FirstLayers(list):
    """The first `n` layers for the thread that cut the model, all of them for every other."""

    def __init__(self, layers: list[nn.Module], n: int | None):
        super().__init__(layers)
        self._n, self._thread = n, threading.get_ident()

    def _seen(self) -> list[nn.Module]:
        return list.__getitem__(self, slice(self._n if threading.get_ident() == self._thread else None))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._seen())

    def __len__(self) -> int:
        return len(self._seen())

    def __getitem__(self, index: Any) -> Any:
        return self._seen()[index]


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


def layer_list_owners(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every (module, attribute) that holds the model's list of layers."""
    first, count = model.layers[0], len(model.layers)
    return [
        (module, name)
        for _, module in model.named_modules()
        for name, child in module.items()
        if isinstance(child, list) and len(child) == count and child[0] is first
    ]
