"""Options of a generation that cannot be, refused before the prompt is read; mlx-lm would trip over them later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from kvpred_mlx.errors import UnsupportedModelError, check_ranges, one_line
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.quantization import GROUP_SIZES, KV_BITS

LEAST = {"prefill_step_size": 1, "num_draft_tokens": 1, "max_kv_size": 8, "quantized_kv_start": 0}


def check_options(model: nn.Module, max_tokens: int, options: Mapping[str, Any]) -> None:
    """Refuse what `stream_generate` cannot do.

    Args:
        options: its keyword arguments; those that are not there or None are mlx-lm's defaults.

    Raises:
        ValueError: naming what was given and what was expected.
        UnsupportedModelError: the model's cache cannot be quantized.
    """
    if type(max_tokens) is not int or max_tokens < -1 or max_tokens == 0:
        raise ValueError(f"max_tokens is {max_tokens!r}, expected at least 1, or -1 until the answer ends")
    check_ranges({name: options.get(name) for name in LEAST}, LEAST, whole=LEAST)
    if options.get("kv_bits") is not None:
        check_quantized_cache(
            model,
            options["kv_bits"],
            options.get("kv_group_size", 64),
            options.get("max_kv_size"),
            options.get("prompt_cache"),
        )


def check_quantized_cache(
    model: nn.Module,
    bits: int,
    group_size: int,
    max_kv_size: int | None = None,
    prompt_cache: Sequence[Any] | None = None,
) -> None:
    """Refuse a quantized KV cache that a model (of a pair: its base) cannot have.

    Raises:
        ValueError: bits or group size are none that MLX has, or the group size does not fit the heads.
        UnsupportedModelError: the cache is a window, or the family's attention takes no quantized one.
    """
    for name, given, known in (("kv_bits", bits, KV_BITS), ("kv_group_size", group_size, GROUP_SIZES)):
        if type(given) is not int or given not in known:
            *others, last = known
            raise ValueError(f"{name} is {given!r}, expected {', '.join(map(str, others))} or {last}")
    if max_kv_size is not None:
        raise ValueError(
            f"kv_bits is {bits} and max_kv_size {max_kv_size}, expected one of the two: a cache that forgets cannot be "
            "quantized"
        )
    base = model.base if isinstance(model, KVPredictionModel) else model
    family = getattr(base, "model_type", type(base).__name__)
    probe = make_prompt_cache(base)
    if any(isinstance(c, RotatingKVCache) for c in (*probe, *(prompt_cache or ()))):
        raise UnsupportedModelError(
            f"kv_bits is {bits}, but the cache of {family} is a window, expected none"
        )
    tokens = mx.array([[0]])
    base(tokens, cache=probe)  # lazy: nothing is computed
    widths = {
        a.shape[-1] for c in probe for name in ("keys", "values") if (a := getattr(c, name, None)) is not None
    }
    if any(width % group_size for width in widths):
        shown = " and ".join(map(str, sorted(widths)))
        fitting = [g for g in GROUP_SIZES if not any(width % g for width in widths)]
        expected = " or ".join(map(str, fitting)) or "no --kv-bits: no group fits"
        raise ValueError(
            f"kv_group_size is {group_size}, but heads of {family} are {shown} wide, expected {expected}"
        )
    try:
        quantized = [
            c.to_quantized(group_size=group_size, bits=bits) if hasattr(c, "to_quantized") else c
            for c in probe
        ]
        base(tokens, cache=quantized)
    except Exception as error:  # whatever its attention does not find in such a cache
        raise UnsupportedModelError(
            f"kv_bits is {bits}, but {family} cannot compute with a quantized cache: {one_line(error)}"
        ) from error
