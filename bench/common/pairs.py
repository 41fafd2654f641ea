"""What results say of the pair that was measured."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from kvpred_mlx.pair.description import weight_bytes
from kvpred_mlx.pair.loading import quantization_config
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.modes import Mode


def describe_pair(pair: KVPredictionModel, name: str) -> dict[str, Any]:
    """Name, types, sizes and settings of a pair; see docs/benchmarking.md."""
    parts = {"base": pair.base, "auxiliary": pair.auxiliary, "predictor": pair.predictor}
    modules = {role: module for role, module in parts.items() if module is not None}
    return {
        "name": name,
        "dtype": dtype_name(pair),
        "weight_bytes": {role: weight_bytes(module) for role, module in modules.items()},
        **({"quantization": None} | quantization_config(pair)),
        "min_prompt_tokens": pair.min_prompt_tokens,
        "exact_positions": pair.exact_positions.as_dict() if pair.exact_positions else None,
        "mode": str(Mode.of(pair)),
    }


def computed_dtype(pair: KVPredictionModel) -> mx.Dtype:
    """The type that the base computes in, that of its logits."""
    return pair.base(mx.array([[0]])).dtype


def dtype_name(pair: KVPredictionModel) -> str:
    """`computed_dtype`'s name: `float32`."""
    return str(computed_dtype(pair)).rpartition(".")[2]
