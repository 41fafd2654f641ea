"""Recording and injecting keys and values, in every model family of mlx-lm."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from families import (
    ATTENTION,
    INJECTABLE,
    LAYERS,
    NOT_BUILT,
    OVERRIDES,
    QUICK,
    STATES,
    VOCAB,
    WINDOW,
    build,
    families,
)
from mlx.utils import tree_flatten
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.fused import FusedColumns
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps
from kvpred_mlx.taps.states import states

PROMPT = 2 * WINDOW + 4

# What some models of a family do and the family's tiny configuration does not.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoehybrid, attention only": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * LAYERS, "position_embedding_type": "rope"},
    ),
    "gemma4_text, shared keys and values": (
        "gemma4_text",
        {**OVERRIDES["gemma4_text"], "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16},
    ),
    "hunyuan, no shared layers": ("hunyuan", {**OVERRIDES["hunyuan"], "use_cla": False}),
    "plamo2, attention only": ("plamo2", {**OVERRIDES["plamo2"], "mamba_enabled": False}),
    "qwen3_moe, dense first layer": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "gear, convolutional mixers": ("gear", {"layer_types": ["conv_mixer", "full_attention"] * 2}),
}


def tokens(seed: int, *, batch: int = 1, length: int = PROMPT) -> mx.array:
    return mx.random.randint(1, VOCAB, (batch, length), key=mx.random.key(seed))


@functools.cache
def taps_of(family: str, bits: int | None = None) -> KVTaps:
    model = build(*VARIANTS.get(family, (family,)))
    if bits is not None:
        quantize(model, bits)
    return KVTaps(model)


def quantize(model: nn.Module, bits: int) -> None:
    def fits(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=bits, class_predicate=fits)


def state(cache: list[Any]) -> dict[str, Any]:
    return dict(tree_flatten([c.state for c in cache]))


def assert_same_state(given: list[Any], expected: list[Any]) -> None:
    given_state, expected_state = state(given), state(expected)
    assert given_state.keys() == expected_state.keys()
    for name, value in expected_state.items():
        assert (
            mx.array_equal(given_state[name], value)
            if isinstance(value, mx.array)
            else (given_state[name] == value)
        ), f"cache entry {name} differs"


def seen(cache: list[Any]) -> list[mx.array]:
    """What the next token sees of the caches: of keys and values those in the window, oldest first."""
    arrays = []
    for (i, kind), array in states(cache).items():
        window = {"RotatingKVCache": "max_size", "ChunkedKVCache": "chunk_size"}.get(kind.cache)
        if window:
            entry = cache[i]
            for part in kind.path.split(".")[:-1]:
                entry = entry.caches[int(part)]
            assert getattr(entry, window) == WINDOW < PROMPT
            array = entry.keys_and_values()[kind.attention == "values"][..., -WINDOW:, :]
        arrays.append(array)
    return arrays


def assert_identity(taps: KVTaps, *, batch: int = 1) -> None:
    """A model's own keys and values, injected with other tokens, make its own cache, bit for bit."""
    model, prompt, following = taps.model, tokens(1, batch=batch), tokens(3, batch=batch, length=1)
    plain, injected = make_prompt_cache(model), make_prompt_cache(model)
    model(prompt, cache=plain)
    kv, _ = taps.record(prompt)
    taps.inject(kv, tokens(2, batch=batch), injected, logits=False)
    for entry, own in zip(injected, plain, strict=True):
        keep_token_ids(entry, own)
    assert_same_state(injected, plain)
    assert mx.array_equal(model(following, cache=injected), model(following, cache=plain))


def keep_token_ids(entry: Any, own: Any) -> None:
    """Token ids that a cache holds are those of the prompt; only here other tokens are read."""
    if isinstance(entry, CacheList):
        for part, own_part in zip(entry.caches, own.caches, strict=True):
            keep_token_ids(part, own_part)
    elif isinstance(entry, ArraysCache):
        for i, array in enumerate(own.cache):
            if array is not None and not mx.issubdtype(array.dtype, mx.floating):
                entry[i] = array


def test_every_family_is_listed_once() -> None:
    assert sorted([*INJECTABLE, *NOT_BUILT]) == families()


@pytest.mark.parametrize("family", [*INJECTABLE, *VARIANTS])
def test_own_keys_and_values_injected_with_other_tokens_make_the_same_cache(family: str) -> None:
    assert_identity(taps_of(family))


