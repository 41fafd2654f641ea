"""Where a model's keys and values are made: its key, value and fused projections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ChunkedKVCache, KVCache, RotatingKVCache

from kvpred_mlx.errors import UnsupportedModelError

KEY = re.compile(r"k_proj|c_k|attn_key")
VALUE = re.compile(r"v_proj|c_v|attn_value")
FUSED = re.compile(r"qkvg?_proj|q_k_v_proj|[wW]qkv|query_key_value|c_attn|att_proj|W_pack|kv_a_proj_with_mqa")
KEY_NORM = re.compile(r"k_norm|k_layernorm|key_layernorm")
ATTENTION_CACHES = (KVCache, RotatingKVCache, ChunkedKVCache)


@dataclass(frozen=True)
class Site:
    """One K, V or fused projection: the child `name` of `owner`, in layer `layer`."""

    layer: int
    owner: nn.Module
    name: str

    @property
    def projection(self) -> nn.Module:
        return self.owner[self.name]  # the module's own entry, never the tap that shadows it


def project(projection: nn.Module, x: mx.array) -> mx.array:
    """The projection's output as one array (one family's fused projection returns it in pieces)."""
    output = projection(x)
    return output if isinstance(output, mx.array) else mx.concatenate(output, axis=-1)


def check_caches(family: str, caches: list[Any]) -> None:
    """Refuse a model whose caches hold anything but attention keys and values."""
    names = sorted({type(c).__name__ for c in caches if type(c) not in ATTENTION_CACHES})
    reasons = {
        "ArraysCache": "recurrent or convolutional state",
        "CacheList": "several caches",
    }
    if names:
        kept = ", ".join(
            f"{reasons.get(n, 'state other than attention keys and values')} ({n})" for n in names
        )
        raise UnsupportedModelError(f"{family}: a layer keeps {kept}, which cannot be predicted")
    if not caches:
        raise UnsupportedModelError(f"{family}: the model has no key-value cache")


def find_sites(model: nn.Module) -> Iterator[Site]:
    for i, layer in enumerate(model.layers):
        modules = layer.named_modules() if isinstance(layer, nn.Module) else []
        for _, owner in sorted(modules, key=lambda item: item[0]):
            for name, child in owner.items():
                if isinstance(child, nn.Module) and any(p.fullmatch(name) for p in (KEY, VALUE, FUSED)):
                    yield Site(i, owner, name)


def key_norm(site: Site) -> Site | None:
    """The norm of the keys that are made at a key or fused projection, if its attention has one."""
    if VALUE.fullmatch(site.name):
        return None
    names = (n for n, c in site.owner.items() if isinstance(c, nn.Module) and KEY_NORM.fullmatch(n))
    return next((Site(site.layer, site.owner, name) for name in names), None)


def group_calls(
    family: str, sites: list[Site], calls: list[tuple[int, int]]
) -> list[tuple[tuple[int, int], ...]]:
    """The calls of one KV layer together: (key, value) or (fused,)."""
    groups: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}
    for site, nth in calls:
        name = sites[site].name
        kind = "fused" if FUSED.fullmatch(name) else "key" if KEY.fullmatch(name) else "value"
        groups.setdefault((sites[site].layer, nth), {})[kind] = (site, nth)
    if not groups:
        raise UnsupportedModelError(f"{family}: no key and value projections were found by name")
    for (layer, _), group in groups.items():
        if set(group) not in ({"key", "value"}, {"fused"}, {"key"}):  # a key alone is its value too
            raise UnsupportedModelError(
                f"{family}: layer {layer} has {' and '.join(sorted(group))} projections, "
                "expected key and value, or one fused projection"
            )
    return [tuple(group[k] for k in ("key", "value", "fused") if k in group) for group in groups.values()]
