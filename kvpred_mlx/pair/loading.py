"""Load and save pairs, standalone or linked, in mlx-lm's flat directory format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvpred_mlx.errors import UnsupportedModelError, one_line
from kvpred_mlx.files import new_directory
from kvpred_mlx.pair.config import ModelArgs
from kvpred_mlx.pair.kept_layers import keep_layers
from kvpred_mlx.pair.links import ROLES, Link, sample_norms
from kvpred_mlx.pair.locating import find_model, find_pair, has_tokenizer, read_config, read_model_config
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.pair.saved_model import Model


def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: dict[str, Any] | None = None,
    *,
    lazy: bool = False,
    revision: str | None = None,
    base: str | None = None,
    auxiliary: str | None = None,
    force: bool = False,
) -> tuple[KVPredictionModel, TokenizerWrapper | None]:
    """Load a pair and its tokenizer from a directory or a Hugging Face repository.

    Returns:
        The model, and the tokenizer or None if the pair has none (it then takes token ids only).

    Args:
        base, auxiliary, force: see `load_model`.

    Raises:
        FileNotFoundError: no such directory, and no such repository could be fetched.
        ValueError: the directory does not hold a pair, or its weights are damaged or do not fit.
    """
    path = find_pair(path_or_hf_repo, revision)
    model = load_model(path, lazy=lazy, base=base, auxiliary=auxiliary, force=force)
    source = model.parts.by_role["base"].path if "base" in model.parts.by_role else path
    if not has_tokenizer(source):
        return model, None
    eos = read_config(path).get("eos_token_id", read_base_config(path, base).get("eos_token_id"))
    return model, mlx_lm.utils.load_tokenizer(source, tokenizer_config, eos_token_ids=eos)


def load_model(
    path: str | Path,
    *,
    lazy: bool = False,
    base: str | None = None,
    auxiliary: str | None = None,
    force: bool = False,
) -> KVPredictionModel:
    """Load a pair's model from a directory.

    Args:
        lazy: leave the weights on disk until they are first used.
        base, auxiliary: the same models from another place, or quantized otherwise; directories or Hugging Face
            repositories.
        force: take them, and linked ones, even if the predictor was fitted on others.

    Raises:
        FileNotFoundError: the directory, its config, its weights or one of its models are not there.
        ValueError: the config or the weights are damaged, do not fit each other, or belong to other models.
    """
    path = Path(path)
    config = read_config(path)
    replaced: dict[str, Any] = {}
    for role, place in (("base", base), ("auxiliary", auxiliary)):
        replaced |= _replacement(path, config, role, place, force)
    try:
        model, _ = mlx_lm.utils.load_model(
            path, lazy=lazy, model_config=replaced, get_model_classes=lambda config: (Model, ModelArgs)
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {one_line(error)}") from error
    except (UnsupportedModelError, OSError):
        raise
    except RuntimeError as error:  # mlx: a file that cannot be read, or ends early
        raise ValueError(f"{path}: damaged weights: {one_line(error)}") from error
    except Exception as error:  # mlx-lm's models look at no entry of a config before they use it
        raise ValueError(f"{path}: {one_line(error)}") from error
    return cast(KVPredictionModel, model)


def _replacement(
    path: Path, config: dict[str, Any], role: str, place: str | None, force: bool
) -> dict[str, Any]:
    """The entry of a config with which a model is loaded from another place, or without a check."""
    entry = config.get(role)
    if place is None and (not force or Link.of(entry) is None):
        return {}
    if entry is None or (role == "auxiliary" and config.get("auxiliary_layers")):
        raise ValueError(f"{path}: it reads with layers of its base, so there is no {role} to replace")
    linked = Link.of(entry) or Link("")
    if place is not None:
        linked = replace(linked, path_or_hf_repo=place, revision=None)
    return {role: asdict(replace(linked, checked=not force))}


def save(
    path: str | Path,
    model: KVPredictionModel,
    tokenizer: TokenizerWrapper | None = None,
    *,
    overwrite: bool = False,
    extras: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Save a pair as one flat mlx-lm directory; an interrupted save leaves nothing at `path`.

    Linked models are not copied (see `fuse`).

    Args:
        extras: called with the directory before it takes its place, to add files of its own.

    Raises:
        FileExistsError: `path` is there and `overwrite` is false, or it is not a model directory.
    """
    with new_directory(Path(path), overwrite) as directory:
        mlx_lm.utils.save_model(directory, _stored(model))
        mlx_lm.utils.save_config(pair_config(model, Path(path)), directory / "config.json")
        if tokenizer is not None and "base" not in model.parts.by_role:
            tokenizer.save_pretrained(directory)
        extras(directory)


