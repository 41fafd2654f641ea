"""Training a predictor as a cache is used: the prompt predicted, the answer exact.

The paper trains with predicted entries at every position, through the whole base.  Here the prompt's features are
recorded once; the maps make its entries, the base runs the answer's tokens alone over them, and the loss is the
Kullback-Leibler divergence from the exact base's recorded probabilities.  The gradient touches the answer's tokens, not
the prompt's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.making.fresh_windows import FreshWindows
from kvpred_mlx.making.in_turn import InTurn
from kvpred_mlx.making.loop import Trainer
from kvpred_mlx.making.loss import check_weights
from kvpred_mlx.making.recording import Batch, Layout, Recording
from kvpred_mlx.making.settings import TrainingSettings
from kvpred_mlx.making.step import Terms
from kvpred_mlx.pair.loading import quantization_config
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.taps.kv import KV

SMALLEST = 1e-9  # probability
AnswerWindows = Recording | FreshWindows | InTurn


@dataclass(frozen=True)
class AsUsedWeights:
    """Weights of the loss terms beside the divergence.

    Args:
        cross_entropy: of the base's cross-entropy on the real continuation (the paper's first term).
        kv: of the mean absolute distance of predicted from true keys and values, summed over layers, before the key
            norm (the paper's third term).
    """

    cross_entropy: float = 0.0
    kv: float = 0.0

    def __post_init__(self) -> None:
        check_weights(vars(self))


class AsUsedLoss:
    """KL(exact base || base over predicted entries), mean over the answers' tokens.

    Args:
        recording: of the windows (`kvpred_mlx.making.recording.record`).
        weights: of the other terms.
        depth: which maps of a first-layers pair are trained (None: the deepest).
    """

    def __init__(
        self,
        recording: AnswerWindows,
        weights: AsUsedWeights | None = None,
        depth: int | None = None,
    ):
        self.recording, self._weights, self._depth = recording, weights or AsUsedWeights(), depth

    def __call__(self, pair: KVPredictionModel, batch: Batch) -> tuple[mx.array, Terms]:
        """The loss of some windows, and its terms by name, not yet weighted."""
        logits, predicted, true = self._answer(pair, batch)
        terms = {"divergence": divergence(logits, batch["top_ids"], batch["top_logprobs"])}
        loss, weights = terms["divergence"], self._weights
        if weights.cross_entropy:
            terms["base"] = nn.losses.cross_entropy(logits, batch["continuations"]).mean()
            loss = loss + weights.cross_entropy * terms["base"]
        if weights.kv:
            terms["kv"] = _distance(predicted, true)
            loss = loss + weights.kv * terms["kv"]
        return loss, terms

    def logits(self, pair: KVPredictionModel, batch: Batch) -> mx.array:
        """The base's logits [B, N, vocabulary] of the answers over predicted entries of the prompts, in float32."""
        return self._answer(pair, batch)[0]

    def _answer(self, pair: KVPredictionModel, batch: Batch) -> tuple[mx.array, list[KV], list[KV]]:
        predicted, true = self.entries(pair, batch)
        prompts, continuations = batch["prompts"], batch["continuations"]
        cache = make_prompt_cache(pair.base)
        pair.base_taps.inject(predicted, prompts[:, :-1], cache, logits=False)
        answers = mx.concatenate([prompts[:, -1:], continuations[:, :-1]], axis=1)
        return pair.base(answers, cache=cache).astype(mx.float32), predicted, true

    def entries(self, pair: KVPredictionModel, batch: Batch) -> tuple[list[KV], list[KV]]:
        """Keys and values of every layer as the pair fills them, and the true ones."""
        true = self.recording.layout.split_kv(batch["kv"])
        predictor = pair.predictor
        if isinstance(predictor, FirstLayersPredictor):
            depth = predictor.depths[-1] if self._depth is None else self._depth
            return [*true[: depth + 1], *predictor.behind(depth)(batch[f"layer_{depth}"])], true
        read = max(predictor.auxiliary_layers) + 1
        arrays = 2 if predictor.source == "kv" else 1
        features = [
            tuple(batch[f"layer_{j}_{a}"] for a in range(arrays)) if j in predictor.auxiliary_layers else ()
            for j in range(read)
        ]
        return predictor(features), true


def divergence(logits: mx.array, top_ids: mx.array, top_logprobs: mx.array) -> mx.array:
    """KL(p || q) with p known for its most likely tokens, and as one number for all others; mean over positions.

    Args:
        logits: of q, `[B, N, vocabulary]`.
        top_ids, top_logprobs: of p, `[B, N, TOP]`.
    """
    logq = mx.take_along_axis(logits, top_ids, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    p = mx.exp(top_logprobs)
    known = mx.where(p > 0, p * (mx.where(p > 0, top_logprobs, 0) - logq), 0).sum(-1)
    rest_p = mx.maximum(1 - p.sum(-1), 0)
    q = mx.where(p > 0, mx.exp(logq), 0)
    rest_q = mx.maximum(1 - q.sum(-1), SMALLEST)
    rest = mx.where(rest_p > SMALLEST, rest_p * (mx.log(mx.maximum(rest_p, SMALLEST)) - mx.log(rest_q)), 0)
    return (known + rest).mean()


def as_used_trainer(
    pair: KVPredictionModel,
    recording: AnswerWindows,
    settings: TrainingSettings,
    weights: AsUsedWeights | None = None,
    state_folder: Path | None = None,
    *,
    depth: int | None = None,
    compiled: bool = False,
) -> Trainer:
    """A trainer of the predictor alone; models are frozen, and the auxiliary is not even asked.

    Args:
        recording: of this pair's models.
        state_folder: where states are saved and resumed from.
        depth: see `AsUsedLoss`.

    Raises:
        ValueError: the predictor is quantized, or the recording lacks what it reads.
    """
    if quantization_config(pair.predictor):
        raise ValueError("the predictor is quantized, expected float weights to train: --dequantize")
    needed = Layout.of(pair)
    if list(map(tuple, recording.layout.kv)) != list(needed.kv):
        raise ValueError(
            f"{recording.folder} was recorded with another base: its keys and values have other widths"
        )
    if list(recording.layout.models) != list(needed.models):
        raise ValueError(f"{recording.folder} was recorded with other models of the same shapes")
    missing = [n for n, width in needed.features.items() if recording.layout.features.get(n) != width]
    if missing:
        raise ValueError(f"{recording.folder} lacks the features {', '.join(missing)}")
    pair.freeze()
    trained = pair.predictor
    if isinstance(pair.predictor, FirstLayersPredictor):
        trained = pair.predictor.at(pair.predictor.depths[-1] if depth is None else depth)
    trained.unfreeze()
    pair.predictor.set_dtype(mx.float32)
    loss = AsUsedLoss(recording, weights, depth)
    identity = {
        "as_used": asdict(weights or AsUsedWeights()),
        "depth": depth,
        "source": pair.predictor.source,
    }
    return Trainer(pair, loss, recording, settings, state_folder, identity=identity, compiled=compiled)


def _distance(predicted: list[KV], true: list[KV]) -> mx.array:
    """The sum over layers of the mean absolute difference."""
    pairs = [
        (p, t) for a, b in zip(predicted, true, strict=True) for p, t in zip(a, b, strict=True) if t.size
    ]
    return mx.stack([mx.abs(p.astype(mx.float32) - t).mean() for p, t in pairs]).sum()
