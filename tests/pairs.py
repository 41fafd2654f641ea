"""Tiny random pairs, and the slow, plain way to do what a pair does."""

from __future__ import annotations

import copy
import functools

import mlx.core as mx
import mlx.nn as nn
from families import build
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from kvpred_mlx import KVPredictionModel, Predictor
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.pair.sources import feature_widths
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps
from kvpred_mlx.taps.states import states

# (base, auxiliary): separate and fused projections, sliding windows on either side, latent attention.
PAIRS = [
    ("qwen3", "qwen2"),
    ("openelm", "openelm"),
    ("gemma3_text", "qwen2"),
    ("qwen3", "gemma3_text"),
    ("gpt_neox", "phi3"),
    ("deepseek_v3", "olmoe"),
]


@functools.cache
def _tapped(family: str) -> KVTaps:
    return KVTaps(build(family))


def tapped(family: str) -> KVTaps:
    """Taps of a family's tiny model, both of their own: finding where keys and values come from takes as long again."""
    return copy.deepcopy(_tapped(family))


def make_pair(
    base: str = "qwen3",
    auxiliary: str = "qwen2",
    layer_map=None,
    seed: int = 0,
    source: str = "kv",
    **options,
):
    base_taps, auxiliary_taps = tapped(base), tapped(auxiliary)
    base_widths, auxiliary_widths = base_taps.widths, feature_widths(source, auxiliary_taps)
    n, m = len(base_widths), len(auxiliary_widths)
    layer_map = layer_map or [i * m // n for i in range(n)]
    mx.random.seed(seed)
    return KVPredictionModel(
        base_taps, auxiliary_taps, Predictor(layer_map, auxiliary_widths, base_widths, source), **options
    )


def tokens(n: int, seed: int = 0, batch: int = 1) -> mx.array:
    return mx.random.randint(1, 127, (batch, n), key=mx.random.key(seed))


def prefill(model, *chunks, cache=None):
    """A prompt cache that has read the chunks [B, L], one call for each."""
    cache = cache or model.make_cache()
    for chunk in chunks:
        model(chunk, cache=cache)
        mx.eval([c.state for c in cache])
    return cache


def kv_entries(cache) -> list[KV]:
    """What attention sees of the base's entries: keys and values, a window's in order of time."""
    seen = []
    for entry in cache[:-1]:
        keys, values = entry.keys_and_values()
        if isinstance(entry, RotatingKVCache):
            keys, values = (entry._temporal_order(a)[..., -entry.max_size :, :] for a in (keys, values))
        seen.append(KV(keys, values))
    return seen


def difference(a, b) -> float:
    """The largest absolute difference between two caches' base entries."""
    pairs = [
        (x, y) for p, q in zip(kv_entries(a), kv_entries(b), strict=True) for x, y in zip(p, q, strict=True)
    ]
    assert all(x.shape == y.shape for x, y in pairs), [(x.shape, y.shape) for x, y in pairs]
    return max(float(mx.abs(x - y).max()) for x, y in pairs if x.size)


def states_difference(a, b) -> float:
    """The largest difference between all that two prompt caches' base entries hold, whatever it is."""
    some, others = states(a[:-1]), states(b[:-1])
    assert some.keys() == others.keys()
    assert all(some[key].shape == others[key].shape for key in some)
    return max(float(mx.abs(some[key] - others[key]).max()) for key in some if some[key].size)


def reference_cache(model: KVPredictionModel, parts: list[tuple[str, mx.array]]):
    """A prompt cache made without any of the pair's bookkeeping.

    `parts` are ("predicted" | "exact", tokens) in order.  The auxiliary reads everything at once.
    """
    everything = mx.concatenate([t for _, t in parts], axis=1)
    taps, auxiliary = (
        copy.deepcopy(model.base_taps),
        copy.deepcopy(model.auxiliary_taps),
    )  # quicker than new ones
    predicted = model.predictor(auxiliary.record(everything, make_prompt_cache(model.auxiliary))[0])
    cache, start = make_prompt_cache(model.base), 0
    for kind, part in parts:
        end = start + part.shape[1]
        if kind == "predicted":
            taps.inject(
                [KV(k[:, start:end], v[:, start:end]) for k, v in predicted], part, cache, logits=False
            )
        else:
            model.base(part, cache=cache)
        mx.eval([c.state for c in cache])
        start = end
    return [*cache, None]


def make_first_layers_pair(base: str | nn.Module | KVTaps = "qwen3", depths=(1,), seed: int = 0, **options):
    """A pair that reads with its base's first layers, with random maps."""
    taps = base if isinstance(base, KVTaps) else tapped(base) if isinstance(base, str) else KVTaps(base)
    mx.random.seed(seed)
    predictor = FirstLayersPredictor(depths, taps.input_widths, taps.widths)
    return KVPredictionModel(taps, None, predictor, **options)


def first_layers_reference(model: KVPredictionModel, parts: list[tuple[int | str, mx.array]]):
    """A prompt cache of such a pair, made the slow way: by recording and injecting everything.

    `parts` are (depth or "exact", tokens) in order.
    """
    taps, cache = copy.deepcopy(model.base_taps), make_prompt_cache(model.base)
    for depth, part in parts:
        if depth == "exact":
            model.base(part, cache=cache)
            continue
        before = copy.deepcopy(cache)
        kv, _ = taps.record(part, copy.deepcopy(before))
        inputs, _ = taps.record_inputs(part, before)
        predicted = model.predictor.behind(depth)(inputs[depth])
        taps.inject([*kv[: depth + 1], *predicted], part, cache, logits=False)
        mx.eval([c.state for c in cache])
    return [*cache, None]
