"""What kvpred-mlx uses of mlx-lm beyond its documented functions, in one place, for mlx-lm>=0.32,<0.33.

`USED` names every class, function and method that is subclassed, replaced or called, with the parameters that are
counted on.  After a change of mlx-lm's version `moved` says which of them are no longer there, or no longer the same.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

VERSIONS = "mlx-lm>=0.32,<0.33"

USED: dict[str, dict[str, list[str] | None]] = {
    # draft.py, generation.py: a prefill of one's own, and speculative decoding after it
    "mlx_lm.generate": {
        "generation_stream": None,
        "maybe_quantize_kv_cache": ["prompt_cache", "quantized_kv_start", "kv_group_size", "kv_bits"],
        "str2bool": ["string"],  # cli/generate.py
        "speculative_generate_step": ["prompt", "model", "draft_model", "num_draft_tokens", "prompt_cache"],
    },
    # server.py and http_api.py: subclasses of the server's classes
    "mlx_lm.server": {
        "APIHandler.__init__": ["self", "response_generator"],
        "APIHandler.do_GET": ["self"],
        "APIHandler.do_POST": ["self"],
        "APIHandler._set_completion_headers": ["self", "status_code"],
        "APIHandler._set_cors_headers": ["self"],
        "APIHandler._set_stream_headers": ["self", "status_code"],
        "APIHandler.validate_model_parameters": ["self"],
        "APIHandler.handle_completion": ["self", "request", "stop_words"],
        "APIHandler.handle_models_request": ["self"],
        "APIHandler.generate_response": ["self", "text", "finish_reason"],
        "APIHandler.completion_usage_response": ["self"],
        "CompletionRequest": ["request_type", "prompt", "messages"],
        "GenerationArguments": ["model", "max_tokens", "num_draft_tokens"],
        "LRUPromptCache.fetch_nearest_cache": ["self", "model", "tokens"],
        "ModelDescription": ["model", "draft", "adapter"],
        "ModelProvider.__init__": ["self", "cli_args"],
        "ModelProvider.load": ["self", "model_path", "adapter_path", "draft_model_path"],
        "ModelProvider.load_default": ["self"],
        "ModelProvider.reset": ["self"],
        "ResponseGenerator.__init__": ["self", "model_provider", "prompt_cache"],
        "ResponseGenerator.generate": ["self", "request", "generation_args", "progress_callback"],
        "ResponseGenerator._generate": ["self"],
        "ResponseGenerator._run_generate": ["self"],
        "ResponseGenerator._tokenize": ["self", "tokenizer", "request", "args"],
        "ResponseGenerator.stop_and_join": ["self"],
        "_run_http_server": ["host", "port", "response_generator", "server_class", "handler_class"],
        "stream_generate": ["model", "tokenizer", "prompt", "max_tokens", "draft_model"],
    },
    # server.py, cli/serve.py
    "mlx_lm.utils": {"_parse_size": ["x"], "maybe_set_recommended_wired_limit": []},
    # cli/chat.py: the look of mlx-lm's chat
    "mlx_lm.cli_ui": {
        "ChatUI.__init__": ["self", "args"],
        "ChatUI.prompt": ["self"],
        "ChatUI.stream_token": ["self", "text"],
        "ChatUI.end_turn": ["self", "response"],
        "print_header_panel": ["console", "title", "rows"],
    },
    # bench/evaluate/lm_eval_model.py: mlx-lm's lm-eval model class (needs lm-eval)
    "mlx_lm.evaluate": {
        "MLXLM._process_prompt": ["self", "prompt", "step_size"],
        "MLXLM._score_fn": ["self", "inputs", "cache", "step_size"],
        "MLXLM.generate_until": ["self", "requests"],
        "MLXLM.loglikelihood": ["self", "requests"],
    },
}


def moved(modules: list[str] | None = None) -> list[str]:
    """One line for each name of `USED` that is missing or has lost a parameter (empty: all is as expected).

    Args:
        modules: which of mlx-lm's modules to look at (default: all).
    """
    from mlx_lm import __version__

    found = []
    for module in modules or USED:
        for name, parameters in USED[module].items():
            problem = _problem(importlib.import_module(module), name, parameters)
            if problem:
                found.append(f"{module}.{name} {problem} in mlx-lm {__version__}, written for {VERSIONS}")
    return found


def _problem(module: Any, name: str, parameters: list[str] | None) -> str | None:
    used = module
    for part in name.split("."):
        used = getattr(used, part, None)
    if used is None:
        return "is not there"
    missing = [p for p in parameters or [] if p not in inspect.signature(used).parameters]
    return f"has no parameter {', '.join(missing)}" if missing else None
