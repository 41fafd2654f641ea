"""What a command opens: a pair, its tokenizer, its context length, in the mode that was asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvpred_mlx.cli.dial import set_dial

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from kvpred_mlx.pair.model import KVPredictionModel

DEMO_NOTE = "Using the bundled demo pair: 8 M parameters, it writes Python-shaped text. --model takes others."


@dataclass
class OpenedPair:
    """A pair that a command works with.

    Args:
        name: what was given as `--model`, the bundled pair's name, or a preset's.
        path: its directory (None: a preset, which is nowhere).
        pair: the model.
        context: tokens of prompt and answer that its base was made for (None: not stated).
        read_with: its tokenizer, if it has one.
    """

    name: str
    path: Path | None
    pair: KVPredictionModel
    context: int | None = None
    read_with: TokenizerWrapper | None = None

    @property
    def short_name(self) -> str:
        """What results and their folders call it: the directory's own name."""
        return self.name if self.path is None else self.path.name

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer, for a command that cannot do without.

        Raises:
            ValueError: there is none.
        """
        if self.read_with is None:
            raise ValueError(
                f"{self.path or self.name}: the pair has no tokenizer, so it takes token ids only "
                "(see the Python API)"
            )
        return self.read_with


def one_pair(model: str | None, pair: str | None) -> str | None:
    """The pair that is given as `--model PAIR` or as a bare word."""
    if model is not None and pair is not None:
        raise typer.BadParameter(f"{model!r}, and {pair!r} too, expected one pair", param_hint="--model")
    return pair if model is None else model


def locate(model: str | Path | None) -> tuple[str, Path]:
    """A pair's name as it was given, and its directory; the bundled pair's without `model`.

    Raises:
        FileNotFoundError: no such directory, and no such repository could be fetched.
    """
    from kvpred_mlx.pair.locating import DEMO_PAIR, find_pair

    path = find_pair(model or DEMO_PAIR)
    return str(model or path.name), path


def preset_name(preset: str) -> str:
    """A preset's full name."""
    from kvpred_mlx.bench.common.presets import find_preset

    try:
        return find_preset(preset).name
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--preset") from error


@dataclass(frozen=True)
class OtherModels:
    """Models in the place of a pair's own (see `kvpred_mlx.pair.loading.load`)."""

    base: str | None = None
    auxiliary: str | None = None
    force: bool = False


def open_pair(
    model: str | Path | None,
    others: OtherModels = OtherModels(),
    *,
    exact: bool = False,
    dial: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> OpenedPair:
    """Load a pair, the bundled one without `model`, and put it in a mode.

    Args:
        others: models in the place of its own.
        exact: the base alone.
        dial: exact positions in the place of the pair's own (see `kvpred_mlx.cli.dial.dial`).
        tokenizer_config: as mlx-lm's `load` takes it.

    Raises:
        FileNotFoundError: no such directory, and no such repository could be fetched.
        ValueError: the directory does not hold a pair, or it cannot do what the dial asks for.
    """
    from kvpred_mlx.pair.loading import context_length, load, read_base_config

    name, path = locate(model)
    pair, tokenizer = load(path, tokenizer_config, **asdict(others))
    pair.exact = exact
    set_dial(pair, dial or {})
    return OpenedPair(name, path, pair, context_length(read_base_config(path, others.base)), tokenizer)


def open_for_measuring(
    model: str | Path | None,
    preset: str | None,
    dtype: str | None,
    seed: int = 0,
    dial: dict[str, Any] | None = None,
    others: OtherModels = OtherModels(),
) -> OpenedPair:
    """A pair, or a preset's with random weights, in the type that was asked for."""
    import mlx.core as mx

    if preset is None:
        opened = open_pair(model, others, dial=dial)
        if dtype is not None:
            opened.pair.set_dtype(getattr(mx, dtype))
            mx.eval(opened.pair.parameters())
        return opened
    from kvpred_mlx.bench.common.presets import build_preset
    from kvpred_mlx.scans.when import on_cpu

    name = preset_name(preset)
    default = "float32" if on_cpu() else "bfloat16"
    opened = OpenedPair(name, None, build_preset(preset, getattr(mx, dtype or default), seed))
    set_dial(opened.pair, dial or {})
    return opened


def beside_another(model: str, opened: OpenedPair, dtype: str | None = None) -> KVPredictionModel:
    """Another pair on the base that `opened` has already.

    Raises:
        FileNotFoundError: no such pair.
        ValueError: it is of another base.
    """
    import mlx.core as mx

    from kvpred_mlx.pair.description import norms_checksum
    from kvpred_mlx.pair.loading import load_model
    from kvpred_mlx.pair.model import KVPredictionModel

    linked = opened.pair.parts.by_role.get("base")
    base = None if linked is None else str(linked.path)
    other = load_model(locate(model)[1], lazy=True, base=base)  # its own base is never read
    if base is None and norms_checksum(other.base) != norms_checksum(opened.pair.base):
        raise ValueError(f"{model}: of another base than {opened.name}")
    auxiliary = None if other.auxiliary is None else other.auxiliary_taps
    made = KVPredictionModel(opened.pair.base_taps, auxiliary, other.predictor, other.min_prompt_tokens)
    if dtype is not None:
        made.set_dtype(getattr(mx, dtype))
    mx.eval(made.parameters())
    return made


def use_default_template(tokenizer: TokenizerWrapper) -> None:
    """mlx-lm's `--use-default-chat-template`: that of the tokenizer's class, if it has no other and there is one."""
    default = getattr(tokenizer, "default_chat_template", None)
    if not tokenizer.has_chat_template and default is not None:
        tokenizer.chat_template = default
        tokenizer.has_chat_template = True
