"""`kvpred-mlx fuse`: a linked pair becomes a standalone one."""

from __future__ import annotations

import shutil
from pathlib import Path

import typer

from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.opening import OtherModels, one_pair, open_pair
from kvpred_mlx.cli.output import Output
from kvpred_mlx.console import progress_bar


def fuse(
    pair: o.PairArgument = None,
    model: o.ModelOption = None,
    base: o.OtherBase = None,
    auxiliary: o.OtherAuxiliary = None,
    force: o.Force = False,
    mlx_path: o.MlxPath = Path("mlx_model"),
    overwrite: o.Overwrite = False,
    upload_repo: o.UploadRepo = None,
) -> None:
    """Make one directory of a linked pair and its models, as mlx_lm.fuse does with adapters."""
    chosen = one_pair(model, pair)
    if chosen is None:
        raise typer.BadParameter("missing, expected a linked pair", param_hint="--model")
    output = Output(mlx_path, overwrite, upload_repo)
    output.check()

    from kvpred_mlx.making.card import CARD
    from kvpred_mlx.making.hub import upload
    from kvpred_mlx.pair.loading import fuse as fuse_models
    from kvpred_mlx.pair.loading import save

    opened = open_pair(chosen, OtherModels(base, auxiliary, force))
    fuse_models(opened.pair)
    card = opened.path / CARD if opened.path else None

    def extras(folder: Path) -> None:
        if card is not None and card.exists():
            shutil.copy(card, folder / CARD)

    with progress_bar(f"writing {mlx_path}"):
        save(mlx_path, opened.pair, opened.read_with, overwrite=overwrite, extras=extras)
    output.tell_size()
    if upload_repo is not None:
        print(upload(mlx_path, upload_repo))
