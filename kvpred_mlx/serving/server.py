"""mlx-lm's server with a pair: one model in several modes, which are never mixed in a batch or a prompt cache."""

from __future__ import annotations

import logging
import time
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from queue import Queue
from typing import Any

import mlx_lm.server
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.server import ModelDescription, ModelProvider, ResponseGenerator
from mlx_lm.utils import maybe_set_recommended_wired_limit

from kvpred_mlx.generation.draft import NAME as AUXILIARY
from kvpred_mlx.generation.draft import AuxiliaryDraft
from kvpred_mlx.generation.stream import stream_generate
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.modes import Mode

logger = logging.getLogger(__name__)

BACKLOG = 128  # connections that wait to be accepted; socketserver's 5 loses some of eight clients' at once


@dataclass
class Settings(Namespace):
    """mlx-lm's server flags, with its names and defaults; mlx-lm's classes read them as their `cli_args`.

    Args:
        draft: "auxiliary" for speculative decoding with the pair's auxiliary (requests are then answered one by
            one), None for none; the default that a request's `draft_model` overrides.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    allowed_origins: list[str] = field(default_factory=lambda: ["*"])
    draft: str | None = None
    num_draft_tokens: int = 3
    chat_template: str = ""
    use_default_chat_template: bool = False
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 512
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    prefill_step_size: int = 2048
    prompt_cache_size: int = 10
    prompt_cache_bytes: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START
    # What mlx-lm's classes read too, and a pair has no use for.
    model: str | None = None
    adapter_path: str | None = None
    draft_model: str | None = None
    trust_remote_code: bool = False
    pipeline: bool = False


class RequestError(ValueError):
    """A request that is refused, in the terms of OpenAI's errors."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class PairProvider(ModelProvider):
    """Provides one pair, in the mode that a request asks for.

    mlx-lm's server asks for models by name, empties its batch before it changes the model, and keeps prompt
    caches by model.  Here the name is a mode's: so modes share neither batches nor caches.
    """

    model: Any
    model_key: Any
    draft_model: Any

    def __init__(self, pair: KVPredictionModel, tokenizer: Any, settings: Settings):
        super().__init__(settings)
        self.pair, self.default_mode = pair, Mode.of(pair)
        self.tokenizer = tokenizer

    def load_default(self) -> None:
        self.load(str(self.default_mode), None, self.cli_args.draft)

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[KVPredictionModel, Any]:
        Mode.parse(model_path).apply(self.pair)
        self.model, self.model_key = self.pair, (model_path, adapter_path, draft_model_path)
        self.draft_model = AuxiliaryDraft(self.pair) if draft_model_path == AUXILIARY else None
        mergeable = all(hasattr(c, "merge") for c in make_prompt_cache(self.pair))
        self.is_batchable = mergeable and self.draft_model is None
        return self.pair, self.tokenizer

    def reset(self) -> None:
        """The generation thread has ended; the pair is the caller's."""


class PairPromptCache(LRUPromptCache):
    """mlx-lm's prompt cache, kept by the tokens that are really in it."""

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest or cache is None:
            return cache, rest
        if not can_trim_prompt_cache(cache):
            return None, tokens
        trim_prompt_cache(cache, 1)  # all is known already: a prompt needs its last token all the same
        return cache, tokens[-1:]

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], **options: Any) -> None:
        # A speculative decoder's last token is not in the cache yet, though mlx-lm names it.
        entry = prompt_cache[-1]
        known = entry.logged() if isinstance(entry, AuxiliaryCache) else tokens
        if known:
            super().insert_cache(model, known, prompt_cache, **options)


class PairGenerator(ResponseGenerator):
    """mlx-lm's generation thread, for requests that carry a `mode` and get a `ttft` (see http_api.py).

    Args:
        name: what requests call the pair.
        context: tokens of prompt and answer together (None: no limit).
    """

    model_provider: PairProvider
    requests: _Requests

    def __init__(self, provider: PairProvider, prompt_cache: PairPromptCache, name: str, context: int | None):
        self.name, self.context = name, context
        super().__init__(provider, prompt_cache)
        self.requests = _Requests()

    def generate(
        self, request: Any, generation_args: Any, progress_callback: Callable[[int, int], None] | None = None
    ) -> tuple[Any, Iterator[Any]]:
        # Models are modes here, and a draft of another mode is another model.
        generation_args.model = ModelDescription(str(request.mode), request.draft, "")
        ctx, responses = super().generate(request, generation_args, progress_callback)
        return ctx, _timed(request, responses)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        prompt, *rest = super()._tokenize(tokenizer, request, args)
        check_prompt(prompt, self.context, self.model_provider.pair.vocab_size)
        if self.context is not None:
            args.max_tokens = min(args.max_tokens, self.context - len(prompt))
        return prompt, *rest

    def _run_generate(self) -> None:
        """Generate until the end; a failure ends the requests under way, and not the server."""
        while not self._stop:
            try:
                self._generate()
            except Exception as error:
                logger.exception("generation failed")
                self.requests.fail(error)


class _Requests(Queue):
    """Requests on their way to the generation thread; it remembers who waits for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: weakref.WeakSet[Queue[Any]] = weakref.WeakSet()

    def put(self, item: tuple[Any, ...], block: bool = True, timeout: float | None = None) -> None:
        self._waiting.add(item[0])
        super().put(item, block, timeout)

    def fail(self, error: Exception) -> None:
        for answers in list(self._waiting):
            answers.put(error)


def _timed(request: Any, responses: Iterator[Any]) -> Iterator[Any]:
    for response in responses:
        if request.ttft is None:
            request.ttft = time.perf_counter() - request.started
        yield response


def check_prompt(prompt: list[int], context: int | None, vocab_size: int) -> None:
    """Refuse what would end the generation thread or be answered with nonsense.

    Raises:
        RequestError: the prompt is empty, too long, or has tokens that the model does not know.
    """
    if not prompt:
        raise RequestError("the prompt is empty, expected at least one token", "prompt")
    if context is not None and len(prompt) >= context:
        message = f"the prompt has {len(prompt)} tokens, expected fewer than the model's context of {context}"
        raise RequestError(message, "prompt", "context_length_exceeded")
    if max(prompt) >= vocab_size:
        raise RequestError(
            f"the prompt has token id {max(prompt)}, expected ids below {vocab_size}", "prompt"
        )


class Server(ThreadingHTTPServer):
    """http.server's threads, with room for clients that connect at the same time."""

    request_queue_size = BACKLOG


def serve(
    pair: KVPredictionModel, tokenizer: Any, name: str, settings: Settings, context: int | None = None
) -> None:
    """Serve OpenAI's completions and chat completions until interrupted (see docs/serving.md).

    Args:
        name: what requests call the pair; `name`:base is the base alone.
        context: tokens of prompt and answer together (None: no limit).

    Raises:
        OSError: the address cannot be listened on.
    """
    from kvpred_mlx.serving.handler import PairHandler

    maybe_set_recommended_wired_limit()
    # Requests that cannot be batched: the pair's own announces the prompt and drafts with the auxiliary.
    mlx_lm.server.stream_generate = stream_generate  # type: ignore[assignment]
    if settings.use_default_chat_template and tokenizer.chat_template is None:
        tokenizer.chat_template = tokenizer.default_chat_template
    provider = PairProvider(pair, tokenizer, settings)
    generator = PairGenerator(provider, PairPromptCache(settings.prompt_cache_size), name, context)
    try:
        mlx_lm.server._run_http_server(settings.host, settings.port, generator, Server, PairHandler)
    finally:
        generator.stop_and_join()
