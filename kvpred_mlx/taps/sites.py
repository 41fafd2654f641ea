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
    """A module whose calls are seen: the child `name` of `owner`, in layer `layer`.

    Args:
        layer: -1 if it stands outside the layers.
        path: of the owner, inside the layer.
        index: which one, if the child is a list of modules.
    """

    layer: int
    owner: nn.Module
    name: str
    path: str = ""
    index: int | None = None

    @property
    def projection(self) -> nn.Module:
        child = self.owner[self.name]  # the module's own entry, never the tap that shadows it
        return child if self.index is None else child[self.index]

    @property
    def full_name(self) -> str:
        """Where it stands in its layer."""
        return ".".join(str(part) for part in (self.path, self.name, self.index) if part not in ("", None))


def project(projection: nn.Module, x: mx.array) -> mx.array:
    """The projection's output as one array (one family's fused projection returns it in pieces)."""
    output = projection(x)
    return output if isinstance(output, mx.array) else mx.concatenate(output, axis=-1)


def attention_only(caches: list[Any]) -> bool:
    """Whether a model's caches hold nothing but attention keys and values."""
    return all(type(c) in ATTENTION_CACHES for c in caches)


def find_sites(model: nn.Module) -> Iterator[Site]:
    for i, layer in enumerate(model.layers):
        modules = layer.named_modules() if isinstance(layer, nn.Module) else []
        for path, owner in sorted(modules, key=lambda item: item[0]):
            for name, child in owner.items():
                if isinstance(child, nn.Module) and any(p.fullmatch(name) for p in (KEY, VALUE, FUSED)):
                    yield Site(i, owner, name, path)


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
