"""Quality from recorded windows: the exact base need not run again."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kvpred_mlx.making.as_used import AsUsedLoss, divergence
from kvpred_mlx.making.estimates import Estimate, Resampling
from kvpred_mlx.making.recording import Batch, Recording
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.progress import ProgressCallback, no_progress

Scores = dict[str, np.ndarray]  # by metric, `[W]`


def score(
    pair: KVPredictionModel,
    recording: Recording,
    depth: int | None = None,
    *,
    loss: AsUsedLoss | None = None,
    batch_size: int = 4,
    progress: ProgressCallback = no_progress,
) -> Scores:
    """What each recorded window gives over a pair's predicted entries.

    Returns, by name, `[W]`: `cross_entropy` (and `exact`, `no_prompt`) in nats per token, `agreement` with the exact
    base's most likely tokens, `first_token_agreement`, `divergence` from it, and `recalled`, 1 if every token of the
    continuation is the most likely one.

    Args:
        depth: of a first-layers pair (None: the deepest).
        loss: makes the entries in another way (`AsUsedLoss.entries`).
    """
    loss = loss or AsUsedLoss(recording, depth=depth)
    found: list[Scores] = []
    for start in range(0, len(recording), batch_size):
        batch = recording.rows(slice(start, min(start + batch_size, len(recording))))
        found.append(_of(loss.logits(pair, batch), batch))
        progress(min(start + batch_size, len(recording)), len(recording), "scoring")
    return {name: np.concatenate([f[name] for f in found]) for name in found[0]}


def _of(logits: mx.array, batch: Batch) -> Scores:
    guesses, best = mx.argmax(logits, axis=-1), batch["top_ids"][..., 0]
    pairs = zip(logits, batch["top_ids"], batch["top_logprobs"], strict=True)
    values = {
        "cross_entropy": nn.losses.cross_entropy(logits, batch["continuations"]).mean(1),
        "exact": batch["losses"].mean(1),
        "no_prompt": batch["losses_without"].mean(1),
        "agreement": (guesses == best).mean(1),
        "first_token_agreement": guesses[:, 0] == best[:, 0],
        "divergence": mx.stack([divergence(*(a[None] for a in row)) for row in pairs]),
        "recalled": mx.all(guesses == batch["continuations"], axis=1),
    }
    return {name: np.array(value.astype(mx.float32)) for name, value in values.items()}


def estimates(
    recording: Recording, scores: Scores, over: Scores | None = None, seed: int = 0
) -> dict[str, Estimate]:
    """Means over documents with 95 % intervals, `retention` among them; with `over`, of the difference from it."""
    resampling = Resampling(recording.documents, seed)

    def means(of: Scores) -> dict[str, np.ndarray]:
        found = {name: resampling.means(values) for name, values in of.items()}
        gained = found["no_prompt"] - found["exact"]
        return found | {"retention": (found["no_prompt"] - found["cross_entropy"]) / gained}

    mine = means(scores)
    theirs = {name: np.zeros_like(v) for name, v in mine.items()} if over is None else means(over)
    return {name: Estimate.of(mine[name] - theirs[name]) for name in mine}
