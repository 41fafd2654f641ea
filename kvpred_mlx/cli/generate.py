"""`kvpred-mlx generate`: mlx-lm's generate with a pair, and the time to first token."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpred_mlx.cli.dial import ExactFirst, ExactLast, ExactTop, dial, set_dial
from kvpred_mlx.cli.draft import DraftOption, NumDraftTokensOption, check_draft

if TYPE_CHECKING:
    from kvpred_mlx.generation.stream import GenerationResponse

DEMO_NOTE = "Using the bundled demo pair: 8 M parameters, it writes Python-shaped text. --model takes others."


def generate(
    model: Annotated[
        str | None,
        typer.Option(help="Pair: a directory or a Hugging Face repo. Without it, the bundled demo pair."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text; '-' reads standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Tokens to generate.")] = 100,
    temp: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sampling top-p.")] = 1.0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="Sampling min-p.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sampling top-k.")] = 0,
    min_tokens_to_keep: Annotated[int, typer.Option(min=1, help="Least tokens that min-p keeps.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    max_kv_size: Annotated[int | None, typer.Option(min=8, help="Largest KV cache, in tokens.")] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="Quantize the base's KV cache: 2, 3, 4, 6 or 8.")
    ] = None,
    kv_group_size: Annotated[int, typer.Option(help="Group size of KV cache quantization.")] = 64,
    quantized_kv_start: Annotated[int, typer.Option(min=0, help="Quantize from this token on.")] = 5000,
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Prompt tokens to process at a time.")] = 2048,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt for the chat template.")] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Use the raw prompt.")
    ] = False,
    extra_eos_token: Annotated[list[str] | None, typer.Option(help="One more token that stops.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="The base alone, without prediction, to compare.")
    ] = False,
    exact_first: ExactFirst = None,
    exact_last: ExactLast = None,
    exact_top: ExactTop = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Recompute the prompt exactly behind the first token.")
    ] = False,
    repair_budget: Annotated[
        float, typer.Option(help="The share of decoding's time that the repair may take, 0 to 1.")
    ] = 0.3,
    draft: DraftOption = None,
    num_draft_tokens: NumDraftTokensOption = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of text.")] = False,
) -> None:
    """Generate text: the auxiliary model reads the prompt, the base model answers."""
    check_draft(draft)
    text = _read_prompt(prompt)
    if kv_bits not in (None, 2, 3, 4, 6, 8):
        raise typer.BadParameter(f"{kv_bits}, expected 2, 3, 4, 6 or 8", param_hint="--kv-bits")
    if not 0 < repair_budget <= 1:
        raise typer.BadParameter(
            f"{repair_budget:g}, expected a share above 0 and up to 1", param_hint="--repair-budget"
        )
    if repair and draft:
        raise typer.BadParameter("given with --draft, expected one of the two", param_hint="--repair")
    dial(
        exact_first, exact_last, exact_top, None
    )  # what is wrong with them is said before anything is loaded
    from kvpred_mlx.pair.loading import DEMO_PAIR, context_length, find_pair, load, read_config

    if model is None:
        print(DEMO_NOTE, file=sys.stderr)
    path = find_pair(model or DEMO_PAIR)
    pair, tokenizer = load(path)
    if tokenizer is None:
        raise ValueError(
            f"{path}: the pair has no tokenizer, so it takes token ids only (see the Python API)"
        )
    for token in extra_eos_token or []:
        tokenizer.add_eos_token(token)
    pair.exact = exact
    set_dial(pair, dial(exact_first, exact_last, exact_top, pair.exact_positions))
    ids = _encode(tokenizer, text, system_prompt, ignore_chat_template)
    context = context_length(read_config(path))
    if context is not None and len(ids) >= context:
        raise typer.BadParameter(
            f"the prompt has {len(ids)} tokens, expected fewer than the model's context of {context}",
            param_hint="--prompt",
        )

    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from kvpred_mlx.generation.stream import stream_generate

    if seed is not None:
        mx.random.seed(seed)
    responses = stream_generate(
        pair,
        tokenizer,
        ids,
        max_tokens,
        draft_model=pair.auxiliary if draft else None,
        num_draft_tokens=num_draft_tokens,
        sampler=make_sampler(temp, top_p, min_p, min_tokens_to_keep, top_k),
        max_kv_size=max_kv_size,
        prefill_step_size=prefill_step_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
        repair=repair,
        repair_budget=repair_budget,
    )
    (_print_json if as_json else _print_text)(responses, str(path), pair)


def _read_prompt(prompt: str | None) -> str:
    if prompt is None:
        raise typer.BadParameter("missing, expected text, or - to read standard input", param_hint="--prompt")
    try:
        # As mlx-lm: \n and \t on the command line are a newline and a tab.
        text = (
            sys.stdin.buffer.read().decode("utf-8")
            if prompt == "-"
            else prompt.replace("\\n", "\n").replace("\\t", "\t")
        )
        text.encode("utf-8")
    except UnicodeError as error:
        where = (
            f"at position {error.start}" if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else ""
        )
        raise typer.BadParameter(f"not UTF-8 {where}, expected UTF-8 text", param_hint="--prompt") from error
    if not text:
        raise typer.BadParameter("empty, expected at least one character", param_hint="--prompt")
    return text


def _encode(tokenizer: Any, text: str, system_prompt: str | None, ignore_chat_template: bool) -> list[int]:
    if ignore_chat_template or not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    messages = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    messages.append({"role": "user", "content": text})
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(chat, add_special_tokens=False)


def _print_text(responses: Any, path: str, pair: Any) -> None:
    from kvpred_mlx.generation.stream import footer

    print("=" * 10)
    response: GenerationResponse | None = None
    try:
        for response in responses:
            print(response.text, end="", flush=True)
    except KeyboardInterrupt:
        print("\n[interrupted]", file=sys.stderr)
        raise
    if response is not None:
        print(f"\n{'=' * 10}\n{footer(response)}")


def _print_json(responses: Any, path: str, pair: Any) -> None:
    received = list(responses)
    last = received[-1]
    fields = (
        "prompt_tokens",
        "prompt_tps",
        "generation_tokens",
        "generation_tps",
        "peak_memory",
        "finish_reason",
        "ttft",
        "prefill_time",
        "drafted",
        "accepted",
    )
    result = {
        "model": str(Path(path)),
        "mode": "exact" if pair.exact else "predicted",
        "exact_positions": pair.exact_positions.as_dict() if pair.exact_positions else None,
        "text": "".join(r.text for r in received),
        **{name: getattr(last, name) for name in fields},
    }
    if last.repair is not None:
        rates = {name: getattr(last, name) for name in ("repair_tps", "repaired_tps")}
        result["repair"] = dataclasses.asdict(last.repair) | rates
    print(json.dumps(result, ensure_ascii=False))
