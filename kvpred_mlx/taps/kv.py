"""Raw keys and values, as taps record and inject them."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class KV(NamedTuple):
    """Raw keys and values of one layer, heads merged: `[B, L, key width]` and `[B, L, value width]`."""

    keys: mx.array
    values: mx.array
