"""What prediction costs in quality: the same text continued from an exact and from a predicted prompt cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.errors import check_ranges
from kvpred_mlx.making.estimates import Estimate, Resampling
from kvpred_mlx.making.explained_variance import ExplainedVariance
from kvpred_mlx.making.windows import Windows
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.progress import ProgressCallback, no_progress
from kvpred_mlx.taps.kv import KV

# From a prompt's tokens [B, P] to a model and a cache that holds all of them but the last.
Prefill = Callable[[mx.array], tuple[nn.Module, list[Any]]]
METRICS = ("cross_entropy", "cross_entropy_per_byte", "top1_accuracy", "agreement", "first_token_agreement")
SCORE_TOKENS = 64


@dataclass(frozen=True)
class Quality:
    """Figures of a pair for one prompt length.

    Args:
        prompt_tokens, score_tokens: tokens of each prompt, and tokens scored after it.
        windows, documents: how many.
        modes: for each mode the estimates of `METRICS`, and `retention`: (no prompt - mode) / (no prompt - exact)
            in cross-entropy.
        explained_variance: of the base's raw keys and values by the predicted ones, for each layer.
        gains: for each mode, its figures less those of one of them, with intervals of the difference, document by
            document.
        explained_places: explained variances of every projection that makes a part of what a layer keeps, by its name;
            none unless the base keeps states.
    """

    prompt_tokens: int
    score_tokens: int
    windows: int
    documents: int
    modes: dict[str, dict[str, Estimate]]
    explained_variance: dict[str, list[float]] = field(default_factory=dict)
    gains: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    explained_places: list[dict[str, float]] = field(default_factory=list)

    def explained(self) -> dict[str, dict[int, float]]:
        """Explained variances by what is predicted and layer: keys and values, or places where there are states."""
        if not self.explained_places:
            return {
                name: dict(enumerate(values))
                for name, values in self.explained_variance.items()
                if any(values)
            }
        names = dict.fromkeys(name for places in self.explained_places for name in places)
        return {
            name: {i: places[name] for i, places in enumerate(self.explained_places) if name in places}
            for name in names
        }


def modes_of(pair: KVPredictionModel) -> dict[str, Prefill]:
    """The base with an exact cache, with a predicted one, the auxiliary alone if there is one, and the base
    without the prompt."""

    def predicted(prompt: mx.array) -> tuple[nn.Module, list[Any]]:
        cache = pair.make_cache()
        pair(prompt[:, :-1], cache=cache, exact=False)
        return pair.base, cache[:-1]

    def without(prompt: mx.array) -> tuple[nn.Module, list[Any]]:
        return pair.base, make_prompt_cache(pair.base)

    alone = {} if pair.auxiliary is None else {"auxiliary": prefill_of(pair.auxiliary)}
    return {"exact": prefill_of(pair.base), "predicted": predicted, **alone, "no prompt": without}


def prefill_of(model: nn.Module) -> Prefill:
    """A model that processes the whole prompt itself."""

    def prefill(prompt: mx.array) -> tuple[nn.Module, list[Any]]:
        cache = make_prompt_cache(model)
        model(prompt[:, :-1], cache=cache)
        return model, cache

    return prefill


def measure(
    pair: KVPredictionModel,
    windows: Windows,
    modes: Mapping[str, Prefill] | None = None,
    *,
    over: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: ProgressCallback = no_progress,
    begun: dict[str, Any] | None = None,
) -> Quality:
    """Score the continuations after every mode's prompt cache.

    Args:
        modes: `exact` (the base's own prefill, whose pass tells explained variances too) and `no prompt` must be among
            them (default: `modes_of(pair)`).
        over: the mode that `gains` are over.
        batch_size: windows side by side (default: `windows.at_once`).
        progress: called with the number of windows done and their total.
        begun: what an interrupted call with the same windows and modes left in it, or {}; ready for JSON, kept up after
            every batch.  Explained variances are of the windows since then alone.

    Raises:
        ValueError: a number is out of range.
    """
    batch_size = windows.at_once if batch_size is None else batch_size
    numbers = {"batch_size": batch_size, "seed": seed}
    check_ranges(numbers, {"batch_size": 1, "seed": 0}, whole=numbers)
    modes = modes_of(pair) if modes is None else modes
    others = {name: prefill for name, prefill in modes.items() if name != "exact"}
    begun = {} if begun is None else begun
    scores = {name: [_restored(values)] for name, values in begun["scores"].items()} if begun else {}
    scores = scores or {name: [] for name in modes}
    variance = ExplainedVariance(pair)
    for start in range(begun.get("windows", 0), len(windows), batch_size):
        chosen = slice(start, start + batch_size)
        prompts, continuations = mx.array(windows.prompts[chosen]), mx.array(windows.continuations[chosen])
        cache, true, predicted = _exact(pair, prompts[:, :-1])
        exact, losses = _score(pair.base, cache, prompts, continuations)
        variance.add(true, predicted)
        scores["exact"].append(_metrics(exact, losses, exact, windows, chosen))
        for name, prefill in others.items():
            guesses, losses = _score(*prefill(prompts), prompts, continuations)
            scores[name].append(_metrics(guesses, losses, exact, windows, chosen))
        done = min(start + batch_size, len(windows))
        begun.update(windows=done, scores={name: _kept(batches) for name, batches in scores.items()})
        progress(done, len(windows))
    resampling = Resampling(windows.documents, seed)
    means = {
        name: {m: resampling.means(np.concatenate([b[m] for b in batches])) for m in METRICS}
        for name, batches in scores.items()
    }
    _add_retention(means)
    gains = {} if over is None else _less(means, means[over])
    return Quality(
        windows.prompts.shape[1], windows.continuations.shape[1], len(windows), len(set(windows.documents)),
        _estimates(means), variance.explained(), _estimates(gains),
        variance.by_place() if pair.reads_in_order else [],
    )  # fmt: skip


def _exact(pair: KVPredictionModel, tokens: mx.array) -> tuple[list[Any], list[KV], list[KV]]:
    """The exact cache of `tokens` [B, L], true raw keys and values of the same pass, and the predicted ones."""
    cache, inputs = make_prompt_cache(pair.base), list[mx.array]()
    true, _ = pair.base_taps.record(tokens, cache, inputs=inputs)
    if isinstance(pair.predictor, FirstLayersPredictor):
        depth = pair.predictor.depths[-1]
        return cache, true, [*true[: depth + 1], *pair.predictor.behind(depth)(inputs[depth])]
    return cache, true, pair.predict(tokens)


def _score(
    model: nn.Module, cache: list[Any], prompts: mx.array, continuations: mx.array
) -> tuple[np.ndarray, np.ndarray]:
    """Most likely tokens and losses at every scored position, `[B, N]` each."""
    logits = model(mx.concatenate([prompts[:, -1:], continuations[:, :-1]], axis=1), cache=cache)
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), continuations)
    return np.array(mx.argmax(logits, axis=-1)), np.array(losses)


def _metrics(
    guesses: np.ndarray, losses: np.ndarray, exact: np.ndarray, windows: Windows, chosen: slice
) -> dict[str, np.ndarray]:
    same = guesses == exact
    values = (
        losses.mean(1),
        losses.sum(1) / windows.bytes[chosen],
        (guesses == windows.continuations[chosen]).mean(1),
        same.mean(1),
        same[:, 0].astype(float),
    )
    return dict(zip(METRICS, values, strict=True))


def _kept(batches: list[dict[str, np.ndarray]]) -> dict[str, tuple[str, list[float]]]:
    """The scores so far, each metric's with its type."""
    whole = {m: np.concatenate([b[m] for b in batches]) for m in METRICS}
    return {m: (str(values.dtype), values.tolist()) for m, values in whole.items()}


def _restored(kept: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {m: np.array(values, dtype) for m, (dtype, values) in kept.items()}


def _add_retention(means: dict[str, dict[str, np.ndarray]]) -> None:
    """How much of what the prompt gives in cross-entropy each mode keeps."""
    nothing, exact = (means[name]["cross_entropy"] for name in ("no prompt", "exact"))
    for metrics in means.values():
        metrics["retention"] = (nothing - metrics["cross_entropy"]) / (nothing - exact)


def _less(
    means: dict[str, dict[str, np.ndarray]], other: dict[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    return {mode: {m: v - other[m] for m, v in metrics.items()} for mode, metrics in means.items()}


def _estimates(means: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Estimate]]:
    return {mode: {m: Estimate.of(v) for m, v in metrics.items()} for mode, metrics in means.items()}
