"""What `fit` and `train` have in common: models, data, and figures on held-out documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvpred_mlx.cli.opening import open_pair
from kvpred_mlx.console import progress_bar

if TYPE_CHECKING:
    from kvpred_mlx.making.data import PackedSequences
    from kvpred_mlx.making.pairing import LoadedModel
    from kvpred_mlx.making.quality import Quality
    from kvpred_mlx.making.settings import FitSettings
    from kvpred_mlx.pair.model import KVPredictionModel


@dataclass(frozen=True)
class TwoModels:
    """The models that a pair is made of, as options name them: `auxiliary`, or `layers` of the base in its place."""

    base: str | None
    auxiliary: str | None
    layers: str | None

    def __bool__(self) -> bool:
        return any((self.base, self.auxiliary, self.layers))

    def load(self) -> tuple[LoadedModel, LoadedModel]:
        """Both of them, with the same tokenizer."""
        from kvpred_mlx.making.layer_maps import kept_layers
        from kvpred_mlx.making.pairing import check_same_tokenizer, keep_layers, load_part

        if self.base is None:
            raise typer.BadParameter(
                "missing, expected a directory or a Hugging Face repo", param_hint="--base"
            )
        if (self.auxiliary is None) == (self.layers is None):
            given = "neither" if self.auxiliary is None else "both"
            raise typer.BadParameter(
                f"{given} given, expected one of the two", param_hint="--auxiliary / --auxiliary-layers"
            )
        first = load_part(self.base)
        if self.layers is not None:
            try:
                kept = kept_layers(self.layers, len(first.model.layers))
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--auxiliary-layers") from error
            return first, keep_layers(first, kept)
        second = load_part(str(self.auxiliary))
        check_same_tokenizer(first, second)
        return first, second


@dataclass
class Begun:
    """A pair before it is saved.

    Args:
        pair: the model.
        tokenizer: what it reads with.
        names: of its base and its auxiliary, for the model card.
        made: what the card says of how it was made.
    """

    pair: KVPredictionModel
    tokenizer: Any
    names: tuple[str, str]
    made: list[str]


def check_source(source: str | None) -> str:
    """The predictor's source, the default one if none was given."""
    from kvpred_mlx.pair.sources import DEFAULT
    from kvpred_mlx.pair.sources import check_source as check

    try:
        check(source or DEFAULT)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--source") from error
    return source or DEFAULT


def fit_pair(
    models: TwoModels, documents: list[str], max_seq_length: int, data: Path, settings: FitSettings
) -> Begun:
    """Load two models and fit a predictor in closed form."""
    from kvpred_mlx.making.fit import fit
    from kvpred_mlx.making.layer_maps import parse
    from kvpred_mlx.making.pairing import join
    from kvpred_mlx.taps.kv_taps import KVTaps

    first, second = models.load()
    depths = len(KVTaps(first.model)), len(KVTaps(second.model))
    try:
        parse(settings.layer_map, *depths)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layer-map") from error
    packed = pack(first.tokenizer, documents, max_seq_length, data)
    with progress_bar("fitting") as progress:
        fitted = fit(first.model, second.model, packed, settings, progress)
    layer_map = ",".join(map(str, fitted.predictor.layer_map))
    made = (
        f"The predictor (source {settings.source}, layer map {layer_map}) was fitted in closed form on "
        f"{fitted.tokens:,} tokens."
    )
    pair = join(first, second, fitted.predictor)
    return Begun(pair, first.tokenizer, (first.name, second.name), [made])


def open_to_train(model: str) -> Begun:
    """A pair that was made before."""
    opened = open_pair(model)
    name = f"of {opened.short_name}"
    return Begun(
        opened.pair, opened.tokenizer, (name, name), [f"Training began from the pair {opened.short_name}."]
    )


def read_data(data: Path, text_key: str) -> tuple[list[str], list[str]]:
    """Training and held-out documents."""
    from kvpred_mlx.making.data import read_documents, split

    with progress_bar(f"reading {data}"):
        training, held_out = split(read_documents(data, text_key))
    if not training and not held_out:
        raise ValueError(f"{data}: empty, expected text")
    return training or held_out, held_out


def read_held_out(data: Path, text_key: str, all_documents: bool) -> list[str]:
    """The documents that `fit` and `train` hold out, or all."""
    training, held_out = read_data(data, text_key)
    chosen = held_out + (training if all_documents and training is not held_out else [])
    if not chosen:
        raise ValueError(f"{data}: no document is held out from training, --all-documents takes them all")
    return chosen


