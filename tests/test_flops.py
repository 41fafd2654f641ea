"""FLOPs against torch's own counter, on decoders written out in torch with the same shapes."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from families import build
from pairs import make_pair
from torch.utils.flop_counter import FlopCounterMode

from kvpred_mlx.bench.common.flops import full_prefill_flops, prefill_bytes, step_flops, ttft_flops
from kvpred_mlx.bench.common.presets import presets

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, VOCAB = 64, 4, 2, 16, 96, 4, 128


def product(rows: int, inner: int, columns: int) -> None:
    torch.empty(rows, inner, device="meta") @ torch.empty(inner, columns, device="meta")


def attend(heads: int, head_dim: int, keys: int) -> None:
    """One query against the keys that it may see."""
    torch.bmm(
        torch.empty(heads, 1, head_dim, device="meta"), torch.empty(heads, head_dim, keys, device="meta")
    )
    torch.bmm(torch.empty(heads, 1, keys, device="meta"), torch.empty(heads, keys, head_dim, device="meta"))


def dense_ffn() -> None:
    product(1, HIDDEN, 2 * FFN)
    product(1, FFN, HIDDEN)


def mixture(experts: int = 4, active: int = 2, width: int = 96) -> None:
    product(1, HIDDEN, experts)
    for _ in range(active):
        product(1, HIDDEN, 2 * width)
        product(1, width, HIDDEN)


def token(position: int, logits: bool, ffn=dense_ffn, windows=(None,) * LAYERS) -> None:
    """One token after `position` others; without logits, what only they need is left out."""
    for layer, window in enumerate(windows):
        product(1, HIDDEN, 2 * KV_HEADS * HEAD_DIM)
        if layer == LAYERS - 1 and not logits:
            return
        product(1, HIDDEN, HEADS * HEAD_DIM)
        attend(HEADS, HEAD_DIM, min(position + 1, window or position + 1))
        product(1, HEADS * HEAD_DIM, HIDDEN)
        ffn()
    product(1, HIDDEN, VOCAB)


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def prompt(n: int, **options):
    def run() -> None:
        for position in range(n):
            token(position, logits=position == n - 1, **options)

    return run


@pytest.mark.variations
@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_dense_decoder(n):
    assert full_prefill_flops(build("qwen2"), n) == counted(prompt(n))


@pytest.mark.parametrize("n", [7, 60])
def test_mixture_counts_active_experts(n):
    assert full_prefill_flops(build("mixtral"), n) == counted(prompt(n, ffn=mixture))


@pytest.mark.parametrize("n", [5, 8, 9, 60])
def test_sliding_windows(n):
    model = build("gemma3_text")
    windows = [getattr(c, "max_size", None) for c in model.make_cache()]
    assert None in windows and any(windows)
    assert full_prefill_flops(model, n) == counted(prompt(n, windows=windows))


def test_quantized_weights_cost_what_their_shapes_say():
    model = build("qwen2")
    nn.quantize(model, group_size=32, bits=4)
    assert full_prefill_flops(model, 20) == counted(prompt(20))


def test_decode_step():
    assert step_flops(build("qwen2"), 40) == counted(lambda: token(40, logits=True))


def test_prediction_counts_only_what_is_evaluated():
    pair = make_pair("qwen2", "qwen2", layer_map=[0, 0, 1, 2])  # the auxiliary's layer 3 is never read

    def predicted(n):
        def run() -> None:
            for position in range(n - 1):
                for layer in range(3):
                    product(1, HIDDEN, 2 * KV_HEADS * HEAD_DIM)
                    if layer < 2:
                        product(1, HIDDEN, HEADS * HEAD_DIM)
                        attend(HEADS, HEAD_DIM, position + 1)
                        product(1, HEADS * HEAD_DIM, HIDDEN)
                        dense_ffn()
                for _ in range(2 * LAYERS):
                    product(1, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
            token(n - 1, logits=True)

        return run

    for n in (40, 56):
        flops = ttft_flops(pair, n)
        assert flops.predicted == counted(predicted(n))
        assert flops.exact == flops.auxiliary == counted(prompt(n))
        assert flops.ratio == flops.exact / flops.predicted


def test_short_prompts_are_not_predicted():
    flops = ttft_flops(make_pair(min_prompt_tokens=32), 32)
    assert flops.predicted == flops.exact


@pytest.mark.slow
def test_published_pair_from_shapes_alone():
    """By hand: OpenELM's linear layers and heads, from the config; nothing of this size is made."""
    preset = presets()["openelm-1_1b:openelm-270m"]
    pair, n = preset.model(), 512

    def by_hand(config, whole: int, last_kv_only: int) -> int:
        dim, head = config["model_dim"], config["head_dim"]
        layers = list(
            zip(config["num_query_heads"], config["num_kv_heads"], config["ffn_multipliers"], strict=True)
        )
        total = 0
        for i, (q, kv, multiplier) in enumerate(layers):
            ffn = 2 * dim * 3 * round(multiplier * dim) + 2 * q * head * dim
            last = i == len(layers) - 1
            total += (whole + last_kv_only) * 2 * dim * (q + 2 * kv) * head
            rows = range(whole + last_kv_only) if not last else range(last_kv_only, whole + last_kv_only)
            total += sum(ffn + 4 * q * head * (position + 1) for position in rows)
        return total + whole * 2 * dim * config["vocab_size"]

    exact = by_hand(pair.args.base, 1, n - 1)
    assert ttft_flops(pair, n).exact == exact


def test_memory_estimate_grows_with_the_shape():
    model = build("qwen2")
    small, long = prefill_bytes(model, 1, 64, 2048), prefill_bytes(model, 1, 256, 2048)
    assert small < long < prefill_bytes(model, 4, 256, 2048)
    if mx.default_device() == mx.Device(mx.cpu):
        assert prefill_bytes(model, 1, 256, 64) < long
