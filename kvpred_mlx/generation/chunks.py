"""A prompt in chunks: how it is cut, and how it is processed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
from mlx_lm.generate import DEFAULT_PREFILL_STEP_SIZE, maybe_quantize_kv_cache

from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.progress import no_progress


def announce_prompt(model: KVPredictionModel, tokens: int, options: dict[str, Any]) -> None:
    """Tell the cache that a long prompt comes, and cut it so that no chunk is a single token."""
    if options.get("prompt_cache") is None:
        options["prompt_cache"] = model.make_cache(options.get("max_kv_size"))
    entry, before_last = options["prompt_cache"][-1], tokens - 1
    if isinstance(entry, AuxiliaryCache) and model.predicts(tokens):
        entry.announce(before_last)
        step = options.get("prefill_step_size", DEFAULT_PREFILL_STEP_SIZE)
        sizes = (*range(step, 1, -1), *range(step + 1, tokens + 1))
        options["prefill_step_size"] = next(size for size in sizes if size > 1 and before_last % size != 1)


def process_prompt(
    model: Any,
    tokens: mx.array,
    cache: Any,
    progress: Callable[[int, int], None] = no_progress,
    **options: Any,
) -> None:
    """Process `tokens` [n] as mlx-lm processes a prompt, chunk by chunk.

    Args:
        progress: as mlx-lm's `prompt_progress_callback`; the total counts the prompt's last token, which is not here.
        options: as those of mlx-lm's `generate_step`.
    """
    step = options.get("prefill_step_size", DEFAULT_PREFILL_STEP_SIZE)
    stream, kv_bits, group_size = (options.get(name) for name in ("stream", "kv_bits", "kv_group_size"))
    with mx.stream(stream) if stream is not None else nullcontext():
        for start in range(0, tokens.size, step):
            model(tokens[None, start : start + step], cache=cache)
            maybe_quantize_kv_cache(cache, options.get("quantized_kv_start", 0), group_size, kv_bits)
            mx.eval([c.state for c in cache])
            progress(min(start + step, tokens.size), tokens.size + 1)
            mx.clear_cache()
