"""mlx-lm's `generate` and `stream_generate`, with the time to first token."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Generator
from dataclasses import dataclass
from operator import index
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, generation_stream
from mlx_lm.generate import GenerationResponse as MlxLmResponse
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvpred_mlx.errors import one_line
from kvpred_mlx.generation.checks import check_options
from kvpred_mlx.generation.chunks import announce_prompt, process_prompt
from kvpred_mlx.generation.draft import AuxiliaryDraft
from kvpred_mlx.generation.repair import BUDGET, RepairingModel, RepairStatus
from kvpred_mlx.generation.timing import FirstToken, Rates
from kvpred_mlx.pair.model import KVPredictionModel


@dataclass
class GenerationResponse(MlxLmResponse):
    """mlx-lm's response, and how long the first token took.

    Args:
        ttft (float): seconds from the call until the first token's value was on the host.
        prefill_time (float): the part of `ttft` in which the prompt cache was filled (auxiliary and
            projection, or the base alone); the rest is the base's step on the last prompt token.
        repair (RepairStatus | None): how far the repair of the prompt cache is, if there is one.
        repair_tps (float): tokens per second while it was repaired, the first token left out.
        repaired_tps (float): tokens per second since it is exact; 0 before.
        drafted (int): tokens that the pair's auxiliary drafted so far.
        accepted (int): drafted tokens that the base accepted so far.
    """

    ttft: float = 0.0
    prefill_time: float = 0.0
    repair: RepairStatus | None = None
    repair_tps: float = 0.0
    repaired_tps: float = 0.0
    drafted: int = 0
    accepted: int = 0


ENDLESS = sys.maxsize  # tokens: mlx-lm's speculative decoding takes no -1


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    *,
    repair: bool = False,
    repair_budget: float = BUDGET,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """mlx-lm's `stream_generate`: the same arguments, the same tokens, responses with `ttft`.

    It knows the whole prompt, so unlike mlx-lm's it predicts a pair's prompt whatever the
    `prefill_step_size` is, and honours `max_kv_size`, which mlx-lm ignores for models that make their cache.

    Args:
        draft_model: a pair's own auxiliary drafts from the cache with which it predicted the prompt, so it
            processes no prompt of its own.
        max_tokens: of the answer; -1: until it ends.
        repair: recompute the prompt exactly behind the first token (see `RepairingModel`).
        repair_budget: the share of decoding's time that the repair may take (see `RepairingModel`).

    Raises:
        ValueError: the prompt is empty, has token ids outside the vocabulary, or cannot be repaired; an option is
            out of range (see `check_options`); or a pair's auxiliary cannot draft with these options (see
            `AuxiliaryDraft.attach`).
    """
    clock = FirstToken(kwargs.pop("prompt_progress_callback", None))
    check_options(model, max_tokens, kwargs)
    prompt = _token_ids(model, tokenizer, prompt)
    draft = _draft_of(model, draft_model)
    own = isinstance(draft, AuxiliaryDraft)
    if isinstance(model, KVPredictionModel) and (draft is None or own):
        announce_prompt(model, prompt.size, kwargs)
    if repair:
        if draft is not None or not isinstance(model, KVPredictionModel):
            raise ValueError("only a pair without a draft model has a predicted cache to repair")
        model = RepairingModel(model, repair_budget, kwargs.get("max_kv_size"), prompt.size)
    rates = Rates(model.status if isinstance(model, RepairingModel) else None)
    accepted = 0
    for response in _responses(model, tokenizer, prompt, max_tokens, draft, clock, kwargs):
        clock.first_response()
        accepted += response.from_draft
        fields = {f.name: getattr(response, f.name) for f in dataclasses.fields(response)}
        counts: Any = {"drafted": draft.drafted, "accepted": accepted} if own else {}
        counts |= rates(response.generation_tokens)
        yield GenerationResponse(**fields, ttft=clock.ttft, prefill_time=clock.prefill_time, **counts)


def _draft_of(model: nn.Module, draft: Any) -> Any:
    """The draft model; a pair's own auxiliary gets a view of the pair's cache."""
    if not isinstance(model, KVPredictionModel):
        return draft
    own = isinstance(draft, AuxiliaryDraft) or (draft is not None and draft is model.auxiliary)
    return AuxiliaryDraft(model) if own else draft


def _responses(
    model: nn.Module,
    tokenizer: Any,
    prompt: mx.array,
    max_tokens: int,
    draft: Any,
    clock: FirstToken,
    options: dict[str, Any],
) -> Generator[MlxLmResponse, None, None]:
    """mlx-lm's responses; `clock` is told of the prompt's progress where mlx-lm tells it."""
    if draft is not None and max_tokens < 0:
        max_tokens = ENDLESS
    if isinstance(draft, AuxiliaryDraft):
        return _drafted(model, tokenizer, prompt, max_tokens, draft, clock, **options)
    if draft is None:
        options = options | {"prompt_progress_callback": clock}
    return mlx_lm_stream_generate(model, tokenizer, prompt, max_tokens, draft, **options)


def _drafted(
    model: nn.Module,
    tokenizer: Any,
    prompt: mx.array,
    max_tokens: int,
    draft: Any,
    clock: FirstToken,
    **options: Any,
) -> Generator[MlxLmResponse, None, None]:
    """mlx-lm's speculative decoding with an `AuxiliaryDraft`, from the prompt's last token on, after its prefill.

    mlx-lm would let the draft process the prompt first.
    """
    defaults: dict[str, Any] = {
        "stream": generation_stream,
        "quantized_kv_start": DEFAULT_QUANTIZED_KV_START,
        "kv_group_size": 64,
        "num_draft_tokens": 2,
    }
    options = defaults | options
    cache, drafts = options["prompt_cache"], options["num_draft_tokens"]
    end = None if max_tokens == ENDLESS else cache[-1].size() + prompt.size + max_tokens + drafts
    attached = draft.attach(cache, drafts, end)
    process_prompt(model, prompt[:-1], cache, clock, **options)
    options["prompt_cache"] = [*cache, attached[-1]]  # the prefill may have quantized some
    for response in mlx_lm_stream_generate(model, tokenizer, prompt[-1:], max_tokens, draft, **options):
        clock.first_response(prompt.size)
        yield dataclasses.replace(response, prompt_tokens=prompt.size, prompt_tps=prompt.size / clock.ttft)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | list[int],
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """mlx-lm's `generate`: the whole text at once; `verbose` prints it as it comes, and a footer."""
    text, response = "", None
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response is not None:
        print(f"\n{'=' * 10}\n{footer(response)}")
    return text


