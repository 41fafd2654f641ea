"""What models make of a fixed set of windows, on disk: recorded once, read as often as one likes.

A recording holds, for every window, the prompt's features and the base's raw keys and values, and the exact base's
most likely tokens with their probabilities at every scored position.  Arrays are memory-mapped; keys and values are
stored in half precision, less their means.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.files import write_file
from kvpred_mlx.making.windows import Windows
from kvpred_mlx.pair import sources
from kvpred_mlx.pair.description import norms_checksum
from kvpred_mlx.pair.model import KVPredictionModel
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.progress import ProgressCallback, no_progress
from kvpred_mlx.taps.kv import KV

FACTS = "recording.json"
TOP = 64  # tokens of each distribution that are kept; the others' probability is one number
Batch = dict[str, mx.array]


@dataclass(frozen=True)
class Layout:
    """Where things stand in a recording's rows.

    Args:
        kv: (key width, value width) of each base KV layer, side by side in this order.
        features: name and width of each feature array.
        models: checksums that tell them from others (`norms_checksum`).
    """

    kv: Sequence[tuple[int, int]]
    features: Mapping[str, int]
    models: Sequence[int] = ()

    def split_kv(self, kv: mx.array) -> list[KV]:
        """Recorded keys and values [B, L, widths] layer by layer."""
        ends = np.cumsum([w for widths in self.kv for w in widths])[:-1].tolist()
        parts: Any = mx.split(kv, ends, axis=-1)
        return [KV(k, v) for k, v in zip(parts[::2], parts[1::2], strict=True)]

    @classmethod
    def of(cls, pair: KVPredictionModel) -> Layout:
        """What a pair's predictor reads, and the keys and values of its base."""
        widths: dict[str, int]
        if isinstance(pair.predictor, FirstLayersPredictor):
            widths = {f"layer_{k}": pair.base_taps.input_widths[k] for k in pair.predictor.depths}
        else:
            taken = sources.feature_widths(pair.predictor.source, pair.auxiliary_taps)
            arrays = 2 if pair.predictor.source == "kv" else 1
            widths = {
                f"layer_{j}_{a}": taken[j][a] for j in pair.predictor.auxiliary_layers for a in range(arrays)
            }
        read = [pair.base] if pair.auxiliary is None else [pair.base, pair.auxiliary]
        return cls(pair.base_taps.widths, widths, [norms_checksum(model) for model in read])


def record(
    pair: KVPredictionModel,
    windows: Windows,
    folder: Path,
    *,
    batch_size: int | None = None,
    progress: ProgressCallback = no_progress,
) -> Recording:
    """Record windows; what an interrupted recording has already is not computed again.

    Args:
        pair: its base is run once over every window; of its predictor only the features' names count.
        folder: made if it is not there.
        batch_size: windows side by side (default: `windows.at_once`).
        progress: called with the number of windows done and their total.

    Raises:
        ValueError: `folder` holds a recording of other windows or of another pair.
    """
    recording = Recording.begin(folder, Layout.of(pair), windows)
    batch_size = windows.at_once if batch_size is None else batch_size
    for start in range(recording.done, len(windows), batch_size):
        progress(start, len(windows), "recording")
        rows = slice(start, min(start + batch_size, len(windows)))
        prompts, continuations = mx.array(windows.prompts[rows]), mx.array(windows.continuations[rows])
        recording.write(rows, **observe(pair, prompts, continuations))
    progress(len(windows), len(windows), "recording")
    return recording


def observe(pair: KVPredictionModel, prompts: mx.array, continuations: mx.array) -> dict[str, Any]:
    """What a recording keeps of some windows, `[B, P]` and `[B, N]`; only the passes over prompts are evaluated."""
    cache, inputs = make_prompt_cache(pair.base), list[mx.array]()
    kv, _ = pair.base_taps.record(prompts[:, :-1], cache, inputs=inputs)
    if isinstance(pair.predictor, FirstLayersPredictor):
        features = {f"layer_{k}": inputs[k] for k in pair.predictor.depths}
    else:
        read, _ = sources.record(pair.predictor.source, pair.auxiliary_taps, prompts[:, :-1])
        features = {
            f"layer_{j}_{a}": array
            for j in pair.predictor.auxiliary_layers
            for a, array in enumerate(read[j])
        }
    whole = mx.concatenate([a for layer in kv for a in layer], axis=-1).astype(mx.float32)
    mx.eval(whole, features, [c.state for c in cache])
    answers = mx.concatenate([prompts[:, -1:], continuations[:, :-1]], axis=1)
    logits = pair.base(answers, cache=cache).astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    top = mx.argpartition(-logprobs, kth=TOP - 1, axis=-1)[..., :TOP] if logits.shape[-1] > TOP else None
    ids = mx.broadcast_to(mx.arange(logits.shape[-1]), logits.shape) if top is None else top
    order = mx.argsort(-mx.take_along_axis(logprobs, ids, axis=-1), axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1)
    without = pair.base(answers, cache=make_prompt_cache(pair.base)).astype(mx.float32)
    return {
        "losses": nn.losses.cross_entropy(logits, continuations),
        "losses_without": nn.losses.cross_entropy(without, continuations),
        "kv": whole,
        "features": features,
        "top_ids": ids,
        "top_logprobs": mx.take_along_axis(logprobs, ids, axis=-1),
    }


