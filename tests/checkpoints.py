"""CoreNet checkpoints with random weights, for the tests of the conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml


def openelm_state(
    layers: list[tuple[int, int, int]], model_dim: int = 64, head_dim: int = 16, vocab_size: int = 128
) -> dict[str, torch.Tensor]:
    """A CoreNet OpenELM; `layers` are (query heads, key-value heads, FFN width)."""
    state = {"token_embeddings.weight": torch.randn(vocab_size, model_dim) * 0.3}
    for i, (query, kv, ffn) in enumerate(layers):
        state |= {
            f"layers.{i}.attn.qkv_proj.weight": torch.randn((query + 2 * kv) * head_dim, model_dim) * 0.1,
            f"layers.{i}.attn.q_norm.weight": torch.rand(head_dim) + 0.5,
            f"layers.{i}.attn.k_norm.weight": torch.rand(head_dim) + 0.5,
            f"layers.{i}.attn.out_proj.weight": torch.randn(model_dim, query * head_dim) * 0.1,
            f"layers.{i}.ffn.proj_1.weight": torch.randn(2 * ffn, model_dim) * 0.1,
            f"layers.{i}.ffn.proj_2.weight": torch.randn(model_dim, ffn) * 0.1,
            f"layers.{i}.attn_norm.weight": torch.rand(model_dim) + 0.5,
            f"layers.{i}.ffn_norm.weight": torch.rand(model_dim) + 0.5,
        }
    return state | {"norm.weight": torch.rand(model_dim) + 0.5}


BASE_LAYERS = [(4, 2, 96), (4, 2, 100), (6, 3, 128), (8, 2, 72)]
AUXILIARY_LAYERS = [(2, 1, 48), (4, 1, 64), (4, 4, 40)]
LAYER_MAP = [2, 0, 1, 1]


def pair_state(layer_map: list[int] | None = None) -> dict[str, torch.Tensor]:
    """A KV Prediction checkpoint whose head counts differ per layer and whose layer map is not monotone."""
    state = {f"base.{k}": v for k, v in openelm_state(BASE_LAYERS).items()}
    state |= {f"auxiliary.{k}": v for k, v in openelm_state(AUXILIARY_LAYERS, 48, 24).items()}
    for i, m in enumerate(layer_map or LAYER_MAP):
        width, source = BASE_LAYERS[i][1] * 16, AUXILIARY_LAYERS[m][1] * 24
        for kind in ("key", "value"):
            name = f"predicter.auxkv_to_basekv.{kind}_transforms.{i}"
            state |= {f"{name}.weight": torch.randn(width, source) * 0.2, f"{name}.bias": torch.randn(width)}
    return state


def pair_yaml(
    path: Path, layer_map: Any = None, base: str = "test-base", auxiliary: str = "test-aux", **gpt: Any
):
    """CoreNet's training YAML, as far as a conversion reads it."""

    def model(name: str) -> list[dict[str, Any]]:
        return [{"model": {"language_modeling": {"general_gpt": {"model_name": name}}}}]

    pair = {
        "auxkv_num_layers_to_basekv_num_layers": LAYER_MAP if layer_map is None else layer_map,
        "base_model": model(base),
        "auxiliary_model": model(auxiliary),
    }
    models = {"name": "kv_prediction", "kv_prediction": pair, "general_gpt": {"model_name": base, **gpt}}
    path.write_text(yaml.safe_dump({"model": {"language_modeling": models}}))
    return path


def save(state: Any, path: Path, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path
