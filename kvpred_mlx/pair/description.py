"""What a saved pair is made of, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from kvpred_mlx.pair.loading import (
    TOKENIZER_FILES,
    context_length,
    load_model,
    quantization_config,
    read_config,
)
from kvpred_mlx.pair.predictor import FirstLayersPredictor


def describe(path: Path) -> dict[str, Any]:
    """The facts of the pair at `path`; weights are read from disk only as far as their headers.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    model, config = load_model(path, lazy=True), read_config(path)
    modules = {"base": model.base, "auxiliary": model.auxiliary}
    roles: dict[str, Any] = {
        role: module
        and _part(module) | {"model_type": config[role]["model_type"], "layers": len(module.layers)}
        for role, module in modules.items()
    }
    depths = model.predictor.depths if isinstance(model.predictor, FirstLayersPredictor) else None
    return {
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        **roles,
        "predictor": _part(model.predictor),
        "layer_map": list(model.predictor.layer_map),
        "source": model.predictor.source,
        "first_layers": depths and list(depths),
        "min_prompt_tokens": model.min_prompt_tokens,
        "exact_positions": model.exact_positions.as_dict() if model.exact_positions else None,
        "context_length": context_length(config),
        "tokenizer": any((path / name).exists() for name in TOKENIZER_FILES),
    }


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's arrays."""
    return sum(array.nbytes for array in dict(tree_flatten(module.parameters())).values())


def norms_checksum(model: nn.Module) -> int:
    """Of a model's vectors (norms and biases), which no quantization touches: tells one model from another."""
    arrays: Any = dict(tree_flatten(model.parameters())).values()
    vectors = [a for a in arrays if a.ndim == 1 and mx.issubdtype(a.dtype, mx.floating)]
    return crc32(b"".join(np.array(v.astype(mx.float32)).tobytes() for v in vectors))


def _part(module: nn.Module) -> dict[str, Any]:
    arrays = list(dict(tree_flatten(module.parameters())).values())
    floats = sorted({str(a.dtype).rpartition(".")[2] for a in arrays if mx.issubdtype(a.dtype, mx.floating)})
    return {
        "parameters": get_total_parameters(module),
        "bytes": weight_bytes(module),
        "dtype": " and ".join(floats),
        "quantization": quantization_config(module).get("quantization"),
    }
