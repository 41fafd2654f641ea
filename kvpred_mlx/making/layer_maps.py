"""Which auxiliary layer each base layer is predicted from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

WINDOW = 2


def even(n_base: int, n_auxiliary: int) -> list[int]:
    """The published maps' rule, from the numbers of layers alone.

    If the auxiliary could be the base without every k-th layer, each base layer reads itself, and a missing
    one its predecessor.  Otherwise each auxiliary layer serves neighbours, the first ones one more than the last.
    """
    missing = n_base - n_auxiliary
    if missing <= 0:
        return [i * n_auxiliary // n_base for i in range(n_base)]
    if n_base % missing == 0:
        k = n_base // missing
        return [i - (i + 1) // k for i in range(n_base)]
    return [j for j, served in enumerate(np.array_split(range(n_base), n_auxiliary)) for _ in served]


def candidates(n_base: int, n_auxiliary: int) -> list[list[int]]:
    """For each base layer the auxiliary layers that `auto` tries: those near the even map's, `WINDOW` either way.

    The window bounds the memory of the fit: sums are kept for every candidate.
    """
    near = even(n_base, n_auxiliary)
    return [[j for j in range(n_auxiliary) if abs(j - m) <= WINDOW] for m in near]


def parse(text: str, n_base: int, n_auxiliary: int) -> list[int] | None:
    """The map that `--layer-map` names; None for `auto`.

    Raises:
        ValueError: it is no map of these models.
    """
    if text == "auto":
        return None
    if text == "even":
        return even(n_base, n_auxiliary)
    words = [word.strip() for word in text.split(",")]
    entries = [int(word) if word.isascii() and word.isdigit() else -1 for word in words]
    if len(entries) != n_base or not all(0 <= m < n_auxiliary for m in entries):
        raise ValueError(
            f"layer map {text!r}, expected auto, even, or {n_base} auxiliary layers from 0 to {n_auxiliary - 1}"
        )
    return entries


def kept_layers(text: str, n_layers: int) -> list[int]:
    """The base layers that a layer-pruned auxiliary keeps (paper, KVP-LP): a share, or a list 0,4,8,...

    The share 0.25 keeps every fourth layer, 0.5 every second, 0.75 all but every fourth.

    Raises:
        ValueError: neither.
    """
    shares = {0.25: lambda i: i % 4 == 0, 0.5: lambda i: i % 2 == 0, 0.75: lambda i: i % 4 != 3}
    try:
        if "," not in text and "." in text:
            return [i for i in range(n_layers) if shares[float(text)](i)]
        kept = [int(word) for word in text.split(",")]
    except (ValueError, KeyError):
        kept = []
    if not kept or not _ascending(kept) or kept[-1] >= n_layers or kept[0] < 0:
        raise ValueError(
            f"auxiliary layers {text!r}, expected 0.25, 0.5, 0.75 or an ascending list of layers 0 to {n_layers - 1}"
        )
    return kept


def first_layers(text: str, n_layers: int) -> list[int]:
    """The depths that `first:14`, `first:0.5` or `first:8,0.5` name, of a base with `n_layers` KV layers, ascending.

    Raises:
        ValueError: it names none, or a depth that leaves no layer to predict.
    """
    words = text.removeprefix("first:").split(",")
    try:
        depths = sorted({round(float(w) * n_layers) if "." in w else int(w) for w in words})
    except ValueError:
        depths = []
    if not text.startswith("first:") or not depths or depths[0] < 1 or depths[-1] > n_layers - 2:
        raise ValueError(
            f"auxiliary layers {text!r}, expected first: and numbers of layers from 1 to {n_layers - 2}, or shares "
            "such as first:0.5"
        )
    return depths


def _ascending(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))
