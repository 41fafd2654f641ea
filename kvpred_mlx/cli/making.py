"""What `fit` and `train` have in common: models, data, and figures on held-out documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpred_mlx.cli.progress import progress_bar

if TYPE_CHECKING:
    from kvpred_mlx.making.data import PackedSequences
    from kvpred_mlx.making.pairing import LoadedModel
    from kvpred_mlx.making.quality import Quality
    from kvpred_mlx.pair.model import KVPredictionModel

Data = Annotated[Path, typer.Option(help="Text, JSONL, or a directory of such files.")]
TextKey = Annotated[str, typer.Option(help="Where a JSONL line has its text.")]
Base = Annotated[str | None, typer.Option(help="The model that answers: a directory or a Hugging Face repo.")]
Auxiliary = Annotated[str | None, typer.Option(help="The small model that reads the prompt.")]
AuxiliaryLayers = Annotated[
    str | None,
    typer.Option(help="Instead of --auxiliary: the base's own layers, 0.25, 0.5, 0.75 or 0,4,8,..."),
]
MlxPath = Annotated[Path, typer.Option(help="The directory to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it is there.")]
UploadRepo = Annotated[str | None, typer.Option(help="Hugging Face repository to upload it to.")]
AllDocuments = Annotated[
    bool,
    typer.Option(
        "--all-documents", help="Not only those that fit and train hold out: for a file of its own."
    ),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize", help="The same weights unquantized: MLX's CPU backend is slow on quantized ones."
    ),
]


def load_models(
    base: str | None, auxiliary: str | None, layers: str | None
) -> tuple[LoadedModel, LoadedModel]:
    """The two models that the options name, with the same tokenizer."""
    from kvpred_mlx.making.layer_maps import kept_layers
    from kvpred_mlx.making.pairing import check_same_tokenizer, keep_layers, load_part

    if base is None:
        raise typer.BadParameter("missing, expected a directory or a Hugging Face repo", param_hint="--base")
    if (auxiliary is None) == (layers is None):
        given = "neither" if auxiliary is None else "both"
        raise typer.BadParameter(
            f"{given} given, expected one of the two", param_hint="--auxiliary / --auxiliary-layers"
        )
    first = load_part(base)
    if layers is not None:
        try:
            kept = kept_layers(layers, len(first.model.layers))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--auxiliary-layers") from error
        return first, keep_layers(first, kept)
    second = load_part(str(auxiliary))
    check_same_tokenizer(first, second)
    return first, second


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
    pair: KVPredictionModel, tokenizer: Any, documents: list[str], prompt_tokens: list[int], most: int = 80
) -> list[Quality]:
    """Quality on held-out documents, for the prompt lengths that they are long enough for."""
    from kvpred_mlx.making.data import encode
    from kvpred_mlx.making.quality import SCORE_TOKENS, measure
    from kvpred_mlx.making.windows import cut_windows

    ids = encode(tokenizer, documents)
    figures = []
    for n in prompt_tokens:
        if max(map(len, ids), default=0) >= n + SCORE_TOKENS:
            windows = cut_windows(ids, n, SCORE_TOKENS, tokenizer, most)
            with progress_bar(f"quality at {n} tokens") as progress:
                figures.append(measure(pair, windows, progress=progress))
    return figures


def prompt_lengths(max_seq_length: int) -> list[int]:
    """Where figures are taken for models that were fitted or trained on sequences of that length."""
    from kvpred_mlx.making.quality import SCORE_TOKENS

    longest = max_seq_length - SCORE_TOKENS
    return sorted({n for n in (longest // 2, longest) if n > 1})


def check_output(mlx_path: Path, overwrite: bool, upload_repo: str | None) -> None:
    """Refuse a path or a repository that cannot be written before hours are spent on what should go there."""
    import os

    from kvpred_mlx.files import check_absent
    from kvpred_mlx.making.hub import check_access

    if upload_repo is not None:
        check_access(upload_repo)
    check_absent(mlx_path, overwrite)
    parent = next(p for p in mlx_path.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{mlx_path}: no permission to write in {parent}")


def save_pair(
    mlx_path: Path,
    pair: KVPredictionModel,
    tokenizer: Any,
    names: tuple[str, str],
    made: list[str],
    figures: list[Quality],
    overwrite: bool,
    upload_repo: str | None,
) -> None:
    """Save a pair with its model card and figures, upload it if asked to, and say so."""
    from kvpred_mlx.making.card import CardFacts, write_card
    from kvpred_mlx.making.hub import upload
    from kvpred_mlx.pair.loading import save

    def extras(folder: Path) -> None:
        write_card(folder, CardFacts(upload_repo or mlx_path.name, *names, made), figures)

    save(mlx_path, pair, tokenizer, overwrite=overwrite, extras=extras)
    show_figures(figures)
    print(f"{mlx_path}: {sum(f.stat().st_size for f in mlx_path.iterdir()) / 1e6:.1f} MB")
    if upload_repo is not None:
        print(upload(mlx_path, upload_repo))


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
