"""KV Prediction (arXiv 2410.08391) for MLX: a pair of models that is an mlx-lm model like any other.

Importing this package teaches mlx-lm to load pairs: `mlx_lm.load`, `mlx_lm.stream_generate`,
`mlx_lm.batch_generate`, prompt-cache files and `mlx_lm.server` then take them as they are.

    from kvpred_mlx import load, generate

    model, tokenizer = load("path/to/pair")
    print(generate(model, tokenizer, prompt="..."))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvpred_mlx import _blas, _registration

if TYPE_CHECKING:
    from kvpred_mlx.dial.positions import ExactPositions
    from kvpred_mlx.errors import UnsupportedModelError
    from kvpred_mlx.generation.repair import RepairingModel
    from kvpred_mlx.generation.stream import GenerationResponse, generate, stream_generate
    from kvpred_mlx.pair.loading import load, load_model, save
    from kvpred_mlx.pair.model import KVPredictionModel
    from kvpred_mlx.pair.predictor import Predictor

__version__ = "0.1.0"

_HOME = {
    "ExactPositions": "dial.positions",
    "GenerationResponse": "generation.stream",
    "KVPredictionModel": "pair.model",
    "Predictor": "pair.predictor",
    "RepairingModel": "generation.repair",
    "UnsupportedModelError": "errors",
    "generate": "generation.stream",
    "load": "pair.loading",
    "load_model": "pair.loading",
    "save": "pair.loading",
    "stream_generate": "generation.stream",
}
__all__ = [
    "ExactPositions",
    "GenerationResponse",
    "KVPredictionModel",
    "Predictor",
    "RepairingModel",
    "UnsupportedModelError",
    "generate",
    "load",
    "load_model",
    "save",
    "stream_generate",
]

_blas.preload()
_registration.register()


def __getattr__(name: str) -> Any:
    # mlx_lm takes more than a second to import: `kvpred-mlx --help` must not wait for it.
    if name in _HOME:
        return getattr(importlib.import_module(f"kvpred_mlx.{_HOME[name]}"), name)
    raise AttributeError(f"module 'kvpred_mlx' has no attribute {name!r}")
