"""Two mlx-lm models become a pair: loading them, comparing their tokenizers, pruning layers, joining."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvpred_mlx.errors import UnsupportedModelError, one_line
from kvpred_mlx.pair.kept_layers import KeptLayers
from kvpred_mlx.pair.loading import TOKENIZER_FILES, find_pair
from kvpred_mlx.pair.model import MIN_PROMPT_TOKENS, KVPredictionModel, ModelArgs, build_model
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor

LAYER_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")
SAMPLE = (
    "def naïve(x): return x[1:]  # 3.14 + 2718 → “quoted”, 日本語, \t\n\n"
    "Once upon a time, there were 12,345 words."
)


@dataclass(frozen=True)
class LoadedModel:
    """An mlx-lm model with what is needed to save it again.

    Args:
        name: as it was given, for messages and the model card.
        model: the model.
        config: its `config.json`.
        tokenizer: None if it has none.
        layers: of the base, if it is made of some of its layers.
    """

    name: str
    model: nn.Module
    config: dict[str, Any]
    tokenizer: TokenizerWrapper | None = None
    layers: list[int] | None = None


def load_part(path_or_hf_repo: str) -> LoadedModel:
    """Load any mlx-lm model from a directory or a Hugging Face repository.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is a pair, or it is damaged, or mlx-lm does not know its kind.
    """
    path = find_pair(path_or_hf_repo)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json, so not a model directory")
    try:
        config = mlx_lm.utils.load_config(path)
        if config.get("model_type") == "kvpred":
            raise ValueError("it is a pair already, expected a single model")
        model, config = mlx_lm.utils.load_model(path)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    has_tokenizer = any((path / name).exists() for name in TOKENIZER_FILES)
    eos = config.get("eos_token_id")
    tokenizer = mlx_lm.utils.load_tokenizer(path, eos_token_ids=eos) if has_tokenizer else None
    return LoadedModel(path_or_hf_repo, model, config, tokenizer)


def check_same_tokenizer(base: LoadedModel, auxiliary: LoadedModel) -> None:
    """Make sure that both models mean the same by the same token ids.

    Raises:
        ValueError: naming the first token that differs, or a text that is cut differently.
    """
    if base.tokenizer is None or auxiliary.tokenizer is None:
        without = [m.name for m in (base, auxiliary) if m.tokenizer is None]
        raise ValueError(f"{' and '.join(without)}: no tokenizer, so it cannot be compared")
    vocabularies = [
        {i: t for t, i in m.tokenizer.get_vocab().items()} for m in (base, auxiliary) if m.tokenizer
    ]
    first, second = vocabularies
    for i in sorted(first.keys() | second.keys()):
        if first.get(i) != second.get(i):
            raise ValueError(
                f"{base.name} and {auxiliary.name} have different tokenizers: token {i} is {first.get(i)!r} "
                f"and {second.get(i)!r}, expected the same"
            )
    ids = [m.tokenizer.encode(SAMPLE) for m in (base, auxiliary) if m.tokenizer]
    if ids[0] != ids[1]:
        place = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
        parts = [repr(first.get(i[place]) if place < len(i) else None) for i in ids]
        raise ValueError(
            f"{base.name} and {auxiliary.name} cut the same text differently: token {place} of a sample is "
            f"{parts[0]} and {parts[1]}, expected the same"
        )


def keep_layers(base: LoadedModel, kept: list[int]) -> LoadedModel:
    """An auxiliary made of some of the base's layers (paper, KVP-LP), with the base's own weights, not copies.

    Raises:
        UnsupportedModelError: the family's config does not tell its number of layers in a known way.
    """
    config = _with_layers(copy.deepcopy(base.config), len(base.model.layers), kept)
    model = build_model(config)
    if len(model.layers) != len(kept):
        raise UnsupportedModelError(f"{base.config['model_type']}: layers cannot be left out of this family")
    layers = KeptLayers(base.model, kept)
    quantized = {n: m for n, m in base.model.named_modules() if "scales" in m and hasattr(m, "bits")}

    def like_the_base(name: str, module: nn.Module) -> bool | dict[str, Any]:
        found = quantized.get(layers.original(name))
        return {"group_size": found.group_size, "bits": found.bits, "mode": found.mode} if found else False

    if quantized:
        nn.quantize(model, class_predicate=like_the_base)
    model.load_weights(list(layers.shared(dict(tree_flatten(base.model.parameters()))).items()))
    name = f"{base.name}, layers {','.join(map(str, kept))}"
    return LoadedModel(name, model, config, base.tokenizer, kept)


def join(
    base: LoadedModel,
    auxiliary: LoadedModel,
    predictor: Predictor,
    min_prompt_tokens: int = MIN_PROMPT_TOKENS,
) -> KVPredictionModel:
    """A pair that is saved with the two models' own configs."""
    args = ModelArgs(
        "kvpred",
        base.config,
        auxiliary.config,
        list(predictor.layer_map),
        min_prompt_tokens,
        predictor.source,
        auxiliary_layers=auxiliary.layers,
    )
    return KVPredictionModel(base.model, auxiliary.model, predictor, min_prompt_tokens, args=args)


def join_first_layers(
    base: LoadedModel, predictor: FirstLayersPredictor, min_prompt_tokens: int = MIN_PROMPT_TOKENS
) -> KVPredictionModel:
    """A pair that reads with its base's first layers, saved with the base's own config.

    Raises:
        UnsupportedModelError: the base's first layers do not stand alone (`FirstLayersReader.check`).
    """
    depths = list(predictor.depths)
    args = ModelArgs("kvpred", base.config, min_prompt_tokens=min_prompt_tokens, first_layers=depths)
    pair = KVPredictionModel(base.model, None, predictor, min_prompt_tokens, args=args)
    if pair.first_layers_reader is not None:
        pair.first_layers_reader.check()
    return pair


def _with_layers(config: dict[str, Any], n_layers: int, kept: list[int]) -> dict[str, Any]:
    """The config of a model with `kept` of its `n_layers`; lists with an entry a layer are cut too."""
    for part in (config, config.get("text_config", {})):
        for name, value in part.items():
            if name in LAYER_COUNTS and value == n_layers:
                part[name] = len(kept)
            elif isinstance(value, list) and len(value) == n_layers:
                part[name] = [value[i] for i in kept]
    return config
