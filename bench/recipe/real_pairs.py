"""The recipe of the pairs of real models: `make real-pairs BASE=... DATA=... HELD_OUT=...`.

Closed form, training as the cache is used, quantization, figures and card, for a base's own first layers at several
depths, or (`--auxiliary`) for a second model that reads.  Every step leaves a folder and is passed over if that is
there; sums, recordings and trainings go on where they were stopped.  The pairs are linked: megabytes beside models that
the user has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpred_mlx.bench.common import command
from kvpred_mlx.bench.recipe.real_steps import RealPairs, is_encoded
from kvpred_mlx.bench.recipe.requests import check_can_chat, write_conversations
from kvpred_mlx.bench.recipe.requests import requests as requests_about
from kvpred_mlx.console import numbers, progress_bar
from kvpred_mlx.errors import changes
from kvpred_mlx.making.data import read_documents
from kvpred_mlx.making.pairing import check_same_tokenizer, load_part
from kvpred_mlx.making.recording import write_json
from kvpred_mlx.making.settings import FitSettings, TrainingSettings
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.quantization import WEIGHT_BITS

NOTED = "recipe.json"  # in the folder: what its results are made with


def main(
    base: Annotated[str, typer.Option(help="Any mlx-lm model.")],
    data: Annotated[Path, typer.Option(help="Text to fit and to train on.")],
    held_out: Annotated[Path, typer.Option(help="Other text, to measure on.")],
    folder: Annotated[Path, typer.Option(help="Of all that is made.")] = Path("real-pairs"),
    depths: Annotated[str, typer.Option(help="How many layers read, 10,14: a pair each.")] = "10,14",
    auxiliary: Annotated[str | None, typer.Option(help="A second model that reads, instead.")] = None,
    source: Annotated[str, typer.Option(help="What is read of it.")] = FitSettings.source,
    name: Annotated[str, typer.Option(help="Of the pairs; the depth is added.")] = "pair",
    links: Annotated[
        str,
        typer.Option(help="Repositories to link to instead of the models' directories: BASE[,AUXILIARY]."),
    ] = "",
    tokens: Annotated[int, typer.Option(min=1024, help="Of the closed form.")] = 200_000,
    windows: Annotated[
        int, typer.Option(min=0, help="To record and train on; 0: all there are, recorded nowhere.")
    ] = 400,
    prompt_lens: Annotated[
        str, typer.Option(help="Tokens of their prompts, 64,192,448: so many windows of each length.")
    ] = "448",
    requests: Annotated[
        int, typer.Option(min=0, help="Requests about the data's functions, answered by the base: more text.")
    ] = 0,
    bodies: Annotated[
        int, typer.Option(min=0, help="Functions of the data whose bodies the base writes: more windows.")
    ] = 0,
    joint_iters: Annotated[
        int, typer.Option(min=0, help="With --auxiliary: steps of the paper's training of both, before.")
    ] = 0,
    iters: Annotated[
        int, typer.Option(min=0, help="Training steps of each pair, as its cache is used.")
    ] = 400,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0)] = 3e-4,
    q_bits: Annotated[int, typer.Option(help="Of the predictors.")] = 4,
    measured: Annotated[
        tuple[int, int], typer.Option(help="Windows of the card's figures, of 448 tokens and of 1984.")
    ] = (24, 6),
    licence: Annotated[str | None, typer.Option(help="Of the pairs, for their cards.")] = None,
) -> None:
    """Make pairs of real models, text to card; run again, it goes on where it stopped."""
    if q_bits not in WEIGHT_BITS:
        raise typer.BadParameter(
            f"{q_bits}, expected one of {', '.join(map(str, WEIGHT_BITS))}", param_hint="--q-bits"
        )
    if joint_iters and auxiliary is None:
        raise typer.BadParameter("given without --auxiliary, expected none", param_hint="--joint-iters")
    if bodies and not iters:
        raise typer.BadParameter("given with --iters 0, expected none", param_hint="--bodies")
    given = {name: value for name, value in locals().items() if name != "folder"}
    chosen, lengths = numbers("--depths", [depths], 1), numbers("--prompt-lens", [prompt_lens], 2)
    check_same(folder, given)
    model, texts, asked = load_part(base), [data], list[str]()
    if requests and not is_encoded(folder):
        check_can_chat(model)
        asked = requests_about(read_documents(data), requests)
        if len(asked) < requests:
            print(f"only {len(asked)} functions with docstrings to ask about", file=sys.stderr)
    note(folder, {name: value for name, value in given.items() if name not in ("prompt_lens", "bodies")})
    if asked:
        texts.append(folder / "requests.jsonl")
        with progress_bar("asking") as progress:
            write_conversations(model, asked, texts[-1], progress)
    recipe = RealPairs(model, folder, _named(links, 0), texts)
    if iters:
        recipe.check_long_enough(max(lengths))
    held, written = recipe.held_out(held_out, measured), dict[int, int]()
    if bodies:
        written = recipe.write_bodies(lengths, bodies)
        for n, count in written.items():
            if count < bodies:
                print(f"only {count} functions whose bodies are written behind {n} tokens", file=sys.stderr)
    note(folder, given)
    pairs: dict[str, Callable[[], KVPredictionModel]]
    if auxiliary is None:
        recipe.fit(chosen, tokens)
        pairs = {f"{name}-{depth}": partial(recipe.at, depth) for depth in chosen}
    else:
        second = load_part(auxiliary)
        check_same_tokenizer(recipe.base, second)
        recipe.fit_two(second, source, tokens, _named(links, 1))
        pairs = {name: recipe.read_by_auxiliary}
    settings = TrainingSettings(
        max(1, iters), batch_size, learning_rate, warmup=min(20, iters // 5), weight_decay=0.0, save_every=50,
        steps_per_report=10,
    )  # fmt: skip
    for called, made in pairs.items():
        pair, done = made(), ""
        if joint_iters:
            joint = replace(settings, iters=joint_iters, warmup=min(100, joint_iters // 5), weight_decay=0.1)
            recipe.train_jointly(called, pair, joint)
            done = f"trained together with the auxiliary in {joint_iters} steps of {batch_size} rows, "
        if iters:
            recipe.train(called, pair, settings, windows, lengths, bodies)
            done += f"trained as the cache is used in {iters} steps of {batch_size} windows, "
            done += f"prompts of {prompt_lens} tokens, "
            if written:
                done += f"also {', '.join(map(str, written.values()))} whose answers the base wrote itself, "
        if requests:
            done += "with conversations of the base's own in the text, "
        recipe.finish(called, pair, q_bits, held, f"{done}quantized to {q_bits} bits", licence)


def check_same(folder: Path, given: dict[str, Any]) -> None:
    """Make sure that what a folder's results were made with, as far as it is noted, is the same now.

    Raises:
        ValueError: they were made with something else, which is named.
    """
    noted, now = _noted(folder), _as_noted(given)
    both = noted.keys() & now.keys()
    if differ := changes({name: noted[name] for name in both}, {name: now[name] for name in both}):
        raise ValueError(f"{folder} was begun with {'; '.join(differ)}: give the same, or another --folder")


def note(folder: Path, given: dict[str, Any]) -> None:
    """Note what a folder's results are made with."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NOTED, _noted(folder) | _as_noted(given))


def _noted(folder: Path) -> dict[str, Any]:
    place = folder / NOTED
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    return found


def _as_noted(given: dict[str, Any]) -> dict[str, str | None]:
    return {name: None if value is None else str(value) for name, value in given.items()}


def _named(links: str, place: int) -> str | None:
    """One of the repositories of `--links`, if it is there."""
    names = links.split(",") if links else []
    return names[place] if place < len(names) else None


if __name__ == "__main__":
    command.run(main)