class Recording:
    """Windows and what models made of them (see `record`).

    Args:
        folder: that holds it.

    Raises:
        FileNotFoundError: there is no recording.
        ValueError: it is damaged.
    """

    def __init__(self, folder: Path):
        place = folder / FACTS
        if not place.is_file():
            raise FileNotFoundError(f"{folder}: no {FACTS}, so not a recording")
        try:
            self._facts = json.loads(place.read_text())
            self.done: int = self._facts["done"]
            kv = [(k, v) for k, v in self._facts["kv"]]
            self.layout = Layout(kv, self._facts["features"], self._facts["models"])
            self._arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in self._facts["arrays"]
            }
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{folder}: damaged recording: {error}") from error
        self.folder = folder

    @classmethod
    def begin(cls, folder: Path, layout: Layout, windows: Windows) -> Recording:
        """A new recording, or the one that is there if it is of the same windows and arrays."""
        facts = {
            "kv": [list(widths) for widths in layout.kv],
            "features": dict(layout.features),
            "models": list(layout.models),
            "windows": zlib.crc32(
                np.hstack([windows.prompts, windows.continuations]).astype(np.int64).tobytes()
            ),
        }
        if (folder / FACTS).is_file():
            there = cls(folder)
            differ = [k for k, v in facts.items() if there._facts[k] != v]
            if differ:
                raise ValueError(
                    f"{folder} holds a recording with other {' and '.join(differ)}: give another folder"
                )
            return there
        count, prompt = windows.prompts.shape
        scored = windows.continuations.shape[1]
        width = sum(sum(widths) for widths in layout.kv)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "prompts": ((count, prompt), np.int32),
            "continuations": ((count, scored), np.int32),
            "documents": ((count,), np.int32),
            "kv_means": ((width,), np.float32),
            "kv": ((count, prompt - 1, width), np.float16),
            "top_ids": ((count, scored, TOP), np.int32),
            "top_logprobs": ((count, scored, TOP), np.float32),
            "losses": ((count, scored), np.float32),
            "losses_without": ((count, scored), np.float32),
        }
        shapes |= {name: ((count, prompt - 1, w), np.float16) for name, w in layout.features.items()}
        folder.mkdir(parents=True, exist_ok=True)
        for name, (shape, dtype) in shapes.items():
            array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
            if name in ("prompts", "continuations", "documents"):
                array[:] = getattr(windows, name)
            array.flush()
        write_json(folder / FACTS, facts | {"arrays": list(shapes), "done": 0})  # last: now it is a recording
        return cls(folder)

    def write(
        self, rows: slice, *, kv: mx.array, features: Mapping[str, mx.array], **scores: mx.array
    ) -> None:
        """Add windows, the next ones; they count once everything of them is on disk."""
        arrays = self._arrays
        values = np.array(kv)
        if rows.start == 0:
            arrays["kv_means"][:] = values.mean(axis=(0, 1))
        arrays["kv"][rows] = values - arrays["kv_means"]
        for name, array in features.items():
            arrays[name][rows] = np.array(array.astype(mx.float32))
        for name, array in scores.items():
            arrays[name][rows, ..., : array.shape[-1]] = np.array(array)
            arrays[name][rows, ..., array.shape[-1] :] = -np.inf if name == "top_logprobs" else 0
        for array in arrays.values():
            array.flush()
        self.done = rows.stop
        self._facts["done"] = self.done
        write_json(self.folder / FACTS, self._facts)

    def __len__(self) -> int:
        return self.done

    @property
    def tokens_per_row(self) -> int:
        """Tokens of a window."""
        return self._arrays["prompts"].shape[1] + self._arrays["continuations"].shape[1]

    @property
    def documents(self) -> np.ndarray:
        """Which document each window is from, `[W]`."""
        return np.array(self._arrays["documents"][: self.done])

    def checksum(self) -> int:
        """Of the windows."""
        return int(self._facts["windows"])

    def rows(self, chosen: Any, features: Sequence[str] | None = None) -> Batch:
        """Some windows: `prompts` [B, P], `continuations` [B, N], `kv` [B, P - 1, widths], the features, and the
        exact base's `top_ids` and `top_logprobs` [B, N, TOP] and its `losses` [B, N], also those without the prompt.

        Args:
            features: which ones (default: all).
        """
        names = list(self.layout.features) if features is None else list(features)
        plain = ("prompts", "continuations", "top_ids", "top_logprobs", "losses", "losses_without")
        batch = {name: mx.array(self._arrays[name][chosen]) for name in plain}
        batch["kv"] = mx.array(self._arrays["kv"][chosen]).astype(mx.float32) + mx.array(
            self._arrays["kv_means"]
        )
        return batch | {name: mx.array(self._arrays[name][chosen]).astype(mx.float32) for name in names}

    def batch(self, index: int, batch_size: int, seed: int) -> Batch:
        """Batch number `index` of the recorded windows (see `draw`)."""
        return self.rows(draw(len(self), index, batch_size, seed))


def draw(count: int, index: int, batch_size: int, seed: int) -> list[int]:
    """Batch number `index` of `count` windows: every one once an epoch, in an order of its own."""
    places = range(index * batch_size, (index + 1) * batch_size)
    orders = {e: np.random.default_rng([seed, e]).permutation(count) for e in {p // count for p in places}}
    return [int(orders[p // count][p % count]) for p in places]


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write beside, then rename."""
    write_file(path, lambda beside: beside.write_text(json.dumps(facts)))
