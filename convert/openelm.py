"""Read an OpenELM's dimensions off its tensors' shapes, and hold them against what is known of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvpred_mlx.convert.published import OpenELMShape, openelm_shape

Shapes = Mapping[str, tuple[int, ...]]
LAYER_TENSORS = (
    "attn.qkv_proj.weight",
    "attn.q_norm.weight",
    "attn.k_norm.weight",
    "attn.out_proj.weight",
    "ffn.proj_1.weight",
    "ffn.proj_2.weight",
    "attn_norm.weight",
    "ffn_norm.weight",
)
CLASSIFIER = "classifier.weight"  # there only if the embedding is not shared with the output


def read_config(shapes: Shapes) -> tuple[dict[str, Any] | None, list[str]]:
    """mlx-lm's OpenELM config from the shapes of CoreNet's tensors.

    RoPE's base (10000) and the norms' eps (1e-6) are CoreNet's constants; no tensor shows them.

    Returns:
        The config, or None if tensors are missing; and every missing, unexpected or wrongly shaped
        tensor, one line each.
    """
    layers = 1 + max((int(m[1]) for m in map(re.compile(r"layers\.(\d+)\.").match, shapes) if m), default=-1)
    names = {"token_embeddings.weight", "norm.weight"}
    names |= {f"layers.{i}.{name}" for i in range(layers) for name in LAYER_TENSORS}
    problems = [f"missing {name}" for name in _natural(names - set(shapes))]
    problems += [f"unexpected {name} {shapes[name]}" for name in _natural(set(shapes) - names - {CLASSIFIER})]
    if not layers:
        problems.append("missing layers.0.*: no layers at all")
    if names - set(shapes) or not layers:
        return None, problems
    config = _config(shapes, layers)
    problems += [
        f"{name} has shape {shapes[name]}, expected {expected}"
        for name, expected in _expected(config, shapes)
        if shapes[name] != expected
    ]
    heads = zip(config["num_query_heads"], config["num_kv_heads"], strict=True)
    problems += [
        f"layers.{i}.attn.qkv_proj.weight {shapes[f'layers.{i}.attn.qkv_proj.weight']} leaves {kv} key-value "
        f"heads for {query} query heads, expected a divisor"
        for i, (query, kv) in enumerate(heads)
        if kv < 1 or query % kv
    ]
    return config, problems


def compare_with_name(config: dict[str, Any], name: str | None) -> list[str]:
    """Where the dimensions differ from those of the published architecture `name`, one line each."""
    shape = openelm_shape(name) if name else None
    if shape is None:
        return []
    found = {
        "model_dim": (config["model_dim"], shape.model_dim),
        "head_dim": (config["head_dim"], shape.head_dim),
        "query heads": (tuple(config["num_query_heads"]), shape.query_heads),
        "key-value heads": (tuple(config["num_kv_heads"]), shape.kv_heads),
        "FFN widths": (ffn_dims(config), shape.ffn_dims),
    }
    return [
        f"{what} {have}, but {name} has {known}" for what, (have, known) in found.items() if have != known
    ]


def ffn_dims(config: dict[str, Any]) -> tuple[int, ...]:
    """The FFN width of each layer."""
    return tuple(round(m * config["model_dim"]) for m in config["ffn_multipliers"])


def mlx_lm_name(name: str) -> str:
    """CoreNet's parameter name as mlx-lm's OpenELM calls it."""
    return name.replace("classifier.", "lm_head.") if name == CLASSIFIER else f"transformer.{name}"


def _config(shapes: Shapes, layers: int) -> dict[str, Any]:
    vocab_size, model_dim = _two(shapes["token_embeddings.weight"])
    head_dim = max((1, *shapes["layers.0.attn.q_norm.weight"][:1]))
    query_dims = [_two(shapes[f"layers.{i}.attn.out_proj.weight"])[1] for i in range(layers)]
    qkv_dims = [_two(shapes[f"layers.{i}.attn.qkv_proj.weight"])[0] for i in range(layers)]
    ffn = [_two(shapes[f"layers.{i}.ffn.proj_2.weight"])[1] for i in range(layers)]
    shape = OpenELMShape(
        model_dim,
        head_dim,
        tuple(q // head_dim for q in query_dims),
        tuple((qkv - q) // head_dim // 2 for qkv, q in zip(qkv_dims, query_dims, strict=True)),
        tuple(ffn),
    )
    return shape.config(vocab_size, tied=CLASSIFIER not in shapes)


def _expected(config: dict[str, Any], shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    model_dim, head_dim, vocab_size = config["model_dim"], config["head_dim"], config["vocab_size"]
    yield "token_embeddings.weight", (vocab_size, model_dim)
    if CLASSIFIER in shapes:
        yield CLASSIFIER, (vocab_size, model_dim)
    heads = zip(config["num_query_heads"], config["num_kv_heads"], ffn_dims(config), strict=True)
    for i, (query, kv, ffn) in enumerate(heads):
        yield f"layers.{i}.attn.qkv_proj.weight", ((query + 2 * kv) * head_dim, model_dim)
        yield f"layers.{i}.attn.q_norm.weight", (head_dim,)
        yield f"layers.{i}.attn.k_norm.weight", (head_dim,)
        yield f"layers.{i}.attn.out_proj.weight", (model_dim, query * head_dim)
        yield f"layers.{i}.ffn.proj_1.weight", (2 * ffn, model_dim)
        yield f"layers.{i}.ffn.proj_2.weight", (model_dim, ffn)
        yield f"layers.{i}.attn_norm.weight", (model_dim,)
        yield f"layers.{i}.ffn_norm.weight", (model_dim,)
    yield "norm.weight", (model_dim,)


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)


def _natural(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", name)])
