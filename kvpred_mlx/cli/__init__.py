"""The command line: parses and calls the library."""

from __future__ import annotations

import typer

from kvpred_mlx.cli.bench import bench
from kvpred_mlx.cli.chat import chat
from kvpred_mlx.cli.convert import convert
from kvpred_mlx.cli.demo import demo
from kvpred_mlx.cli.evaluate import evaluate
from kvpred_mlx.cli.fit import fit
from kvpred_mlx.cli.fuse import fuse
from kvpred_mlx.cli.generate import EPILOG, GenerateCommand, generate
from kvpred_mlx.cli.info import info
from kvpred_mlx.cli.pairs import pairs
from kvpred_mlx.cli.pareto import pareto
from kvpred_mlx.cli.quality import quality
from kvpred_mlx.cli.serve import serve
from kvpred_mlx.cli.train import train
from kvpred_mlx.console import run

app = typer.Typer(
    name="kvpred-mlx",
    help="KV Prediction for MLX: a small auxiliary model reads the prompt, the first token comes sooner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(cls=GenerateCommand, epilog=EPILOG)(generate)
app.command()(chat)
app.command()(serve)
app.command()(bench)
app.command()(pareto)
app.command("eval")(evaluate)
app.command()(convert)
app.command()(fit)
app.command()(train)
app.command()(fuse)
app.command()(quality)
app.command()(info)
app.command()(pairs)
app.command()(demo)


def main() -> None:
    """Run the command line and exit (see `kvpred_mlx.console.run`)."""
    run(app, "kvpred-mlx")
