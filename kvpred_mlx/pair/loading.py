"""Load and save pairs, in mlx-lm's flat directory format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.nn as nn
import mlx_lm.utils
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvpred_mlx.errors import one_line
from kvpred_mlx.files import new_directory
from kvpred_mlx.pair.model import KVPredictionModel, Model, ModelArgs
from kvpred_mlx.pair.predictor import FirstLayersPredictor

DEMO_PAIR = Path(__file__).parents[1] / "pycode"
BUNDLED = {DEMO_PAIR.name: DEMO_PAIR}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "tiktoken.model",
    "vocab.json",
)


def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: dict[str, Any] | None = None,
    *,
    lazy: bool = False,
    revision: str | None = None,
) -> tuple[KVPredictionModel, TokenizerWrapper | None]:
    """Load a pair and its tokenizer from a directory or a Hugging Face repository.

    Returns:
        The model, and the tokenizer or None if the pair has none (it then takes token ids only).

    Raises:
        FileNotFoundError: no such directory, and no such repository could be fetched.
        ValueError: the directory does not hold a pair, or its weights are damaged or do not fit.
    """
    path = find_pair(path_or_hf_repo, revision)
    model = load_model(path, lazy=lazy)
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        return model, None
    config = read_config(path)
    eos = config.get("eos_token_id", config["base"].get("eos_token_id"))
    return model, mlx_lm.utils.load_tokenizer(path, tokenizer_config, eos_token_ids=eos)


def load_model(path: str | Path, *, lazy: bool = False) -> KVPredictionModel:
    """Load a pair's model from a directory.

    Args:
        lazy: leave the weights on disk until they are first used.

    Raises:
        FileNotFoundError: the directory or its config or weights are not there.
        ValueError: the config or the weights are damaged, or do not fit each other.
    """
    path = Path(path)
    read_config(path)
    try:
        model, _ = mlx_lm.utils.load_model(
            path, lazy=lazy, get_model_classes=lambda config: (Model, ModelArgs)
        )
    except RuntimeError as error:  # mlx: a file that cannot be read, or ends early
        raise ValueError(f"{path}: damaged weights: {one_line(error)}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    return cast(KVPredictionModel, model)


def save(
    path: str | Path,
    model: KVPredictionModel,
    tokenizer: TokenizerWrapper | None = None,
    *,
    overwrite: bool = False,
    extras: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Save a pair as one flat mlx-lm directory; an interrupted save leaves nothing at `path`.

    Args:
        extras: called with the directory before it takes its place, to add files of its own.

    Raises:
        FileExistsError: `path` is there and `overwrite` is false, or it is not a model directory.
    """
    with new_directory(Path(path), overwrite) as directory:
        mlx_lm.utils.save_model(directory, _stored(model))
        mlx_lm.utils.save_config(pair_config(model), directory / "config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        extras(directory)


def _stored(model: KVPredictionModel) -> nn.Module:
    """The parts whose weights are written: not an auxiliary's that are the base's own."""
    if not (model.args and model.args.auxiliary_layers):
        return model
    stored = nn.Module()
    stored.base, stored.predictor = model.base, model.predictor
    return stored


def pair_config(model: KVPredictionModel) -> dict[str, Any]:
    """The `config.json` of a pair (see `ModelArgs`), with the quantization that its modules have."""
    config: dict[str, Any] = {"model_type": "kvpred", "base": _model_config(model.base, model.args, "base")}
    if isinstance(model.predictor, FirstLayersPredictor):
        config["first_layers"] = list(model.predictor.depths)
    else:
        config |= {
            "auxiliary": _model_config(model.auxiliary, model.args, "auxiliary"),
            "layer_map": list(model.predictor.layer_map),
            "source": model.predictor.source,
        }
        if model.args and model.args.auxiliary_layers:
            config["auxiliary_layers"] = model.args.auxiliary_layers
    config["min_prompt_tokens"] = model.min_prompt_tokens
    if model.exact_positions:
        config["exact_positions"] = model.exact_positions.as_dict()
    return config | quantization_config(model)


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization` entry of a model's config, {} if no module is quantized.

    mlx-lm reads each layer's own settings off its shapes; these are only the defaults.
    """
    quantized = [m for _, m in model.named_modules() if "scales" in m and hasattr(m, "bits")]
    if not quantized:
        return {}
    first = quantized[0]
    return {"quantization": {"group_size": first.group_size, "bits": first.bits, "mode": first.mode}}


def find_pair(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The local directory of a pair: a directory, a bundled pair's name, or a Hugging Face repository, fetched.

    Raises:
        FileNotFoundError: neither a directory nor a repository that could be fetched.
    """
    path = Path(path_or_hf_repo).expanduser()
    if path.exists():
        return path
    name = str(path_or_hf_repo)
    if name in BUNDLED:
        return BUNDLED[name]
    if "/" not in name:
        raise FileNotFoundError(f"{name}: no such directory, and not a bundled pair ({', '.join(BUNDLED)})")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name}: no such directory")
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=mlx_lm.utils.DEFAULT_ALLOW_PATTERNS)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: no such directory, and not to be had from the Hugging Face hub: {one_line(error)}"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """A pair's `config.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or not a pair's.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: {'not a directory' if path.exists() else 'no such directory'}")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json, so not a model directory")
    try:
        config = mlx_lm.utils.load_config(path)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / 'config.json'}: not JSON: {one_line(error)}") from error
    if not isinstance(config, dict) or config.get("model_type") != "kvpred":
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: model_type is {kind!r}, expected 'kvpred' (a pair)")
    return config


def context_length(config: dict[str, Any]) -> int | None:
    """How many tokens a pair's base was made for, if its config says so."""
    base = config["base"]
    for part in (base, base.get("text_config", {})):
        for name in ("max_position_embeddings", "max_context_length", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(part.get(name), int):
                return part[name]
    return None


def _model_config(model: Any, pair_args: ModelArgs | None, role: str) -> dict[str, Any]:
    if pair_args is not None:
        return dict(getattr(pair_args, role))
    return dataclasses.asdict(model.args)
