"""Linked pairs: a config that names its models, and weights that hold the predictor alone.

A *link* stands in a pair's `config.json` where a standalone pair has a model's config:

    "base": {"path_or_hf_repo": "mlx-community/Qwen2.5-Coder-1.5B-Instruct-4bit", "revision": "3f4a9...",
             "layers": 28, "kv_widths": [[256, 256], ...]}

A path is relative to the pair's directory.  What a model's quantization leaves alone tells whether it is the model that
the predictor was fitted on: its layers, the widths of its keys and values, and some values of each of its vectors
(norms and biases), which are kept beside the predictor's weights as `norms.base` and `norms.auxiliary`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_flatten

from kvpred_mlx.errors import one_line
from kvpred_mlx.pair.locating import find_model, is_repository, read_model_config, revision_of
from kvpred_mlx.taps.kv_taps import KVTaps

ROLES = ("base", "auxiliary")
SAMPLE = 32  # values of a vector that are kept
ROUNDED = 0.005  # relative: bfloat16 rounds by at most 0.004
NOTHING = 1e-5


@dataclass(frozen=True)
class Link:
    """Which model a pair has in a role.

    Args:
        path_or_hf_repo: a directory, or a Hugging Face repository.
        revision: the commit of that repository (None: its newest).
        layers, kv_widths: of the model that the predictor was fitted on (None: not known).
        checked: whether another model is refused.

    Raises:
        ValueError: an entry is not of its type.
    """

    path_or_hf_repo: str
    revision: str | None = None
    layers: int | None = None
    kv_widths: list[list[int]] | None = None
    checked: bool = True

    def __post_init__(self) -> None:
        kinds = {
            "path_or_hf_repo": str,
            "revision": str | None,
            "layers": int | None,
            "kv_widths": list | None,
        }
        wrong = [n for n, kind in kinds.items() if not isinstance(getattr(self, n), kind)]
        if wrong:
            found = ", ".join(f"{name} is {getattr(self, name)!r}" for name in wrong)
            raise ValueError(f"config.json: in the link to a model {found}, expected {_EXPECTED}")

    @classmethod
    def of(cls, entry: Any) -> Link | None:
        """The link that a config's entry is; None if it is a model's config."""
        if not isinstance(entry, dict) or "path_or_hf_repo" not in entry:
            return None
        return cls(**{k: v for k, v in entry.items() if k in cls.__dataclass_fields__})

    @classmethod
    def to(cls, name: str, path: Path, taps: KVTaps) -> Link:
        """A link to a model that is loaded: by `name` if that is a repository's, else by its path."""
        hub = is_repository(name) and not Path(name).exists()
        widths = [list(w) for w in taps.widths]
        place = name if hub else str(path.absolute())
        return cls(place, revision_of(path) if hub else None, len(taps.model.layers), widths)

    def entry(self, relative_to: Path | None = None) -> dict[str, Any]:
        """As it stands in a `config.json` in the directory `relative_to`."""
        entry = {k: v for k, v in asdict(self).items() if k != "checked" and v is not None}
        path = Path(self.path_or_hf_repo)
        if relative_to is not None and path.is_absolute():
            entry["path_or_hf_repo"] = os.path.relpath(path.resolve(), relative_to.resolve())
        return entry


_EXPECTED = "path_or_hf_repo and revision as text, layers as a number, kv_widths as a list"


@dataclass(eq=False)
class Part:
    """A model that a pair is made of.

    Args:
        path: its directory.
        config: its `config.json`.
        taps: of the model.
    """

    path: Path
    config: dict[str, Any]
    taps: KVTaps

    @property
    def weights(self) -> dict[str, mx.array]:
        """All its arrays by name."""
        return dict(tree_flatten(self.taps.model.parameters()))


@dataclass
class Parts:
    """The linked models of a pair, by role."""

    by_role: dict[str, Part] = field(default_factory=dict)

    def config(self, role: str) -> dict[str, Any] | None:
        """The config of a linked model."""
        return self.by_role[role].config if role in self.by_role else None


_open: WeakValueDictionary[tuple[Any, ...], Part] = WeakValueDictionary()


