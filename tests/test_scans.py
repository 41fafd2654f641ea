"""Scans in blocks and shifted products give what mlx-lm's and MLX's own give, on the CPU backend alone."""

from __future__ import annotations

import subprocess
from functools import partial

import backend
import families
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta, ssm
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache
from mlx_lm.models.jamba import JambaMambaMixer
from processes import python

from kvpred_mlx.scans import delta_net, depthwise, state_space, when
from kvpred_mlx.scans.blocks import cut, inverse, joined

LENGTHS = [1, 2, 9, 63, 64, 65, 200]
TOLERANCE = 2e-5
their_delta, their_space = gated_delta.gated_delta_ops.__wrapped__, ssm.ssm_attn.__wrapped__
their_conv = nn.Conv1d.__call__.__wrapped__
on_cpu_only = pytest.mark.skipif(not backend.ON_CPU, reason="other devices use mlx-lm's own")


def normal(*shape, key):
    return mx.random.normal(shape, key=mx.random.key(key))


def uniform(*shape, key):
    return mx.random.uniform(shape=shape, key=mx.random.key(key))


def delta_inputs(tokens, channels=False, repeats=1, batch=2, width=16):
    """q, k, v, g, beta of two key heads and values of 12."""
    heads = 2 * repeats
    q, k = (normal(batch, tokens, 2, width, key=i) for i in (1, 2))
    q, k = gated_delta.normalize_qk(q, k, inv_scale=width**-0.5, eps=1e-6)
    g = uniform(batch, tokens, heads, *[width] * channels, key=3)
    return [q, k, normal(batch, tokens, heads, 12, key=4), g, uniform(batch, tokens, heads, key=5)]


def delta_state(inputs):
    q, _, v, *_ = inputs
    return normal(*v.shape[::2], v.shape[-1], q.shape[-1], key=6)