def fuse(model: KVPredictionModel) -> None:
    """Let a pair hold its linked models itself: it is then saved with them, as one standalone directory."""
    _own(model, ROLES)


def own_auxiliary(model: KVPredictionModel) -> None:
    """Let a pair hold its auxiliary itself, whose weights are about to be trained."""
    _own(model, ("auxiliary",))
    if model.args is not None:
        model.args = replace(model.args, auxiliary_layers=None)


def _own(model: KVPredictionModel, roles: Sequence[str]) -> None:
    args, base = model.args, model.parts.config("base")
    if args is None:
        return
    if args.auxiliary is None and args.auxiliary_layers and base is not None:
        args = replace(args, auxiliary=keep_layers(model.base, base, args.auxiliary_layers)[1])
    for role in roles:
        part = model.parts.by_role.pop(role, None)
        if part is not None:
            args = args.with_models({role: part.config})
    model.args = args


def _stored(model: KVPredictionModel) -> nn.Module:
    """The parts whose weights are written: not linked models, nor an auxiliary's weights that are the base's own."""
    linked = model.parts.by_role
    shared = model.args is not None and model.args.auxiliary_layers
    if not linked and not shared:
        return model
    stored, norms = nn.Module(), {}
    for role in ROLES:
        module = getattr(model, role)
        if role in linked:
            norms[role] = sample_norms(linked[role].weights)
        elif module is not None and not (role == "auxiliary" and shared):
            stored[role] = module
    stored.predictor = model.predictor
    if norms:
        stored.norms = norms
    return stored


def pair_config(model: KVPredictionModel, path: Path | None = None) -> dict[str, Any]:
    """The `config.json` of a pair (see `ModelArgs`), with the quantization that its modules have.

    Args:
        path: where it is saved, to which the paths of links are relative.
    """
    config: dict[str, Any] = {"model_type": "kvpred", "base": _entry(model, "base", path)}
    if isinstance(model.predictor, FirstLayersPredictor):
        config["first_layers"] = list(model.predictor.depths)
    else:
        if model.args is None or model.args.auxiliary is not None:
            config["auxiliary"] = _entry(model, "auxiliary", path)
        config |= {"layer_map": list(model.predictor.layer_map), "source": model.predictor.source}
        if model.args and model.args.auxiliary_layers:
            config["auxiliary_layers"] = model.args.auxiliary_layers
    config["min_prompt_tokens"] = model.min_prompt_tokens
    if model.exact_positions:
        config["exact_positions"] = model.exact_positions.as_dict()
    return config | quantization_config(_stored(model))


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization` entry of a model's config, {} if no module is quantized.

    mlx-lm reads each layer's own settings off its shapes; these are only the defaults.
    """
    quantized = [m for _, m in model.named_modules() if "scales" in m and hasattr(m, "bits")]
    if not quantized:
        return {}
    first = quantized[0]
    return {"quantization": {"group_size": first.group_size, "bits": first.bits, "mode": first.mode}}


def read_base_config(path: Path, base: str | None = None) -> dict[str, Any]:
    """The `config.json` of a pair's base, wherever it is.

    Args:
        base: the place that it is taken from instead (see `load_model`).

    Raises:
        FileNotFoundError, ValueError: it is not there, or no config.
    """
    entry = read_config(path)["base"]
    link = Link.of(entry) if base is None else Link(base)
    return entry if link is None else read_model_config(find_model(link.path_or_hf_repo, link.revision))


def context_length(base_config: dict[str, Any]) -> int | None:
    """How many tokens a base was made for, if its config says so."""
    for part in (base_config, base_config.get("text_config", {})):
        for name in ("max_position_embeddings", "max_context_length", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(part.get(name), int):
                return part[name]
    return None


def _entry(model: KVPredictionModel, role: str, path: Path | None) -> dict[str, Any]:
    """What a pair's config says of a model: a link, or its own config."""
    if model.args is None:
        return asdict(getattr(model, role).args)
    link = model.args.link(role)
    return dict(getattr(model.args, role)) if link is None else link.entry(path)
