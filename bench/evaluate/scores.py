"""From finished items to scores with intervals, retention, FLOPs and times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from kvpred_mlx.bench.common.flops import TTFT, ttft_flops
from kvpred_mlx.bench.common.statistics import share
from kvpred_mlx.bench.evaluate.journal import Record
from kvpred_mlx.bench.evaluate.modes import AUXILIARY, Sparse, SparseModel, parse
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.modes import Mode

RESAMPLES = 2000
FLOPS_LENGTHS = 9  # prompt lengths at which FLOPs are counted; between them they are interpolated


def summarize(
    pair: KVPredictionModel, task: str, records: dict[str, list[Record]], seed: int = 0
) -> list[dict[str, Any]]:
    """A row for each metric and mode of a task.

    Args:
        records: of each mode, the same items in the same order.
    """
    rows = []
    prompts = {mode: [n for r in done for n in r["prompt_tokens"]] for mode, done in records.items()}
    counted: dict[tuple[str, int], TTFT] = {}
    flops = {
        mode: mean_flops(pair, mode, lengths, counted) if lengths else None
        for mode, lengths in prompts.items()
    }
    first = next(iter(records.values()))[0]
    for metric in first["scores"]:
        exact = [r["scores"][metric] for r in records.get("exact", [])]
        higher = first.get("higher_is_better", {}).get(metric, True)
        for mode, done in records.items():
            scores = [r["scores"][metric] for r in done]
            ttfts = [t for r in done for t in r["ttfts"]]
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "mode": mode,
                    "items": done[0].get("items", len(done)),
                    **_score(scores, done[0].get("errors", {}).get(metric), seed),
                    "higher_is_better": higher,
                    **_retention(scores, exact if higher else [], seed),
                    "prompt_tokens": float(np.mean(prompts[mode])) if prompts[mode] else None,
                    "ttft_flops": flops[mode],
                    "ttft": median(ttfts) if ttfts else None,
                }
            )
    return rows


def mean_flops(
    pair: KVPredictionModel,
    mode: str,
    prompts: Sequence[int],
    counted: dict[tuple[str, int], TTFT] | None = None,
) -> float:
    """FLOPs until the first token, the mean over prompts of these lengths, in tokens.

    Args:
        counted: what was counted before, to be used again and added to.
    """
    counted = {} if counted is None else counted
    lengths = Counter(prompts)
    known = sorted(lengths)
    if len(known) > FLOPS_LENGTHS:
        known = sorted({*np.quantile(known, np.linspace(0, 1, FLOPS_LENGTHS), method="nearest").tolist()})
    flops = [_flops(pair, mode, int(n), counted) for n in known]
    return float(np.average(np.interp(list(lengths), known, flops), weights=list(lengths.values())))


def interval(scores: Sequence[float], seed: int = 0) -> tuple[float | None, float | None]:
    """The 95 % interval of a mean: Wilson's for scores of 0 and 1, else a bootstrap over items."""
    if set(scores) <= {0, 1}:
        found = share(scores)
        return found["low"], found["high"]
    return _bootstrap((np.asarray(scores),), np.mean, seed)


def _flops(
    pair: KVPredictionModel, mode: str, prompt_tokens: int, counted: dict[tuple[str, int], TTFT]
) -> int:
    parsed = parse(mode)
    if isinstance(parsed, Sparse):
        return SparseModel(pair, parsed.positions).flops(prompt_tokens)
    dial = mode if mode not in (AUXILIARY, "exact") else "predicted"
    if (dial, prompt_tokens) not in counted:
        with Mode.parse(dial).applied(pair):
            counted[dial, prompt_tokens] = ttft_flops(pair, prompt_tokens)
    return getattr(counted[dial, prompt_tokens], mode if mode in (AUXILIARY, "exact") else "predicted")


def _score(scores: list[float], error: float | None, seed: int) -> dict[str, float | None]:
    score = float(np.mean(scores))
    if len(scores) == 1 and error is not None:  # lm-eval's own standard error
        return {"score": score, "low": score - 1.96 * error, "high": score + 1.96 * error}
    low, high = interval(scores, seed) if len(scores) > 1 else (None, None)
    return {"score": score, "low": low, "high": high}


def _retention(scores: list[float], exact: list[float], seed: int) -> dict[str, float | None]:
    """The score as a share of the exact mode's, item by item; None where that is zero, lower is better, or it was
    not asked for."""
    if not exact or not np.mean(exact):
        return dict.fromkeys(("retention", "retention_low", "retention_high"))
    both = (np.asarray(scores), np.asarray(exact))
    low, high = _bootstrap(both, _ratio, seed) if len(scores) > 1 else (None, None)
    return {"retention": float(_ratio(*both)), "retention_low": low, "retention_high": high}


def _ratio(scores: np.ndarray, exact: np.ndarray) -> float:
    return float(scores.mean() / exact.mean()) if exact.any() else np.nan


def _bootstrap(
    samples: tuple[np.ndarray, ...], statistic: Any, seed: int
) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of a statistic over items, drawn together from all samples."""
    rng, n = np.random.default_rng(seed), len(samples[0])
    draws = (rng.integers(n, size=n) for _ in range(RESAMPLES))
    values = np.array([statistic(*(s[drawn] for s in samples)) for drawn in draws])
    if not np.isfinite(values).any():
        return None, None
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)
