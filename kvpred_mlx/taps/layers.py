"""A model's list of layers as one thread sees it: cut short, watched, or begun in the middle.

A stand-in shadows the list (`kvpred_mlx.taps.shadows`); other threads see the model as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.taps.shadows import lock, shadowed


class SeenLayers(list):
    """Layers of a model: `seen` for the thread that made this, `layers` for every other."""

    def __init__(self, layers: list[Any], seen: list[Any]):
        super().__init__(layers)
        self._here, self._thread = seen, threading.get_ident()

    def _seen(self) -> list[Any]:
        return self._here if threading.get_ident() == self._thread else list.__getitem__(self, slice(None))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._seen())

    def __len__(self) -> int:
        return len(self._seen())

    def __getitem__(self, index: Any) -> Any:
        return self._seen()[index]


class Layers:
    """The layers of a model.

    Args:
        model: any mlx-lm model.
    """

    def __init__(self, model: nn.Module):
        self._model = model

    @contextmanager
    def first(self, n: int | None) -> Iterator[None]:
        """Let the model run its first `n` layers only (None: all), so that no graph is built beyond them."""
        with self._seen(lambda layers: layers[:n], n is not None):
            yield

    @contextmanager
    def watched(self, layer: int, entry: Any, kept: list[mx.array]) -> Iterator[None]:
        """Append what `layer` reads, the hidden states [B, L, D], to `kept` at every call with its cache `entry`."""

        def watch(layers: list[Any]) -> list[Any]:
            return [*layers[:layer], _Watched(layers[layer], entry, kept), *layers[layer + 1 :]]

        with self._seen(watch):
            yield

    @contextmanager
    def noted(self, cache: list[Any], entries: dict[int, set[int]]) -> Iterator[None]:
        """Put into `entries` which entries of `cache` each layer is called with, by number."""

        def note(layers: list[Any]) -> list[Any]:
            return [_Noted(layer, cache, entries.setdefault(i, set())) for i, layer in enumerate(layers)]

        with self._seen(note):
            yield

    @contextmanager
    def resumed(self, layer: int, hidden: mx.array) -> Iterator[None]:
        """Let the model begin at `layer`, which reads `hidden` [B, L, D] in place of the layers before it."""

        def resume(layers: list[Any]) -> list[Any]:
            skipped = [_Skipped(earlier) for earlier in layers[:layer]]
            return [*skipped, _Resumed(layers[layer], hidden), *layers[layer + 1 :]]

        with self._seen(resume):
            yield

    @contextmanager
    def _seen(self, seen: Callable[[list[Any]], list[Any]], shadow: bool = True) -> Iterator[None]:
        owners = layer_list_owners(self._model) if shadow else []
        with lock, ExitStack() as stack:
            for owner, name in owners:
                now = list(
                    owner.__dict__.get(name, owner[name])
                )  # one may be shadowed by this thread already
                stack.enter_context(shadowed(owner, name, SeenLayers(owner[name], seen(now))))
            yield


class _StandIn:
    """Stands in a layer's place; other attributes are still the layer's."""

    def __init__(self, layer: nn.Module):
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Watched(_StandIn):
    def __init__(self, layer: nn.Module, entry: Any, kept: list[mx.array]):
        super().__init__(layer)
        self._entry, self._kept = entry, kept

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if any(given is self._entry for given in (*args, *kwargs.values())):
            self._kept.append(x)
        return self._layer(x, *args, **kwargs)


class _Noted(_StandIn):
    def __init__(self, layer: nn.Module, cache: list[Any], entries: set[int]):
        super().__init__(layer)
        self._cache, self._entries = cache, entries

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        self._entries |= {i for i, entry in enumerate(self._cache) if any(one is entry for one in given)}
        return self._layer(*args, **kwargs)


class _Skipped(_StandIn):
    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return x


class _Resumed(_StandIn):
    def __init__(self, layer: nn.Module, hidden: mx.array):
        super().__init__(layer)
        self._hidden = hidden

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self._layer(self._hidden.astype(x.dtype), *args, **kwargs)


def layer_list_owners(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every (module, attribute) that holds the model's list of layers."""
    first, count = model.layers[0], len(model.layers)
    return [
        (module, name)
        for _, module in model.named_modules()
        for name, child in module.items()
        if isinstance(child, list) and len(child) == count and child[0] is first
    ]
