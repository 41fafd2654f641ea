"""Modules that may make a part of what a model keeps, and others with large weights."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.taps.sites import Site


def candidates(model: nn.Module, norms: bool) -> Iterator[Site]:
    """All projections inside the layers, an adapter and what it wraps as one."""
    seen = set()
    for i, layer in enumerate(model.layers):
        wrapped: list[str] = []
        modules = layer.named_modules() if isinstance(layer, nn.Module) else []
        for path, owner in sorted(modules, key=lambda item: item[0]):
            if any(f"{path}.".startswith(f"{outer}.") for outer in wrapped):
                continue
            for site in _children(i, path, owner):
                module = site.projection
                is_norm = norms and owner is layer and "norm" in type(module).__name__.lower()
                if id(module) not in seen and (_is_projection(module) or is_norm):
                    seen.add(id(module))
                    if isinstance(module.get("linear"), nn.Module):
                        wrapped.append(site.full_name)
                    yield site


def other_leaves(model: nn.Module, known: set[int]) -> Iterator[Site]:
    """Everything else with large weights; convolutions stand between projections and states."""
    for path, owner in model.named_modules():
        for site in _children(-1, path, owner):
            module = site.projection
            if site.index is None and id(module) not in known and has_large_weight(module):
                yield site


def has_large_weight(module: nn.Module) -> bool:
    """Whether a module is a projection, an embedding or a group of experts; convolutions have few weights."""
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim >= 2 and "conv" not in type(module).__name__.lower()


def _children(layer: int, path: str, owner: nn.Module) -> Iterator[Site]:
    for name, child in owner.items():
        for index, module in enumerate(child) if isinstance(child, list) else [(None, child)]:
            if isinstance(module, nn.Module):
                yield Site(layer, owner, name, path, index)


def _is_projection(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | nn.QuantizedLinear) or isinstance(module.get("linear"), nn.Module):
        return True
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 2 and not hasattr(module, "as_linear")