QUANTIZABLE = [f for f in INJECTABLE if f != "afm7"]  # mlx-lm's afm7 breaks nn.quantize
EIGHT_BIT = [
    "deepseek_v3",
    "gemma3n",
    "gpt_neox",
    "gpt_oss",
    "llama",
    "llama4",
    "openelm",
    "phi3",
    "qwen3_moe",
]


@pytest.mark.parametrize(("family", "bits"), [*((f, 4) for f in QUANTIZABLE), *((f, 8) for f in EIGHT_BIT)])
def test_quantized_models_too(family: str, bits: int) -> None:
    taps = taps_of(family, bits)
    assert any(isinstance(m, nn.QuantizedLinear) for m in taps.model.modules())
    assert_identity(taps)


@pytest.mark.parametrize("family", sorted(QUICK))
def test_compiled_functions_too(family: str, compiling: None) -> None:
    assert_identity(taps_of(family))


@pytest.mark.parametrize("family", INJECTABLE)
def test_batches_too(family: str) -> None:
    assert_identity(taps_of(family), batch=2)


@pytest.mark.parametrize("family", [*INJECTABLE, *VARIANTS])
def test_teacher_forced_logits(family: str) -> None:
    taps, prompt = taps_of(family), tokens(1, batch=2)
    kv, recorded = taps.record(prompt)
    injected = taps.inject(kv, prompt, logits=True)
    # With a cache: gemma3n's last layers borrow keys and values from it only.
    plain = taps.model(prompt, cache=make_prompt_cache(taps.model))
    assert mx.allclose(recorded, plain, rtol=1e-5, atol=1e-5)
    assert mx.allclose(injected, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*INJECTABLE, *VARIANTS])
def test_chunks_make_the_same_cache(family: str) -> None:
    taps, prompt, following = taps_of(family), tokens(2), tokens(3, length=1)
    kv, _ = taps.record(tokens(1))
    whole, chunked = make_prompt_cache(taps.model), make_prompt_cache(taps.model)
    taps.inject(kv, prompt, whole, logits=False)
    for start in range(0, PROMPT, 7):
        part = slice(start, start + 7)
        taps.inject([KV(k[:, part], v[:, part]) for k, v in kv], prompt[:, part], chunked, logits=False)
    for given, expected in zip(seen(chunked), seen(whole), strict=True):
        assert mx.allclose(given, expected, atol=1e-4)
    assert mx.allclose(
        taps.model(following, cache=chunked), taps.model(following, cache=whole), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", [*INJECTABLE, *VARIANTS])
def test_first_layers_alone_record_the_same_without_a_cache(family: str) -> None:
    taps, prompt = taps_of(family), tokens(1)
    whole, _ = taps.record(prompt)
    for n in range(1, len(taps)):
        if (depth := taps.depth(n)) is not None:
            with taps.first_layers(depth[0]):
                first, _ = taps.record(prompt)
            assert_same_kv(first[:n], whole[:n])


@pytest.mark.parametrize("family", [*INJECTABLE, *VARIANTS])
def test_first_layers_alone_record_the_same_in_chunks(family: str) -> None:
    taps, prompt = taps_of(family), tokens(1)
    parts, cache = (prompt[:, :12], prompt[:, 12:]), make_prompt_cache(taps.model)
    whole = [taps.record(part, cache)[0] for part in parts]
    for n in range(1, len(taps)):
        if (depth := taps.depth(n)) is None:
            continue
        layers, entries = depth
        cache = make_prompt_cache(taps.model)
        for part, expected in zip(parts, whole, strict=True):
            with taps.first_layers(layers):
                first, _ = taps.record(part, cache)
            assert_same_kv(first[:n], expected[:n])
            cache = [*cache[:entries], *make_prompt_cache(taps.model)[entries:]]


def assert_same_kv(given: list[KV], expected: list[KV]) -> None:
    for a, b in zip(given, expected, strict=True):
        assert mx.array_equal(a.keys, b.keys) and mx.array_equal(a.values, b.values)


class Calls(nn.Module):
    """A module that is a function."""

    def __init__(self, function: Callable[..., mx.array]):
        super().__init__()
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self.function(*args, **kwargs)


def leaky_llama() -> nn.Module:
    """A model whose first layer's cached keys hold something that no projection made."""
    model, inputs = build("llama"), []
    layer = model.layers[0]
    norm, rope = layer.input_layernorm, layer.self_attn.rope

    def remember(x: mx.array) -> mx.array:
        inputs.append(x)
        return norm(x)

    def leak(x: mx.array, offset: int = 0) -> mx.array:
        return rope(x, offset=offset) + inputs[-1].sum(axis=-1)[:, None, :, None]

    layer.input_layernorm, layer.self_attn.rope = Calls(remember), Calls(leak)
    return model


def test_keys_from_a_second_source_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^llama: its cache holds more than"):
        KVTaps(leaky_llama())


def test_keys_from_a_second_source_are_refused_when_some_tokens_are_untrained() -> None:
    model = leaky_llama()
    model.model.embed_tokens.weight[1] = model.model.embed_tokens.weight[0]
    with pytest.raises(UnsupportedModelError, match=r"^llama: its cache holds more than"):
        KVTaps(model)


def test_keys_that_are_the_values_too() -> None:
    overrides = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    taps = KVTaps(build("gemma4_text", {**OVERRIDES["gemma4_text"], **overrides}))
    assert taps.widths == [(16, 0), (32, 32), (32, 32), (16, 0)]
    assert_identity(taps)


def test_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpacked(self: BitLinear, x: mx.array, packed: mx.array) -> mx.array:  # the kernel runs on Metal only
        quarters = [(packed >> shift & 3).astype(mx.float32) - 1 for shift in (0, 2, 4, 6)]
        return x @ mx.concatenate(quarters).T

    monkeypatch.setattr(BitLinear, "execute_matmul_kernel", unpacked)
    model = build("bitnet")
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.weight = mx.random.randint(0, 255, module.weight.shape).astype(mx.uint8)
    taps = KVTaps(model)
    assert taps.widths == [(32, 32)] * LAYERS
    assert_identity(taps)


def shadowing(model: nn.Module) -> list[str]:
    """Instance attributes that stand in front of a child."""
    return [f"{path}.{name}" for path, m in model.named_modules() for name in vars(m).keys() & m.keys()]


@pytest.mark.parametrize("family", INJECTABLE)
def test_taps_leave_no_trace(family: str) -> None:
    model, prompt = taps_of(family).model, tokens(1)
    plain = model(prompt)
    before = dict(tree_flatten(model.parameters()))
    taps = KVTaps(model)
    kv, _ = taps.record(prompt)
    taps.inject(kv, tokens(2), make_prompt_cache(model), logits=False)
    taps.depth(1)
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(after[name], array) for name, array in before.items())
    assert shadowing(model) == []
    assert mx.array_equal(model(prompt), plain)


