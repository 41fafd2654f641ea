"""What a saved pair is made of, as data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from kvpred_mlx.pair.links import ROLES, is_vector
from kvpred_mlx.pair.loading import context_length, load_model, quantization_config, read_base_config
from kvpred_mlx.pair.locating import has_tokenizer
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor


def describe(path: Path, **others: Any) -> dict[str, Any]:
    """The facts of the pair at `path`, its linked models' too; weights are read from disk only as far as their headers.

    Args:
        others: `base`, `auxiliary` and `force`, as `load_model` takes them.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    model = load_model(path, lazy=True, **others)
    roles: dict[str, Any] = {role: _model(model, role) for role in ROLES}
    base = model.parts.by_role.get("base")
    depths = model.predictor.depths if isinstance(model.predictor, FirstLayersPredictor) else None
    return {
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        **roles,
        "predictor": _part(model.predictor),
        "layer_map": list(model.predictor.layer_map),
        "source": model.predictor.source,
        "places": [
            {
                "layer": model.base_taps.layer_of(i),
                "window": tail,
                "projections": [place.name for place in places],
            }
            for i, (places, tail) in enumerate(
                zip(model.base_taps.places, model.base_taps.tails, strict=True)
            )
        ],
        "first_layers": depths and list(depths),
        "min_prompt_tokens": model.min_prompt_tokens,
        "exact_positions": model.exact_positions.as_dict() if model.exact_positions else None,
        "context_length": context_length(read_base_config(path, others.get("base"))),
        "tokenizer": has_tokenizer(base.path if base else path),
    }


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's arrays."""
    return sum(array.nbytes for array in dict(tree_flatten(module.parameters())).values())


def norms_checksum(model: nn.Module) -> int:
    """Of a model's vectors (norms and biases), which no quantization touches: tells one model from another."""
    return _checksum(model, is_vector)


def weights_checksum(module: nn.Module) -> int:
    """Of all of a module's arrays: tells it from another one of its shapes."""
    return _checksum(module, lambda array: True)


def _checksum(module: nn.Module, counts: Callable[[mx.array], bool]) -> int:
    arrays: Any = dict(tree_flatten(module.parameters())).values()
    return crc32(b"".join(np.array(a.astype(mx.float32)).tobytes() for a in arrays if counts(a)))


def _model(pair: KVPredictionModel, role: str) -> dict[str, Any] | None:
    """One of the models; `link` is where it is, if the pair does not hold it itself."""
    module, args = getattr(pair, role), pair.args
    if module is None or args is None:
        return None
    of_base = pair.parts.config("base") or args.base
    config = pair.parts.config(role) or getattr(args, role) or of_base
    link = args.link(role)
    return _part(module) | {
        "model_type": config["model_type"],
        "layers": len(module.layers),
        "link": None if link is None else link.entry(),
    }


def _part(module: nn.Module) -> dict[str, Any]:
    arrays = list(dict(tree_flatten(module.parameters())).values())
    floats = sorted({str(a.dtype).rpartition(".")[2] for a in arrays if mx.issubdtype(a.dtype, mx.floating)})
    return {
        "parameters": get_total_parameters(module),
        "bytes": weight_bytes(module),
        "dtype": " and ".join(floats),
        "quantization": quantization_config(module).get("quantization"),
    }
