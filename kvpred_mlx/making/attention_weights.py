"""Which tokens a fit should get right: those that the base attends to.

Least squares treats all tokens alike, and a base does not: it attends to some of them far more than to others, to the
first one above all.  Where the base's keys and values are hard to predict, as from a model that was never trained with
it, the error falls where the weights are small (docs/making-pairs.md, "What pays").
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.dial.importance import Importance
from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps

RECENT = 64  # last tokens of a sequence: all tokens attend to their neighbours, whatever these are
EVEN = 0.5  # of the weight is the same for all tokens


class AttentionWeights:
    """Records a base, and weighs tokens by the attention of a sequence's last queries.

    Args:
        taps: of the base; all tokens weigh the same if its family's attention cannot be seen.
        weighted: if not, all tokens weigh the same, too.
    """

    def __init__(self, taps: KVTaps, weighted: bool = True):
        self._taps, self._importance = taps, Importance(taps.model)
        self._weighted = weighted and self._audible()

    def record(self, tokens: mx.array, **options: Any) -> tuple[list[KV], mx.array | None]:
        """Raw keys and values of `tokens` [B, L], as `KVTaps.record`, and weights [B, L] whose mean is 1, both lazy.

        The weights are None where there are none.
        """
        B, L = tokens.shape
        if not self._weighted or L <= RECENT:
            return self._taps.record(tokens, **options)[0], None
        with self._importance.listen() as heard:
            raw, _ = self._taps.record(tokens, make_prompt_cache(self._taps.model), **options)
        attended = heard.scores(L, L, [0] * B)[:, : L - RECENT]
        weights = EVEN + (1 - EVEN) * attended / attended.mean(axis=1, keepdims=True)
        return raw, mx.pad(weights, [(0, 0), (0, RECENT)], constant_values=1.0)

    def _audible(self) -> bool:
        try:
            self._importance.check()
        except UnsupportedModelError:
            return False
        return True
