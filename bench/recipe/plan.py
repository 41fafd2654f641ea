"""What the bundled pair is made of: sizes, models, lessons and stages, and how the time is shared out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpred_mlx.bench.recipe.pretrain import SHORT_SHARE
from kvpred_mlx.making.loss import LossWeights
from kvpred_mlx.pair.locating import DEMO_PAIR

NAME = "pycode"
VOCABULARY = 4096
CONTEXT = 640  # tokens, of the models and of the rows of the last lesson
TEXT_TOKENS, REPEATING_TOKENS = 512, 64  # of the other lessons' rows
REPEATING_ROWS = 10_000
PROMPT_TOKENS = (192, 448)  # of the figures on the card
BITS, GROUP_SIZE = 8, 32
PROMPT = DEMO_PAIR / "prompt.txt"
MADE = (
    "A demonstration that is small enough to ship: it writes Python-shaped text, no more. `make demo-pair` "
    "is the whole recipe: corpus (the source of CPython's standard library, PSF licence, held-out modules "
    "left out, and rows with facts planted to be recalled), SentencePiece tokenizer, base and auxiliary "
    "(Muon), closed-form fit, joint training, quantization."
)
HYBRIDS = {  # said on the card of another layout than attention alone
    "lfm2": "LFM2's layout instead of attention alone: short convolutions, and every third layer attends.",
    "qwen3.5": "Qwen3.5's layout instead of attention alone: three gated delta nets to each attention.",
}
SHARES = {  # of the minutes, for each training
    "base-text": 0.35,
    "base-repeating": 0.05,
    "base": 0.2,
    "auxiliary-text": 0.07,
    "auxiliary-repeating": 0.02,
    "auxiliary": 0.06,
    "joint": 0.08,
    "polished": 0.04,
    "sharpened": 0.13,
}


@dataclass(frozen=True)
class Lesson:
    """What a model is taught, one after another.

    Args:
        suffix: of the folder of the model that has had it.
        rows: file of the rows, in the recipe's folder.
        batch_size: in multiples of the recipe's.
        short: the share of the steps that are taken on halved rows.
    """

    suffix: str
    rows: str
    learning_rate: float
    batch_size: int = 1
    short: float = SHORT_SHARE


@dataclass(frozen=True)
class Stage:
    """A joint training, one after another.

    Args:
        weights: of the loss terms; None: the paper's.
        short: the share of the steps that are taken on halved rows.
    """

    name: str
    learning_rate: float
    short: float = SHORT_SHARE
    weights: LossWeights | None = None
    optimizer: str = "adamw"
    seed: int = 0


STAGES = (
    Stage("joint", 1e-3),
    Stage("polished", 5e-4, short=1),
    Stage("sharpened", 3e-3, weights=LossWeights(auxiliary=0.3, kv=0.3), optimizer="muon", seed=3),
)
LESSONS = (
    Lesson("-text", "text.npy", 0.01),
    Lesson("-repeating", "repeating.npy", 0.01, batch_size=4, short=0),
    Lesson("", "recall.npy", 0.006),
)


def nemotron(
    width: int, layers: int, heads: int, kv_heads: int, ffn: int, head_dim: int = 64
) -> dict[str, Any]:
    """A small Nemotron: its squared ReLU costs no exponentials, which are slow on MLX's x86 backend."""
    return {
        "model_type": "nemotron",
        "hidden_size": width,
        "hidden_act": "relu2",
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def qwen3_5(width: int, layers: int, heads: int, ffn: int, head_dim: int, states: int) -> dict[str, Any]:
    """A small Qwen3.5: three gated delta nets, then one attention, and again.

    Args:
        states: matrices of `head_dim` by `head_dim` numbers that each delta net keeps.
    """
    text = {
        "model_type": "qwen3_5_text",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "linear_num_key_heads": states,
        "linear_num_value_heads": states,
        "linear_key_head_dim": head_dim,
        "linear_value_head_dim": head_dim,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }
    return {"model_type": "qwen3_5", "text_config": text, "bos_token_id": 1, "eos_token_id": 2}


def lfm2(width: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    """A small LFM2: two gated short convolutions, then one attention, and again."""
    attention = range(2, layers, 3)
    return {
        "model_type": "lfm2",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": width,
        "block_ff_dim": ffn,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["full_attention" if i in attention else "conv" for i in range(layers)],
        "norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


CONFIGS = {
    "attention": {
        "base": nemotron(256, 8, 2, 1, 1024, head_dim=128),
        "auxiliary": nemotron(160, 4, 2, 1, 640),
    },
    "lfm2": {"base": lfm2(160, 6, 2, 416), "auxiliary": lfm2(96, 4, 2, 256)},
    "qwen3.5": {"base": qwen3_5(128, 8, 2, 320, 32, 4), "auxiliary": qwen3_5(96, 4, 2, 240, 32, 2)},
}
