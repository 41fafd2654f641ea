"""Tiny, randomly initialised models of every family in mlx-lm, for the tests."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_map
from mlx_lm.models.base import BaseModelArgs

LAYERS = 4
VOCAB = 128
WINDOW = 8  # of sliding-window layers; the tests' prompts are longer

# What mlx-lm itself cannot run here.
NOT_BUILT: dict[str, str] = json.loads((Path(__file__).parent / "data" / "families.json").read_text())

# Families that keep nothing but attention keys and values.
_ATTENTION = """
    Klear afm7 afmoe apertus bailing_moe cohere cohere2 dbrx deepseek deepseek_v2 deepseek_v3 dots1
    ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe gear gemma gemma2 gemma3 gemma3_text gemma3n gemma4
    gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite
    granitemoe helium hunyuan hunyuan_v1_dense internlm2 internlm3 iquestloopcoder kimi_k25 kimi_vl
    laguna lille-130m llama llama4 llama4_text mellum mimo mimo_v2_flash minicpm minicpm3 minimax
    ministral3 mistral3 mistral4 mixtral muse_glimmer nanbeige nanochat nemotron nemotron-nas olmo2
    olmo3 olmoe openelm phi phi3 phimoe phixtral pixtral plamo plamo3 qwen qwen2 qwen2_moe qwen2_vl
    qwen3 qwen3_moe qwen3_vl qwen3_vl_moe seed_oss smollm3 solar_open spark2_5 stablelm starcoder2
    step3p5 talkie telechat3 youtu_llm
"""
# Families that keep recurrent or convolutional state, second caches, or parts of tokens in other ways.
_STATES = """
    baichuan_m1 bailing_hybrid bailing_moe_linear bailing_moe_v3 deepseek_v32 deepseek_v41 falcon_h1
    glm_moe_dsa granitemoehybrid jamba kimi_k3 kimi_linear lfm2 lfm2-vl lfm2_moe longcat_flash
    longcat_flash_ngram mamba mamba2 minimax_m3_vl nemotron_h olmo_hybrid plamo2 prism_hadamard_qwen35
    qwen3_5 qwen3_5_moe qwen3_next recurrent_gemma rwkv7
