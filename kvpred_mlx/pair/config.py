"""A saved pair's `config.json`, standalone or linked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.utils import _get_classes

from kvpred_mlx.dial.positions import ExactPositions
from kvpred_mlx.pair.links import ROLES, Link
from kvpred_mlx.pair.sources import check_source

MIN_PROMPT_TOKENS = 32


@dataclass
class ModelArgs(BaseModelArgs):
    """What it says: mlx-lm's configs of its models and what joins them.

    Args:
        model_type: kvpred.
        base: its config, or a link to it (`kvpred_mlx.pair.links`).
        auxiliary: likewise; None if the base's first layers read, or some layers of a base that is linked.
        layer_map, source: of a pair with an auxiliary (`Predictor`).
        min_prompt_tokens, exact_positions: see `KVPredictionModel`.
        first_layers: how many of the base's layers read: the depths that there are maps for.
        auxiliary_layers: the auxiliary is these layers of the base, with its weights, which are then stored once.

    Raises:
        ValueError: an entry is not of its type.
    """

    model_type: str
    base: dict[str, Any]
    auxiliary: dict[str, Any] | None = None
    layer_map: list[int] = field(default_factory=list)
    min_prompt_tokens: int = MIN_PROMPT_TOKENS
    source: str = "kv"
    exact_positions: dict[str, Any] | None = None
    first_layers: list[int] | None = None
    auxiliary_layers: list[int] | None = None

    def __post_init__(self) -> None:
        kinds = {"base": dict, "min_prompt_tokens": int}
        if self.first_layers is not None:
            kinds |= {"first_layers": list}
        else:
            kinds |= {"layer_map": list, "source": str}
            kinds |= {"auxiliary_layers": list} if self.auxiliary is None else {"auxiliary": dict}
        wrong = [
            f"{name} is {value!r}, expected {kind.__name__}"
            for name, kind in kinds.items()
            if type(value := getattr(self, name)) is not kind
        ]
        models = {n: getattr(self, n) for n in ROLES if n in kinds and isinstance(getattr(self, n), dict)}
        wrong += [
            f"{name} has no model_type"
            for name, c in models.items()
            if not Link.of(c) and "model_type" not in c
        ]
        if self.first_layers is not None and self.auxiliary is not None:
            wrong.append("auxiliary and first_layers are both there, expected one of the two")
        try:
            self.dial()
        except (TypeError, ValueError) as error:
            wrong.append(f"exact_positions is {self.exact_positions!r}: {error}")
        if wrong:
            raise ValueError("config.json: " + "; ".join(wrong))
        if self.first_layers is None:
            check_source(self.source)

    def link(self, role: str) -> Link | None:
        """The link to a model; None if the pair holds it itself, or has none."""
        return Link.of(getattr(self, role))

    def with_models(self, entries: Mapping[str, dict[str, Any] | None]) -> ModelArgs:
        """The same pair with other entries for some of its models, by role."""
        base = entries.get("base") or self.base
        return replace(self, base=base, auxiliary=entries.get("auxiliary", self.auxiliary))

    def dial(self) -> ExactPositions | None:
        """The pair's default of `KVPredictionModel.exact_positions`."""
        return None if self.exact_positions is None else ExactPositions(**self.exact_positions)


def build_model(config: dict[str, Any]) -> nn.Module:
    """The mlx-lm model of a config, with random weights that are made only if they are used."""
    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(config))
