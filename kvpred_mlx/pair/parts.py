"""What a pair is: the base, what reads prompts for it, and the predictor between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.dial.importance import Importance
from kvpred_mlx.dial.rows import ExactRows
from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.auxiliary_reader import AuxiliaryReader
from kvpred_mlx.pair.first_layers_reader import FirstLayersReader
from kvpred_mlx.pair.predictor import FirstLayersPredictor, Predictor
from kvpred_mlx.pair.readers import Reader
from kvpred_mlx.pair.sources import Features
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps
from kvpred_mlx.taps.states import holds_states


class PairParts(nn.Module):
    """The models of a pair, their taps, and how predicted entries come into the base's cache.

    Args:
        base: any mlx-lm model that `KVTaps` can inject, or its taps.
        auxiliary: any mlx-lm model that `KVTaps` can record, with the same vocabulary, or its taps; None if the base's
            own first layers read.
        predictor: from the auxiliary's keys and values to the base's, or (`FirstLayersPredictor`) from the input of one
            of the base's layers to those behind it.
        min_prompt_tokens: a shorter call is not a prompt (see `KVPredictionModel`).

    Raises:
        UnsupportedModelError: if a model cannot be tapped; names the family and the reason.
        ValueError: if the predictor does not fit the models.
    """

    def __init__(
        self,
        base: nn.Module | KVTaps,
        auxiliary: nn.Module | KVTaps | None,
        predictor: Predictor | FirstLayersPredictor,
        min_prompt_tokens: int,
    ):
        super().__init__()
        self.base_taps = base if isinstance(base, KVTaps) else KVTaps(base)
        self.base, self.predictor = self.base_taps.model, predictor
        self.min_prompt_tokens = min_prompt_tokens
        self.auxiliary: nn.Module | None = None
        self.reader: Reader
        if isinstance(predictor, FirstLayersPredictor):
            if auxiliary is not None:
                raise ValueError("a first-layers predictor and an auxiliary, expected one of the two")
            self.reader = FirstLayersReader(self.base_taps, predictor)
        elif auxiliary is None:
            raise ValueError("no auxiliary, expected one, or a first-layers predictor")
        else:
            taps = auxiliary if isinstance(auxiliary, KVTaps) else KVTaps(auxiliary)
            self.auxiliary = taps.model
            self.reader = AuxiliaryReader(self.base_taps, taps, predictor)
        self.rows = ExactRows(self.base_taps)

    @property
    def importance(self) -> Importance:
        """Who tells which tokens matter: the reader."""
        return self.reader.importance

    def check_top(self) -> None:
        """Make sure that positions can be chosen and made exact: each by itself, or in blocks where there are states.

        Raises:
            UnsupportedModelError: they cannot.
        """
        self.importance.check()
        if isinstance(self.reader, FirstLayersReader):
            self.reader.heard_layers(self.reader.depth)
        if not self.reads_in_order:
            self.rows.check()

    @property
    def reads_in_order(self) -> bool:
        """Whether the base keeps more than attention keys and values, so that exact spans are read in their order."""
        return holds_states(make_prompt_cache(self.base))

    @property
    def heard_layers(self) -> int | None:
        """How many attention layers of the reader are there to be listened to (None: all)."""
        reader = self.reader
        return reader.heard_layers(reader.depth) if isinstance(reader, FirstLayersReader) else None

    @property
    def auxiliary_taps(self) -> KVTaps:
        """Those of the auxiliary."""
        return self.auxiliary_reader.taps

    @property
    def auxiliary_reader(self) -> AuxiliaryReader:
        """The reader of a pair with an auxiliary.

        Raises:
            UnsupportedModelError: there is none.
        """
        if isinstance(self.reader, AuxiliaryReader):
            return self.reader
        raise UnsupportedModelError(
            "the pair reads with its base's first layers, so it has no auxiliary model"
        )

    @property
    def auxiliary_model(self) -> nn.Module:
        """The auxiliary, where there must be one (see `auxiliary_reader`)."""
        return self.auxiliary_taps.model

    @property
    def first_layers_reader(self) -> FirstLayersReader | None:
        """The reader of a pair that reads with its base's first layers; None if it has an auxiliary."""
        return self.reader if isinstance(self.reader, FirstLayersReader) else None

    def auxiliary_features(self, tokens: mx.array, caches: Sequence[Any] | None = None) -> list[Features]:
        """What the predictor reads of the auxiliary (see `AuxiliaryReader.features`)."""
        return self.auxiliary_reader.features(tokens, caches)

    def predict(self, inputs: mx.array, entry: AuxiliaryCache | None = None) -> list[KV]:
        """Predicted raw base keys and values of `inputs` [B, L]; the auxiliary catches up first."""
        return self.auxiliary_reader.predict(inputs, entry)

    def fill(self, predicted: list[KV], tokens: mx.array, base_cache: list[Any]) -> None:
        """Append predicted raw keys and values of `tokens` [B, L] to the base's caches."""
        self.base_taps.inject(predicted, tokens, base_cache, logits=False)

    def make_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """The base's caches and one `AuxiliaryCache`; `max_kv_size` as in mlx-lm's `make_prompt_cache`."""
        entry = AuxiliaryCache(*self.reader.caches(max_kv_size))
        return [*make_prompt_cache(self.base, max_kv_size), entry]

    @property
    def vocab_size(self) -> int:
        """Rows of the base's token embedding: token ids must be below."""
        size = getattr(getattr(self.base, "args", None), "vocab_size", None)
        embeddings = (m for m in self.base.modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding))
        return size or max(m.weight.shape[0] for m in embeddings)

    @property
    def layers(self) -> list[Any]:
        """The base's layers and the reader: as many as `make_cache` has entries, as mlx-lm expects."""
        entries = len(make_prompt_cache(self.base))
        layers = list(self.base.layers)
        return [*(layers[i % len(layers)] for i in range(entries)), self.auxiliary or self.predictor]