def right_padded(tokens):
    """Rows of all tokens and of two thirds of them."""
    return mx.arange(tokens) < mx.array([[tokens], [max(tokens * 2 // 3, 1)]])


def space_inputs(tokens, groups=1, batch=2):
    """x, A_log, B, C, D, dt and dt_bias of four heads of 6, with states of 8."""
    b, c = (normal(batch, tokens, groups, 8, key=i) for i in (1, 2))
    per_head = (normal(4, key=i) for i in (3, 4, 5))
    a_log, d, bias = per_head
    x, dt = normal(batch, tokens, 4, 6, key=6), normal(batch, tokens, 4, key=7)
    return [x, a_log, b, c, d, dt, bias]


def same(found, expected, mask=None, tolerance=TOLERANCE):
    """Outputs (where `mask` is true) and state."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    if mask is not None:
        found, expected = ((mx.where(mask[..., None, None], y, 0), s) for y, s in (found, expected))
    for a, b in zip(found, expected, strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        assert mx.abs(a - b).max().item() <= tolerance * max(1.0, mx.abs(b).max().item())


@pytest.mark.variations(20)
@pytest.mark.parametrize("given", [False, True], ids=["", "state"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize(("channels", "repeats"), [(False, 1), (False, 2), (True, 1), (True, 2)])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_delta_net(tokens, channels, repeats, masked, given):
    inputs, mask = delta_inputs(tokens, channels, repeats), right_padded(tokens) if masked else None
    state = delta_state(inputs) if given else None
    found = delta_net.scan(*inputs, state, mask)
    same(found, their_delta(*inputs, state, mask), mask)
    if masked:
        assert not mx.any(mx.where(mask[..., None, None], 0, found[0])).item()


@pytest.mark.parametrize("channels", [False, True])
def test_delta_net_of_one_key_again_and_again(channels):
    """Nothing decays, every token writes over the one before: powers of A would be of 10^18."""
    q, k, v, g, beta = delta_inputs(200, channels)
    k, g, beta = mx.broadcast_to(k[:, :1], k.shape), mx.ones_like(g), mx.full(beta.shape, 0.999)
    same(delta_net.scan(q, k, v, g, beta), their_delta(q, k, v, g, beta))


@pytest.mark.parametrize("channels", [False, True])
def test_delta_net_of_eigenvalues_below_zero(channels):
    q, k, v, g, beta = delta_inputs(200, channels)
    same(delta_net.scan(q, k, v, g, 2 * beta), their_delta(q, k, v, g, 2 * beta))


@pytest.mark.parametrize("channels", [False, True])
def test_delta_net_that_forgets_everything(channels):
    q, k, v, g, beta = delta_inputs(100, channels)
    g = mx.where(uniform(*g.shape, key=9) < 0.2, 0.0, g)
    state = delta_state([q, k, v])
    same(delta_net.scan(q, k, v, g, beta, state), their_delta(q, k, v, g, beta, state))
    grad = mx.grad(lambda g: delta_net.scan(q, k, v, g, beta, state)[0].sum())(g)
    assert mx.isfinite(grad).all().item()


def test_delta_net_keeps_clear_of_what_is_masked():
    q, k, v, g, beta = delta_inputs(70)
    mask = right_padded(70)
    spoilt = [mx.where(mask.reshape(2, 70, *[1] * (x.ndim - 2)), x, mx.nan) for x in (q, k, v, g, beta)]
    same(delta_net.scan(*spoilt, None, mask), delta_net.scan(q, k, v, g, beta, None, mask), tolerance=0)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_delta_net_keeps_types(dtype):
    q, k, v, g, beta = delta_inputs(40)
    q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))
    same(delta_net.scan(q, k, v, g, beta), their_delta(q, k, v, g, beta), tolerance=1e-2)


def gradients(scan, inputs):
    """Of outputs and state alike, weighed at random."""

    def weighed(*inputs):
        y, state = scan(*inputs)
        weights = normal(*y.shape, key=10), normal(*state.shape, key=11)
        return sum((a * w).sum() for a, w in zip((y, state), weights, strict=True))

    return mx.grad(weighed, argnums=list(range(len(inputs))))(*inputs)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("tokens", [9, 65])
def test_gradients_of_the_delta_net(tokens, channels):
    inputs = delta_inputs(tokens, channels, repeats=2)
    inputs.append(delta_state(inputs))
    same(gradients(delta_net.scan, inputs), gradients(their_delta, inputs))


def test_delta_net_in_two_calls():
    inputs, cut_at = delta_inputs(150), 70
    y, state = delta_net.scan(*inputs)
    first, middle = delta_net.scan(*(x[:, :cut_at] for x in inputs))
    second, end = delta_net.scan(*(x[:, cut_at:] for x in inputs), middle)
    same((mx.concatenate([first, second], axis=1), end), (y, state))


@pytest.mark.variations(16)
@pytest.mark.parametrize("given", [False, True], ids=["", "state"])
@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_state_space(tokens, groups, padding, given):
    inputs = space_inputs(tokens, groups)
    state = normal(2, 4, 6, 8, key=8) if given else None
    mask = right_padded(tokens) if padding else None
    lengths = mask.sum(axis=1) if padding == "right" else None
    mask = mask[:, ::-1] if padding == "left" else mask
    expected = their_space(*inputs, state, mask=mask, lengths=lengths)
    same(state_space.scan(*inputs, state, mask=mask), expected, mask)


def test_state_space_of_a_row_that_is_done():
    """In the chunks after its end a row has less than no tokens."""
    inputs, state, mask = space_inputs(20), normal(2, 4, 6, 8, key=8), mx.array([[True], [False]])
    mask = mx.broadcast_to(mask, (2, 20))
    expected = their_space(*inputs, state, mask=mask, lengths=mx.array([20, -4]))
    same(state_space.scan(*inputs, state, mask=mask), expected, mask)


def test_limits_of_time_steps():
    inputs = space_inputs(40)
    same(state_space.scan(*inputs, None, (0.5, 0.75)), their_space(*inputs, None, (0.5, 0.75)))


@pytest.mark.parametrize("tokens", [9, 65])
def test_gradients_of_the_state_space(tokens):
    inputs = [*space_inputs(tokens, 2), normal(2, 4, 6, 8, key=8)]
    same(gradients(state_space.scan, inputs), gradients(their_space, inputs))


def test_state_space_keeps_types():
    inputs = [x.astype(mx.bfloat16) for x in space_inputs(40)]
    same(state_space.scan(*inputs), their_space(*inputs), tolerance=2e-2)


def depthwise_conv(taps, bias=True, channels=5, **more):
    conv = nn.Conv1d(channels, channels, taps, groups=channels, bias=bias, **more)
    if bias:
        conv.bias = normal(channels, key=2)
    return conv


@on_cpu_only
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_depthwise_convolutions(tokens, taps, bias):
    conv, x = depthwise_conv(taps, bias), normal(2, tokens + taps - 1, 5, key=1)
    same([conv(x)], [their_conv(conv, x)])
    assert depthwise._is_for_us(conv, x) == (tokens > when.FEW_TOKENS)


@on_cpu_only
def test_convolutions_keep_types_and_have_gradients():
    conv, x = depthwise_conv(4), normal(2, 40, 5, key=1)
    weights = normal(2, 37, 5, key=3)
    found, expected = (
        mx.grad(lambda x, w, b, call=call: (call(_with(conv, w, b), x) * weights).sum(), argnums=[0, 1, 2])(
            x, conv.weight, conv.bias
        )
        for call in (nn.Conv1d.__call__, their_conv)
    )
    same(found, expected)
    conv.set_dtype(mx.bfloat16)
    x = x.astype(mx.bfloat16)
    same([conv(x)], [their_conv(conv, x)], tolerance=1e-2)


def _with(conv, weight, bias):
    conv.weight, conv.bias = weight, bias
    return conv


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(6, 6, 3),
        nn.Conv1d(6, 6, 3, groups=2),
        nn.Conv1d(6, 12, 3, groups=6),
        depthwise_conv(3, channels=6, stride=2),
        depthwise_conv(3, channels=6, padding=1),
        depthwise_conv(3, channels=6, dilation=2),
        depthwise_conv(9, channels=6),
    ],
    ids=str,
)
def test_other_convolutions_are_mlx_s_own(conv, monkeypatch):
    monkeypatch.setattr(depthwise, "convolve", None)
    x = normal(2, 40, 6, key=1)
    same([conv(x)], [their_conv(conv, x)], tolerance=0)


@on_cpu_only
@pytest.mark.parametrize("given", [False, True], ids=["", "state"])
@pytest.mark.parametrize("tokens", [1, 9, 30])
def test_jamba(tokens, given):
    mixer = next(layer.mamba for layer in families.build("jamba").layers if not layer.is_attn)
    width, kept = mixer.A_log.shape
    x, a = normal(2, tokens, width, key=1), -mx.exp(mixer.A_log)
    state = normal(2, width, kept, key=2) if given else None
    theirs = JambaMambaMixer.ssm_step.__wrapped__
    same(mixer.ssm_step(x, a, state), theirs(mixer, x, a, state))
    weights = normal(2, tokens, width, key=3)
    found, expected = (
        mx.grad(lambda x, step=step: (step(mixer, x, a, state)[0] * weights).sum())(x)
        for step in (JambaMambaMixer.ssm_step, theirs)
    )
    same([found], [expected])


class Calls:
    """Counts what is computed here."""

    def __init__(self, monkeypatch):
        self.counts = dict.fromkeys(("delta", "space", "conv"), 0)
        for name, module, function in (
            ("delta", delta_net, "scan"), ("space", state_space, "scan"), ("conv", depthwise, "convolve")
        ):  # fmt: skip
            monkeypatch.setattr(module, function, partial(self._call, name, getattr(module, function)))

    def _call(self, name, function, *args):
        self.counts[name] += 1
        return function(*args)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch).counts


FAMILIES = {
    "qwen3_next": {"delta", "conv"},
    "qwen3_5": {"delta", "conv"},
    "kimi_linear": {"delta", "conv"},
    "olmo_hybrid": {"delta", "conv"},
    "granitemoehybrid": {"space", "conv"},
    "falcon_h1": {"space", "conv"},
    "nemotron_h": {"space", "conv"},
    "mamba2": {"space", "conv"},
    "plamo2": {"space", "conv"},
    "lfm2": {"conv"},
    "mamba": {"conv"},
    "jamba": {"conv"},
}


def read(model, prompt, lengths=None):
    """Logits of a prompt read in two chunks, and all that the caches keep."""
    cache = make_prompt_cache(model)
    logits = [model(chunk, cache=cache) for chunk in (prompt[:, :40], prompt[:, 40:])]
    state = dict(tree_flatten([c.state for c in cache]))
    return mx.concatenate(logits, axis=1), {k: x for k, x in state.items() if isinstance(x, mx.array)}


@on_cpu_only
@pytest.mark.parametrize("family", FAMILIES)
def test_models(family, calls, monkeypatch):
    model = families.build(family).eval()
    prompt = mx.random.randint(0, families.VOCAB, (2, 75), key=mx.random.key(1))
    logits, states = read(model, prompt)
    assert {name for name, count in calls.items() if count} == FAMILIES[family]
    calls.update(dict.fromkeys(calls, 0))
    monkeypatch.setenv(when.OPT_OUT, "1")
    their_logits, their_states = read(model, prompt)
    assert not any(calls.values())
    assert states.keys() == their_states.keys()
    same([logits, *states.values()], [their_logits, *their_states.values()])


@on_cpu_only
@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear", "granitemoehybrid", "lfm2"])
def test_rows_of_a_ragged_batch(family, calls):
    """Right-padded rows give what each gives alone."""
    model = families.build(family).eval()
    prompt = mx.random.randint(0, families.VOCAB, (2, 75), key=mx.random.key(1))
    lengths = [75, 50]
    alone = [make_prompt_cache(model) for _ in lengths]
    expected = [model(prompt[i : i + 1, :n], cache=alone[i])[0, -1] for i, n in enumerate(lengths)]
    together = [BatchKVCache([0, 0]) if isinstance(e, KVCache) else e for e in make_prompt_cache(model)]
    for entry in together:
        entry.prepare(lengths=lengths, right_padding=[75 - n for n in lengths])
    logits = model(prompt, cache=together)
    same([logits[i, n - 1] for i, n in enumerate(lengths)], expected)
    assert {name for name, count in calls.items() if count} == FAMILIES[family]


@on_cpu_only
def test_gradients_through_a_model(calls, monkeypatch):
    model = families.build("qwen3_5").train()
    prompt = mx.random.randint(0, families.VOCAB, (1, 40), key=mx.random.key(1))
    loss = nn.value_and_grad(
        model, lambda m: nn.losses.cross_entropy(m(prompt[:, :-1]), prompt[:, 1:]).mean()
    )
    found = loss(model)
    assert calls["delta"] and calls["conv"]
    monkeypatch.setenv(when.OPT_OUT, "1")
    same(*([loss_, *(x for _, x in tree_flatten(grads))] for loss_, grads in (found, loss(model))))


@on_cpu_only
def test_few_tokens_and_other_devices_are_mlx_lm_s_own(calls, monkeypatch):
    inputs, space, conv = delta_inputs(40), space_inputs(40), depthwise_conv(4)
    few = when.FEW_TOKENS
    gated_delta.gated_delta_ops(*(x[:, :few] for x in inputs))
    conv(normal(1, few + 3, 5, key=1))
    x, a_log, b, c, d, dt, bias = space
    ssm.ssm_attn(x[:, :few], a_log, b[:, :few], c[:, :few], d, dt[:, :few], bias)
    monkeypatch.setattr(when, "on_cpu", lambda: False)
    expected = their_delta(*inputs), their_space(*space)
    same(gated_delta.gated_delta_ops(*inputs), expected[0], tolerance=0)
    same(ssm.ssm_attn(*space), expected[1], tolerance=0)
    conv(normal(1, 40, 5, key=1))
    assert not any(calls.values())
    monkeypatch.setattr(when, "on_cpu", lambda: True)
    same(gated_delta.gated_delta_ops(*inputs), expected[0])
    same(ssm.ssm_attn(*space), expected[1])
    conv(normal(1, 40, 5, key=1))
    assert set(calls.values()) == {1}


def test_lengths_without_a_mask_are_mlx_lm_s_own(calls):
    inputs, lengths = space_inputs(40), mx.array([40, 30])
    expected = their_space(*inputs, lengths=lengths)
    same(ssm.ssm_attn(*inputs, lengths=lengths), expected, tolerance=0)
    assert not calls["space"]


def test_the_device_decides(monkeypatch):
    for device in (mx.cpu, mx.gpu):
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        assert when.applies(100) == (device == mx.cpu)


def test_other_parameters_are_left_alone():
    assert when.takes(their_delta, "q k v g beta state mask")
    assert when.takes(gated_delta.gated_delta_ops, "q k v g beta state mask")  # the wrapper says the same
    assert not when.takes(lambda q, k, v, g, beta, state, mask, scale: None, "q k v g beta state mask")
    assert not when.takes(lambda q, k: None, "k q")
    assert not when.takes(None, "q")


CHANGED = """
import mlx_lm.models.gated_delta as gated_delta, mlx_lm.models.ssm as ssm
def gated_delta_ops(q, k, v, g, beta, scale, state=None, mask=None): ...
gated_delta.gated_delta_ops = gated_delta_ops
del ssm.ssm_attn
import kvpred_mlx
assert gated_delta.gated_delta_ops is gated_delta_ops and not hasattr(ssm, "ssm_attn")
"""
SEEN = """
import mlx.nn as nn
delta, space = qwen3_next.gated_delta_update.__globals__, granitemoehybrid.ssm_update.__globals__
for function in (delta["gated_delta_ops"], space["ssm_attn"], nn.Conv1d.__call__):
    assert not hasattr(function.__wrapped__, "__wrapped__")
"""
MODELS = "from mlx_lm.models import granitemoehybrid, qwen3_next\n"


@pytest.mark.variations(2)
@pytest.mark.parametrize(
    "code",
    [CHANGED, "import kvpred_mlx\n" + MODELS + SEEN, MODELS + "import kvpred_mlx\n" + SEEN],
    ids=["what changed in mlx-lm is left alone", "ours first", "models first"],
)
def test_however_it_is_imported(code):
    done = subprocess.run(python(code), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tokens", [1, 5, 8, 9])
def test_blocks_hold_all_tokens(tokens):
    x = normal(2, tokens, 3, 4, key=1)
    blocks = cut(x, 8, fill=1.0)
    assert blocks.shape == (2, 3, -(-tokens // 8), 8, 4)
    assert mx.array_equal(joined(blocks, tokens), x).item()
    assert mx.array_equal(
        blocks[:, :, -1, tokens - 8 * (blocks.shape[2] - 1) :], mx.ones((2, 3, -tokens % 8, 4))
    )


@pytest.mark.parametrize("size", [1, 2, 32])
def test_inverse(size):
    a = mx.tril(normal(3, size, size, key=1) / 4, -1)
    product = (mx.eye(size) + a) @ inverse(a)
    assert mx.abs(product - mx.eye(size)).max().item() < 1e-5
