"""What `fit` and `train` have in common: models, data, recordings, and figures on held-out documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvpred_mlx.cli.opening import open_pair
from kvpred_mlx.console import progress_bar
from kvpred_mlx.errors import UnsupportedModelError

if TYPE_CHECKING:
    import mlx.nn as nn

    from kvpred_mlx.making.data import PackedSequences
    from kvpred_mlx.making.fresh_windows import FreshWindows
    from kvpred_mlx.making.pairing import LoadedModel
    from kvpred_mlx.making.quality import Quality
    from kvpred_mlx.making.recording import Recording
    from kvpred_mlx.making.settings import FitSettings
    from kvpred_mlx.making.windows import Windows
    from kvpred_mlx.pair.model import KVPredictionModel


FIRST_LAYERS = "first:0.5"  # what reads, if nothing else is named
PASSES = 3  # forward passes over a window that its figures cost, about


@dataclass(frozen=True)
class Models:
    """What a pair is made of, as options name it: `auxiliary`, or `layers` of the base in its place."""

    base: str | None
    auxiliary: str | None
    layers: str | None

    def __bool__(self) -> bool:
        return any((self.base, self.auxiliary, self.layers))

    def load(self) -> Chosen:
        """The models, with the same tokenizer; with neither auxiliary nor layers, the base's first half reads."""
        from kvpred_mlx.making.layer_maps import first_layers, kept_layers
        from kvpred_mlx.making.pairing import check_same_tokenizer, keep_layers, load_part
        from kvpred_mlx.taps.kv_taps import KVTaps

        if self.base is None:
            raise typer.BadParameter(
                "missing, expected a directory or a Hugging Face repo", param_hint="--base"
            )
        if self.auxiliary is not None and self.layers is not None:
            raise typer.BadParameter(
                "both given, expected one of the two", param_hint="--auxiliary / --auxiliary-layers"
            )
        base = load_part(self.base)
        if self.auxiliary is not None:
            auxiliary = load_part(self.auxiliary)
            check_same_tokenizer(base, auxiliary)
            return Chosen(base, auxiliary)
        layers = self.layers or FIRST_LAYERS
        try:
            if layers.startswith("first:"):
                return Chosen(base, depths=first_layers(layers, len(KVTaps(base.model))))
            return Chosen(base, keep_layers(base, kept_layers(layers, len(base.model.layers))))
        except UnsupportedModelError:
            raise
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--auxiliary-layers") from error


@dataclass(frozen=True)
class Chosen:
    """Models that were loaded.

    Args:
        base: answers.
        auxiliary: reads; None if the base's first layers do.
        depths: how many of them, if so.
    """

    base: LoadedModel
    auxiliary: LoadedModel | None = None
    depths: list[int] | None = None


@dataclass
class Begun:
    """A pair before it is saved.

    Args:
        pair: the model.
        tokenizer: what it reads with.
        names: of its base and of what reads, for the model card.
        made: what the card says of how it was made.
        tokens: how many it was fitted on.
    """

    pair: KVPredictionModel
    tokenizer: Any
    names: tuple[str, str]
    made: list[str]
    tokens: int = 0


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
    chosen: Chosen,
    documents: list[str],
    data: list[Path],
    max_seq_length: int,
    settings: FitSettings,
    sums: Path | None = None,
) -> Begun:
    """Fit a predictor in closed form.

    Args:
        documents: read from `data`.
        sums: the folder in which an interrupted fit is gone on with.
    """
    from kvpred_mlx.making.fit import fit, fit_first_layers
    from kvpred_mlx.making.layer_maps import parse
    from kvpred_mlx.making.pairing import join, join_first_layers
    from kvpred_mlx.taps.kv_taps import KVTaps

    base, second = chosen.base, chosen.auxiliary
    taps, packed = KVTaps(base.model), pack(base.tokenizer, documents, max_seq_length, data)
    if second is None:
        depths = chosen.depths or []
        with progress_bar("fitting") as progress:
            alone = fit_first_layers(taps, depths, packed, settings, progress, sums)
        read = f"first {' or '.join(map(str, depths))} layers"
        made = f"Maps behind the base's {read} were fitted in closed form on {alone.tokens:,} tokens."
        pair = join_first_layers(base, alone.predictor, linked=True)
        return Begun(pair, base.tokenizer, (base.name, f"its own {read}"), [made], alone.tokens)
    auxiliary = KVTaps(second.model)
    try:
        parse(settings.layer_map, len(taps), len(auxiliary))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layer-map") from error
    with progress_bar("fitting") as progress:
        fitted = fit(taps, auxiliary, packed, settings, progress, sums)
    layer_map = ",".join(map(str, fitted.predictor.layer_map))
    made = (
        f"The predictor (source {settings.source}, layer map {layer_map}) was fitted in closed form on "
        f"{fitted.tokens:,} tokens."
    )
    pair = join(base, second, fitted.predictor, linked=True)
    return Begun(pair, base.tokenizer, (base.name, second.name), [made], fitted.tokens)


def quantize(begun: Begun, bits: int | None, group_size: int) -> None:
    """Quantize a pair's predictor, if bits are named."""
    import mlx.core as mx
    import mlx.nn as nn

    if bits is None:
        return
    predictor = begun.pair.predictor
    nn.quantize(predictor, group_size, bits)
    mx.eval(predictor.parameters())
    begun.made += [f"The predictor is quantized: {bits} bits in groups of {group_size}."]


