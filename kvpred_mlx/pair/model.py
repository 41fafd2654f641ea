"""A pair of models as one mlx-lm model: how mlx-lm's calls are answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.utils import _get_classes

from kvpred_mlx._registration import announce_config
from kvpred_mlx.dial.positions import ExactPositions
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.dialled import read_prompt
from kvpred_mlx.pair.kept_layers import KeptLayers
from kvpred_mlx.pair.parts import PairParts
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor
from kvpred_mlx.pair.sources import check_source, feature_widths
from kvpred_mlx.taps.kv_taps import KVTaps

MIN_PROMPT_TOKENS = 32


class KVPredictionModel(PairParts):
    """KV Prediction (arXiv 2410.08391, section 3) behind mlx-lm's model interface.

    A call with a prompt is answered by the reader (an auxiliary model, or the base's own first layers) and the
    predictor, which fill the base's cache; a decode step is the base's own.  A prompt's last token must come in a call
    of its own, as mlx-lm sends it: the base then processes it exactly, and its logits give the first token.

    Without a cache the call is the teacher-forced form: the base runs over all tokens with predicted keys
    and values at every position, its own included.

    Args:
        base, auxiliary, predictor: see `PairParts`.
        min_prompt_tokens: a call with fewer tokens runs the base alone, unless it continues a prompt
            whose earlier chunk was predicted.  In a batch the longest row counts.  A chunk of one token
            cannot be told from a prompt's last token and is always exact.
        exact_positions: which of a prompt's positions the base computes exactly (None: the last token only); may
            be set at any time.
        args: the config that it is saved with (None: the models' own).

    Raises:
        UnsupportedModelError: if a model cannot be tapped; names the family and the reason.
        ValueError: if the predictor's widths are not those of the models.
    """

    model_type = "kvpred"

    def __init__(
        self,
        base: nn.Module | KVTaps,
        auxiliary: nn.Module | KVTaps | None,
        predictor: Predictor | FirstLayersPredictor,
        min_prompt_tokens: int = MIN_PROMPT_TOKENS,
        exact_positions: ExactPositions | None = None,
        args: ModelArgs | None = None,
    ):
        super().__init__(base, auxiliary, predictor, min_prompt_tokens)
        self.exact = False
        self.exact_positions = exact_positions
        self.args = args

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None = None, *, exact: bool | None = None
    ) -> mx.array:
        """Process `inputs` [B, L] and return logits [B, L, vocabulary].

        Args:
            cache: what `make_cache` returned; updated in place.
            exact: run the base alone, bit for bit as it would by itself (default: the attribute `exact`).
        """
        exact = self.exact if exact is None else exact
        if cache is None:
            if exact or inputs.shape[1] < self.min_prompt_tokens:
                return self.base(inputs)
            return self.reader.forced(inputs)
        if not isinstance(cache[-1], AuxiliaryCache):
            return self.base(inputs, cache=cache)
        *base_cache, entry = cache
        is_prompt = inputs.shape[1] >= self.min_prompt_tokens or entry.prompt_open
        if exact or inputs.shape[1] == 1 or not is_prompt:
            return self._decode(inputs, base_cache, entry)
        return read_prompt(self, self.exact_positions or ExactPositions(), inputs, base_cache, entry)

    def _decode(self, inputs: mx.array, base_cache: list[Any], entry: AuxiliaryCache) -> mx.array:
        """Run the base alone, and log the tokens for the auxiliary to catch up on later."""
        redo = entry.to_redo
        if redo and can_trim_prompt_cache(base_cache):
            trim_prompt_cache(base_cache, redo)
            again = mx.concatenate([entry.tail(redo).astype(inputs.dtype), inputs], axis=1)
            logits = self.base(again, cache=base_cache)[:, redo:]
        else:
            logits = self.base(inputs, cache=base_cache)
        return mx.depends(logits, entry.decoded(inputs))


@dataclass
class ModelArgs(BaseModelArgs):
    """A saved pair's `config.json`: mlx-lm's configs of its models and what joins them.

    Args:
        model_type: kvpred.
        base: its config.
        auxiliary: its config; None if the base's first layers read.
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
        if self.first_layers is None:
            kinds |= {"auxiliary": dict, "layer_map": list, "source": str}
        else:
            kinds |= {"first_layers": list}
        wrong = [
            f"{name} is {value!r}, expected {kind.__name__}"
            for name, kind in kinds.items()
            if type(value := getattr(self, name)) is not kind
        ]
        configs = ("base", "auxiliary") if self.first_layers is None else ("base",)
        wrong += [f"{n} has no model_type" for n in configs if "model_type" not in (getattr(self, n) or {})]
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

    def dial(self) -> ExactPositions | None:
        """The pair's default of `KVPredictionModel.exact_positions`."""
        return None if self.exact_positions is None else ExactPositions(**self.exact_positions)


class Model(KVPredictionModel):
    """A pair as mlx-lm builds it: from its config, before the weights are there."""

    def __init__(self, args: ModelArgs):
        base = KVTaps(build_model(args.base))
        auxiliary: KVTaps | None = None
        predictor: Predictor | FirstLayersPredictor
        if args.first_layers is not None:
            predictor = FirstLayersPredictor(args.first_layers, base.input_widths, base.widths)
        else:
            auxiliary = KVTaps(build_model(args.auxiliary or {}))
            widths = feature_widths(args.source, auxiliary)
            predictor = Predictor(args.layer_map, widths, base.widths, args.source)
        super().__init__(base, auxiliary, predictor, args.min_prompt_tokens, args.dial(), args)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """mlx-lm's hook between reading a pair's files and loading its weights: what is stored once serves twice."""
        kept = self.args and self.args.auxiliary_layers
        if not kept:
            return weights
        base = {n.removeprefix("base."): w for n, w in weights.items() if n.startswith("base.")}
        shared = KeptLayers(self.base, kept).shared(base)
        return weights | {f"auxiliary.{name}": array for name, array in shared.items()}


def build_model(config: dict[str, Any]) -> nn.Module:
    """The mlx-lm model of a config, with random weights that are made only if they are used."""
    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(config))


announce_config()
