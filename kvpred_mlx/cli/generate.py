"""`kvpred-mlx generate`: mlx-lm's generate with a pair, and the time to first token."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.dial import Depth, ExactFirst, ExactLast, ExactTop, dial
from kvpred_mlx.cli.opening import DEMO_NOTE, OpenedPair, OtherModels, open_pair
from kvpred_mlx.cli.prompt import ChatTemplate, read_prompt
from kvpred_mlx.cli.prompt_cache import OPTION as CACHE_OPTION
from kvpred_mlx.cli.prompt_cache import SavedCache, read_cache
from kvpred_mlx.cli.values import json_object

if TYPE_CHECKING:
    from kvpred_mlx.generation.stream import GenerationResponse

LIST_OPTION = "--extra-eos-token"
EPILOG = (
    "Of mlx_lm.generate's options it has not --adapter-path and --quantize-activations, which change the keys and "
    "values that the predictor was fitted to (fuse the adapter into the base with mlx_lm.fuse, then fit a pair), nor "
    "--image: pairs read text."
)


class GenerateCommand(typer.core.TyperCommand):
    """As in mlx-lm, several tokens may follow one `--extra-eos-token`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words, values = [], None
        for word in args:
            if word.startswith("-"):
                values = 0 if word == LIST_OPTION else None
            elif values is not None:
                words += [LIST_OPTION] if values else []
                values += 1
            words.append(word)
        return super().parse_args(ctx, words)


def generate(
    model: o.ModelOption = None,
    base: o.OtherBase = None,
    auxiliary: o.OtherAuxiliary = None,
    force: o.Force = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text; '-' reads standard input.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=-1, help="Tokens to generate; -1: until the answer ends.")
    ] = 100,
    temp: o.Temp = 0.0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    top_k: o.TopK = 0,
    xtc_probability: o.XtcProbability = 0.0,
    xtc_threshold: o.XtcThreshold = 0.1,
    min_tokens_to_keep: Annotated[int, typer.Option(min=1, help="Least tokens that min-p keeps.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, max=o.LARGEST_SEED, help="Seed of the sampling.")] = None,
    max_kv_size: o.MaxKvSize = None,
    kv_bits: o.KvBits = None,
    kv_group_size: o.KvGroupSize = 64,
    quantized_kv_start: o.QuantizedKvStart = 5000,
    prefill_step_size: o.PrefillStepSize = 2048,
    prompt_cache_file: Annotated[
        Path | None,
        typer.Option(help="A pair's saved prompt cache, to which the prompt is the continuation."),
    ] = None,
    system_prompt: o.SystemPrompt = None,
    prefill_response: Annotated[
        str | None, typer.Option(help="How the answer begins (chat template).")
    ] = None,
    chat_template_config: Annotated[
        str | None,
        typer.Option(help="""JSON arguments for the chat template: '{"enable_thinking":false}'."""),
    ] = None,
    use_default_chat_template: o.DefaultChatTemplate = False,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Use the raw prompt.")
    ] = False,
    extra_eos_token: Annotated[
        list[str] | None, typer.Option(LIST_OPTION, help="More tokens that stop, one or several.")
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="The base alone, without prediction, to compare.")
    ] = False,
    exact_first: ExactFirst = None,
    exact_last: ExactLast = None,
    exact_top: ExactTop = None,
    depth: Depth = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Recompute the prompt exactly behind the first token.")
    ] = False,
    repair_budget: Annotated[
        float, typer.Option(help="The share of decoding's time that the repair may take, 0 to 1.")
    ] = 0.3,
    draft_model: Annotated[
        str | None,
        typer.Option(
            help="Speculative decoding: 'auxiliary', which has read the prompt already, or a model."
        ),
    ] = None,
    draft: o.Draft = None,
    num_draft_tokens: o.NumDraftTokens = 3,
    verbose: Annotated[
        str, typer.Option(metavar="BOOL", help="False or F: print the answer only, no lines around it.")
    ] = "True",
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of text.")] = False,
) -> None:
    """Generate text: the auxiliary model reads the prompt, the base model answers."""
    text, drafts_with = read_prompt(prompt), draft_model or draft
    _check(repair, repair_budget, drafts_with, prompt_cache_file)
    if max_tokens == 0:
        raise typer.BadParameter("0, expected at least 1, or -1 for all", param_hint="--max-tokens")
    given_dial = dial(exact_first, exact_last, exact_top, depth)
    config = json_object("--chat-template-config", chat_template_config)
    template = ChatTemplate(
        ignore_chat_template, use_default_chat_template, system_prompt, prefill_response, config
    )

    import mlx.core as mx
    from mlx_lm.generate import str2bool
    from mlx_lm.sample_utils import make_sampler

    from kvpred_mlx.generation.checks import check_quantized_cache
    from kvpred_mlx.generation.stream import stream_generate

    if seed is not None:
        mx.random.seed(seed)  # before the model is made, as mlx-lm does: the same seed, the same text
    saved = read_cache(prompt_cache_file) if prompt_cache_file else None
    if saved is not None:
        saved.check_quantization(kv_bits, kv_group_size)
    others = OtherModels(base, auxiliary, force)
    opened = _open(model, others, saved, exact, given_dial, trust_remote_code)
    if kv_bits is not None:
        check_quantized_cache(
            opened.pair, kv_bits, kv_group_size, max_kv_size, saved.entries if saved else None
        )
    tokenizer = opened.tokenizer
    for token in extra_eos_token or []:
        tokenizer.add_eos_token(token)
    sampler = make_sampler(
        temp, top_p, min_p, min_tokens_to_keep, top_k, xtc_probability, xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )  # fmt: skip
    responses = stream_generate(
        opened.pair, tokenizer, _encode(opened, template, text, saved), max_tokens,
        draft_model=_draft(drafts_with, opened), num_draft_tokens=num_draft_tokens, sampler=sampler,
        max_kv_size=max_kv_size, prefill_step_size=prefill_step_size,
        prompt_cache=saved.entries if saved else None, kv_bits=kv_bits, kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start, repair=repair, repair_budget=repair_budget,
    )  # fmt: skip
    if as_json:
        _print_json(responses, opened)
    else:
        _print_text(responses, str2bool(verbose))


