"""What repair behind the first token gives: `python -m kvpred_mlx.bench.studies.repair --data TEXT`.

Greedy answers to prompts of real text, with and without repair.  Agreement at a position: the token that was
generated there is what the exact base gives after the same prompt and the same tokens before.  Decode speed:
while the cache is repaired, after that, and without repair.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import mlx.core as mx
import typer
from mlx_lm.generate import generate_step
from mlx_lm.utils import dequantize_model

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.common.statistics import paired_ratio
from kvpred_mlx.console import progress_bar, read_text
from kvpred_mlx.generation.chunks import announce_prompt
from kvpred_mlx.generation.repair import BUDGET, RepairingModel
from kvpred_mlx.pair.model import KVPredictionModel


@dataclass(frozen=True)
class Answer:
    """One generation.

    Args:
        agrees: for each token whether the exact base would have given it.
        exact_from: the first token of an exact cache (None: there is none).
        times: when each token was out.
    """

    agrees: list[bool]
    exact_from: int | None
    times: list[float]

    def speed(self, start: int, end: int) -> float | None:
        """Tokens per second from token `start` to token `end`; None if there are too few."""
        times = self.times[start : end + 1]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 2 else None


def answer(pair: KVPredictionModel, prompt: list[int], tokens: int, budget: float | None) -> Answer:
    """Generate `tokens` tokens, repaired with a budget or (None) not at all."""
    model = pair if budget is None else RepairingModel(pair, budget)
    options: dict[str, Any] = {}
    announce_prompt(pair, len(prompt), options)
    found, times = [], []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=tokens, **options):
        found.append(token)
        times.append(time.perf_counter())
    logits = pair.base(mx.array([[*prompt, *found[:-1]]]))[0, len(prompt) - 1 :]
    exact: Any = mx.argmax(logits, axis=-1).tolist()
    since = None if budget is None else model.status.exact_from
    return Answer([a == b for a, b in zip(found, exact, strict=True)], since, times)


def report(plain: Sequence[Answer], repaired: Sequence[Answer], width: int) -> list[str]:
    """Agreement in steps of `width` tokens, and speeds; lines of text."""
    tokens = len(plain[0].agrees)
    lines = ["tokens      not repaired  repaired  cache exact"]
    for start in range(0, tokens, width):
        part = slice(start, start + width)
        shares = [mean(mean(a.agrees[part]) for a in answers) for answers in (plain, repaired)]
        exact = mean(a.exact_from is not None and a.exact_from <= start for a in repaired)
        place = f"{start + 1:4} to {min(start + width, tokens):4}"
        lines.append(f"{place}  {shares[0]:11.3f}  {shares[1]:8.3f}  {exact:10.0%}")
    ends = [tokens if a.exact_from is None else a.exact_from for a in repaired]
    speeds = {
        "not repaired": [a.speed(0, end) for a, end in zip(plain, ends, strict=True)],
        "during repair": [a.speed(0, end) for a, end in zip(repaired, ends, strict=True)],
        "after repair": [a.speed(end, tokens) for a, end in zip(repaired, ends, strict=True)],
    }
    for name, found in speeds.items():
        known = [s for s in found if s is not None]
        lines.append(f"{name}: {median(known):.1f} tokens-per-sec" if known else f"{name}: too few tokens")
    before, during = speeds["not repaired"], speeds["during repair"]
    both = [(a, b) for a, b in zip(during, before, strict=True) if a is not None and b is not None]
    if both:
        share = paired_ratio([a for a, _ in both], [b for _, b in both])
        lines.append(f"speed during repair / not repaired, prompt by prompt: {share}")
    return lines


def main(
    data: Annotated[Path, typer.Option(help="Held-out text; it is cut into prompts.")],
    model: command.Model = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-lens", min=2, help="Tokens of a prompt.")] = 448,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=3, help="Tokens to generate.")] = 64,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, at most.")] = 20,
    budget: Annotated[float, typer.Option(help="Share of decoding's time that repair may take.")] = BUDGET,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="The same weights unquantized.")] = False,
) -> None:
    """Compare greedy answers with and without repair."""
    text = read_text("--data", data)
    pair, tokenizer = command.open_pair(model)
    if dequantize:
        dequantize_model(pair)
    ids = tokenizer.encode(text, add_special_tokens=False)
    count = min(prompts, len(ids) // prompt_tokens)
    if not count:
        raise typer.BadParameter(
            f"{data} has {len(ids)} tokens, expected at least {prompt_tokens}", param_hint="--data"
        )
    given = [ids[i * prompt_tokens : (i + 1) * prompt_tokens] for i in range(count)]
    answer(pair, given[0], 3, budget)  # what is only made once
    plain, repaired = [], []
    with progress_bar("answering") as progress:
        for i, prompt in enumerate(given):
            progress(i, count, f"prompt {i + 1} of {count}")
            plain.append(answer(pair, prompt, max_tokens, None))
            repaired.append(answer(pair, prompt, max_tokens, budget))
    print(f"{count} prompts of {prompt_tokens} tokens, budget {budget:g}")
    print("\n".join(report(plain, repaired, width=max(1, max_tokens // 8))))


if __name__ == "__main__":
    command.run(main)
