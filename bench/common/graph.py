"""What MLX would evaluate: the operations of a lazy graph with their shapes, without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

Shape = tuple[int, ...]
Step = Callable[[mx.array, list[Any]], Any]


def primitives(function: Callable[..., Any], *arrays: mx.array) -> list[tuple[str, list[Shape], list[Shape]]]:
    """Name, input shapes and output shapes of every operation in a function's graph."""
    found = []

    def visit(part: Any) -> None:
        if part["type"] == "primitive":
            inputs, outputs = ([shape for _, shape, _ in part[side]] for side in ("inputs", "outputs"))
            found.append((part["name"], inputs, outputs))

    with _exportable():
        mx.export_function(visit, function, *arrays)
    return found


@contextmanager
def _exportable() -> Iterator[None]:
    """MLX cannot export `mx.contiguous`, which computes nothing."""
    contiguous = mx.contiguous
    mx.contiguous = lambda array, *args, **kwargs: array
    try:
        yield
    finally:
        mx.contiguous = contiguous


def fill(model: nn.Module) -> Step:
    """mlx-lm's prefill step: process tokens, evaluate the cache only."""

    def fill(tokens: mx.array, cache: list[Any]) -> Any:
        model(tokens, cache=cache)
        return [c.state for c in cache]

    return fill


def caches(model: nn.Module) -> Callable[[], list[Any]]:
    """Makes a model's empty caches."""
    return lambda: make_prompt_cache(model)


def after(
    cached: int, shape: tuple[int, int], step: Step, make_cache: Callable[[], list[Any]]
) -> tuple[Callable[..., Any], list[mx.array]]:
    """`step` on tokens of `shape` after `cached` ones, as a function of the tokens and the cache's arrays."""
    filled = make_cache()
    if cached:
        step(mx.zeros((shape[0], cached), mx.int32), filled)
    flat = dict(tree_flatten([c.state for c in filled]))
    names = [name for name, leaf in flat.items() if isinstance(leaf, mx.array)]

    def function(tokens: mx.array, *arrays: mx.array) -> Any:
        states: Any = tree_unflatten(list((flat | dict(zip(names, arrays, strict=True))).items()))
        cache = make_cache()
        for c, state in zip(cache, states, strict=True):
            c.state = state
        outputs = dict(tree_flatten(step(tokens, cache))).values()
        return [a for a in outputs if isinstance(a, mx.array)]

    return function, [mx.zeros(shape, mx.int32), *(flat[name] for name in names)]
