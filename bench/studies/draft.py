"""What the auxiliary gives as a draft: `python -m kvpred_mlx.bench.studies.draft --num-draft-tokens 1,3,5`.

Generates greedily from one prompt without a draft and with it, one after the other in every trial, and prints
the share of drafted tokens that the base accepted, decode speed (between the first token and the last), and
the median of the speed's ratio to that without a draft, trial by trial.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.common.statistics import paired_ratio
from kvpred_mlx.console import numbers, progress_bar, read_text
from kvpred_mlx.generation.stream import stream_generate
from kvpred_mlx.pair.locating import DEMO_PAIR
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.progress import ProgressCallback, no_progress


@dataclass(frozen=True)
class Run:
    """One generation: its tokens, tokens per second after the first, seconds until the first, drafts."""

    tokens: list[int]
    decode_tokens_per_second: float
    ttft: float
    drafted: int
    accepted: int


def main(
    model: command.Model = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Text to begin with. Without it, the bundled pair's prompt.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Tokens to generate.")] = 128,
    num_draft_tokens: Annotated[list[str] | None, typer.Option(help="Tokens to draft, 1,2,3,5.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Timed generations of each.")] = 5,
    as_json: command.AsJson = False,
) -> None:
    """Compare decoding with and without the auxiliary as draft."""
    counts = numbers("--num-draft-tokens", num_draft_tokens or ["1,2,3,5"], 1)
    text = read_text("--prompt-file", prompt_file or DEMO_PAIR / "prompt.txt")
    pair, tokenizer = command.open_pair(model)
    with progress_bar("generating") as progress:
        rows = measure(pair, tokenizer, tokenizer.encode(text), counts, max_tokens, trials, progress)
    print(json.dumps(rows) if as_json else _table(rows))


def measure(
    pair: KVPredictionModel,
    tokenizer: Any,
    prompt: list[int],
    counts: list[int],
    max_tokens: int,
    trials: int,
    progress: ProgressCallback = no_progress,
) -> list[dict[str, Any]]:
    """A row without draft (`num_draft_tokens` 0), and one for each of `counts`."""
    runs: dict[int, list[Run]] = {n: [] for n in (0, *counts)}
    for trial in range(trials + 1):
        for i, (n, done) in enumerate(runs.items()):
            progress(trial * len(runs) + i, (trials + 1) * len(runs), f"{n} draft tokens")
            run = generate(pair, tokenizer, prompt, n, max_tokens)
            done += [run] if trial else []  # the first round is not counted
    plain = [r.decode_tokens_per_second for r in runs[0]]
    rows = []
    for n, done in runs.items():
        speeds = [r.decode_tokens_per_second for r in done]
        last = done[-1]
        rows.append(
            {
                "num_draft_tokens": n,
                "generated": len(last.tokens),
                "same_text": last.tokens == runs[0][-1].tokens,
                "drafted": last.drafted,
                "accepted": last.accepted,
                "decode_tokens_per_second": median(speeds),
                "ttft": median(r.ttft for r in done),
                "times_faster": asdict(paired_ratio(speeds, plain)),
            }
        )
    return rows


def generate(
    pair: KVPredictionModel, tokenizer: Any, prompt: list[int], num_draft_tokens: int, max_tokens: int
) -> Run:
    """Generate greedily, with the auxiliary as draft if it is to draft any tokens."""
    options: dict[str, Any] = {}
    if num_draft_tokens:
        options = {"draft_model": pair.auxiliary, "num_draft_tokens": num_draft_tokens}
    tokens, times, last = [], [], None
    for last in stream_generate(pair, tokenizer, prompt, max_tokens, **options):
        tokens.append(last.token)
        times.append(time.perf_counter())
    assert last is not None
    speed = (len(tokens) - 1) / (times[-1] - times[0]) if len(tokens) > 1 else float("nan")
    return Run(tokens, speed, last.ttft, last.drafted, last.accepted)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["draft tokens  accepted        tok/s   TTFT s  times faster (95 %)   same text"]
    for row in rows:
        share = f"{row['accepted']} of {row['drafted']}" if row["drafted"] else ""
        ratio = row["times_faster"]
        lines.append(
            f"{row['num_draft_tokens']:>12}  {share:<12} {row['decode_tokens_per_second']:>8.1f}"
            f" {row['ttft']:>8.3f}  {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            f"   {'yes' if row['same_text'] else 'no'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