def footer(response: GenerationResponse) -> str:
    """mlx-lm's closing lines, and the TTFT with its parts."""
    step = response.ttft - response.prefill_time
    share = response.accepted / max(1, response.drafted)
    draft = f"\nDraft: {response.accepted} of {response.drafted} drafted tokens accepted ({share:.0%})"
    lines = (
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB\n"
        f"TTFT: {response.ttft:.3f} s (prompt cache {response.prefill_time:.3f} s, base step {step:.3f} s)"
        f"{draft if response.drafted else ''}"
    )
    if response.repair is None:
        return lines
    if response.repair.exact_from == 0:
        return f"{lines}\nRepair: nothing to do, all of the cache was exact"
    if response.repair.given_up:
        return f"{lines}\nRepair: given up, it does not catch up with the answer within its budget"
    if response.repair.exact_from is None:
        return f"{lines}\nRepair: not finished, {response.repair_tps:.3f} tokens-per-sec meanwhile"
    return (
        f"{lines}\nRepair: exact from generated token {response.repair.exact_from + 1} on, "
        f"{response.repair_tps:.3f} tokens-per-sec before, {response.repaired_tps:.3f} after"
    )


def encode(tokenizer: Any, text: str) -> list[int]:
    """A raw prompt's tokens; as in mlx-lm's `stream_generate`, one that begins with a BOS gets no second.

    Raises:
        ValueError: it has half of a surrogate pair, which no tokenizer takes.
    """
    wrapped = tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt's character {error.start} is half of a surrogate pair, expected text"
        ) from error
    ids: list[int] = wrapped.encode(text)
    return ids[1:] if ids[:2] == [wrapped.bos_token_id] * 2 else ids


def _token_ids(model: nn.Module, tokenizer: Any, prompt: str | mx.array | list[int]) -> mx.array:
    if isinstance(prompt, mx.array) and (prompt.ndim != 1 or not mx.issubdtype(prompt.dtype, mx.integer)):
        raise ValueError(f"the prompt is an array {prompt.shape} of {prompt.dtype}, expected token ids [n]")
    try:
        ids = encode(tokenizer, prompt) if isinstance(prompt, str) else [*map(index, _listed(prompt))]
    except TypeError as error:
        raise ValueError(f"the prompt is not text nor token ids: {one_line(error)}") from error
    if not ids:
        raise ValueError("the prompt is empty, expected at least one token")
    size = getattr(model, "vocab_size", None)
    if size is not None and (min(ids) < 0 or max(ids) >= size):
        raise ValueError(f"the prompt has token ids {min(ids)} to {max(ids)}, expected 0 to {size - 1}")
    return mx.array(ids, mx.int32)


def _listed(prompt: mx.array | list[int]) -> Any:
    return prompt.tolist() if isinstance(prompt, mx.array) else prompt
