"""Prefill on MLX's CPU backend with the scans of this package and with mlx-lm's own.

`python -m kvpred_mlx.bench.studies.scans --prompt-lens 512,2048` builds models of three families with random weights
and times a prompt's way into their caches both ways, side by side (`kvpred_mlx.scans`); `--q-bits 4` quantizes them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from kvpred_mlx.bench.common import command, machine
from kvpred_mlx.bench.common.results import machine_text
from kvpred_mlx.bench.common.statistics import Interval, paired_ratio
from kvpred_mlx.console import numbers, progress_bar
from kvpred_mlx.progress import ProgressCallback, no_progress
from kvpred_mlx.scans.when import OPT_OUT, on_cpu

VOCABULARY, GROUP_SIZE = 2048, 64
FAMILIES = ("qwen3_5", "granitemoehybrid", "lfm2")
PromptLens = Annotated[list[str] | None, typer.Option(help="Prompt lengths in tokens, 512,2048.")]
Layers = Annotated[int, typer.Option(min=4, help="Of each model, a multiple of four.")]
Width = Annotated[int, typer.Option(min=64, help="Of hidden states, a multiple of 64.")]
Bits = Annotated[int, typer.Option(min=0, max=8, help="Of the weights; 0: not quantized.")]
Trials = Annotated[int, typer.Option(min=1, help="Of each way, after one that is not counted.")]


@dataclass(frozen=True)
class Row:
    """What was found of a model and a prompt's length.

    Args:
        family: mlx-lm's name of the model.
        prompt_tokens: length.
        own: median seconds with mlx-lm's own scans and convolutions.
        ours: with this package's.
        sooner: the ratio of the two, pair by pair.
        difference: the largest difference in a cache, over the largest number in it.
    """

    family: str
    prompt_tokens: int
    own: float
    ours: float
    sooner: Interval
    difference: float


def main(
    prompt_lens: PromptLens = None,
    layers: Layers = 8,
    width: Width = 1024,
    trials: Trials = 5,
    q_bits: Bits = 0,
) -> None:
    """Prefill with this package's scans and with mlx-lm's own."""
    lengths = numbers("--prompt-lens", prompt_lens or ["512,2048"], 2)
    if not on_cpu():
        raise typer.BadParameter("MLX computes on another device, expected its CPU backend")
    begin(layers, width)
    for family in FAMILIES:
        with progress_bar(family) as progress:
            for row in measure(family, layers, width, lengths, trials, progress, q_bits):
                print(text(row), flush=True)


def begin(layers: int, width: int) -> None:
    """Check the models' shape, and say on what they run.

    Raises:
        typer.BadParameter: there are no such models.
    """
    if layers % 4 or width % 64:
        raise typer.BadParameter(
            f"--layers {layers} --width {width}, expected multiples of 4 and of 64", param_hint="--layers"
        )
    about = {"machine": machine.describe(), "pair": {"dtype": "float32"}}
    print(f"{machine_text(about)}; {layers} layers of width {width}", flush=True)


def text(row: Row) -> str:
    """One line."""
    return (
        f"{row.family}, {row.prompt_tokens} tokens: mlx-lm's own {row.own:.2f} s, here {row.ours:.2f} s, "
        f"{row.sooner} times sooner, {row.difference:.0e} apart"
    )


def measure(
    family: str,
    layers: int,
    width: int,
    prompt_lens: list[int],
    trials: int,
    progress: ProgressCallback = no_progress,
    q_bits: int = 0,
) -> Iterator[Row]:
    """A row for each length; both ways in turn, one round not counted."""
    model = build(family, layers, width)
    if q_bits:
        nn.quantize(model, GROUP_SIZE, q_bits)
    for n in prompt_lens:
        tokens = mx.random.randint(0, VOCABULARY, (1, n), key=mx.random.key(n))
        own: list[float] = []
        ours: list[float] = []
        for trial in range(trials + 1):
            progress(trial, trials + 1, f"{n} tokens")
            with _mlx_lm_s_own():
                seconds, expected = _read(model, tokens)
            own.append(seconds)
            seconds, found = _read(model, tokens)
            ours.append(seconds)
        ratio = paired_ratio(own[1:], ours[1:])
        yield Row(family, n, median(own[1:]), median(ours[1:]), ratio, _difference(found, expected))


def build(family: str, layers: int, width: int) -> nn.Module:
    """A model with random weights: one layer in four attends, the others are the family's kind."""
    model_class, args_class = _get_classes(_config(family, layers, width))
    mx.random.seed(0)
    model: nn.Module = model_class(args_class.from_dict(_config(family, layers, width))).eval()
    mx.eval(model.parameters())
    return model


def _config(family: str, layers: int, width: int) -> dict[str, Any]:
    """Shapes in the proportions of Qwen3.5 0.8B, Granite 4 350M and LFM2 1.2B."""
    shape = {
        "model_type": family, "hidden_size": width, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "intermediate_size": 7 * width // 2,
        "attention_bias": False,
    }  # fmt: skip
    if family == "qwen3_5":
        heads = width // 64
        linear = {"linear_num_value_heads": heads, "linear_num_key_heads": heads, "linear_key_head_dim": 128,
                  "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}  # fmt: skip
        attention = {"num_attention_heads": width // 128, "num_key_value_heads": 1, "head_dim": 256}
        return {"model_type": family, "text_config": shape | linear | attention}
    shape |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    if family == "lfm2":
        convolutions = ["conv", "conv", "full_attention", "conv"] * (layers // 4)
        return shape | {
            "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": width, "block_multiple_of": 64,
            "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "layer_types": convolutions,
        }  # fmt: skip
    return shape | {
        "embedding_multiplier": 1.0, "attention_multiplier": 0.125, "logits_scaling": 1.0, "residual_multiplier": 1.0,
        "shared_intermediate_size": shape["intermediate_size"], "mamba_n_heads": width // 32, "mamba_d_head": 64,
        "mamba_proj_bias": False, "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True,
        "position_embedding_type": "nope", "layer_types": (["mamba"] * 3 + ["attention"]) * (layers // 4),
    }  # fmt: skip


@contextmanager
def _mlx_lm_s_own() -> Iterator[None]:
    before = os.environ.get(OPT_OUT)
    os.environ[OPT_OUT] = "1"
    try:
        yield
    finally:
        del os.environ[OPT_OUT]
        if before is not None:
            os.environ[OPT_OUT] = before


def _read(model: nn.Module, tokens: mx.array) -> tuple[float, dict[str, mx.array]]:
    """Seconds until the caches are filled, and what they hold."""
    cache = make_prompt_cache(model)
    seconds = time_filling(model, tokens, cache)
    held = dict(tree_flatten([entry.state for entry in cache]))
    return seconds, {name: x for name, x in held.items() if isinstance(x, mx.array)}


def time_filling(fill: Callable[..., Any], tokens: mx.array, cache: list[Any]) -> float:
    """Seconds that `fill(tokens, cache=cache)` takes until what the cache holds is computed."""
    mx.clear_cache()
    start = time.perf_counter()
    fill(tokens, cache=cache)
    mx.eval([entry.state for entry in cache])
    return time.perf_counter() - start


def _difference(found: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
    return max(float(mx.abs(found[n] - x).max() / mx.abs(x).max()) for n, x in expected.items())


if __name__ == "__main__":
    command.run(main)
