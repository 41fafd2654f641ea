"""A pair of models as one mlx-lm model: how mlx-lm's calls are answered."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from kvpred_mlx.dial.positions import ExactPositions
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.config import MIN_PROMPT_TOKENS, ModelArgs
from kvpred_mlx.pair.dialled import read_prompt
from kvpred_mlx.pair.links import Parts
from kvpred_mlx.pair.parts import PairParts
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor
from kvpred_mlx.taps.kv_taps import KVTaps


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
        parts: the models that `args` links to.

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
        parts: Parts | None = None,
    ):
        super().__init__(base, auxiliary, predictor, min_prompt_tokens)
        self.exact = False
        self.exact_positions = exact_positions
        self.args = args
        self.parts = parts or Parts()

    def predicts(self, prompt_tokens: int) -> bool:
        """Whether a prompt of so many tokens is predicted, whose last one comes in a call of its own."""
        return prompt_tokens - 1 >= max(2, self.min_prompt_tokens)

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