@pytest.mark.parametrize("layers", [None, 2])
def test_taps_leave_no_trace_of_a_call_that_failed(layers: int | None) -> None:
    model = build("llama")
    taps, norm, shadowed = KVTaps(model), model.model.norm, []

    def fail(x: mx.array) -> mx.array:
        shadowed.extend(shadowing(model))
        raise RuntimeError("in the middle")

    kv, _ = taps.record(tokens(1))
    for call in (lambda: taps.record(tokens(1)), lambda: taps.inject(kv, tokens(1), logits=True)):
        shadowed.clear()
        model.model.norm = Calls(fail)
        with pytest.raises(RuntimeError, match="in the middle"), taps.first_layers(layers):
            call()
        model.model.norm = norm
        assert len(shadowed) == 2 * LAYERS + (layers is not None)
        assert shadowing(model) == []
        assert_same_kv(taps.record(tokens(1))[0], kv)


def in_threads(*functions: Callable[[], None]) -> None:
    """Run the functions at the same time; an error of any is raised."""
    with ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(f) for f in functions]:
            future.result()


def test_two_threads_record_at_once() -> None:
    expected = [(taps_of(f), taps_of(f).record(tokens(1))[0]) for f in ("llama", "gpt_neox", "llama")]
    mx.eval([kv for _, kv in expected])
    start = threading.Barrier(len(expected))

    def record(taps: KVTaps, kv: list[KV]) -> None:
        start.wait()
        for _ in range(10):
            assert_same_kv(taps.record(tokens(1))[0], kv)

    in_threads(*(functools.partial(record, *pair) for pair in expected))
    assert all(shadowing(taps.model) == [] for taps, _ in expected)


@pytest.mark.parametrize("layers", [None, 2])
def test_plain_calls_of_other_threads_are_not_tapped(layers: int | None) -> None:
    model, prompt = build("llama"), tokens(1)
    taps, norm, plain, other = KVTaps(model), model.model.norm, model(prompt), []
    nothing = [KV(*(mx.zeros((1, PROMPT, w)) for w in widths)) for widths in taps.widths]
    mx.eval(plain, nothing)
    model.model.norm = Calls(lambda x: meanwhile(x))

    def call() -> None:
        other.append(model(prompt))
        mx.eval(other)

    def meanwhile(x: mx.array) -> mx.array:
        if threading.current_thread() is threading.main_thread():
            in_threads(call)
        return norm(x)

    with taps.first_layers(layers):
        injected = taps.inject(nothing, prompt, logits=True)
    assert mx.array_equal(other[0], plain)
    assert not mx.allclose(injected, plain)


