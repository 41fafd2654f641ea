"""lm-eval's tasks on a pair, through mlx-lm's own lm-eval model class."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from mlx_lm.evaluate import MLXLM
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.bench.evaluate.settings import LM_EVAL_BATCH, EvaluationSettings
from kvpred_mlx.generation.chunks import announce_prompt, process_prompt
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.modes import Mode


class LoadedLM(MLXLM):
    """mlx-lm's model class for a model that is loaded already.

    A context is processed as a prompt is: its last token by itself, so that a pair's is exact, and what is
    scored after it by the base.  mlx-lm would send the context whole.

    Args:
        model: a pair, in the mode that it is in, or a model of its own.
        max_tokens: of an answer (None: the task's own).
        context: tokens of a context with what is scored after it; longer ones lose their beginning (None: no limit).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        batch_size: int,
        max_tokens: int | None,
        context: int | None = None,
    ):
        LM.__init__(self)
        self._model, self.tokenizer = model, tokenizer
        self._batch_size, self._max_tokens, self._sampler = batch_size, max_tokens, None
        self.use_chat_template = tokenizer.chat_template is not None
        self._context, self.cut = context, 0
        self.prompt_tokens: list[int] = []
        self.ttfts: list[float] = []

    def _process_prompt(self, prompt: Any, step_size: int = 2048) -> tuple[mx.array, list[Any]]:
        started, tokens = time.perf_counter(), mx.array(prompt)
        options: dict[str, Any] = {"prefill_step_size": step_size}
        if isinstance(self._model, KVPredictionModel):
            announce_prompt(self._model, tokens.size, options)
        cache = options.setdefault("prompt_cache", make_prompt_cache(self._model))
        process_prompt(self._model, tokens[:-1], cache, **options)
        logits = self._model(tokens[None, -1:], cache=cache)[:, -1]
        logprobs = nn.log_softmax(logits.astype(mx.float32))
        mx.eval(logprobs)
        self.ttfts.append(time.perf_counter() - started)
        self.prompt_tokens.append(tokens.size)
        return logprobs, cache

    def _score_fn(self, inputs: Any, cache: list[Any] | None = None, step_size: int = 2048) -> Any:
        if cache is None or not isinstance(self._model, KVPredictionModel):
            return super()._score_fn(inputs, cache, step_size)
        with Mode(exact=True).applied(self._model):
            return super()._score_fn(inputs, cache, step_size)

    def loglikelihood(self, requests: Any) -> list[Any]:
        """mlx-lm's, whose `max_tokens` is the context's length here, and an answer's elsewhere."""
        answer, self._max_tokens = self._max_tokens, self._context or sys.maxsize
        if self._context is not None:
            lengths = {r.args[0]: len(self.tokenizer.encode("".join(r.args))) for r in requests}
            self.cut += sum(length > self._context for length in lengths.values())
        try:
            return super().loglikelihood(requests)
        finally:
            self._max_tokens = answer

    def generate_until(self, requests: Any) -> list[str]:
        special = not self.use_chat_template
        self.prompt_tokens += [
            len(self.tokenizer.encode(r.args[0], add_special_tokens=special)) for r in requests
        ]
        return super().generate_until(requests)


def known_tasks(names: list[str], include_path: Any = None) -> list[str]:
    """Those of `names` that lm-eval knows."""
    manager = _manager(include_path)
    return [name for name in names if name in manager.all_tasks]


def evaluate(
    model: nn.Module, tokenizer: Any, task: str, settings: EvaluationSettings, context: int | None = None
) -> dict[str, Any]:
    """Run one of lm-eval's tasks: `scores`, standard `errors` and `higher_is_better` by metric, and what
    prompts there were.

    Args:
        context: of the model, in tokens (None: no limit); a line on standard error says how many prompts are longer.

    Raises:
        OSError: its data cannot be had.
    """
    batch_size = settings.batch_size or LM_EVAL_BATCH
    lm = LoadedLM(model, tokenizer, batch_size, settings.max_tokens, context)
    with contextlib.redirect_stdout(sys.stderr):
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=_manager(settings.include_path),
            limit=settings.limit,
            apply_chat_template=lm.use_chat_template,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    if lm.cut:
        print(
            f"{task}: {lm.cut} contexts are longer than the model's {context} tokens and lost their beginning",
            file=sys.stderr,
        )
    numbers = {k: v for k, v in found["results"][task].items() if isinstance(v, int | float) and "," in k}
    errors = {
        k.replace("_stderr,", ",").removesuffix(",none"): v for k, v in numbers.items() if "_stderr," in k
    }
    scores = {k.removesuffix(",none"): float(v) for k, v in numbers.items() if "_stderr," not in k}
    better = {k: v for k, v in found.get("higher_is_better", {}).get(task, {}).items() if v is not None}
    items = found.get("n-samples", {}).get(task, {}).get("effective", len(lm.prompt_tokens))
    return {
        "items": items,
        "scores": scores,
        "errors": errors,
        "higher_is_better": {name: better.get(name.partition(",")[0], True) for name in scores},
        "prompt_tokens": lm.prompt_tokens,
        "ttfts": lm.ttfts,
    }


@cache
def _manager(include_path: Any) -> TaskManager:
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    return TaskManager(include_path=None if include_path is None else str(include_path))
