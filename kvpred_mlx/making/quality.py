"""What prediction costs in quality: the same text continued from an exact and from a predicted prompt cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.pair.model import KVPredictionModel

# From a prompt's tokens [B, P] to a model and a cache that holds all of them but the last.
Prefill = Callable[[mx.array], tuple[nn.Module, list[Any]]]
METRICS = ("cross_entropy", "cross_entropy_per_byte", "top1_accuracy", "agreement", "first_token_agreement")
SCORE_TOKENS = 64
RESAMPLES = 2000
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Windows:
    """Prompts of real text and the real text that follows.

    Args:
        prompts: `[W, P]` token ids.
        continuations: `[W, N]` token ids.
        documents: `[W]`, which document each window is from.
        bytes: `[W]`, UTF-8 bytes of the continuations' text; nan without a tokenizer.
    """

    prompts: np.ndarray
    continuations: np.ndarray
    documents: np.ndarray
    bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)


def cut_windows(
    documents: Sequence[Sequence[int]],
    prompt_tokens: int,
    score_tokens: int,
    tokenizer: Any = None,
    most: int = 160,
    per_document: int = 4,
) -> Windows:
    """Cut windows of `prompt_tokens` + `score_tokens` from documents, spread evenly over each.

    Raises:
        ValueError: no document is long enough.
    """
    size = prompt_tokens + score_tokens
    found: list[tuple[int, Sequence[int]]] = []
    for d, ids in enumerate(documents):
        count = min(per_document, len(ids) // size)
        starts = np.linspace(0, len(ids) - size, count).astype(int) if count > 1 else range(count)
        found += [(d, ids[s : s + size]) for s in starts]
    if not found:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"the longest of {len(documents)} documents has {longest} tokens, expected at least {size}: "
            f"{prompt_tokens} of prompt and {score_tokens} to score"
        )
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]
    rows = np.array([ids for _, ids in chosen])
    texts = [
        len(tokenizer.decode(row[prompt_tokens:].tolist()).encode()) if tokenizer else np.nan for row in rows
    ]
    return Windows(
        rows[:, :prompt_tokens], rows[:, prompt_tokens:], np.array([d for d, _ in chosen]), np.array(texts)
    )


@dataclass(frozen=True)
class Estimate:
    """A mean over documents with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


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
    """

    prompt_tokens: int
    score_tokens: int
    windows: int
    documents: int
    modes: dict[str, dict[str, Estimate]]
    explained_variance: dict[str, list[float]] = field(default_factory=dict)
    gains: dict[str, dict[str, Estimate]] = field(default_factory=dict)


def modes_of(pair: KVPredictionModel) -> dict[str, Prefill]:
    """The base with an exact cache, with a predicted one, the auxiliary alone, and the base without the prompt."""

    def predicted(prompt: mx.array) -> tuple[nn.Module, list[Any]]:
        cache = pair.make_cache()
        pair(prompt[:, :-1], cache=cache, exact=False)
        return pair.base, cache[:-1]

    def without(prompt: mx.array) -> tuple[nn.Module, list[Any]]:
        return pair.base, make_prompt_cache(pair.base)

    return {
        "exact": prefill_of(pair.base),
        "predicted": predicted,
        "auxiliary": prefill_of(pair.auxiliary),
        "no prompt": without,
    }


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
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Quality:
    """Score the continuations after every mode's prompt cache.

    Args:
        modes: `exact` and `no prompt` must be among them (default: `modes_of(pair)`).
        over: the mode that `gains` are over.
        progress: called with the number of windows done and their total.
    """
    modes = modes_of(pair) if modes is None else modes
    scores: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in modes}
    variance = _Variance(pair)
    for start in range(0, len(windows), batch_size):
        chosen = slice(start, start + batch_size)
        prompts, continuations = mx.array(windows.prompts[chosen]), mx.array(windows.continuations[chosen])
        exact: np.ndarray | None = None
        for name in sorted(modes, key=lambda name: name != "exact"):
            guesses, losses = _score(modes[name], prompts, continuations)
            exact = guesses if exact is None else exact
            scores[name].append(_metrics(guesses, losses, exact, windows, chosen))
        variance.add(prompts[:, :-1])
        progress(min(start + batch_size, len(windows)), len(windows))
    found = {
        name: {m: np.concatenate([b[m] for b in batches]) for m in METRICS}
        for name, batches in scores.items()
    }
    draws = _draws(found, windows.documents, seed)
    return Quality(
        windows.prompts.shape[1], windows.continuations.shape[1], len(windows), len(set(windows.documents)),
        {mode: _estimates(metrics) for mode, metrics in draws.items()}, variance.explained(),
        {mode: _estimates({m: v - draws[over][m] for m, v in metrics.items()}) for mode, metrics in draws.items()}
        if over else {},
    )  # fmt: skip


def _score(prefill: Prefill, prompts: mx.array, continuations: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Most likely tokens and losses at every scored position, `[B, N]` each."""
    model, cache = prefill(prompts)
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


def _draws(
    scores: dict[str, dict[str, np.ndarray]], documents: np.ndarray, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Means over documents, and retention: of the sample itself, then with the documents resampled."""
    names, group = np.unique(documents, return_inverse=True)
    weights = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), RESAMPLES)
    draws = np.vstack([np.ones(len(names), int), weights])

    def resampled(values: np.ndarray) -> np.ndarray:
        by_document = np.bincount(group, values) / np.bincount(group)
        return draws @ by_document / len(names)

    means = {mode: {m: resampled(v) for m, v in metrics.items()} for mode, metrics in scores.items()}
    nothing, exact = (means[name]["cross_entropy"] for name in ("no prompt", "exact"))
    for metrics in means.values():
        metrics["retention"] = (nothing - metrics["cross_entropy"]) / (nothing - exact)
    return means


def _estimates(draws: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    ends = {metric: np.quantile(d[1:], (0.025, 0.975)) for metric, d in draws.items()}
    return {metric: Estimate(float(d[0]), *map(float, ends[metric])) for metric, d in draws.items()}


class _Variance:
    """Sums for the explained variance of predicted keys and values, layer by layer."""

    def __init__(self, pair: KVPredictionModel):
        self._pair, self._count = pair, 0
        self._sums = [[_Deviation(width) for width in widths] for widths in pair.base_taps.widths]

    def add(self, tokens: mx.array) -> None:
        true, _ = self._pair.base_taps.record(tokens)
        predicted = self._pair.predictor(self._pair.auxiliary_features(tokens))
        for sums, *layer in zip(self._sums, predicted, true, strict=True):
            for deviation, p, t in zip(sums, *layer, strict=True):
                deviation.add(p, t)
        self._count += tokens.size

    def explained(self) -> dict[str, list[float]]:
        """1 - squared errors / squared deviations from the mean; 0 where a layer has no values of its own."""
        parts = zip(*self._sums, strict=True)
        return {
            name: [d.explained(self._count) for d in part]
            for name, part in zip(("keys", "values"), parts, strict=True)
        }


class _Deviation:
    def __init__(self, width: int):
        self._errors, self._sum, self._squares = 0.0, np.zeros(width), 0.0

    def add(self, predicted: mx.array, true: mx.array) -> None:
        p, t = (
            np.array(a.astype(mx.float32)).reshape(-1, a.shape[-1]).astype(float) for a in (predicted, true)
        )
        self._errors += float(((p - t) ** 2).sum())
        self._sum += t.sum(0)
        self._squares += float((t * t).sum())

    def explained(self, count: int) -> float:
        total = self._squares - float((self._sum**2).sum()) / count
        return 1 - self._errors / total if total > 0 else 0.0
