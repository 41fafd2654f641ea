"""A pair of models as one mlx-lm model: the auxiliary reads the prompt, the base answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.utils import _get_classes

from kvpred_mlx._registration import announce_config
from kvpred_mlx.dial.importance import Importance
from kvpred_mlx.dial.positions import ExactPositions, prefill
from kvpred_mlx.dial.rows import ExactRows
from kvpred_mlx.pair import cpu_prefill
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.predictor import Predictor
from kvpred_mlx.pair.sources import Features, check_source, feature_widths, layers_read, record
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps

MIN_PROMPT_TOKENS = 32


class KVPredictionModel(nn.Module):
    """KV Prediction (arXiv 2410.08391, section 3) behind mlx-lm's model interface.

    A call with a prompt is answered by the auxiliary and the predictor, which fill the base's cache; a
    decode step is the base's own.  A prompt's last token must come in a call of its own, as mlx-lm sends
    it: the base then processes it exactly, and its logits give the first token.

    Without a cache the call is the teacher-forced form: the base runs over all tokens with predicted keys
    and values at every position, its own included.

    Args:
        base: any mlx-lm model that `KVTaps` can inject.
        auxiliary: any mlx-lm model that `KVTaps` can record, with the same vocabulary.
        predictor: maps the auxiliary's keys and values to the base's.
        min_prompt_tokens: a call with fewer tokens runs the base alone, unless it continues a prompt
            whose earlier chunk was predicted.  In a batch the longest row counts.  A chunk of one token
            cannot be told from a prompt's last token and is always exact.
        exact_positions: which of a prompt's positions the base computes exactly (None: the last token only); may
            be set at any time.

    Raises:
        UnsupportedModelError: if a model cannot be tapped; names the family and the reason.
        ValueError: if the predictor's widths are not those of the two models.
    """

    def __init__(
        self,
        base: nn.Module,
        auxiliary: nn.Module,
        predictor: Predictor,
        min_prompt_tokens: int = MIN_PROMPT_TOKENS,
        exact_positions: ExactPositions | None = None,
    ):
        super().__init__()
        self._set_taps(KVTaps(base), KVTaps(auxiliary), predictor)
        self.min_prompt_tokens = min_prompt_tokens
        self.exact = False
        self.exact_positions = exact_positions
        self.model_type = "kvpred"

    def _set_taps(self, base: KVTaps, auxiliary: KVTaps, predictor: Predictor) -> None:
        _check_widths(predictor, base, auxiliary)
        self.base, self.auxiliary, self.predictor = base.model, auxiliary.model, predictor
        self.base_taps, self.auxiliary_taps = base, auxiliary
        self._depth = auxiliary.depth(layers_read(predictor.source, predictor.layer_map, auxiliary))
        self.rows, self.importance = ExactRows(base), Importance(auxiliary.model)

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
            return self.base_taps.inject(self.predict(inputs), inputs, logits=True)
        if not isinstance(cache[-1], AuxiliaryCache):
            return self.base(inputs, cache=cache)
        *base_cache, entry = cache
        is_prompt = inputs.shape[1] >= self.min_prompt_tokens or entry.prompt_open
        if exact or inputs.shape[1] == 1 or not is_prompt:
            return self._decode(inputs, base_cache, entry)
        if self.exact_positions:
            return prefill(self, self.exact_positions, inputs, base_cache, entry)
        return self._prefill(inputs, base_cache, entry)

    def auxiliary_features(self, tokens: mx.array, caches: Sequence[Any] | None = None) -> list[Features]:
        """What the predictor reads of the auxiliary's layers for `tokens` [B, L], and of no layer beyond.

        Args:
            caches: the auxiliary's (`AuxiliaryCache.auxiliary`); updated in place.  If they are those of all its
                layers (it will draft), all are filled.
        """
        source, taps = self.predictor.source, self.auxiliary_taps
        if self._depth is None or (caches is not None and len(caches) > self._depth[1]):
            return record(source, taps, tokens, list(caches) if caches is not None else None)[0]
        layers, entries = self._depth
        if caches is not None:  # layers that do not run still have their masks made from their caches
            caches = [*caches, *make_prompt_cache(self.auxiliary)[entries:]]
        with taps.first_layers(layers):
            return record(source, taps, tokens, caches)[0]

    def fill(self, predicted: list[KV], tokens: mx.array, base_cache: list[Any]) -> None:
        """Append predicted raw keys and values of `tokens` [B, L] to the base's caches."""
        self.base_taps.inject(predicted, tokens, base_cache, logits=False)

    def make_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """The base's caches and one `AuxiliaryCache`; `max_kv_size` as in mlx-lm's `make_prompt_cache`."""
        entries = None if self._depth is None else self._depth[1]
        auxiliary = make_prompt_cache(self.auxiliary, max_kv_size)[:entries]
        return [*make_prompt_cache(self.base, max_kv_size), AuxiliaryCache(*auxiliary)]

    @property
    def vocab_size(self) -> int:
        """Rows of the base's token embedding: token ids must be below."""
        size = getattr(getattr(self.base, "args", None), "vocab_size", None)
        embeddings = (m for m in self.base.modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding))
        return size or max(m.weight.shape[0] for m in embeddings)

    @property
    def layers(self) -> list[Any]:
        """The base's layers and the auxiliary: as many as `make_cache` has entries, as mlx-lm expects."""
        entries = len(make_prompt_cache(self.base))
        layers = list(self.base.layers)
        return [*(layers[i % len(layers)] for i in range(entries)), self.auxiliary]

    def _prefill(self, inputs: mx.array, base_cache: list[Any], entry: AuxiliaryCache) -> mx.array:
        """Predict the base's cache entries for `inputs`.

        The logits are lazy and mlx-lm never evaluates a prompt's; who does gets the teacher-forced ones.
        A short call that follows a predicted chunk may be that prompt's remainder, or a speculative decoder's
        draft: its entries are predicted, its logits are exact, and if the cache is then wound back it was a
        draft, and the next call makes its entries exact (see `_decode`).
        """
        short = inputs.shape[1] < self.min_prompt_tokens
        aside = copy.deepcopy(base_cache) if short or self.base_taps.fused else None
        predicted = self.predict(inputs, entry)
        if aside is None:
            logits = self.base_taps.inject(predicted, inputs, base_cache, logits=True)
        else:
            self.fill(predicted, inputs, base_cache)
            logits = (
                self.base(inputs, cache=aside)
                if short
                else self.base_taps.inject(predicted, inputs, aside, logits=True)
            )
        entry.append(inputs)
        entry.prompt_open = entry.caught_up = True
        entry.provisional = inputs.shape[1] if short else 0
        return logits

    def _decode(self, inputs: mx.array, base_cache: list[Any], entry: AuxiliaryCache) -> mx.array:
        """Run the base alone, and log the tokens for the auxiliary to catch up on later."""
        redo = 0 if entry.caught_up else entry.provisional
        if redo and can_trim_prompt_cache(base_cache):
            trim_prompt_cache(base_cache, redo)
            again = mx.concatenate([entry.tail(redo).astype(inputs.dtype), inputs], axis=1)
            logits = self.base(again, cache=base_cache)[:, redo:]
        else:
            logits = self.base(inputs, cache=base_cache)
        return self.logged(logits, inputs, entry)

    def logged(self, logits: mx.array, inputs: mx.array, entry: AuxiliaryCache) -> mx.array:
        """`logits`, once `inputs` [B, L] are logged as decoded."""
        entry.close_prompt()
        entry.provisional = 0
        # Tied to the logits, so that the log is evaluated step by step and not as one long graph.
        return mx.depends(logits, entry.append(inputs, exact=True))

    def predict(self, inputs: mx.array, entry: AuxiliaryCache | None = None) -> list[KV]:
        """Predicted raw base keys and values of `inputs` [B, L]; the auxiliary catches up first."""
        if entry is None:
            return self.predictor(self.auxiliary_features(inputs))
        reading = entry.catch_up(inputs)
        reading.prepare(entry.auxiliary)
        recorded = cpu_prefill.read(partial(self.auxiliary_features, caches=entry.auxiliary), reading.tokens)
        reading.finalize(entry.auxiliary)
        new = inputs.shape[1]
        return self.predictor([tuple(reading.predicted(a, new) for a in layer) for layer in recorded])


