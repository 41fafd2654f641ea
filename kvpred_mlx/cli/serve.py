"""`kvpred-mlx serve`: mlx-lm's OpenAI-compatible server with a pair."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated, Any

import typer

from kvpred_mlx.cli.dial import ExactFirst, ExactLast, ExactTop, dial, set_dial
from kvpred_mlx.cli.draft import DraftOption, NumDraftTokensOption, check_draft

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def serve(
    pair: Annotated[
        str | None, typer.Argument(help="A directory or a Hugging Face repo; the demo pair without it.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    allowed_origins: Annotated[str, typer.Option(help="Allowed origins, with commas between.")] = "*",
    exact: Annotated[
        bool, typer.Option("--exact", help="The base alone, where a request says nothing.")
    ] = False,
    exact_first: ExactFirst = None,
    exact_last: ExactLast = None,
    exact_top: ExactTop = None,
    draft: DraftOption = None,
    num_draft_tokens: NumDraftTokensOption = 3,
    log_level: Annotated[str, typer.Option(help=", ".join(LEVELS) + ".")] = "INFO",
    chat_template: Annotated[str, typer.Option(help="A chat template for the tokenizer.")] = "",
    use_default_chat_template: Annotated[
        bool, typer.Option("--use-default-chat-template", help="Use the default chat template.")
    ] = False,
    temp: Annotated[float, typer.Option(min=0, help="Default sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Default top-p.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Default top-k.")] = 0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="Default min-p.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Default for the most tokens to generate.")] = 512,
    chat_template_args: Annotated[
        str, typer.Option(help="""JSON arguments for the chat template: '{"enable_thinking":false}'.""")
    ] = "{}",
    decode_concurrency: Annotated[int, typer.Option(min=1, help="Answers to decode in parallel.")] = 32,
    prompt_concurrency: Annotated[int, typer.Option(min=1, help="Prompts to process in parallel.")] = 8,
    prefill_step_size: Annotated[int, typer.Option(min=2, help="Prompt tokens to process at a time.")] = 2048,
    prompt_cache_size: Annotated[int, typer.Option(min=1, help="Prompt caches to keep.")] = 10,
    prompt_cache_bytes: Annotated[str | None, typer.Option(help="Most bytes of them: 2GB, 500MB.")] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="Quantize the base's KV cache: 2, 3, 4, 6 or 8; no batches then.")
    ] = None,
    kv_group_size: Annotated[int, typer.Option(help="Group size of KV cache quantization.")] = 64,
    quantized_kv_start: Annotated[int, typer.Option(min=0, help="Quantize from this token on.")] = 5000,
) -> None:
    """Serve OpenAI's completions and chat completions over HTTP, prompts predicted."""
    check_draft(draft)
    dial(
        exact_first, exact_last, exact_top, None
    )  # what is wrong with them is said before anything is loaded
    if log_level.upper() not in LEVELS:
        raise typer.BadParameter(f"{log_level!r}, expected {', '.join(LEVELS)}", param_hint="--log-level")
    if kv_bits not in (None, 2, 3, 4, 6, 8):
        raise typer.BadParameter(f"{kv_bits}, expected 2, 3, 4, 6 or 8", param_hint="--kv-bits")
    template_args = _json_object("--chat-template-args", chat_template_args)

    from mlx_lm.utils import _parse_size

    from kvpred_mlx.pair.loading import DEMO_PAIR, context_length, find_pair, load, read_config
    from kvpred_mlx.serving.server import serve as run_server
    from kvpred_mlx.serving.settings import ServerSettings

    try:
        cache_bytes = None if prompt_cache_bytes is None else _parse_size(prompt_cache_bytes)
    except (ArithmeticError, LookupError, ValueError) as error:
        raise typer.BadParameter(
            f"{prompt_cache_bytes!r}, expected bytes such as 2GB", param_hint="--prompt-cache-bytes"
        ) from error
    path = find_pair(pair or DEMO_PAIR)
    model, tokenizer = load(path, {"chat_template": chat_template} if chat_template else None)
    if tokenizer is None:
        raise ValueError(f"{path}: the pair has no tokenizer, so it cannot be served")
    model.exact = exact
    set_dial(model, dial(exact_first, exact_last, exact_top, model.exact_positions))
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s")
    settings = ServerSettings(
        host=host, port=port, allowed_origins=allowed_origins.split(","), draft=draft,
        num_draft_tokens=num_draft_tokens, use_default_chat_template=use_default_chat_template, temp=temp,
        top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=max_tokens, chat_template_args=template_args,
        decode_concurrency=decode_concurrency, prompt_concurrency=prompt_concurrency,
        prefill_step_size=prefill_step_size, prompt_cache_size=prompt_cache_size, prompt_cache_bytes=cache_bytes,
        kv_bits=kv_bits, kv_group_size=kv_group_size, quantized_kv_start=quantized_kv_start,
    )  # fmt: skip
    name = pair or path.name
    print(f"Serving {name} at http://{host}:{port}/v1 (Ctrl-C ends)", file=sys.stderr)
    run_server(model, tokenizer, name, settings, context_length(read_config(path)))


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r}, expected a JSON object", param_hint=option)
    return value
