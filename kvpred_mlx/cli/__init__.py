"""The command line: parses, calls the library, and turns every failure into one line."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from kvpred_mlx.cli.bench import bench
from kvpred_mlx.cli.chat import chat
from kvpred_mlx.cli.convert import convert
from kvpred_mlx.cli.demo import demo
from kvpred_mlx.cli.evaluate import evaluate
from kvpred_mlx.cli.fit import fit
from kvpred_mlx.cli.generate import EPILOG, GenerateCommand, generate
from kvpred_mlx.cli.info import info
from kvpred_mlx.cli.pareto import pareto
from kvpred_mlx.cli.quality import quality
from kvpred_mlx.cli.serve import serve
from kvpred_mlx.cli.train import train

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
app.command()(quality)
app.command()(info)
app.command()(demo)


def main() -> None:
    """Run the command line; exit code 2 for wrong usage, 1 for failures, 130 when interrupted."""
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # noqa: BLE001 - a traceback helps no user; KVPRED_MLX_DEBUG shows it
        if os.environ.get("KVPRED_MLX_DEBUG"):
            traceback.print_exc()
        code = _report(error)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Print one line for `error` and return the exit code."""
    usage = getattr(error, "format_message", None)  # typer's own errors, in every version of it
    message = " ".join(str(usage() if usage else error).split()) or type(error).__name__
    known = usage or isinstance(error, OSError | ValueError | ImportError | MemoryError | ArithmeticError)
    print(f"kvpred-mlx: error: {message if known else f'{type(error).__name__}: {message}'}", file=sys.stderr)
    return getattr(error, "exit_code", 1) if usage else 1
