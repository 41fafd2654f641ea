"""Two mlx-lm models become a pair: loading them, comparing their tokenizers, pruning layers, joining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvpred_mlx.pair import kept_layers
from kvpred_mlx.pair.config import MIN_PROMPT_TOKENS, ModelArgs
from kvpred_mlx.pair.links import Link, Part, Parts, float_type, load_single
from kvpred_mlx.pair.locating import find_model, has_tokenizer
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor
from kvpred_mlx.taps.kv_taps import KVTaps

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
        path: the directory that it was loaded from.
    """

    name: str
    model: nn.Module
    config: dict[str, Any]
    tokenizer: TokenizerWrapper | None = None
    layers: list[int] | None = None
    path: Path | None = None


def load_part(path_or_hf_repo: str) -> LoadedModel:
    """Load any mlx-lm model from a directory or a Hugging Face repository.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is a pair, or it is damaged, or mlx-lm does not know its kind.
    """
    path = find_model(path_or_hf_repo)
    model, config = load_single(path)
    mx.eval(model.parameters())
    eos = config.get("eos_token_id")
    tokenizer = mlx_lm.utils.load_tokenizer(path, eos_token_ids=eos) if has_tokenizer(path) else None
    return LoadedModel(path_or_hf_repo, model, config, tokenizer, path=path)


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
    model, config = kept_layers.keep_layers(base.model, base.config, kept)
    name = f"{base.name}, layers {','.join(map(str, kept))}"
    return LoadedModel(name, model, config, base.tokenizer, kept)


def join(
    base: LoadedModel,
    auxiliary: LoadedModel,
    predictor: Predictor,
    min_prompt_tokens: int = MIN_PROMPT_TOKENS,
    *,
    linked: bool = False,
) -> KVPredictionModel:
    """A pair that is saved with the two models' own configs.

    Args:
        linked: it is saved with links to them, and without their weights.
    """
    args = ModelArgs(
        "kvpred",
        base.config,
        auxiliary.config,
        list(predictor.layer_map),
        min_prompt_tokens,
        predictor.source,
        auxiliary_layers=auxiliary.layers,
    )
    taps = KVTaps(base.model), KVTaps(auxiliary.model)
    parts = Parts()
    if linked:
        args, parts = _linked(args, [("base", base, taps[0]), ("auxiliary", auxiliary, taps[1])])
        predictor.set_dtype(float_type(base.model))
    return KVPredictionModel(*taps, predictor, min_prompt_tokens, args=args, parts=parts)


def join_first_layers(
    base: LoadedModel,
    predictor: FirstLayersPredictor,
    min_prompt_tokens: int = MIN_PROMPT_TOKENS,
    *,
    linked: bool = False,
) -> KVPredictionModel:
    """A pair that reads with its base's first layers, saved with the base's own config, or with a link to it.

    Raises:
        UnsupportedModelError: the base's first layers do not stand alone (`FirstLayersReader.check`).
    """
    depths, taps, parts = list(predictor.depths), KVTaps(base.model), Parts()
    args = ModelArgs("kvpred", base.config, min_prompt_tokens=min_prompt_tokens, first_layers=depths)
    if linked:
        args, parts = _linked(args, [("base", base, taps)])
        predictor.set_dtype(float_type(base.model))
    pair = KVPredictionModel(taps, None, predictor, min_prompt_tokens, args=args, parts=parts)
    if pair.first_layers_reader is not None:
        pair.first_layers_reader.check()
    return pair


def _linked(args: ModelArgs, models: Sequence[tuple[str, LoadedModel, KVTaps]]) -> tuple[ModelArgs, Parts]:
    """Links in the place of configs; layers of the base have none, they are found through it."""
    parts, links = Parts(), dict[str, dict[str, Any] | None]()
    for role, model, taps in models:
        links[role] = None
        if model.layers is None:
            if model.path is None:
                raise ValueError(f"{model.name}: it was not loaded from a place that could be linked to")
            parts.by_role[role] = Part(model.path, model.config, taps)
            links[role] = Link.to(model.name, model.path, taps).entry()
    return args.with_models(links), parts
