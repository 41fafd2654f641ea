"""What kvpred-mlx uses of mlx-lm beyond its documented functions, in one place, for mlx-lm>=0.32,<0.33.

Documented is what `mlx_lm` itself exports, and `mlx_lm.sample_utils`.  `USED` names everything else that our code
imports, calls, reads, subclasses or replaces; a test reads the names off our sources and finds it complete, and none in
it that is not used.  After a change of mlx-lm's version `moved` says which of them are no longer there, or no longer
the same.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from functools import cache
from typing import Any

VERSIONS = "mlx-lm>=0.32,<0.33"

# By module: a function, class, method or attribute, and the parameters that are counted on.
USED: dict[str, dict[str, str]] = {
    # generation/: processing a prompt, and speculative decoding after it; cli/generate.py: a flag's type;
    # bench/ttft/, bench/evaluate/batches.py: mlx-lm's own generation
    "mlx_lm.generate": {
        "BatchGenerator": "model max_tokens stop_tokens sampler completion_batch_size prefill_batch_size "
        "prefill_step_size",
        "BatchGenerator.close": "",
        "BatchGenerator.next_generated": "",
        "BatchGenerator.prompt_cache_nbytes": "",
        "DEFAULT_PREFILL_STEP_SIZE": "",
        "DEFAULT_QUANTIZED_KV_START": "",
        "GenerationResponse": "text from_draft prompt_tokens prompt_tps generation_tokens generation_tps peak_memory",
        "GenerationResponse.from_draft": "",
        "GenerationResponse.generation_tokens": "",
        "GenerationResponse.generation_tps": "",
        "GenerationResponse.peak_memory": "",
        "GenerationResponse.prompt_tokens": "",
        "GenerationResponse.prompt_tps": "",
        "GenerationResponse.text": "",
        "generate_step": "prompt model max_tokens sampler prompt_cache prefill_step_size",
        "generation_stream": "",
        "maybe_quantize_kv_cache": "prompt_cache quantized_kv_start kv_group_size kv_bits",
        "str2bool": "string",
    },
    # pair/: the families' classes and configs; taps/attention.py: what stands in attention's place
    "mlx_lm.models.base": {
        "BaseModelArgs": "",
        "BaseModelArgs.from_dict": "params",
        "scaled_dot_product_attention": "queries keys values cache scale mask sinks",
    },
    # pair/auxiliary_cache.py, dial/, taps/sites.py, bench/common/sparse.py: cache entries, ours among them
    "mlx_lm.models.cache": {
        "ArraysCache": "size left_padding",
        "ArraysCache.batch_size": "",
        "ArraysCache.cache": "",
        "ArraysCache.left_padding": "",
        "ArraysCache.lengths": "",
        "BatchKVCache": "left_padding",
        "BatchKVCache.merge": "caches",
        "BatchRotatingKVCache": "max_size left_padding",
        "CacheList": "",
        "CacheList.caches": "",
        "CacheList.empty": "",
        "CacheList.extend": "other",
        "CacheList.extract": "idx",
        "CacheList.finalize": "",
        "CacheList.is_trimmable": "",
        "CacheList.merge": "caches",
        "CacheList.prepare": "left_padding lengths right_padding",
        "CacheList.size": "",
        "CacheList.trim": "n",
        "ChunkedKVCache": "chunk_size",
        "ChunkedKVCache.chunk_size": "",
        "ConcatenateKVCache": "",
        "ConcatenateKVCache.keys": "",
        "ConcatenateKVCache.make_mask": "N return_array window_size",
        "ConcatenateKVCache.offset": "",
        "ConcatenateKVCache.update_and_fetch": "keys values",
        "ConcatenateKVCache.values": "",
        "KVCache": "",
        "KVCache.empty": "",
        "KVCache.is_trimmable": "",
        "KVCache.keys_and_values": "",
        "KVCache.merge": "caches",
        "KVCache.offset": "",
        "KVCache.to_quantized": "group_size bits",
        "KVCache.trim": "n",
        "KVCache.update_and_fetch": "keys values",
        "LRUPromptCache": "max_size",
        "LRUPromptCache.fetch_nearest_cache": "model tokens",
        "LRUPromptCache.insert_cache": "model tokens prompt_cache",
        "QuantizedKVCache": "",
        "QuantizedKVCache.bits": "",
        "QuantizedKVCache.group_size": "",
        "RotatingKVCache": "max_size keep",
        "RotatingKVCache.keep": "",
        "RotatingKVCache.max_size": "",
        "can_trim_prompt_cache": "cache",
        "create_attention_mask": "N offset return_array window_size",
        "load_prompt_cache": "file_name return_metadata",  # finds the classes of saved entries by name
        "make_prompt_cache": "model max_kv_size",
        "save_prompt_cache": "file_name cache metadata",
        "trim_prompt_cache": "cache num_tokens",
    },
    # scans/: what has another form on MLX's CPU backend; what takes other parameters there is left alone
    "mlx_lm.models.gated_delta": {"gated_delta_ops": "q k v g beta state mask"},
    "mlx_lm.models.jamba": {"JambaMambaMixer": "", "JambaMambaMixer.ssm_step": "x A state"},
    "mlx_lm.models.ssm": {
        "compute_dt": "dt dt_bias time_step_limit",
        "ssm_attn": "x A_log B C D dt dt_bias state time_step_limit mask lengths step",
    },
    # making/data.py: the text that mlx-lm calibrates quantization with
    "mlx_lm.quant.utils": {"load_data": "tokenizer num_samples sequence_length"},
    # serving/: subclasses of the server's classes
    "mlx_lm.server": {
        "APIHandler": "response_generator",
        "APIHandler._set_completion_headers": "status_code",
        "APIHandler._set_cors_headers": "",
        "APIHandler._set_stream_headers": "status_code",
        "APIHandler.body": "",
        "APIHandler.completion_usage_response": "",
        "APIHandler.created": "",
        "APIHandler.do_GET": "",
        "APIHandler.do_POST": "",
        "APIHandler.generate_response": "text finish_reason",
        "APIHandler.handle_chat_completions": "",
        "APIHandler.handle_completion": "request stop_words",
        "APIHandler.handle_models_request": "",
        "APIHandler.logit_bias": "",
        "APIHandler.num_draft_tokens": "",
        "APIHandler.object_type": "",
        "APIHandler.requested_model": "",
        "APIHandler.response_generator": "",
        "APIHandler.stream_options": "",
        "APIHandler.top_k": "",
        "APIHandler.validate_model_parameters": "",
        "GenerationArguments": "",
        "GenerationArguments.max_tokens": "",
        "GenerationArguments.model": "",
        "GenerationArguments.stop_words": "",
        "ModelDescription": "model draft adapter",
        "ModelDescription.draft": "",
        "ModelProvider": "cli_args",
        "ModelProvider.cli_args": "",
        "ModelProvider.draft_model": "",
        "ModelProvider.is_batchable": "",
        "ModelProvider.load": "model_path adapter_path draft_model_path",
        "ModelProvider.load_default": "",
        "ModelProvider.model": "",
        "ModelProvider.model_key": "",
        "ModelProvider.reset": "",
        "ModelProvider.tokenizer": "",
        "ResponseGenerator": "model_provider prompt_cache",
        "ResponseGenerator._generate": "",
        "ResponseGenerator._run_generate": "",
        "ResponseGenerator._serve_single": "request stream",
        "ResponseGenerator._stop": "",
        "ResponseGenerator._tokenize": "tokenizer request args",
        "ResponseGenerator.cli_args": "",
        "ResponseGenerator.generate": "request generation_args progress_callback",
        "ResponseGenerator.is_healthy": "",
        "ResponseGenerator.model_provider": "",
        "ResponseGenerator.requests": "",
        "ResponseGenerator.stop_and_join": "",
        "_run_http_server": "host port response_generator server_class handler_class",
        "stream_generate": "model tokenizer prompt max_tokens draft_model",
    },
    # wherever a tokenizer is wrapped or named
    "mlx_lm.tokenizer_utils": {
        "TokenizerWrapper": "tokenizer",
        "TokenizerWrapper.apply_chat_template": "add_generation_prompt",
        "TokenizerWrapper.detokenizer": "",
        "TokenizerWrapper.eos_token_ids": "",
        "TokenizerWrapper.has_chat_template": "",
    },
    # bench/studies/adapted.py
    "mlx_lm.tuner.lora": {"LoRALinear": "", "LoRALinear.from_base": "linear r scale"},
    # pair/, making/, convert/: models and tokenizers on disk; serving/ and cli/: memory
    "mlx_lm.utils": {
        "DEFAULT_ALLOW_PATTERNS": "",
        "_get_classes": "config",
        "_parse_size": "x",
        "dequantize_model": "model",
        "get_total_parameters": "model",
        "load_config": "model_path",
        "load_model": "model_path lazy model_config get_model_classes",
        "load_tokenizer": "model_path tokenizer_config_extra eos_token_ids",
        "maybe_set_recommended_wired_limit": "",
        "quantize_model": "model config group_size bits quant_predicate",
        "save_config": "config config_path",
        "save_model": "save_path model",
    },
    # cli/chat.py: the look of mlx-lm's chat
    "mlx_lm.cli_ui": {
        "ChatUI": "args",
        "ChatUI.__enter__": "",
        "ChatUI._console": "",
        "ChatUI.end_turn": "response",
        "ChatUI.prompt": "",
        "ChatUI.stream_token": "text",
        "print_header_panel": "console title rows",
    },
    # bench/evaluate/lm_eval_model.py: mlx-lm's lm-eval model class (needs lm-eval)
    "mlx_lm.evaluate": {
        "MLXLM": "",
        "MLXLM._batch_size": "",
        "MLXLM._max_tokens": "",
        "MLXLM._model": "",
        "MLXLM._process_prompt": "prompt step_size",
        "MLXLM._sampler": "",
        "MLXLM._score_fn": "inputs cache step_size",
        "MLXLM.generate_until": "requests",
        "MLXLM.loglikelihood": "requests",
        "MLXLM.tokenizer": "",
        "MLXLM.use_chat_template": "",
    },
}

# What is counted on without being named: mlx-lm calls it, and calls or finds what is ours.
BEHIND: dict[str, dict[str, str]] = {
    # generation/draft.py: splits a prompt cache into the model's and the draft's, and winds both back
    "mlx_lm.generate": {
        "speculative_generate_step": "prompt model draft_model num_draft_tokens prompt_cache"
    },
}

# What is put into mlx-lm's modules, where it has nothing of that name.
ADDED = ("mlx_lm.models.cache.AuxiliaryCache",)


def moved(modules: list[str] | None = None) -> list[str]:
    """One line for each name of `USED` and `BEHIND` that is missing or has lost a parameter (empty: all is well).

    Args:
        modules: which of mlx-lm's modules to look at (default: all).
    """
    from mlx_lm import __version__

    found = []
    for module in USED if modules is None else modules:
        for name, parameters in (USED[module] | BEHIND.get(module, {})).items():
            problem = _problem(importlib.import_module(module), name, parameters.split())
            if problem:
                found.append(f"{module}.{name} {problem} in mlx-lm {__version__}, written for {VERSIONS}")
    return found


def _problem(module: Any, name: str, parameters: list[str]) -> str | None:
    *owners, last = name.split(".")
    owner = module
    for part in owners:
        owner = getattr(owner, part, None)
    if not hasattr(owner, last):
        return None if isinstance(owner, type) and last in _given(owner) else "is not there"
    taken = inspect.signature(getattr(owner, last)).parameters if parameters else {}
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return None
    missing = [p for p in parameters if p not in taken]
    return f"has no parameter {', '.join(missing)}" if missing else None


def attributes(owner: Any) -> set[str]:
    """What a class of mlx-lm's and its parents in mlx-lm define, and what they give to their instances."""
    return {name for part in _parts(owner) for name in vars(part)} | _given(owner)


@cache
def _given(owner: Any) -> set[str]:
    """The fields of a class's instances: annotated ones, and those that its methods give to `self`."""
    found: set[str] = set()
    for part in _parts(owner):
        nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(part))))
        given = (n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
        found |= {n.attr for n in given if isinstance(n.value, ast.Name) and n.value.id == "self"}
        found |= part.__annotations__.keys()
    return found


def _parts(owner: Any) -> list[type]:
    return [part for part in owner.__mro__ if part.__module__.split(".")[0] == "mlx_lm"]