@dataclass
class ModelArgs(BaseModelArgs):
    """A saved pair's `config.json`: two mlx-lm configs and what joins them.

    Raises:
        ValueError: an entry is not of its type.
    """

    model_type: str
    base: dict[str, Any]
    auxiliary: dict[str, Any]
    layer_map: list[int]
    min_prompt_tokens: int = MIN_PROMPT_TOKENS
    source: str = "kv"
    exact_positions: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        kinds = {"base": dict, "auxiliary": dict, "layer_map": list, "min_prompt_tokens": int, "source": str}
        wrong = [
            f"{name} is {value!r}, expected {kind.__name__}"
            for name, kind in kinds.items()
            if type(value := getattr(self, name)) is not kind
        ]
        wrong += [
            f"{n} has no model_type"
            for n in ("base", "auxiliary")
            if "model_type" not in (getattr(self, n) or {})
        ]
        try:
            self.dial()
        except (TypeError, ValueError) as error:
            wrong.append(f"exact_positions is {self.exact_positions!r}: {error}")
        if wrong:
            raise ValueError("config.json: " + "; ".join(wrong))
        check_source(self.source)

    def dial(self) -> ExactPositions | None:
        """The pair's default of `KVPredictionModel.exact_positions`."""
        return None if self.exact_positions is None else ExactPositions(**self.exact_positions)


class Model(KVPredictionModel):
    """A pair as mlx-lm builds it: from its config, before the weights are there."""

    def __init__(self, args: ModelArgs):
        nn.Module.__init__(self)
        base, auxiliary = KVTaps(build_model(args.base)), KVTaps(build_model(args.auxiliary))
        widths = feature_widths(args.source, auxiliary)
        predictor = Predictor(args.layer_map, widths, base.widths, args.source)
        self._set_taps(base, auxiliary, predictor)
        self.args, self.model_type = args, args.model_type
        self.min_prompt_tokens, self.exact = args.min_prompt_tokens, False
        self.exact_positions = args.dial()


def build_model(config: dict[str, Any]) -> nn.Module:
    """The mlx-lm model of a config, with random weights that are made only if they are used."""
    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(config))


def _check_widths(predictor: Predictor, base: KVTaps, auxiliary: KVTaps) -> None:
    wrong = [
        f"{name} key and value widths {list(have)}, expected {expected} of {taps.family}"
        for name, have, expected, taps in (
            ("base", predictor.base_widths, base.widths, base),
            ("auxiliary", predictor.auxiliary_widths, feature_widths(predictor.source, auxiliary), auxiliary),
        )
        if list(have) != expected
    ]
    if wrong:
        raise ValueError("predictor does not fit the models: " + "; ".join(wrong))


announce_config()