def open_to_train(model: str) -> Begun:
    """A pair that was made before."""
    opened = open_pair(model)
    name = f"of {opened.short_name}"
    return Begun(
        opened.pair, opened.tokenizer, (name, name), [f"Training began from the pair {opened.short_name}."]
    )


def read_data(data: list[Path], text_key: str, tokenizer: Any = None) -> tuple[list[str], list[str]]:
    """Training and held-out documents of all paths; mlx-lm's calibration text without any.

    Args:
        tokenizer: whose chat template conversations go through.
    """
    from kvpred_mlx.making.data import calibration_text, read_documents, split

    named = names_of(data)
    with progress_bar(f"reading {named}"):
        documents = (document for path in data for document in read_documents(path, text_key, tokenizer))
        training, held_out = split(documents if data else calibration_text(tokenizer))
    if not training and not held_out:
        raise ValueError(f"{named}: empty, expected text")
    return training or held_out, held_out


def read_held_out(data: Path, text_key: str, all_documents: bool, tokenizer: Any = None) -> list[str]:
    """The documents that `fit` and `train` hold out, or all."""
    training, held_out = read_data([data], text_key, tokenizer)
    chosen = held_out + (training if all_documents and training is not held_out else [])
    if not chosen:
        raise ValueError(f"{data}: no document is held out from training, --all-documents takes them all")
    return chosen


def dequantize(*modules: nn.Module | None) -> None:
    """Give the weights of modules in full precision, those that are there."""
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model

    for module in modules:
        if module is not None:
            dequantize_model(module)
            mx.eval(module.parameters())


def names_of(data: list[Path]) -> str:
    """What messages call the text."""
    return ", ".join(map(str, data)) or "mlx-lm's calibration text"


def pack(tokenizer: Any, documents: list[str], length: int, data: list[Path]) -> PackedSequences:
    """Documents, read from `data`, as packed sequences of `length` tokens."""
    from kvpred_mlx.making.data import PackedSequences, encode

    if tokenizer is None:
        raise ValueError("the base has no tokenizer, so text cannot be read")
    try:
        return PackedSequences.of(encode(tokenizer, documents), length, tokenizer.eos_token_id)
    except ValueError as error:
        raise ValueError(f"{names_of(data)}: {error}") from error


def held_out_figures(
    begun: Begun, documents: list[str], max_seq_length: int, windows: int | None = None
) -> list[Quality]:
    """Quality on held-out documents, at the lengths of `prompt_lengths` that the documents are long enough for.

    Args:
        windows: of each length, at most (default: what takes about a quarter of the fit's time, 4 to 80).
    """
    from kvpred_mlx.making.data import encode
    from kvpred_mlx.making.quality import SCORE_TOKENS, measure
    from kvpred_mlx.making.windows import cut_windows

    ids = encode(begun.tokenizer, documents)
    lengths = prompt_lengths(max_seq_length)
    if windows is None and begun.tokens:
        windows = begun.tokens // (4 * PASSES * sum(n + SCORE_TOKENS for n in lengths))
        windows = min(max(windows, 4), 80)
    figures = []
    for n in lengths:
        if max(map(len, ids), default=0) >= n + SCORE_TOKENS:
            cut = cut_windows(ids, n, SCORE_TOKENS, begun.tokenizer, windows or 80)
            with progress_bar(f"quality at {n} tokens") as progress:
                figures.append(measure(begun.pair, cut, progress=progress))
    return figures


def record_windows(
    begun: Begun, documents: list[str], max_seq_length: int, folder: Path, most: int
) -> Recording:
    """Record windows of training documents: a prompt, and the tokens after it that are scored."""
    from kvpred_mlx.making.recording import record

    with progress_bar("recording") as progress:
        return record(
            begun.pair, _cut(begun, documents, max_seq_length, max(most, 1)), folder, progress=progress
        )


def fresh_windows(begun: Begun, documents: list[str], max_seq_length: int) -> FreshWindows:
    """All windows of training documents, each recorded when a step asks for it."""
    from kvpred_mlx.making.fresh_windows import FreshWindows

    return FreshWindows(begun.pair, _cut(begun, documents, max_seq_length, None))


def _cut(begun: Begun, documents: list[str], max_seq_length: int, most: int | None) -> Windows:
    from kvpred_mlx.making.data import encode
    from kvpred_mlx.making.quality import SCORE_TOKENS
    from kvpred_mlx.making.windows import cut_windows

    ids = encode(begun.tokenizer, documents)
    whole = sum(len(i) // max_seq_length for i in ids)
    counts = {"most": most} if most is not None else {"most": max(whole, 1), "per_document": max(whole, 1)}
    return cut_windows(ids, max_seq_length - SCORE_TOKENS, SCORE_TOKENS, **counts)


def prompt_lengths(max_seq_length: int) -> list[int]:
    """Where figures are taken for models that were fitted or trained on sequences of that length."""
    from kvpred_mlx.making.quality import SCORE_TOKENS

    longest = max_seq_length - SCORE_TOKENS
    return sorted({n for n in (longest // 2, longest) if n > 1})
