"""`kvpred-mlx serve`: mlx-lm's OpenAI-compatible server with a pair."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.dial import Depth, ExactFirst, ExactLast, ExactTop, dial
from kvpred_mlx.cli.opening import OtherModels, one_pair, open_pair, use_default_template
from kvpred_mlx.cli.values import json_object

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def serve(
    pair: o.PairArgument = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Pair: a directory, a Hugging Face repo or a name. Repeatable: the first is default.",
        ),
    ] = None,
    base: o.OtherBase = None,
    auxiliary: o.OtherAuxiliary = None,
    force: o.Force = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    allowed_origins: Annotated[str, typer.Option(help="Allowed origins, with commas between.")] = "*",
    exact: Annotated[
        bool, typer.Option("--exact", help="The base alone, where a request says nothing.")
    ] = False,
    exact_first: ExactFirst = None,
    exact_last: ExactLast = None,
    exact_top: ExactTop = None,
    depth: Depth = None,
    draft_model: o.DraftModel = None,
    draft: o.Draft = None,
    num_draft_tokens: o.NumDraftTokens = 3,
    trust_remote_code: o.TrustRemoteCode = False,
    log_level: Annotated[str, typer.Option(help=", ".join(LEVELS) + ".")] = "INFO",
    chat_template: Annotated[str, typer.Option(help="A chat template for the tokenizer.")] = "",
    use_default_chat_template: o.DefaultChatTemplate = False,
    temp: o.Temp = 0.0,
    top_p: o.TopP = 1.0,
    top_k: o.TopK = 0,
    min_p: o.MinP = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 512,
    chat_template_args: Annotated[
        str, typer.Option(help="""JSON arguments for the chat template: '{"enable_thinking":false}'.""")
    ] = "{}",
    decode_concurrency: Annotated[int, typer.Option(min=1, help="Answers to decode in parallel.")] = 32,
    prompt_concurrency: Annotated[int, typer.Option(min=1, help="Prompts to process in parallel.")] = 8,
    prefill_step_size: Annotated[int, typer.Option(min=2, help="Prompt tokens to process at a time.")] = 2048,
    prompt_cache_size: Annotated[int, typer.Option(min=1, help="Prompt caches to keep.")] = 10,
    prompt_cache_bytes: Annotated[str | None, typer.Option(help="Most bytes of them: 2GB, 500MB.")] = None,
    kv_bits: o.KvBits = None,
    kv_group_size: o.KvGroupSize = 64,
    quantized_kv_start: o.QuantizedKvStart = 5000,
) -> None:
    """Serve OpenAI's completions and chat completions over HTTP, prompts predicted.

    A request may override what is said here of its mode, draft and sampling. With --kv-bits there are no batches.
    """
    chosen = [one_pair(model[0] if model else None, pair), *(model or [])[1:]]
    if len(set(chosen)) < len(chosen):
        raise typer.BadParameter(f"{', '.join(map(str, chosen))}, expected each once", param_hint="--model")
    given_dial = dial(exact_first, exact_last, exact_top, depth)
    if log_level.upper() not in LEVELS:
        raise typer.BadParameter(f"{log_level!r}, expected {', '.join(LEVELS)}", param_hint="--log-level")
    template_args = json_object("--chat-template-args", chat_template_args)

    from kvpred_mlx.generation.checks import check_quantized_cache
    from kvpred_mlx.serving.served import ServedPair
    from kvpred_mlx.serving.server import serve as run_server
    from kvpred_mlx.serving.settings import ServerSettings

    cache_bytes = _bytes("--prompt-cache-bytes", prompt_cache_bytes)
    config = {"trust_remote_code": trust_remote_code} | (
        {"chat_template": chat_template} if chat_template else {}
    )
    others, served = OtherModels(base, auxiliary, force), []
    for name in chosen:
        opened = open_pair(name, others, exact=exact, dial=given_dial, tokenizer_config=config)
        if kv_bits is not None:
            check_quantized_cache(opened.pair, kv_bits, kv_group_size)
        if use_default_chat_template:
            use_default_template(opened.tokenizer)
        served.append(ServedPair(opened.name, opened.pair, opened.tokenizer, opened.context))
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s")
    settings = ServerSettings(
        host=host, port=port, allowed_origins=allowed_origins.split(","), draft=draft_model or draft,
        num_draft_tokens=num_draft_tokens, temp=temp, top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=max_tokens,
        chat_template_args=template_args, decode_concurrency=decode_concurrency,
        prompt_concurrency=prompt_concurrency, prefill_step_size=prefill_step_size,
        prompt_cache_size=prompt_cache_size, prompt_cache_bytes=cache_bytes, kv_bits=kv_bits,
        kv_group_size=kv_group_size, quantized_kv_start=quantized_kv_start,
    )  # fmt: skip
    print(
        f"Serving {', '.join(pair.name for pair in served)} at http://{host}:{port}/v1 (Ctrl-C ends)",
        file=sys.stderr,
    )
    run_server(served, settings)


def _bytes(option: str, text: str | None) -> int | None:
    """mlx-lm's sizes: 2GB, 500MB."""
    from mlx_lm.utils import _parse_size

    try:
        return None if text is None else _parse_size(text)
    except (ArithmeticError, LookupError, ValueError) as error:
        raise typer.BadParameter(f"{text!r}, expected bytes such as 2GB", param_hint=option) from error
