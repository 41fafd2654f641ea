"""`kvpred-mlx train`: the paper's joint training of auxiliary and predictor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpred_mlx.cli import making
from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.output import Output

if TYPE_CHECKING:
    from kvpred_mlx.cli.making import Begun, Models
    from kvpred_mlx.making.reports import Report
    from kvpred_mlx.making.settings import FitSettings, TrainingSettings


def train(
    data: o.DataPaths = None,
    model: Annotated[
        str | None, typer.Option(help="A pair to train on. Or two models, from which one is fitted:")
    ] = None,
    base: o.Base = None,
    auxiliary: o.Auxiliary = None,
    auxiliary_layers: o.AuxiliaryLayers = None,
    mlx_path: o.MlxPath = Path("mlx_model"),
    q_bits: o.QBits = None,
    q_group_size: o.QGroupSize = 64,
    source: o.Source = None,
    layer_map: o.LayerMap = "auto",
    fit_tokens: Annotated[
        int, typer.Option(min=1, help="For two models: tokens of the fit that begins.")
    ] = 200_000,
    iters: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step, over all processes.")] = 4,
    max_seq_length: o.MaxSeqLength = 512,
    optimizer: Annotated[str, typer.Option(help="adamw (the paper's) or muon.")] = "adamw",
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="The highest. Default: 3e-4, with muon 3e-3.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of rising learning rate.")] = 100,
    weight_decay: Annotated[
        float | None,
        typer.Option(min=0, help="Of matrices, not of norms and biases. Default: 0.1; muon has none."),
    ] = None,
    grad_clip: Annotated[
        float, typer.Option(min=0, help="The gradient's largest norm; 0 for no limit.")
    ] = 1.0,
    grad_accumulation_steps: Annotated[int, typer.Option(min=1, help="Batches averaged for a step.")] = 1,
    auxiliary_loss: Annotated[
        float, typer.Option(min=0, help="Weight of the auxiliary's cross-entropy.")
    ] = 1.0,
    kv_loss: Annotated[
        float | None,
        typer.Option(min=0, help="Weight of the distance of keys and values. Default: 1, with --as-used 0."),
    ] = None,
    z_loss: Annotated[float, typer.Option(min=0, help="Weight of mean(logsumexp^2); CoreNet: 1e-4.")] = 0.0,
    freeze_auxiliary: Annotated[
        bool, typer.Option("--freeze-auxiliary", help="Train the predictor alone.")
    ] = False,
    grad_checkpoint: Annotated[
        bool, typer.Option("--grad-checkpoint", help="Less memory, more time.")
    ] = False,
    as_used: Annotated[
        bool,
        typer.Option(
            "--as-used",
            help="Train the predictor alone as a cache is used: prompt predicted, answer exact, on recorded windows.",
        ),
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Train a quantized pair's weights in full precision.")
    ] = False,
    record: o.RecordFolder = None,
    windows: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --as-used: windows to record; 0: all of the text, and recorded nowhere (for a GPU).",
        ),
    ] = 400,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Do not compile the step.")] = False,
    dtype: o.Dtype = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 100,
    steps_per_report: Annotated[int, typer.Option(min=1, help="Steps between reports.")] = 10,
    restart: Annotated[bool, typer.Option("--restart", help="Forget a saved state.")] = False,
    text_key: o.TextKey = "text",
    seed: Annotated[int, typer.Option(min=0, max=o.LARGEST_SEED, help="Of the order of the data.")] = 0,
    overwrite: o.Overwrite = False,
    upload_repo: o.UploadRepo = None,
) -> None:
    """Train a pair's predictor and auxiliary, the base frozen. Run again, it goes on where it stopped."""
    from kvpred_mlx.files import remove_directory
    from kvpred_mlx.making.as_used import AsUsedWeights, as_used_trainer
    from kvpred_mlx.making.data import check_paths
    from kvpred_mlx.making.joint import default_dtype, joint_trainer, restored_types
    from kvpred_mlx.making.loss import LossWeights
    from kvpred_mlx.making.optimizers import LEARNING_RATES
    from kvpred_mlx.making.settings import FitSettings, TrainingSettings

    models = making.Models(base, auxiliary, auxiliary_layers)
    if model is not None and (models or source is not None):
        raise typer.BadParameter(
            "given with two models or a source, expected a pair alone", param_hint="--model"
        )
    fit = FitSettings(fit_tokens, source=making.check_source(source), layer_map=layer_map, seed=seed)
    if optimizer not in LEARNING_RATES:
        raise typer.BadParameter(
            f"{optimizer!r}, expected {' or '.join(LEARNING_RATES)}", param_hint="--optimizer"
        )
    if optimizer == "muon" and weight_decay is not None:
        raise typer.BadParameter(
            f"{weight_decay:g}, expected none with --optimizer muon", param_hint="--weight-decay"
        )
    if record is not None and as_used and not windows:
        raise typer.BadParameter("given with --windows 0, which records nothing", param_hint="--record")
    if learning_rate is None:
        learning_rate = LEARNING_RATES[optimizer]
    output = Output(mlx_path, overwrite, upload_repo)
    output.check()
    states = mlx_path.with_name(f"{mlx_path.name}.training")
    if restart:
        remove_directory(states)
    settings = TrainingSettings(
        iters, batch_size, learning_rate, warmup=warmup, optimizer=optimizer,
        weight_decay=TrainingSettings.weight_decay if weight_decay is None else weight_decay, grad_clip=grad_clip,
        grad_accumulation_steps=grad_accumulation_steps, save_every=save_every, steps_per_report=steps_per_report,
        seed=seed, dtype=dtype or default_dtype(),
    )  # fmt: skip
    check_paths(data or [])
    begun, training, held_out = _begin(model, models, data or [], text_key, max_seq_length, fit)
    if dequantize:
        making.dequantize(begun.pair.predictor, begun.pair.auxiliary)
    with restored_types(begun.pair):
        if as_used:
            folder = record or mlx_path.with_name(f"{mlx_path.name}.recording")
            recording: Any = (
                making.record_windows(begun, training, max_seq_length, folder, windows)
                if windows
                else making.fresh_windows(begun, training, max_seq_length)
            )
            weights = AsUsedWeights(kv=kv_loss or 0.0)
            trainer = as_used_trainer(begun.pair, recording, settings, weights, states)
            how = f"The predictor was trained as it is used on {iters * batch_size:,} windows"
        else:
            packed = making.pack(begun.tokenizer, training, max_seq_length, data or [])
            joint = LossWeights(auxiliary_loss, 1.0 if kv_loss is None else kv_loss, z_loss)
            trainer = joint_trainer(
                begun.pair, packed, settings, joint, states,
                freeze_auxiliary=freeze_auxiliary, grad_checkpoint=grad_checkpoint, compiled=not no_compile,
            )  # fmt: skip
            tokens = iters * batch_size * grad_accumulation_steps * max_seq_length
            trained = "Maps" if begun.pair.auxiliary is None else "Auxiliary and predictor"
            how = f"{trained} were trained together on {tokens:,} tokens"
        _run(trainer, settings, states)
    if trainer.group.rank():
        return
    begun.made += [f"{how} with `kvpred-mlx train`."]
    making.quantize(begun, q_bits, q_group_size)
    output.save(begun)
    remove_directory(states)
    output.finish(begun, lambda: making.held_out_figures(begun, held_out, max_seq_length))