def dequantize(pair: KVPredictionModel) -> None:
    """Give a pair's weights in full precision."""
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model

    dequantize_model(pair)
    mx.eval(pair.parameters())


def pack(tokenizer: Any, documents: list[str], length: int, data: Path) -> PackedSequences:
    """Documents as packed sequences of `length` tokens."""
    from kvpred_mlx.making.data import PackedSequences, encode

    if tokenizer is None:
        raise ValueError("the base has no tokenizer, so text cannot be read")
    try:
        return PackedSequences.of(encode(tokenizer, documents), length, tokenizer.eos_token_id)
    except ValueError as error:
        raise ValueError(f"{data}: {error}") from error


def held_out_figures(
    begun: Begun, documents: list[str], max_seq_length: int, most: int = 80
) -> list[Quality]:
    """Quality on held-out documents, at the lengths of `prompt_lengths` that the documents are long enough for."""
    from kvpred_mlx.making.data import encode
    from kvpred_mlx.making.quality import SCORE_TOKENS, measure
    from kvpred_mlx.making.windows import cut_windows

    ids = encode(begun.tokenizer, documents)
    figures = []
    for n in prompt_lengths(max_seq_length):
        if max(map(len, ids), default=0) >= n + SCORE_TOKENS:
            windows = cut_windows(ids, n, SCORE_TOKENS, begun.tokenizer, most)
            with progress_bar(f"quality at {n} tokens") as progress:
                figures.append(measure(begun.pair, windows, progress=progress))
    return figures


def prompt_lengths(max_seq_length: int) -> list[int]:
    """Where figures are taken for models that were fitted or trained on sequences of that length."""
    from kvpred_mlx.making.quality import SCORE_TOKENS

    longest = max_seq_length - SCORE_TOKENS
    return sorted({n for n in (longest // 2, longest) if n > 1})


@dataclass(frozen=True)
class Output:
    """Where a pair goes: a directory, and a repository on the Hugging Face hub if one is named."""

    mlx_path: Path
    overwrite: bool
    upload_repo: str | None

    def check(self) -> None:
        """Refuse a path or a repository that cannot be written before hours are spent on what should go there."""
        import os

        from kvpred_mlx.files import check_absent
        from kvpred_mlx.making.hub import check_access

        if self.upload_repo is not None:
            check_access(self.upload_repo)
        check_absent(self.mlx_path, self.overwrite)
        parent = next(p for p in self.mlx_path.absolute().parents if p.exists())
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"{self.mlx_path}: no permission to write in {parent}")

    def save(self, made: Begun, figures: list[Quality]) -> None:
        """Save a pair with its model card and figures, upload it if asked to, and say so."""
        from kvpred_mlx.making.card import CardFacts, write_card
        from kvpred_mlx.making.hub import upload
        from kvpred_mlx.pair.loading import save

        def extras(folder: Path) -> None:
            write_card(
                folder, CardFacts(self.upload_repo or self.mlx_path.name, *made.names, made.made), figures
            )

        save(self.mlx_path, made.pair, made.tokenizer, overwrite=self.overwrite, extras=extras)
        show_figures(figures)
        print(f"{self.mlx_path}: {sum(f.stat().st_size for f in self.mlx_path.iterdir()) / 1e6:.1f} MB")
        if self.upload_repo is not None:
            print(upload(self.mlx_path, self.upload_repo))


def show_figures(figures: list[Quality]) -> None:
    """Tables on the terminal, 80 columns wide."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from kvpred_mlx.making.card import TITLES

    console = Console()
    for quality in figures:
        table = Table(
            title=f"prompt {quality.prompt_tokens} tokens, {quality.score_tokens} scored, {quality.windows} windows of "
            f"{quality.documents} held-out documents",
            caption="means over documents, 95 % bootstrap intervals",
            box=SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False,
        )  # fmt: skip
        table.add_column("", no_wrap=True, min_width=13)
        for name in quality.modes:
            table.add_column(name, justify="right", no_wrap=True)
        for metric, title in TITLES.items():
            estimates = (modes[metric] for modes in quality.modes.values())
            table.add_row(title, *(f"{e.mean:.3f} {e.low:.2f}-{e.high:.2f}" for e in estimates))
        console.print(table)
        for name, values in quality.explained_variance.items():
            shown = " ".join(f"{v:.2f}" for v in values)
            console.print(f"explained variance of {name} by layer: {shown}", markup=False, highlight=False)
