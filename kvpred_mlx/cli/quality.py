"""`kvpred-mlx quality`: what prediction costs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from kvpred_mlx.cli.dial import ExactFirst, ExactLast, ExactTop, dial, set_dial
from kvpred_mlx.cli.making import AllDocuments, Dequantize, TextKey
from kvpred_mlx.cli.progress import progress_bar


def quality(
    pair: Annotated[
        str | None, typer.Argument(help="A directory or a Hugging Face repo; the demo pair without it.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text, JSONL, or a directory of such files.")] = None,
    prompt_tokens: Annotated[
        list[str] | None, typer.Option(help="Prompt lengths, 192,448; may be repeated.")
    ] = None,
    score_tokens: Annotated[int, typer.Option(min=1, help="Tokens scored after each prompt.")] = 64,
    windows: Annotated[int, typer.Option(min=1, help="Prompts, at most.")] = 160,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    all_documents: AllDocuments = False,
    text_key: TextKey = "text",
    exact_first: ExactFirst = None,
    exact_last: ExactLast = None,
    exact_top: ExactTop = None,
    dequantize: Dequantize = False,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Continue real text from exact and predicted prompt caches, and compare."""
    from kvpred_mlx.cli import making
    from kvpred_mlx.cli.bench import numbers
    from kvpred_mlx.making.data import encode
    from kvpred_mlx.making.quality import cut_windows, measure
    from kvpred_mlx.pair.loading import DEMO_PAIR, find_pair, load

    lengths = numbers("--prompt-tokens", prompt_tokens or ["192"], 2)
    if data is None:
        raise typer.BadParameter("missing, expected text, JSONL or a directory", param_hint="--data")
    dial(
        exact_first, exact_last, exact_top, None
    )  # what is wrong with them is said before anything is loaded
    path = find_pair(pair or DEMO_PAIR)
    model, tokenizer = load(path)
    set_dial(model, dial(exact_first, exact_last, exact_top, model.exact_positions))
    if tokenizer is None:
        raise ValueError(f"{path}: the pair has no tokenizer, so text cannot be read")
    if dequantize:
        making.dequantize(model)
    ids = encode(tokenizer, making.read_held_out(data, text_key, all_documents))
    figures = []
    for n in lengths:
        cut = cut_windows(ids, n, score_tokens, tokenizer, windows)
        with progress_bar(f"quality at {n} tokens") as progress:
            figures.append(measure(model, cut, batch_size=batch_size, seed=seed, progress=progress))
    if as_json:
        print(json.dumps([dataclasses.asdict(q) for q in figures]))
    else:
        making.show_figures(figures)
