"""Requests about code, and a base's own answers to them: conversations to fit and to train on."""

from __future__ import annotations

import ast
import json
import random
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from mlx_lm import batch_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvpred_mlx.files import write_file
from kvpred_mlx.making.pairing import LoadedModel
from kvpred_mlx.progress import ProgressCallback, no_progress

QUESTIONS = (
    "Complete this function:\n\n```python\n{head}\n```",
    "What does this function do?\n\n```python\n{source}\n```",
    "Write a docstring for this function:\n\n```python\n{bare}\n```",
    "Write tests with pytest for this function:\n\n```python\n{source}\n```",
    "Make this function easier to read, and say what you changed:\n\n```python\n{bare}\n```",
)
LINES = range(6, 60)  # of a function that is asked about
BEFORE = 400  # lines that are kept of what precedes a body
ANSWER_TOKENS = 256
BATCH = 16  # requests that are answered side by side


def write_conversations(
    base: LoadedModel, asked: Sequence[str], out: Path, progress: ProgressCallback = no_progress
) -> None:
    """Write a conversation for each request, `{"messages": [...]}` a line, but for those that are there already.

    Args:
        base: answers, greedily, in at most `ANSWER_TOKENS` tokens.
        asked: see `requests`.

    Raises:
        ValueError: the base's tokenizer has no chat template.
    """
    check_can_chat(base)
    lines, tokenizer = _whole_lines(out), cast(TokenizerWrapper, base.tokenizer)
    while len(lines) < len(asked):
        progress(len(lines), len(asked), "answers")
        messages = [[{"role": "user", "content": text}] for text in asked[len(lines) :][:BATCH]]
        prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True) for m in messages]
        answers = batch_generate(base.model, tokenizer, prompts, max_tokens=ANSWER_TOKENS).texts
        for message, answer in zip(messages, answers, strict=True):
            lines.append(json.dumps({"messages": [*message, {"role": "assistant", "content": answer}]}))
        write_file(out, lambda beside: beside.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    progress(len(asked), len(asked), "answers")


def check_can_chat(base: LoadedModel) -> None:
    """Raise ValueError if a model's tokenizer has no chat template."""
    if base.tokenizer is None or not base.tokenizer.has_chat_template:
        raise ValueError(f"{base.name}: no chat template, so it cannot be asked for conversations")


def requests(texts: Iterable[str], count: int, seed: int = 0) -> list[str]:
    """At most `count` requests about functions, each about another one, in a random order that `seed`
    decides; fewer are the first of more.

    Raises:
        ValueError: no text has a function with a docstring.
    """
    found, draw = documented_functions(texts), random.Random(seed)
    draw.shuffle(found)
    return [draw.choice(QUESTIONS).format(**parts) for parts in found[:count]]


def documented_functions(texts: Iterable[str]) -> list[dict[str, str]]:
    """The functions with docstrings: `source`, `head` as far as the docstring, `bare` without it, and `before`, the
    lines of the text as far as the docstring's last.

    Raises:
        ValueError: no text has one.
    """
    found = [function for text in texts for function in _functions(text)]
    if not found:
        raise ValueError(
            f"no Python function of {LINES[0]} to {LINES[-1]} lines with a docstring in the data"
        )
    return found


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file as far as they are JSON; none if it is not there."""
    whole = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            json.loads(line)
        except ValueError:  # the disk was full, or somebody cut it
            break
        whole.append(line)
    return whole


def _functions(text: str) -> Iterator[dict[str, str]]:
    """Those of a text, if it is Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            docstring = node.body[0]
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            begin, end = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
            if last - first in LINES:
                yield {
                    "source": _code(lines[first:last]),
                    "head": _code(lines[first:end]),
                    "bare": _code([*lines[first:begin], *lines[end:last]]),
                    "before": "\n".join(lines[max(0, end - BEFORE) : end]) + "\n",
                }


def _code(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines))
