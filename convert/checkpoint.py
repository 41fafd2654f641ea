"""Turn a CoreNet checkpoint into an MLX model directory: a pair, or a plain OpenELM."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import sentencepiece
from mlx.utils import tree_flatten

from kvpred_mlx.convert import corenet, openelm
from kvpred_mlx.convert.tokenizer import convert_sentencepiece
from kvpred_mlx.files import check_absent, new_directory
from kvpred_mlx.pair.config import ModelArgs, build_model
from kvpred_mlx.pair.loading import pair_config, quantization_config
from kvpred_mlx.pair.saved_model import Model
from kvpred_mlx.progress import ProgressCallback, no_progress


@dataclass(frozen=True)
class Quantization:
    """mlx-lm's quantization settings; None takes mlx-lm's default of the mode."""

    group_size: int | None = None
    bits: int | None = None
    mode: str = "affine"


def convert_checkpoint(
    checkpoint: Path,
    config: Path | None,
    mlx_path: Path,
    *,
    tokenizer: Path | None = None,
    dtype: mx.Dtype | None = None,
    quantization: Quantization | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = no_progress,
) -> None:
    """Convert a CoreNet KV Prediction or OpenELM checkpoint into an MLX model directory.

    Args:
        checkpoint: `.pt` file with a state_dict.
        config: CoreNet's training YAML; a pair needs it for its layer map.
        mlx_path: the directory to make.
        tokenizer: a SentencePiece `tokenizer.model`; without one the model takes token ids.
        dtype: of the weights that are not quantized (default: the checkpoint's).
        progress: called with the number of tensors done and their total.

    Raises:
        FileNotFoundError, FileExistsError, ImportError: as their messages say.
        ValueError: the checkpoint does not fit; one message lists every tensor that is missing, unexpected
            or wrongly shaped.
    """
    check_absent(mlx_path, overwrite)
    training = corenet.read_yaml(config) if config else corenet.TrainingConfig()
    state = corenet.Checkpoint(checkpoint)
    plan = _plan(state.shapes, training, checkpoint, config)
    done = 0

    def read(name: str) -> mx.array:
        return state.take(name, dtype)

    def advance(tensors: int) -> None:
        nonlocal done
        done += tensors
        progress(done, len(state.shapes))

    with new_directory(mlx_path, overwrite) as directory:
        if tokenizer is not None:
            convert_sentencepiece(tokenizer, directory)
            _check_vocabulary(tokenizer, plan.config.get("base", plan.config)["vocab_size"])
        _fill(plan, read, quantization, advance)
        if quantization is not None and not quantization_config(plan.model):
            raise ValueError(f"no weight's width is a multiple of the group size {quantization.group_size}")
        mlx_lm.utils.save_model(directory, plan.model)
        mlx_lm.utils.save_config(plan.config | quantization_config(plan.model), directory / "config.json")


@dataclass(frozen=True)
class _Plan:
    """The model to fill, its config, and for each of its blocks the state_dict names that fill it.

    A block (a layer, an embedding, a norm) is what is held in memory twice: as read and as kept.
    """

    model: nn.Module
    config: dict[str, Any]
    blocks: dict[str, dict[str, str]]


def _plan(
    shapes: openelm.Shapes, training: corenet.TrainingConfig, checkpoint: Path, config: Path | None
) -> _Plan:
    problems: list[str] = []
    if not any(name.startswith(("base.", "auxiliary.", corenet.PREDICTOR)) for name in shapes):
        plain = _read_model(shapes, "", training.base_name, training, problems)
        _raise(checkpoint, problems)
        return _Plan(build_model(plain), plain, _blocks(shapes, [""]))
    if training.layer_map is None:
        where = f"{config} has none" if config else "no YAML was given"
        raise ValueError(f"{checkpoint}: a KV Prediction checkpoint needs its YAML's layer map, and {where}")
    base = _read_model(shapes, "base.", training.base_name, training, problems)
    auxiliary = _read_model(shapes, "auxiliary.", training.auxiliary_name, training, problems)
    problems += _check_predictor(shapes, base, auxiliary, training.layer_map) if base and auxiliary else []
    _raise(checkpoint, problems)
    model = Model(ModelArgs("kvpred", base, auxiliary, training.layer_map))
    return _Plan(model, pair_config(model), _blocks(shapes, ["base.", "auxiliary."]))


def _read_model(
    shapes: openelm.Shapes,
    prefix: str,
    name: str | None,
    training: corenet.TrainingConfig,
    problems: list[str],
) -> dict[str, Any]:
    """The mlx-lm config of the tensors under `prefix` ({} if it can't be told); adds to `problems`."""
    own = {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}
    config, found = openelm.read_config(own)
    if config is not None and not found:
        found = openelm.compare_with_name(config, name)
        if training.vocab_size not in (None, config["vocab_size"]):
            found.append(
                f"token_embeddings.weight has {config['vocab_size']} rows, "
                f"but the YAML's vocab_size is {training.vocab_size}"
            )
    problems += [f"{prefix.rstrip('.') or 'model'}: {problem}" for problem in found]
    if config is not None and training.context_length:
        config["max_context_length"] = training.context_length
    return config or {}


def _check_predictor(
    shapes: openelm.Shapes, base: dict[str, Any], auxiliary: dict[str, Any], layer_map: list[int]
) -> list[str]:
    base_widths, auxiliary_widths = (
        [n * c["head_dim"] for n in c["num_kv_heads"]] for c in (base, auxiliary)
    )
    if len(layer_map) != len(base_widths) or not all(0 <= m < len(auxiliary_widths) for m in layer_map):
        expected_map = (
            f"{len(base_widths)} entries, one for each base layer, from 0 to {len(auxiliary_widths) - 1}"
        )
        return [f"layer map {layer_map} in the YAML, expected {expected_map}"]
    expected: dict[str, tuple[int, ...]] = {}
    for i, m in enumerate(layer_map):
        for kind in ("key", "value"):
            weight, bias = _map_names(kind, i)
            expected[weight] = (base_widths[i], auxiliary_widths[m])
            expected[bias] = (base_widths[i],)
    own = {k: v for k, v in shapes.items() if not k.startswith(("base.", "auxiliary."))}
    problems = [f"missing {name}" for name in expected if name not in own]
    problems += [f"unexpected {name} {shape}" for name, shape in own.items() if name not in expected]
    problems += [
        f"{name} has shape {own[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in own and own[name] != shape
    ]
    return [f"predictor: {problem}" for problem in problems]


def _raise(checkpoint: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{checkpoint}: " + "; ".join(problems))


def _map_names(kind: str, layer: int) -> tuple[str, str]:
    name = f"{corenet.PREDICTOR}{kind}_transforms.{layer}"
    return f"{name}.weight", f"{name}.bias"


def _blocks(shapes: openelm.Shapes, prefixes: list[str]) -> dict[str, dict[str, str]]:
    """For each block's module path: mlx-lm's parameter names to those of the state_dict."""
    blocks: dict[str, dict[str, str]] = {}
    for prefix in prefixes:
        for name in (n for n in shapes if n.startswith(prefix)):
            ours = prefix + openelm.mlx_lm_name(name.removeprefix(prefix))
            layer = re.match(r".*layers\.\d+(?=\.)", ours)
            blocks.setdefault(layer[0] if layer else ours.rpartition(".")[0], {})[ours] = name
    return blocks


def _fill(
    plan: _Plan,
    read: Callable[[str], mx.array],
    quantization: Quantization | None,
    advance: Callable[[int], None],
) -> None:
    for path, names in plan.blocks.items():
        plan.model.load_weights([(ours, read(name)) for ours, name in names.items()], strict=False)
        _finish(plan.model, path, quantization)
        advance(len(names))
    if isinstance(plan.model, Model):
        predictor = plan.model.predictor
        keys, values = (
            [
                (read(weight), read(bias))
                for weight, bias in map(partial(_map_names, kind), range(len(predictor.layer_map)))
            ]
            for kind in ("key", "value")
        )
        predictor.load_maps(keys, values)
        _finish(plan.model, "predictor", quantization)
        advance(4 * len(keys))


def _finish(model: nn.Module, path: str, quantization: Quantization | None) -> None:
    """Quantize and evaluate the block at `path`, so that its float copy is freed before the next."""
    if quantization is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints
            mlx_lm.utils.quantize_model(
                model,
                {},
                quantization.group_size,
                quantization.bits,
                quantization.mode,
                quant_predicate=lambda p, _: f"{p}.".startswith(f"{path}."),
            )
    parameters = dict(tree_flatten(model.parameters()))
    mx.eval([array for name, array in parameters.items() if name.startswith(f"{path}.")])
    mx.clear_cache()


def _check_vocabulary(tokenizer: Path, vocab_size: int) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).get_piece_size()
    if pieces > vocab_size:
        raise ValueError(f"{tokenizer} has {pieces} tokens, but the model's embedding has {vocab_size} rows")
