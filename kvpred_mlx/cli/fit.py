"""`kvpred-mlx fit`: a pair out of two mlx-lm models, in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpred_mlx.cli.making import (
    Auxiliary,
    AuxiliaryLayers,
    Base,
    Data,
    MlxPath,
    Overwrite,
    TextKey,
    UploadRepo,
)
from kvpred_mlx.cli.progress import progress_bar


def fit(
    data: Data,
    base: Base = None,
    auxiliary: Auxiliary = None,
    auxiliary_layers: AuxiliaryLayers = None,
    mlx_path: MlxPath = Path("mlx_model"),
    source: Annotated[
        str | None, typer.Option(help="What to predict from: kv (the paper's), kv-joint or hidden (default).")
    ] = None,
    layer_map: Annotated[
        str, typer.Option(help="auto, even, or an auxiliary layer for each base layer.")
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read, at most.")] = 200_000,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 8,
    ridge: Annotated[
        float | None, typer.Option(min=0, help="Regularization; chosen on held-out tokens without it.")
    ] = None,
    text_key: TextKey = "text",
    seed: Annotated[int, typer.Option(help="Of the choice of sequences.")] = 0,
    overwrite: Overwrite = False,
    upload_repo: UploadRepo = None,
) -> None:
    """Make a pair out of any two mlx-lm models with the same tokenizer, in minutes."""
    from kvpred_mlx.cli import making
    from kvpred_mlx.making.fit import fit as fit_predictor
    from kvpred_mlx.making.layer_maps import parse
    from kvpred_mlx.making.pairing import join
    from kvpred_mlx.making.settings import FitSettings
    from kvpred_mlx.pair.sources import DEFAULT, check_source
    from kvpred_mlx.taps.kv_taps import KVTaps

    try:
        check_source(source or DEFAULT)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--source") from error
    making.check_output(mlx_path, overwrite, upload_repo)
    training, held_out = making.read_data(data, text_key)
    first, second = making.load_models(base, auxiliary, auxiliary_layers)
    depths = len(KVTaps(first.model)), len(KVTaps(second.model))
    try:
        parse(layer_map, *depths)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layer-map") from error
    packed = making.pack(first.tokenizer, training, max_seq_length, data)
    settings = FitSettings(tokens, batch_size, source or DEFAULT, layer_map, ridge, seed)
    with progress_bar("fitting") as progress:
        fitted = fit_predictor(first.model, second.model, packed, settings, progress)
    pair = join(first, second, fitted.predictor)
    figures = making.held_out_figures(pair, first.tokenizer, held_out, making.prompt_lengths(max_seq_length))
    made = [
        (
            f"The predictor (source {settings.source}, layer map {','.join(map(str, fitted.predictor.layer_map))}) was fitted "
            f"in closed form on {fitted.tokens:,} tokens with `kvpred-mlx fit`; it was not trained."
        )
    ]
    making.save_pair(
        mlx_path, pair, first.tokenizer, (first.name, second.name), made, figures, overwrite, upload_repo
    )
