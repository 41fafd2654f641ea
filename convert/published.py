"""Facts about the pairs of the paper: OpenELM's shapes and the published layer maps (apple/corenet)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class OpenELMShape:
    """The dimensions of an OpenELM, one entry for each layer where they differ."""

    model_dim: int
    head_dim: int
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn_dims: tuple[int, ...]

    def config(self, vocab_size: int, tied: bool = True) -> dict[str, Any]:
        """mlx-lm's config; RoPE's base and the norms' eps are CoreNet's constants.

        Args:
            tied: the output projection is the token embedding.
        """
        return {
            "model_type": "openelm",
            "vocab_size": vocab_size,
            "model_dim": self.model_dim,
            "head_dim": self.head_dim,
            "num_transformer_layers": len(self.ffn_dims),
            "num_query_heads": list(self.query_heads),
            "num_kv_heads": list(self.kv_heads),
            # mlx-lm rounds multiplier * model_dim to a multiple of the divisor: 1 keeps any width as it is.
            "ffn_multipliers": [f / max(1, self.model_dim) for f in self.ffn_dims],
            "ffn_dim_divisor": 1,
            "share_input_output_layers": tied,
            "rope_freq_constant": 10000,
            "rms_norm_eps": 1e-6,
        }


@cache
def facts() -> dict[str, Any]:
    """`published_pairs.json`: OpenELM's shape rules and the published pairs."""
    return json.loads(Path(__file__).with_name("published_pairs.json").read_text())


def openelm_shape(name: str) -> OpenELMShape | None:
    """The dimensions of a published OpenELM or layer-pruned OpenELM, None for any other name."""
    for pair in facts()["pairs"].values():
        if pair["auxiliary"] == name and "auxiliary_is_base_layers" in pair:
            return _kept(_full_shape(pair["base"]), pair["auxiliary_is_base_layers"])
    return _full_shape(name) if name in facts()["openelm"]["sizes"] else None


def _kept(shape: OpenELMShape, layers: list[int]) -> OpenELMShape:
    kept = [tuple(dims[i] for i in layers) for dims in (shape.query_heads, shape.kv_heads, shape.ffn_dims)]
    return OpenELMShape(shape.model_dim, shape.head_dim, *kept)


def _full_shape(name: str) -> OpenELMShape:
    rules, size = facts()["openelm"]["common"], facts()["openelm"]["sizes"][name]
    model_dim, head_dim, groups = size["model_dim"], size["head_dim"], rules["num_gqa_groups"]
    query_dims = _spread(rules["qkv_multipliers"], size["layers"], model_dim, head_dim * groups)
    query_heads = tuple(d // head_dim for d in query_dims)
    ffn_dims = _spread(rules["ffn_multipliers"], size["layers"], model_dim, rules["ffn_dim_divisor"])
    return OpenELMShape(model_dim, head_dim, query_heads, tuple(q // groups for q in query_heads), ffn_dims)


def _spread(multipliers: list[float], layers: int, model_dim: int, divisor: int) -> tuple[int, ...]:
    first, last = multipliers
    rounded = (round(float(m), 2) for m in np.linspace(first, last, num=layers))
    return tuple(_nearest_multiple(model_dim * m, divisor) for m in rounded)


def _nearest_multiple(value: float, divisor: int) -> int:
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest
