"""`kvpred-mlx quality`: what prediction costs."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.dial import Depth, ExactFirst, ExactLast, ExactTop, dial
from kvpred_mlx.cli.opening import OtherModels, one_pair, open_pair
from kvpred_mlx.cli.output import show_figures
from kvpred_mlx.console import numbers, progress_bar


def quality(
    pair: o.PairArgument = None,
    model: o.ModelOption = None,
    base: o.OtherBase = None,
    auxiliary: o.OtherAuxiliary = None,
    force: o.Force = False,
    data: o.OptionalData = None,
    prompt_lens: o.PromptLens = None,
    prompt_tokens: Annotated[  # what --prompt-lens was called
        list[str] | None, typer.Option("--prompt-tokens", hidden=True)
    ] = None,
    score_tokens: o.ScoreTokens = 64,
    windows: o.Windows = 160,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts at a time. Default: 4,096 tokens of them, at most 8.")
    ] = None,
    all_documents: o.AllDocuments = False,
    text_key: o.TextKey = "text",
    exact_first: ExactFirst = None,
    exact_last: ExactLast = None,
    exact_top: ExactTop = None,
    depth: Depth = None,
    dequantize: o.Dequantize = False,
    seed: Annotated[int, typer.Option(min=0, max=o.LARGEST_SEED, help="Of the bootstrap.")] = 0,
    as_json: o.AsJson = False,
) -> None:
    """Continue real text from exact and predicted prompt caches, and compare."""
    from kvpred_mlx.cli import making
    from kvpred_mlx.making.data import encode
    from kvpred_mlx.making.quality import measure
    from kvpred_mlx.making.windows import cut_windows
    from kvpred_mlx.pair.modes import Mode

    model, given_dial = one_pair(model, pair), dial(exact_first, exact_last, exact_top, depth)
    lengths = numbers("--prompt-lens", prompt_lens or [], 2) + numbers(
        "--prompt-tokens", prompt_tokens or [], 2
    )
    if data is None:
        raise typer.BadParameter("missing, expected text, JSONL or a directory", param_hint="--data")
    opened = open_pair(model, OtherModels(base, auxiliary, force), dial=given_dial)
    tokenizer = opened.tokenizer
    if dequantize:
        making.dequantize(opened.pair)
    ids = encode(tokenizer, making.read_held_out(data, text_key, all_documents))
    figures = []
    for n in lengths or [192]:
        cut = cut_windows(ids, n, score_tokens, tokenizer, windows)
        with progress_bar(f"quality at {n} tokens") as progress:
            figures.append(measure(opened.pair, cut, batch_size=batch_size, seed=seed, progress=progress))
    if as_json:
        print(json.dumps([dataclasses.asdict(q) for q in figures]))
    else:
        show_figures(figures, str(Mode.of(opened.pair)))
