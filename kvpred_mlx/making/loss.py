"""The paper's training loss, term by term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from kvpred_mlx.pair import sources
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.taps.checkpointing import Norms
from kvpred_mlx.taps.key_norms import KeyNorms
from kvpred_mlx.taps.kv import KV

Z_LOSS = 1e-4  # CoreNet's weight of the z-loss, if it is on


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms beside the base's cross-entropy; the defaults are the paper's.

    Args:
        auxiliary: of the auxiliary model's own cross-entropy.
        kv: of the distance between predicted and true keys and values.
        z: of mean(logsumexp^2) of both models' logits (CoreNet: 1e-4 where it is on).
    """

    auxiliary: float = 1.0
    kv: float = 1.0
    z: float = 0.0

    def __post_init__(self) -> None:
        check_weights(vars(self))


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ValueError for weights of loss terms, by name, that are below 0 or no numbers."""
    wrong = [f"{k} is {v}" for k, v in weights.items() if not v >= 0]
    if wrong:
        raise ValueError(f"loss weight {', '.join(wrong)}, expected 0 or more")


class KVPredictionLoss:
    """CE(base) + a CE(auxiliary) + k sum over layers [mean |K^ - K| + mean |V^ - V|] + z-loss (CoreNet).

    The base runs teacher-forced, with predicted keys and values at every position; K^ and K are taken after the
    base's key norm and before RoPE, K and V from the base run normally, without a gradient.

    Args:
        pair: whose base is frozen.
        weights: of the terms.
        ignore_index: targets of this value are padding: their positions are left out of every term.
    """

    def __init__(self, pair: KVPredictionModel, weights: LossWeights, ignore_index: int | None = None):
        self.weights, self.ignore_index = weights, ignore_index
        self._base, self._source = pair.base_taps, pair.predictor.source
        self._auxiliary = None if pair.auxiliary is None else pair.auxiliary_taps
        self._norms = KeyNorms(pair.base_taps)

    def __call__(self, pair: KVPredictionModel, batch: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss of packed sequences `[B, L + 1]`, and its terms by name."""
        return self.of(pair, batch[:, :-1], batch[:, 1:])

    def of(
        self, pair: KVPredictionModel, tokens: mx.array, targets: mx.array
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss for `tokens` and `targets`, both `[B, L]`; the terms are not yet weighted."""
        norms: Norms = {}
        true_keys, true = self._true(tokens)
        auxiliary_logits: mx.array | None = None
        if self._auxiliary is None:
            predicted, logits = self._first_layers(pair, tokens, true, norms)
        else:
            features, auxiliary_logits = sources.record(self._source, self._auxiliary, tokens)
            predicted = pair.predictor(features)
            logits = self._base.inject(predicted, tokens, logits=True, norms=norms)
        predicted_keys = self._norms.normed(predicted, norms)
        counted = mx.ones(targets.shape) if self.ignore_index is None else targets != self.ignore_index
        terms = {
            "base": _cross_entropy(logits, targets, counted),
            "keys": _distance(predicted_keys, true_keys, counted),
            "values": _distance([v for _, v in predicted], [v for _, v in true], counted),
        }
        weights = self.weights
        loss = terms["base"] + weights.kv * (terms["keys"] + terms["values"])
        if auxiliary_logits is not None:
            terms["auxiliary"] = _cross_entropy(auxiliary_logits, targets, counted)
            loss = loss + weights.auxiliary * terms["auxiliary"]
        if weights.z:
            read = [logits] if auxiliary_logits is None else [logits, auxiliary_logits]
            terms["z"] = mx.stack([_z(one, counted) for one in read]).sum()
            loss = loss + weights.z * terms["z"]
        return loss, terms

    def _first_layers(
        self, pair: KVPredictionModel, tokens: mx.array, true: list[KV], norms: Norms
    ) -> tuple[list[KV], mx.array]:
        """Keys and values of all layers as the greatest depth predicts them, and the logits over them."""
        assert isinstance(pair.predictor, FirstLayersPredictor)
        depth, maps, behind = (
            pair.predictor.depths[-1],
            pair.predictor.behind(pair.predictor.depths[-1]),
            list[KV](),
        )

        def predict(x: mx.array) -> list[KV]:
            behind[:] = maps(x)
            return behind

        logits = self._base.inject_after(depth, predict, tokens, logits=True, norms=norms)
        return [*true[: depth + 1], *behind], logits

    def _true(self, tokens: mx.array) -> tuple[list[mx.array], list[KV]]:
        norms: Norms = {}
        true, _ = self._base.record(tokens, norms=norms)
        keys = [mx.stop_gradient(k) for k in self._norms.normed(true, norms)]
        return keys, [KV(*map(mx.stop_gradient, layer)) for layer in true]


def _cross_entropy(logits: mx.array, targets: mx.array, counted: mx.array) -> mx.array:
    targets = mx.where(counted, targets, 0)
    return _mean(nn.losses.cross_entropy(logits.astype(mx.float32), targets), counted)


def _z(logits: mx.array, counted: mx.array) -> mx.array:
    return _mean(mx.logsumexp(logits.astype(mx.float32), axis=-1) ** 2, counted)


def _distance(predicted: list[mx.array], true: list[mx.array], counted: mx.array) -> mx.array:
    """The sum over layers of the mean absolute difference."""
    total = mx.array(0.0)
    for p, t in zip(predicted, true, strict=True):
        if t.size:
            difference = mx.abs(p.astype(mx.float32) - t.astype(mx.float32))
            total += _mean(difference.reshape(*counted.shape, -1).mean(axis=-1), counted)
    return total


def _mean(values: mx.array, counted: mx.array) -> mx.array:
    return (values * counted).sum() / mx.maximum(counted.sum(), 1)
