"""The whole recipe of the bundled pair: `make demo-pair MINUTES=60`.

Corpus, tokenizer, base and auxiliary (each in three lessons: text, looking back, recall), fit, joint
training, quantization, figures and model card.  Every step leaves a file or a folder and is passed over if
that is there, training resumes from its last state, and the minutes are shared out among the trainings: the
same recipe on CPU, Metal or CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.recipe.plan import CONFIGS, SHARES, STAGES
from kvpred_mlx.bench.recipe.steps import Recipe, alone


def main(
    folder: Annotated[Path, typer.Option(help="Of all that is made; the pair is in its pair/.")] = Path(
        "demo-pair"
    ),
    minutes: Annotated[float, typer.Option(min=0, help="Of training, altogether.")] = 60,
    iters: Annotated[str | None, typer.Option(help=f"Steps instead, of {', '.join(SHARES)}.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    layout: Annotated[
        str, typer.Option(help="attention, lfm2 (short convolutions), or qwen3.5 (delta nets).")
    ] = "attention",
) -> None:
    """Make the bundled pair, corpus to model card; run again, it goes on where it stopped."""
    if layout not in CONFIGS:
        raise typer.BadParameter(f"{layout!r}, expected {', '.join(CONFIGS)}", param_hint="--layout")
    recipe = Recipe(folder, minutes, _iters(iters), batch_size, layout)
    alone(recipe.corpus)
    recipe.pretrain("base")
    recipe.pretrain("auxiliary")
    alone(recipe.fit)
    alone(recipe.first_layers)
    begin = "fitted"
    for stage in STAGES:
        recipe.train(stage, begin)
        begin = stage.name
    alone(lambda: print(recipe.finish()))


def _iters(given: str | None) -> dict[str, int]:
    """A number of steps for each training."""
    if given is None:
        return {}
    words = [word.strip() for word in given.split(",")]
    if len(words) != len(SHARES) or not all(word.isascii() and word.isdigit() for word in words):
        raise typer.BadParameter(
            f"{given!r}, expected {len(SHARES)} numbers with commas between, for {', '.join(SHARES)}",
            param_hint="--iters",
        )
    return dict(zip(SHARES, map(int, words), strict=True))


if __name__ == "__main__":
    command.run(main)
