"""Options that several commands have, each declared once; a wrong value is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpred_mlx.quantization import GROUP_SIZES, KV_BITS, WEIGHT_BITS

DTYPES = ("float32", "float16", "bfloat16")
LARGEST_SEED = (1 << 64) - 1  # of MLX's random numbers


def _one_of(values: tuple[Any, ...], shown: str | None = None) -> Callable[[Any], Any]:
    """A check that refuses what is not among `values`; None is an option that was not given."""
    shown = shown or " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise typer.BadParameter(f"{value!r}, expected {shown}")
        return value

    return check


def _finite(value: float) -> float:
    """A check that refuses what is no number: a range lets nan pass."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value}, expected a finite number")
    return value


# What is opened.
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Pair: a directory, a Hugging Face repo, or a bundled one by name (`kvpred-mlx pairs`). Default: pycode.",
    ),
]
OtherBase = Annotated[
    str | None,
    typer.Option("--base", help="The pair's base from another place, or quantized otherwise."),
]
OtherAuxiliary = Annotated[str | None, typer.Option("--auxiliary", help="Likewise its auxiliary.")]
Force = Annotated[
    bool, typer.Option("--force", help="Take models even if the predictor was fitted on others.")
]
PairArgument = Annotated[str | None, typer.Argument(help="The same as --model PAIR.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the pair's tokenizer.")
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset", help="A published pair's shapes with random weights; 'bench --preset list' shows them."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, float16 or bfloat16.", callback=_one_of(DTYPES, ", ".join(DTYPES))
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu or gpu. Default: MLX's own choice.",
        callback=_one_of(("cpu", "gpu")),
    ),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize", help="The same weights unquantized: MLX's CPU backend is slow on quantized ones."
    ),
]

# How a prompt is read and an answer written: mlx-lm's names.
SystemPrompt = Annotated[
    str | None, typer.Option("--system-prompt", help="System prompt for the chat template.")
]
DefaultChatTemplate = Annotated[
    bool,
    typer.Option("--use-default-chat-template", help="The tokenizer's default template, if it has no other."),
]
MaxKvSize = Annotated[int | None, typer.Option("--max-kv-size", min=8, help="Largest KV cache, in tokens.")]
KvBits = Annotated[
    int | None,
    typer.Option(
        "--kv-bits",
        help="Quantize the base's KV cache: 2, 3, 4, 6 or 8.",
        callback=_one_of(KV_BITS),
    ),
]
KvGroupSize = Annotated[
    int,
    typer.Option(
        "--kv-group-size",
        help="Group size of KV cache quantization.",
        callback=_one_of(GROUP_SIZES),
    ),
]
QuantizedKvStart = Annotated[
    int, typer.Option("--quantized-kv-start", min=0, help="Quantize from this token on.")
]
PrefillStepSize = Annotated[
    int, typer.Option("--prefill-step-size", min=1, help="Prompt tokens to process at a time.")
]
Temp = Annotated[
    float, typer.Option("--temp", callback=_finite, min=0, help="Sampling temperature; 0 is greedy.")
]
TopP = Annotated[float, typer.Option("--top-p", callback=_finite, min=0, max=1, help="Sampling top-p.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sampling top-k; 0: all.")]
MinP = Annotated[float, typer.Option("--min-p", callback=_finite, min=0, max=1, help="Sampling min-p.")]
XtcProbability = Annotated[
    float,
    typer.Option("--xtc-probability", callback=_finite, min=0, max=1, help="Probability of XTC sampling."),
]
XtcThreshold = Annotated[
    float,
    typer.Option("--xtc-threshold", callback=_finite, min=0, max=0.5, help="Threshold of XTC sampling."),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model",
        help="'auxiliary': speculative decoding; the auxiliary has read the prompt already.",
        callback=_one_of(("auxiliary",)),
    ),
]
Draft = Annotated[  # what --draft-model was called
    str | None, typer.Option("--draft", hidden=True, callback=_one_of(("auxiliary",)))
]
NumDraftTokens = Annotated[int, typer.Option("--num-draft-tokens", min=1, help="Tokens to draft at a time.")]

# Text to read, and what is made of it.
Data = Annotated[Path, typer.Option("--data", help="Text, JSONL, or a directory of such files.")]
OptionalData = Annotated[
    Path | None, typer.Option("--data", help="Text, JSONL, or a directory of such files.")
]
DataPaths = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        help="Text, JSONL (texts or conversations), or a directory of such files; may be repeated. Default: the text "
        "that mlx-lm calibrates its quantizers on.",
    ),
]
TextKey = Annotated[str, typer.Option("--text-key", help="Where a JSONL line has its text.")]
AllDocuments = Annotated[
    bool,
    typer.Option(
        "--all-documents", help="Not only those that fit and train hold out: for a file of its own."
    ),
]
PromptLens = Annotated[
    list[str] | None,
    typer.Option("--prompt-lens", help="Prompt lengths in tokens, 512,2048; may be repeated."),
]
ScoreTokens = Annotated[int, typer.Option("--score-tokens", min=1, help="Tokens scored after each prompt.")]
Windows = Annotated[int, typer.Option("--windows", min=1, help="Prompts of real text, at most.")]

# Making a pair.
Base = Annotated[
    str | None, typer.Option("--base", help="The model that answers: a directory or a Hugging Face repo.")
]
Auxiliary = Annotated[str | None, typer.Option("--auxiliary", help="The small model that reads the prompt.")]
AuxiliaryLayers = Annotated[
    str | None,
    typer.Option(
        "--auxiliary-layers",
        help="Instead of --auxiliary: the base's own first layers, first:0.5 (default), first:14, or first:8,14 with "
        "maps for both; or some of its layers as a model of their own, 0.25, 0.5, 0.75 or 0,4,8,...",
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--source",
        help="What to predict from: kv (the paper's), kv-joint, hidden (default) or hidden-joined.",
    ),
]
LayerMap = Annotated[
    str, typer.Option("--layer-map", help="auto, even, or an auxiliary layer for each base layer.")
]
MaxSeqLength = Annotated[int, typer.Option("--max-seq-length", min=2, help="Tokens of a sequence.")]
FigureWindows = Annotated[
    int | None,
    typer.Option(
        "--windows",
        min=1,
        help="Held-out prompts of each length for the figures. Default: a quarter of the fit's time.",
    ),
]
RecordFolder = Annotated[
    Path | None,
    typer.Option("--record", help="Folder for what the models make of windows of the text, to train on."),
]
QBits = Annotated[
    int | None,
    typer.Option(
        "--q-bits",
        help="Quantize the predictor: 2, 3, 4, 5, 6 or 8 bits.",
        callback=_one_of(WEIGHT_BITS),
    ),
]
QGroupSize = Annotated[
    int,
    typer.Option(
        "--q-group-size",
        help="Of its weights, that share a scale.",
        callback=_one_of(GROUP_SIZES),
    ),
]
MlxPath = Annotated[Path, typer.Option("--mlx-path", help="The directory to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it is there.")]
UploadRepo = Annotated[
    str | None, typer.Option("--upload-repo", help="Hugging Face repository to upload it to.")
]

# What is shown.
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
NoPlot = Annotated[bool, typer.Option("--no-plot", help="Draw no picture.")]
