"""mlx-lm's generation thread with pairs, each in several modes, never mixed in a batch or a prompt cache."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from typing import Any

from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.server import GenerationArguments, ModelDescription, ModelProvider, ResponseGenerator

from kvpred_mlx.generation.draft import AUXILIARY, AuxiliaryDraft
from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.modes import Mode
from kvpred_mlx.serving.checks import check_prompt
from kvpred_mlx.serving.random_state import mend_random_state
from kvpred_mlx.serving.served import ServedPair
from kvpred_mlx.serving.settings import ServerSettings
from kvpred_mlx.serving.stops import stopped

logger = logging.getLogger(__name__)
TOO_MANY_FAILURES = 3
PATIENCE_SECONDS = 60.0


class PairProvider(ModelProvider):
    """Provides pairs, in the mode that a request asks for.

    mlx-lm's server asks for models by name, empties its batch before it changes the model, and keeps prompt
    caches by model.  Here the name is a pair's and a mode's: so modes share neither batches nor caches.

    Args:
        served: the pairs; the first answers requests that name none.
    """

    model: Any
    model_key: Any
    draft_model: Any

    def __init__(self, served: Sequence[ServedPair], settings: ServerSettings):
        super().__init__(settings)
        self.served = {pair.name: pair for pair in served}
        self.default = served[0]
        self.tokenizer = self.default.tokenizer

    def load_default(self) -> None:
        self.load(self.default.model_name(self.default.default_mode), None, self.cli_args.draft)

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[KVPredictionModel, Any]:
        name, _, mode = model_path.rpartition("\n")
        pair, self.tokenizer = self.served[name].pair, self.served[name].tokenizer
        Mode.parse(mode).apply(pair)
        self.model, self.model_key = pair, (model_path, adapter_path, draft_model_path)
        self.draft_model = AuxiliaryDraft(pair) if draft_model_path == AUXILIARY else None
        mergeable = all(hasattr(c, "merge") for c in make_prompt_cache(pair))
        self.is_batchable = mergeable and self.draft_model is None
        return pair, self.tokenizer

    def reset(self) -> None:
        """The generation thread has ended; the pairs are the caller's."""


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
    """mlx-lm's generation thread, for requests that carry a pair and a mode and get a `ttft` (see handler.py)."""

    model_provider: PairProvider
    requests: _Requests

    def __init__(self, provider: PairProvider, prompt_cache: PairPromptCache):
        self._failures, self._failed_at = 0, 0.0  # one after the other; before the thread that counts them
        super().__init__(provider, prompt_cache)
        self.requests = _Requests()

    @property
    def is_healthy(self) -> bool:
        """Whether requests can expect an answer: what fails again and again is no longer the requests' fault.

        After a while without any it is worth another try, or nobody who asks here first would ever send one.
        """
        failing = (
            self._failures >= TOO_MANY_FAILURES and time.monotonic() - self._failed_at < PATIENCE_SECONDS
        )
        return super().is_healthy and not failing

    def generate(
        self,
        request: Any,
        generation_args: GenerationArguments,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[Any, Iterator[Any]]:
        # Models are pairs in modes here, and a draft of another mode is another model.
        generation_args.model = ModelDescription(request.served.model_name(request.mode), request.draft, "")
        stops, generation_args.stop_words = generation_args.stop_words, []

        def progress(done: int, total: int) -> None:
            request.check_client()
            if progress_callback is not None:
                progress_callback(done, total)

        ctx, responses = super().generate(request, generation_args, progress)
        return ctx, stopped(self._timed(request, responses), stops)

    def _tokenize(self, tokenizer: Any, request: Any, args: GenerationArguments) -> Any:
        bos = tokenizer.bos_token
        # A tokenizer that adds one whatever is there must not find one there.
        if bos and request.prompt.startswith(bos) and tokenizer.encode(bos) == [tokenizer.bos_token_id] * 2:
            request.prompt = request.prompt.removeprefix(bos)
        prompt, *rest = super()._tokenize(tokenizer, request, args)
        context = request.served.context
        check_prompt(prompt, context, request.served.pair.vocab_size)
        if context is not None:
            args.max_tokens = min(args.max_tokens, context - len(prompt))
        return prompt, *rest

    def _run_generate(self) -> None:
        """Generate until the end; a failure ends the requests under way, and not the server."""
        while not self._stop:
            try:
                self._generate()
            except Exception as error:
                self._failures, self._failed_at = self._failures + 1, time.monotonic()
                logger.exception("generation failed")
                self.requests.fail(error)
                mend_random_state()

    def _timed(self, request: Any, responses: Iterator[Any]) -> Iterator[Any]:
        for response in responses:
            request.check_client()
            self._failures = 0
            if request.ttft is None:
                request.ttft = time.perf_counter() - request.started
            yield response

    def _serve_single(self, request: Any, stream: Any) -> None:
        super()._serve_single(request, stream)
        mend_random_state()  # it sends a failure to the client, and leaves the state to whom comes next


class _Requests(Queue[tuple[Any, ...]]):
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