"""
ATTENTION, STATES = _ATTENTION.split(), _STATES.split()
INJECTABLE = [*ATTENTION, *STATES]
# The tests of the others are marked slow: separate and fused projections, windows, shared and expert layers are here.
QUICK = {"gemma3n", "gpt_oss", "llama", "openelm", "qwen2", "qwen3", "qwen3_5", "lfm2", "granitemoehybrid"}

ROPE = {"rope_theta": 10000.0, "rope_type": "default", "type": "default"}
YARN = {**ROPE, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}
MIXED = ["sliding_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
MAMBA = ["mamba", "attention"] * 2
KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}

# Every family takes what it knows of this and ignores the rest.
BASE: dict[str, Any] = {
    # sizes, in each family's spelling
    **dict.fromkeys(
        ["hidden_size", "model_dim", "hidden_dim", "n_embd", "embedding_size", "dim_model_base"], 64
    ),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "num_transformer_layers", "n_layer"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "num_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_kv_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(
        ["head_dim", "kv_channels", "swa_head_dim", "global_head_dim", "query_pre_attn_scalar"], 16
    ),
    **dict.fromkeys(["vocab_size", "num_vocab", "vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["max_position_embeddings", "n_ctx", "n_positions", "model_max_length"], 512),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size"], WINDOW),
    "attention_chunk_size": WINDOW,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "ffn_hidden_size": 128,
    "n_inner": 128,
    "shared_intermediate_size": 64,
    # norms, biases, activations
    **dict.fromkeys(
        ["rms_norm_eps", "layer_norm_eps", "norm_eps", "layernorm_epsilon", "layer_norm_epsilon"], 1e-5
    ),
    **dict.fromkeys(["norm_epsilon", "post_norm_eps"], 1e-5),
    **dict.fromkeys(
        ["attention_bias", "mlp_bias", "use_bias", "bias", "qkv_bias", "use_qkv_bias", "conv_bias"], False
    ),
    **dict.fromkeys(["mamba_proj_bias", "attention_dropout", "tie_word_embeddings", "post_norm"], False),
    **dict.fromkeys(["no_bias", "qk_norm", "use_qk_norm", "use_conv_bias", "mamba_conv_bias"], True),
    "hidden_act": "relu2",
    # positions and windows
    "rope_theta": 10000.0,
    "swa_rope_theta": 10000.0,
    "rope_local_base_freq": 10000.0,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.5,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 8,
    "rope_scaling": None,
    "rope_parameters": ROPE,
    "no_rope_layer_interval": 2,
    "no_rope_layers": [1, 0, 1, 0],
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window_pattern": 2,
    # multipliers
    **dict.fromkeys(["embedding_multiplier", "logits_scaling", "residual_multiplier", "scale_depth"], 1.0),
    **dict.fromkeys(["scale_emb", "output_multiplier", "routed_scaling_factor"], 1.0),
    "logit_scale": 0.5,
    "attention_multiplier": 0.25,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logits_soft_cap": 30.0,
    # mixtures of experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(
        ["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32
    ),
    **dict.fromkeys(
        ["n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"], 1
    ),
    **dict.fromkeys(
        ["first_k_dense_replace", "decoder_sparse_step", "moe_layer_freq", "n_group", "topk_group"], 1
    ),
    "num_dense_layers": 1,
    "use_expert_bias": True,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "score_function": "sigmoid",
    "num_nextn_predict_layers": 0,
    # latent attention
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "qk_head_dim"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "swa_v_head_dim"], 8),
    # recurrent, convolutional and linear-attention layers
    "state_size": 8,
    "ssm_state_size": 8,
    "conv_kernel": 4,
    "conv_L_cache": 3,
    "conv1d_width": 4,
    "n_groups": 1,
    "time_step_rank": 8,
    "time_step_limit": (0.0, 100.0),
    **dict.fromkeys(["mamba_d_conv", "linear_conv_kernel_dim", "linear_num_value_heads"], 4),
    **dict.fromkeys(["mamba_d_state", "mamba_head_dim", "mamba_d_head"], 16),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 16),
    **dict.fromkeys(
        ["linear_num_key_heads", "full_attention_interval", "layer_group_size", "mamba_expand"], 2
    ),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "mamba_dt_rank"], 8),
    "mamba_n_groups": 1,
    "group_norm_size": 1,
    "linear_allow_neg_eigval": True,
    # an indexer that picks the keys to attend to
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
}


def text(family: str, **extra: Any) -> dict[str, Any]:
    """The language model inside a vision-language family."""
    return {"text_config": {**BASE, "model_type": family, **extra}}


# What a family needs beyond BASE.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 2, "hidden_dim_scale_factor": 1.5},
    "baichuan_m1": {
        "conv_window": 2,
        "sliding_window_layers": [1],
        "num_swa_attention_heads": 4,
        "num_swa_key_value_heads": 2,
    },
    "bailing_moe": {"max_window_layers": LAYERS},
    "bailing_moe_linear": {"group_norm_size": 1},
    "cohere2": {"layer_types": None},
    "dbrx": {
        "d_model": 64,
        "n_layers": LAYERS,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "deepseek_v2": {
        "topk_method": "gready",
        "scoring_func": "softmax",
        "rope_scaling": {"factor": 1.0, **ROPE},
    },
    "deepseek_v41": {"o_groups": 2, "o_lora_rank": 16, "hc_mult": 2, "compress_ratios": [0] * LAYERS},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_interval": 1, "moe_layer_end_index": 3},
    "exaone4": {"sliding_window_pattern": "LLLG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3": text("gemma3_text"),
    "gemma3n": text(
        "gemma3n_text",
        num_kv_shared_layers=2,
        layer_types=MIXED,
        activation_sparsity_pattern=[0.5] * LAYERS,
        hidden_size_per_layer_input=16,
        altup_num_inputs=2,
        altup_coef_clip=120.0,
        altup_correct_scale=True,
        altup_active_idx=0,
        laurel_rank=8,
    ),
    "gemma4": text(
        "gemma4_text",
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=0,
        rope_parameters=None,
        layer_types=MIXED,
    ),
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "rope_parameters": None},
    "gpt2": {"num_key_value_heads": None},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt_oss": {"layer_types": MIXED},
    "granitemoehybrid": {"layer_types": MAMBA, "position_embedding_type": "rope"},
    "hunyuan": {
        "cla_share_factor": 2,
        "use_cla": True,
        "use_mixed_mlp_moe": False,
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "layers_block_type": MAMBA,
    },
    "kimi_k25": text("deepseek_v3"),
    "kimi_k3": text("kimi_linear", hidden_act="situ", linear_attn_config=KDA),
    "kimi_linear": {"linear_attn_config": KDA},
    "kimi_vl": text("deepseek_v3"),
    "lfm2": {
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lille-130m": {"block_size": 64},
    "llama4": text("llama4_text", num_experts_per_tok=1, interleave_moe_layer_step=1),
    "llama4_text": {"interleave_moe_layer_step": 1, "num_experts_per_tok": 1},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba": {"intermediate_size": 128},
    "mamba2": {"num_heads": 8, "intermediate_size": 128},
    "mellum": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
            "original_max_position_embeddings": 64,
        },
    },
    "minimax": {"attn_type_list": [1] * LAYERS, "shared_intermediate_size": 0, "scoring_func": "softmax"},
    "minimax_m3_vl": text(
        "minimax_m3",
        dense_intermediate_size=96,
        moe_layer_freq=[0, 1, 1, 1],
        sparse_attention_freq=[0, 1, 1, 1],
        index_block_size=4,
        index_topk_blocks=2,
    ),
    "ministral3": {"rope_parameters": YARN},
    "mistral3": text("ministral3", rope_parameters=YARN),
    "mistral4": {"rope_parameters": YARN},
    "muse_spark": text(
        "muse_spark_text", layer_rope_theta=[1e4, 0, 1e4, 0], moe_hidden_size=32, num_shared_experts=0
    ),
    "nemotron-nas": {
        "hidden_act": "silu",
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
                "ffn": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False},
            }
        ]
        * LAYERS,
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "-", "E"],
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {"layer_types": HYBRID, "linear_num_key_heads": 4},
    "openelm": {
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4, 6, 8],
        "num_kv_heads": [2, 2, 3, 4],
        "ffn_multipliers": [1.0, 1.5, 2.0, 2.5],
    },
    "phixtral": {"n_positions": 64},
    "pixtral": text("llama"),
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 16},
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": "lm_head", "embedding": False, "dtype": "float16", "block": 0}],
        **text("qwen3_5", hidden_size=128),
    },
    "qwen": {"num_key_value_heads": 4, "intermediate_size": 128},
    "qwen2_vl": text("qwen2"),
    "qwen3_5": text("qwen3_5"),
    "qwen3_5_moe": text("qwen3_5_moe"),
    "qwen3_vl": text("qwen3"),
    "qwen3_vl_moe": text("qwen3_moe"),
    "recurrent_gemma": {"block_types": ["recurrent", "attention"] * 2},
    "rwkv7": dict.fromkeys(
        ["a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"], 8
    ),
    "smollm3": {"layer_types": None},
    "spark2_5": {
        "hidden_act": "gelu",
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "step3p5": {"num_attention_groups": 2, "moe_num_experts": 4, "moe_top_k": 2},
    "telechat3": {"rope_scaling": {"factor": 1.0, **ROPE}},
}
OVERRIDES["lfm2-vl"] = text("lfm2", **OVERRIDES["lfm2"])
OVERRIDES["longcat_flash_ngram"] = {
    **OVERRIDES["longcat_flash"],
    "ngram_vocab_size_ratio": 2,
    "emb_split_num": 2,
}


def families() -> list[str]:
    """Every module of mlx_lm.models that defines a model."""
    # Read, not imported: importing mlx_lm.models.olmo ends the process.
    defines_model = re.compile(r"^class Model\(|^from \.\w+ import .*\bModel\b", re.MULTILINE)
    names = (m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__))
    return sorted(n for n in names if defines_model.search(_source(n)))


def _source(family: str) -> str:
    spec = importlib.util.find_spec(f"mlx_lm.models.{family}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text()


def build(family: str, overrides: dict[str, Any] | None = None, *, noise: float = 0.1) -> nn.Module:
    """A tiny float32 model of the family in eval mode, with random weights, norms included.

    Args:
        overrides: what the configuration has beyond BASE, in place of the family's OVERRIDES.
        noise: of all weights, norms included; 0 leaves the model as it initialises itself.

    The same call gives the same weights, in a model of its own, and leaves MLX's random numbers in the same state.
    """
    overrides = OVERRIDES.get(family, {}) if overrides is None else overrides
    key = family, repr(overrides), noise
    if key not in _BUILT:
        _BUILT[key] = _new(family, overrides, noise)
    mx.random.seed(1)
    return copy.deepcopy(_BUILT[key])


_BUILT: dict[tuple[str, str, float], nn.Module] = {}


def _new(family: str, overrides: dict[str, Any], noise: float) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    config = {**BASE, "model_type": family, **overrides}
    if module.ModelArgs.from_dict.__func__ is BaseModelArgs.from_dict.__func__:
        # It reads the signature anew for every name, known or not, which takes longer than all the rest.
        config = {
            name: config[name] for name in inspect.signature(module.ModelArgs).parameters if name in config
        }
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))

    def add_noise(p: mx.array) -> mx.array:
        return p + noise * mx.random.normal(p.shape) if mx.issubdtype(p.dtype, mx.floating) else p

    model.update(tree_map(add_noise, model.parameters()))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model.eval()
