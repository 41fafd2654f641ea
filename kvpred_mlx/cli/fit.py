"""`kvpred-mlx fit`: a pair out of one or two mlx-lm models, in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpred_mlx.cli import making
from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.output import Output


def fit(
    data: o.DataPaths = None,
    base: o.Base = None,
    auxiliary: o.Auxiliary = None,
    auxiliary_layers: o.AuxiliaryLayers = None,
    mlx_path: o.MlxPath = Path("mlx_model"),
    q_bits: o.QBits = None,
    q_group_size: o.QGroupSize = 64,
    source: o.Source = None,
    layer_map: o.LayerMap = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read, at most.")] = 200_000,
    max_seq_length: o.MaxSeqLength = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 8,
    ridge: Annotated[
        float | None, typer.Option(min=0, help="Regularization; chosen on held-out tokens without it.")
    ] = None,
    even_weights: Annotated[
        bool,
        typer.Option(
            "--even-weights", help="All tokens count alike, not by the attention that the base pays to them."
        ),
    ] = False,
    windows: o.FigureWindows = None,
    record: o.RecordFolder = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the sums of an interrupted fit.")
    ] = False,
    text_key: o.TextKey = "text",
    seed: Annotated[int, typer.Option(min=0, max=o.LARGEST_SEED, help="Of the choice of sequences.")] = 0,
    overwrite: o.Overwrite = False,
    upload_repo: o.UploadRepo = None,
) -> None:
    """Make a pair: of a base and its own first layers, or of two models with the same tokenizer, in minutes."""
    from kvpred_mlx.files import remove_directory
    from kvpred_mlx.making.data import check_paths
    from kvpred_mlx.making.settings import FitSettings

    models = making.Models(base, auxiliary, auxiliary_layers)
    output = Output(mlx_path, overwrite, upload_repo)
    settings = FitSettings(
        tokens, batch_size, making.check_source(source), layer_map, ridge, seed, not even_weights
    )
    output.check()
    check_paths(data or [])
    sums = mlx_path.with_name(f"{mlx_path.name}.fitting")
    if restart:
        remove_directory(sums)
    chosen = models.load()
    training, held_out = making.read_data(data or [], text_key, chosen.base.tokenizer)
    begun = making.fit_pair(chosen, training, data or [], max_seq_length, settings, sums)
    begun.made += ["Made with `kvpred-mlx fit`, not trained."]
    making.quantize(begun, q_bits, q_group_size)
    output.save(begun)
    remove_directory(sums)
    if record is not None:
        making.record_windows(begun, training, max_seq_length, record, tokens // max_seq_length)
    output.finish(begun, lambda: making.held_out_figures(begun, held_out, max_seq_length, windows))
