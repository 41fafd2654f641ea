"""What the auxiliary gives as a draft: `python -m kvpred_mlx.bench.studies.draft [PAIR] --num-draft-tokens 1,3,5`.

Generates greedily from one prompt without a draft and with it, one after the other in every trial, and prints the
share of drafted tokens that the base accepted, decode speed (between the first token and the last), and the median
of the speed's ratio to that without a draft, trial by trial.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kvpred_mlx.bench.common.statistics import paired_ratio
from kvpred_mlx.generation.stream import stream_generate
from kvpred_mlx.pair.loading import DEMO_PAIR, find_pair, load
from kvpred_mlx.pair.model import KVPredictionModel


@dataclass(frozen=True)
class Run:
    """One generation: its tokens, tokens per second after the first, seconds until the first, drafts."""

    tokens: list[int]
    decode_tokens_per_second: float
    ttft: float
    drafted: int
    accepted: int


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pair", nargs="?", default=DEMO_PAIR, help="Default: the bundled pair.")
    parser.add_argument("--prompt-file", type=Path, help="Default: the bundled prompt.")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--num-draft-tokens", default="1,2,3,5", help="One or more, with commas between.")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="One line of JSON instead of a table.")
    given = parser.parse_args()
    pair, tokenizer = load(find_pair(given.pair))
    if tokenizer is None:
        parser.error(f"{given.pair}: the pair has no tokenizer")
    prompt = tokenizer.encode((given.prompt_file or DEMO_PAIR / "prompt.txt").read_text(encoding="utf-8"))
    counts = [int(n) for n in given.num_draft_tokens.split(",")]
    rows = measure(pair, tokenizer, prompt, counts, given.max_tokens, given.trials)
    print(json.dumps(rows) if given.json else _table(rows))


def measure(
    pair: KVPredictionModel,
    tokenizer: Any,
    prompt: list[int],
    counts: list[int],
    max_tokens: int,
    trials: int,
) -> list[dict[str, Any]]:
    """A row without draft (`num_draft_tokens` 0), and one for each of `counts`."""
    runs: dict[int, list[Run]] = {n: [] for n in (0, *counts)}
    for trial in range(trials + 1):
        for n, done in runs.items():
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
            f"{row['num_draft_tokens']:>12}  {share:<12} {row['decode_tokens_per_second']:>8.1f} {row['ttft']:>8.3f}"
            f"  {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            f"   {'yes' if row['same_text'] else 'no'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