def columns_by_heads(heads: list[str], head_dim: int) -> dict[str, list[int]]:
    """The columns of queries, keys and values where `heads` names each head's kind in order."""
    return {
        kind: [h * head_dim + d for h, of in enumerate(heads) if of == kind for d in range(head_dim)]
        for kind in "qkv"
    }


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("openelm", [["q"] * q + ["k"] * kv + ["v"] * kv for q, kv in ((4, 2), (4, 2), (6, 3), (8, 4))]),
        ("gpt_neox", [["q", "k", "v"] * 4] * LAYERS),
    ],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_columns_of_fused_projections(family: str, layouts: list[list[str]], dtype: mx.Dtype) -> None:
    model = build(family)
    model.set_dtype(dtype)
    taps = KVTaps(model)
    for [place], layout in zip(taps.places, layouts, strict=True):
        columns, fused = columns_by_heads(layout, head_dim=16), place.columns
        assert (fused.rest, fused.keys, fused.values) == tuple(columns.values())


@pytest.mark.parametrize("heads", ["qqqqqkv", "qkkvv", "kkvvq", "qkvqkv", "qqkk", "kkvv", "kk"])
@pytest.mark.parametrize("batch", [1, 3])
def test_keys_and_values_beside_unused_columns(heads: str, batch: int) -> None:
    columns = columns_by_heads(list(heads), head_dim=4)
    fused = FusedColumns(columns["k"], columns["v"], columns["q"])
    kv = KV(*(mx.random.normal((batch, 5, len(columns[kind]))) for kind in "kv"))
    weights = KV(*map(mx.random.normal, (kv.keys.shape, kv.values.shape)))

    def padded(kv: KV) -> mx.array:
        return sum((w * a).sum() for w, a in zip(weights, fused.split(fused.pad(kv)), strict=True))

    output = fused.pad(kv)
    assert output.shape == (batch, 5, 4 * len(heads)) and mx.all(mx.isfinite(output))
    assert all(mx.array_equal(a, b) for a, b in zip(fused.split(output), kv, strict=True))
    gradients = mx.grad(lambda keys, values: padded(KV(keys, values)), argnums=(0, 1))(*kv)
    assert all(mx.allclose(g, w, atol=1e-6) for g, w in zip(gradients, weights, strict=True))


@pytest.mark.slow
def test_columns_are_the_same_before_the_weights_are_loaded() -> None:
    # A saved pair's taps are made on the untrained model that its weights are then loaded into.
    fused = [f for f in ATTENTION if any(len(places) == 1 for places in taps_of(f).places)]
    assert {"deepseek_v2", "gpt2", "openelm", "phi3"} <= set(fused)
    differ = [f for f in {*fused, *STATES} if KVTaps(build(f, noise=0.0)).places != taps_of(f).places]
    assert differ == []


def test_wrong_widths_and_counts_are_named() -> None:
    taps = taps_of("openelm")
    kv, _ = taps.record(tokens(1))
    narrow = [KV(k[..., :5], v) for k, v in kv]
    for wrong in (kv[:-1], narrow):
        given = [(k.shape[-1], v.shape[-1]) for k, v in wrong]
        with pytest.raises(ValueError) as error:
            taps.inject(wrong, tokens(1), logits=False)
        assert str(given) in str(error.value) and str(taps.widths) in str(error.value)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("keys", [["self_attn.k_proj", "self_attn.v_proj"], ["attn.qkv_proj"]])
def test_adapters(keys: list[str], use_dora: bool) -> None:
    model = build("openelm" if "attn.qkv_proj" in keys else "llama")
    before = KVTaps(model)
    config = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, LAYERS - 1, config, use_dora=use_dora)
    kv, _ = before.record(tokens(1))
    for name, parameter in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            parameter[:] = 0.1 * mx.random.normal(parameter.shape)
    adapted, _ = before.record(tokens(1))
    assert mx.array_equal(adapted[0].values, kv[0].values)  # the first layer has no adapter
    assert not mx.allclose(adapted[1].values, kv[1].values)
    assert_identity(before)
    assert_identity(KVTaps(model))