def open_part(link: Link, role: str) -> Part:
    """The model of a link, from disk only as it is used; pairs that are alive at the same time share it.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is a pair, damaged, or of another shape than the model that the predictor was fitted on.
        UnsupportedModelError: it cannot be tapped.
    """
    try:
        path = find_model(link.path_or_hf_repo, link.revision)
        files = sorted((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in path.glob("model*"))
        key = (path.resolve(), tuple(files))
        part = _open.get(key)
        if part is None:
            model, config = load_single(path)
            part = Part(path, config, KVTaps(model))
            _open[key] = part
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the {role} of the pair: {error}; --{role} names another place") from error
    if link.checked:
        _check_shape(link, role, part.taps)
    return part


def load_single(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Any mlx-lm model of a directory, its weights left on disk until they are used, and its config.

    Raises:
        FileNotFoundError: it has no config or no weights.
        ValueError: it is a pair, or it is damaged, or mlx-lm does not know its kind.
    """
    if read_model_config(path).get("model_type") == "kvpred":
        raise ValueError(f"{path}: it is a pair already, expected a single model")
    try:
        return mlx_lm.utils.load_model(path, lazy=True)
    except OSError:
        raise
    except Exception as error:  # mlx-lm's models look at no entry of a config before they use it
        raise ValueError(f"{path}: {one_line(error)}") from error


def sample_norms(weights: Mapping[str, mx.array]) -> mx.array:
    """`SAMPLE` values, evenly spread, of each vector among a model's weights `[vectors, SAMPLE]`, by name."""
    vectors = (weights[n] for n in vector_names(weights))
    picked = [v[mx.array(np.linspace(0, v.size - 1, SAMPLE).astype(int))] for v in vectors]
    return mx.stack([p.astype(mx.float32) for p in picked]) if picked else mx.zeros((0, SAMPLE))


def vector_names(weights: Mapping[str, mx.array]) -> list[str]:
    """The names of norms and biases, in order."""
    return sorted(name for name, array in weights.items() if is_vector(array))


def is_vector(array: mx.array) -> bool:
    """Whether a weight is a norm's or a bias, which no quantization touches."""
    return array.ndim == 1 and mx.issubdtype(array.dtype, mx.floating)


def float_type(model: nn.Module) -> mx.Dtype:
    """Of a model's norms and other weights that are not quantized."""
    arrays = dict(tree_flatten(model.parameters())).values()
    return next((a.dtype for a in arrays if mx.issubdtype(a.dtype, mx.floating)), mx.float32)


def check_norms(link: Link, role: str, expected: mx.array, weights: Mapping[str, mx.array]) -> None:
    """Refuse another model than the one whose vectors were kept.

    Raises:
        ValueError: naming a vector that differs.
    """
    found, names = sample_norms(weights), vector_names(weights)
    if found.shape != expected.shape:
        raise _other(link, role, f"it has {len(found)} norms and biases, expected {len(expected)}")
    near = mx.abs(found - expected) <= ROUNDED * mx.abs(expected) + NOTHING
    differ = np.array(mx.any(~near, axis=1))
    if differ.any():
        first = int(differ.argmax())
        values, wanted = (", ".join(f"{v:.3g}" for v in np.array(a[first])[:3]) for a in (found, expected))
        what = (
            f"{differ.sum()} of {len(names)} norms and biases differ, "
            f"{names[first]} is {values}, ..., expected {wanted}, ..."
        )
        raise _other(link, role, what)


def _check_shape(link: Link, role: str, taps: KVTaps) -> None:
    layers, widths = len(taps.model.layers), [list(w) for w in taps.widths]
    if link.layers is not None and layers != link.layers:
        raise _other(link, role, f"it has {layers} layers, expected {link.layers}")
    if link.kv_widths is not None and widths != link.kv_widths:
        different = [(a, b) for a, b in zip(widths, link.kv_widths, strict=False) if a != b]
        found, wanted = different[0] if different else (len(widths), len(link.kv_widths))
        raise _other(link, role, f"its keys and values are {found} wide, expected {wanted}")


def _other(link: Link, role: str, what: str) -> ValueError:
    return ValueError(
        f"{link.path_or_hf_repo} is not the {role} that the predictor was fitted on: {what} "
        "(--force takes it all the same)"
    )
