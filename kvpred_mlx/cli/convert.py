"""`kvpred-mlx convert`: CoreNet checkpoints become MLX model directories."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvpred_mlx.cli import options as o
from kvpred_mlx.console import progress_bar


class Dtype(StrEnum):
    """mlx-lm's conversion dtypes."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class QuantizationMode(StrEnum):
    """mlx-lm's quantization modes."""

    affine = "affine"
    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"
    mxfp8 = "mxfp8"


def convert(
    checkpoint: Annotated[Path, typer.Option(help="CoreNet's .pt file.")],
    config: Annotated[Path | None, typer.Option(help="CoreNet's training YAML; a pair needs it.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece tokenizer.model.")] = None,
    mlx_path: o.MlxPath = Path("mlx_model"),
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights that are not quantized.")] = None,
    quantize: Annotated[bool, typer.Option("--quantize", "-q", help="Quantize the weights.")] = False,
    q_bits: Annotated[int | None, typer.Option(help="Bits per weight.")] = None,
    q_group_size: Annotated[int | None, typer.Option(help="Weights that share a scale.")] = None,
    q_mode: Annotated[QuantizationMode, typer.Option(help="Quantization mode.")] = QuantizationMode.affine,
    overwrite: o.Overwrite = False,
    upload_repo: o.UploadRepo = None,
) -> None:
    """Convert a CoreNet KV Prediction (or plain OpenELM) checkpoint. Hugging Face OpenELM: mlx_lm.convert."""
    if not quantize and (q_bits is not None or q_group_size is not None):
        raise typer.BadParameter("--q-bits and --q-group-size need -q", param_hint="--quantize")
    import mlx.core as mx

    from kvpred_mlx.convert.checkpoint import Quantization, convert_checkpoint
    from kvpred_mlx.making.hub import check_access, upload

    if upload_repo is not None:
        check_access(upload_repo)
    with progress_bar("Converting") as progress:
        convert_checkpoint(
            checkpoint,
            config,
            mlx_path,
            tokenizer=tokenizer,
            dtype=getattr(mx, dtype.value) if dtype else None,
            quantization=Quantization(q_group_size, q_bits, q_mode.value) if quantize else None,
            overwrite=overwrite,
            progress=progress,
        )
    size = sum(f.stat().st_size for f in mlx_path.iterdir())
    print(f"{mlx_path}: {size / 1e6:.1f} MB")
    if upload_repo is not None:
        print(upload(mlx_path, upload_repo, f"Converted from the CoreNet checkpoint `{checkpoint.name}`."))
