"""Read CoreNet's checkpoints: a PyTorch `state_dict` and the training YAML beside it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import yaml

from kvpred_mlx.errors import one_line

T = TypeVar("T")
PREDICTOR = "predicter.auxkv_to_basekv."  # CoreNet's spelling


@dataclass(frozen=True)
class TrainingConfig:
    """What a conversion needs of CoreNet's YAML.

    Args:
        base_name: CoreNet's name of the (base) architecture, e.g. `OpenELM-1_1B`.
        auxiliary_name: the same of the auxiliary, None for a plain checkpoint.
        layer_map: `auxkv_num_layers_to_basekv_num_layers`, None for a plain checkpoint.
        vocab_size: rows of the token embedding.
        context_length: `max_context_length`, in tokens.
    """

    base_name: str | None = None
    auxiliary_name: str | None = None
    layer_map: list[int] | None = None
    vocab_size: int | None = None
    context_length: int | None = None


def read_yaml(path: Path) -> TrainingConfig:
    """Read CoreNet's training YAML.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not YAML, or describes no language model.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    models = _get(content, "model", "language_modeling")
    if not isinstance(models, dict):
        raise ValueError(f"{path}: no model.language_modeling section, expected a CoreNet training YAML")
    pair, gpt = (_entry(path, models, name, dict) or {} for name in ("kv_prediction", "general_gpt"))
    layer_map = _entry(path, pair, "auxkv_num_layers_to_basekv_num_layers", list)
    if layer_map is not None and not all(type(m) is int for m in layer_map):
        raise ValueError(
            f"{path}: auxkv_num_layers_to_basekv_num_layers is {layer_map!r}, expected a list of ints"
        )
    return TrainingConfig(
        base_name=_nested_name(path, pair.get("base_model")) or _entry(path, gpt, "model_name", str),
        auxiliary_name=_nested_name(path, pair.get("auxiliary_model")),
        layer_map=layer_map,
        vocab_size=_entry(path, gpt, "vocab_size", int),
        context_length=_entry(path, gpt, "max_context_length", int),
    )


class Checkpoint:
    """The tensors of a `.pt` file, which stay on disk until they are taken.

    The state_dict may be nested under a key such as `model_state_dict`, and its names may begin with
    `module.`.  No code from the file is run.

    Raises:
        FileNotFoundError: no such file.
        ImportError: torch is not installed.
        ValueError: the file is damaged, needs code to unpickle, or holds no state_dict.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            what = "a directory" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"{path}: {what}, expected a .pt file")
        content, self._mapped = _load(path)
        state = _state_dict(content)
        if state is None:
            raise ValueError(f"{path}: holds no state_dict (a dict of named tensors)")
        self._tensors = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        self.path = path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each tensor's shape, by CoreNet's parameter name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def take(self, name: str, dtype: mx.Dtype | None = None) -> mx.array:
        """Copy a tensor into an MLX array, and drop its pages of the mapped file from memory."""
        tensor = self._tensors[name]
        array = mx.array(tensor)
        array = array if dtype is None else array.astype(dtype)
        mx.eval(array)
        if self._mapped:
            _drop_pages(tensor.untyped_storage())
        return array


def _drop_pages(storage: Any) -> None:
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    with contextlib.suppress(AttributeError, OSError):  # only advice, and not on every system
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _load(path: Path) -> tuple[Any, bool]:
    """What torch reads, and whether its tensors are mapped from the file."""
    try:
        import torch
    except ImportError as error:
        raise ImportError("reading .pt files needs PyTorch: pip install 'kvpred-mlx[convert]'") from error
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that it might not read
            if zipfile.is_zipfile(path):
                return torch.load(path, mmap=True, **options), True
            return torch.load(path, **options), False  # the format before zip files cannot be mapped
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).partition("WeightsUnpickler error: ")[2].split())
        if reason:
            raise ValueError(f"{path}: refused, unpickling it could run code ({reason})") from error
        raise ValueError(f"{path}: damaged, or not a PyTorch checkpoint") from error
    except Exception as error:  # it checks little of what it reads, and trips over the rest in any way
        raise ValueError(f"{path}: damaged, or not a PyTorch checkpoint: {one_line(error)}") from error


def _state_dict(content: Any) -> dict[str, Any] | None:
    """The first dict of nothing but named tensors, searched breadth first through nested dicts."""
    queue = [content]
    while queue:
        node = queue.pop(0)
        if not isinstance(node, Mapping):
            continue
        tensors = {k: v for k, v in node.items() if isinstance(k, str) and hasattr(v, "untyped_storage")}
        if tensors and len(tensors) == len(node):
            return tensors
        queue.extend(node.values())
    return None


def _nested_name(path: Path, models: Any) -> str | None:
    """The name of the first of the models that a section of a YAML file lists."""
    first = models[0] if isinstance(models, list) and models else None
    gpt = _get(first, "model", "language_modeling", "general_gpt")
    return _entry(path, gpt, "model_name", str) if isinstance(gpt, dict) else None


def _entry(path: Path, section: dict[str, Any], key: str, kind: type[T]) -> T | None:
    """An entry of a YAML file's section, None if it is not there.

    Raises:
        ValueError: it is something else.
    """
    value = section.get(key)
    if value is not None and type(value) is not kind:
        expected = {dict: "a section", list: "a list of ints", str: "a name", int: "a number"}[kind]
        raise ValueError(f"{path}: {key} is {value!r}, expected {expected}")
    return value


def _get(node: Any, *keys: str) -> Any:
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node