def _check(repair: bool, repair_budget: float, draft: str | None, prompt_cache_file: Path | None) -> None:
    """Refuse options that do not go together."""
    if not 0 < repair_budget <= 1:
        raise typer.BadParameter(
            f"{repair_budget:g}, expected a share above 0 and up to 1", param_hint="--repair-budget"
        )
    if repair and draft:
        raise typer.BadParameter("given with --draft-model, expected one of the two", param_hint="--repair")
    if prompt_cache_file and draft not in (None, "auxiliary"):
        raise typer.BadParameter(
            f"given with --draft-model {draft}, which has no cache there, expected --draft-model auxiliary",
            param_hint=CACHE_OPTION,
        )


def _open(
    model: str | None,
    others: OtherModels,
    saved: SavedCache | None,
    exact: bool,
    dial: dict[str, Any],
    trust_remote_code: bool,
) -> OpenedPair:
    """The pair that was named, or that made the prompt cache, or the bundled one."""
    chosen = model or (saved.model if saved else None)
    if chosen is None:
        print(DEMO_NOTE, file=sys.stderr)
    config = (saved.tokenizer_config if saved else {}) | {"trust_remote_code": trust_remote_code}
    opened = open_pair(chosen, others, exact=exact, dial=dial, tokenizer_config=config)
    if saved is not None:
        saved.check_pair(model, opened)
    return opened


def _encode(opened: OpenedPair, template: ChatTemplate, text: str, saved: SavedCache | None) -> list[int]:
    """The prompt's tokens, if there is room for them."""
    ids = template.encode(opened.tokenizer, text, is_suffix=saved is not None)
    cached = 0 if saved is None else len(saved)
    if opened.context is not None and cached + len(ids) >= opened.context:
        split = f" with the {cached} in the prompt cache" if cached else ""
        raise typer.BadParameter(
            f"the prompt has {cached + len(ids)} tokens{split}, expected fewer than the model's context of "
            f"{opened.context}",
            param_hint="--prompt",
        )
    return ids


def _draft(name: str | None, opened: OpenedPair) -> Any:
    """The draft model; another model than the auxiliary must know the same tokens, as far as mlx-lm asks."""
    if name is None or name == "auxiliary":
        return opened.pair.auxiliary_model if name else None
    from kvpred_mlx.making.pairing import load_part

    loaded = load_part(name)
    if loaded.tokenizer is None or loaded.tokenizer.vocab_size != opened.tokenizer.vocab_size:
        size = loaded.tokenizer.vocab_size if loaded.tokenizer else "no"
        raise ValueError(
            f"{name}: {size} tokens in the draft model's tokenizer, expected {opened.tokenizer.vocab_size}"
        )
    return loaded.model


def _print_text(responses: Any, verbose: bool) -> None:
    from kvpred_mlx.generation.stream import footer

    if verbose:
        print("=" * 10)
    response: GenerationResponse | None = None
    try:
        for response in responses:
            print(response.text, end="", flush=True)
    except KeyboardInterrupt:
        print("\n[interrupted]", file=sys.stderr)
        raise
    print()
    if verbose and response is not None:
        print(f"{'=' * 10}\n{footer(response)}")


def _print_json(responses: Any, opened: OpenedPair) -> None:
    received = list(responses)
    last, pair = received[-1], opened.pair
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
        "model": str(opened.path),
        "mode": "exact" if pair.exact else "predicted",
        "exact_positions": pair.exact_positions.as_dict() if pair.exact_positions else None,
        "text": "".join(r.text for r in received),
        **{name: getattr(last, name) for name in fields},
    }
    if last.repair is not None:
        rates = {name: getattr(last, name) for name in ("repair_tps", "repaired_tps")}
        result["repair"] = dataclasses.asdict(last.repair) | rates
    print(json.dumps(result, ensure_ascii=False))