def _begin(
    model: str | None, models: Models, data: list[Path], text_key: str, max_seq_length: int, fit: FitSettings
) -> tuple[Begun, list[str], list[str]]:
    """The pair to train on, opened or fitted now, and documents to train on and to hold out."""
    if model is not None:
        opened = making.open_to_train(model)
        return opened, *making.read_data(data, text_key, opened.tokenizer)
    chosen = models.load()
    training, held_out = making.read_data(data, text_key, chosen.base.tokenizer)
    return making.fit_pair(chosen, training, data, max_seq_length, fit), training, held_out


def _run(trainer: Any, settings: TrainingSettings, states: Path) -> None:
    """Train with progress on standard error; only the first process of several shows it."""
    import sys

    quiet = bool(trainer.group.rank())
    if trainer.step and not quiet:
        print(f"going on after step {trainer.step} of {settings.iters} ({states})", file=sys.stderr)
    with _shown(settings.iters, quiet) as report:
        try:
            trainer.run(report)
        except KeyboardInterrupt:
            if not quiet:
                print(f"interrupted: the same command goes on after step {trainer.step}", file=sys.stderr)
            raise


@contextmanager
def _shown(iters: int, quiet: bool) -> Iterator[Callable[[Report], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True, quiet=quiet)
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=iters, left="")

        def report(report: Report) -> None:
            minutes = f"{report.seconds_left / 60:.1f} min left"
            bar.update(task, completed=report.step, left=minutes)
            terms = ", ".join(f"{name} {value:.3f}" for name, value in report.terms.items())
            console.print(
                f"step {report.step}: loss {report.loss:.3f} ({terms}), learning rate {report.learning_rate:.2e}, "
                f"{report.tokens_per_second:.0f} tokens/s, {report.peak_bytes / 1e9:.2f} GB, {minutes}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip

        yield report
