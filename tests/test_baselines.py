"""What the dial is compared with: dropped tokens, smaller models, and what they cost."""

from __future__ import annotations

from math import ceil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from pairs import make_pair, tokens
from test_exact import heads

from kvpred_mlx import ExactPositions
from kvpred_mlx.bench.common.flops import dial_flops, full_prefill_flops, scores_flops, ttft_flops
from kvpred_mlx.bench.common.sparse import at_random, attended, drop_all_but, drop_all_but_last
from kvpred_mlx.bench.front.baselines import METHODS, dialled, pruned, usable

TOLERANCE = 1e-4
PROMPT = 61
DROPPING = ["sparse-top", "sparse-both", "last-only", "random"]


def after_prompt(mode, prompt, following):
    """Logits of the prompt's last token and of what follows, as quality measures them: in one call."""
    model, cache = mode(prompt)
    return model(mx.concatenate([prompt[:, -1:], following], axis=1), cache=cache)


def masked_qwen2(model, everything, kept, n):
    """mlx-lm's qwen2 written out, all tokens at once; of the first `n` only `kept` ones are attended to."""
    L = everything.shape[1]
    seen = mx.array([[p >= n or p in row for p in range(L)] for row in kept])[:, None, None, :]
    mask = mx.tri(L, dtype=mx.bool_) & seen
    h = model.model.embed_tokens(everything)
    for layer in model.layers:
        a, x = layer.self_attn, layer.input_layernorm(h)
        share = a.n_heads // a.n_kv_heads
        q = a.rope(heads(a.q_proj(x), a.n_heads))
        k = mx.repeat(a.rope(heads(a.k_proj(x), a.n_kv_heads)), share, axis=1)
        v = mx.repeat(heads(a.v_proj(x), a.n_kv_heads), share, axis=1)
        weights = mx.softmax(mx.where(mask, (q * a.scale) @ k.swapaxes(-1, -2), -1e9), axis=-1)
        h = h + a.o_proj((weights @ v).swapaxes(1, 2).flatten(-2))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return model.lm_head(model.model.norm(h))


@pytest.mark.parametrize("way", ["attended", "random", "last"])
def test_dropped_tokens_are_never_attended_to_and_positions_stay(way):
    pair = make_pair("qwen2", "qwen2")
    prompt, following = tokens(PROMPT, batch=2), tokens(7, 3, batch=2)
    n, seen = PROMPT - 1, []

    def watched(columns):
        return lambda given: seen.append(columns(given)) or seen[-1]

    if way == "last":
        mode, kept = drop_all_but_last(pair.base, lambda n: 13), [{*range(n - 13, n)}] * 2
    else:
        columns = (
            attended(pair, ExactPositions(first=2, last=5, top=0.25))
            if way == "attended"
            else at_random(lambda n: 17, seed=1)
        )
        mode = drop_all_but(pair, watched(columns))
        after_prompt(mode, prompt, following)
        kept = [{*row} for row in seen[0].tolist()]
        assert [len(row) for row in kept] == ([17, 17] if way == "random" else [7 + ceil(0.25 * n)] * 2)
        assert way == "random" or all({0, 1, *range(n - 5, n)} <= row for row in kept)
    expected = masked_qwen2(pair.base, mx.concatenate([prompt, following], axis=1), kept, n)[:, n:]
    assert mx.allclose(after_prompt(mode, prompt, following), expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["exact", *DROPPING, "dial-last", "dial-top", "dial-both", "pruned"])
def test_every_method_with_the_whole_budget_is_the_exact_base(name):
    pair = make_pair("qwen3", "qwen2")
    prompt, following = tokens(PROMPT, batch=2), tokens(5, 3, batch=2)
    cache = make_prompt_cache(pair.base)
    expected = pair.base(mx.concatenate([prompt, following], axis=1), cache=cache)[:, PROMPT - 1 :]
    found = after_prompt(METHODS[name].prefill(pair, 1.0), prompt, following)
    assert mx.allclose(found, expected, atol=TOLERANCE)


def test_the_pairs_own_dial_is_left_as_it_was():
    pair = make_pair(exact_positions=ExactPositions(last=3))
    dialled(pair, None)(tokens(PROMPT))
    assert pair.exact_positions == ExactPositions(last=3)


def test_pruned_bases_share_their_weights():
    pair = make_pair("llama", "qwen2")
    smaller = pruned(pair.base, 0.5)
    assert len(smaller.layers) == 2 and len(pair.base.layers) == 4
    assert smaller.layers[1].self_attn.q_proj.weight is pair.base.layers[3].self_attn.q_proj.weight
    assert smaller(tokens(5)).shape == pair.base(tokens(5)).shape
    assert len(dict(tree_flatten(pair.base.parameters()))) > len(dict(tree_flatten(smaller.parameters())))


def test_what_a_pair_cannot_do_is_said():
    reasons = usable(make_pair("gemma3_text", "gemma2"), list(METHODS))
    assert "sliding windows" in reasons["last-only"] and "cannot be seen" in reasons["dial-top"]
    assert not {"exact", "predicted", "dial-last", "pruned"} & reasons.keys()
    with pytest.raises(ValueError, match="RotatingKVCache: the base has sliding windows"):
        drop_all_but_last(make_pair("gemma3_text", "qwen2").base, lambda n: 3)


# FLOPs


def test_the_dials_flops():
    pair, n = make_pair("qwen2", "qwen2", layer_map=[0, 0, 1, 1]), 80
    exact, plain = full_prefill_flops(pair.base, n), ttft_flops(pair, n).predicted
    assert dial_flops(pair, ExactPositions(), n) == plain
    assert dial_flops(pair, ExactPositions(last=1.0), n) == exact
    shares = [dial_flops(pair, ExactPositions(last=share), n) for share in (0.1, 0.2, 0.4, 0.8)]
    assert plain < shares[0] and shares == sorted(shares)
    everything = dial_flops(pair, ExactPositions(top=1.0), n)
    assert everything == exact + plain - full_prefill_flops_of_the_step(pair, n) + scores_flops(pair, n - 1)
    pair.exact_positions = ExactPositions(4, 0.1, 0.2)
    assert plain < ttft_flops(pair, n).predicted < exact + plain


def full_prefill_flops_of_the_step(pair, n):
    from kvpred_mlx.bench.common.flops import step_flops

    return step_flops(pair.base, n - 1)


def test_flops_of_the_scores_by_hand():
    """Four layers of four heads of 16, eight queries; and the last layer's, which nobody else needs."""
    pair, n = make_pair("qwen2", "qwen2", layer_map=[0, 1, 2, 3]), 50
    assert scores_flops(pair, n) == 4 * 2 * 4 * 8 * n * 16 + 2 * n * 64 * 64


@pytest.mark.parametrize("name", DROPPING)
def test_flops_of_dropping_grow_with_the_budget(name):
    pair, n = make_pair(), 80
    counts = [METHODS[name].flops(pair, n, budget) for budget in (0.1, 0.3, 1.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert counts[-1] >= full_prefill_flops(pair.base, n)
    if name in ("last-only", "random"):
        assert counts[-1] == full_prefill_flops(pair.base, n)
