"""Tokens in the middle of a filled cache, processed again: each is a row of a batch of its own.

mlx-lm's models serve batches whose rows stand at different positions.  So the chosen tokens of a prompt go through the
model as a batch of one-token rows, with cache entries that give each row its own position and its own view of the
*one* stored cache, and that overwrite the stored keys and values.  No attention code knows of it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from kvpred_mlx.errors import UnsupportedModelError
from kvpred_mlx.taps.attention import AttentionCalls
from kvpred_mlx.taps.kv import KV
from kvpred_mlx.taps.kv_taps import KVTaps

PROBE_TOKENS = (5, 12)  # exact ones, then ones that are processed as rows


class ExactRows:
    """Makes entries of a model's cache exact.

    Args:
        taps: of the model.
    """

    def __init__(self, taps: KVTaps):
        self._taps = taps
        self._calls = AttentionCalls(taps.model)
        self._supported: bool | None = None

    def __call__(
        self,
        tokens: mx.array,
        chosen: mx.array,
        among: int,
        cache: list[Any],
        positions: mx.array | None = None,
    ) -> None:
        """Process `tokens` [B, n] at their places and overwrite their entries.

        Args:
            chosen: [B, n], their places among the last `among` columns of the cache.
            cache: filled up to there in calls of more than one token; updated in place.
            positions: [B, n], the tokens' positions (default: those of their columns).

        Raises:
            UnsupportedModelError: the family cannot process tokens this way.
        """
        self.check()
        self._process(tokens, chosen, among, cache, positions)

    def check(self) -> None:
        """Raise UnsupportedModelError if the family cannot."""
        if not self.supported:
            raise UnsupportedModelError(
                f"{self._taps.family}: positions in the middle of a prompt cannot be made exact, "
                "only its first and last ones"
            )

    @property
    def supported(self) -> bool:
        """Whether the model can: tried once, on a few tokens, against its ordinary prefill."""
        if self._supported is None:
            self._supported = self._probe()
        return self._supported

    def _process(
        self,
        tokens: mx.array,
        chosen: mx.array,
        among: int,
        cache: list[Any],
        positions: mx.array | None = None,
    ) -> None:
        rows = [RowCache(entry, chosen, among, positions) for entry in cache]
        with self._calls.seen_by(_grouped):
            self._taps.model(tokens.reshape(-1, 1), cache=rows)

    def _probe(self) -> bool:
        model, (before, n) = self._taps.model, PROBE_TOKENS
        tokens = mx.arange(before + n)[None]
        plain, rows = make_prompt_cache(model), make_prompt_cache(model)
        for part in (tokens[:, :before], tokens[:, before:]):
            model(part, cache=plain)
        model(tokens[:, :before], cache=rows)
        nothing = [KV(*(mx.zeros((1, n, width)) for width in widths)) for widths in self._taps.widths]
        self._taps.inject(nothing, tokens[:, before:], rows, logits=False)
        try:
            self._process(tokens[:, before:], mx.arange(n)[None], n, rows)
            pairs = [
                (x.astype(mx.float32), y.astype(mx.float32))
                for a, b in zip(plain, rows, strict=True)
                for x, y in zip(a.keys_and_values(), b.keys_and_values(), strict=True)
                if x.size
            ]
            return all(close(x, y) for x, y in pairs)
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            TypeError,
            ValueError,
            RuntimeError,
        ):
            return False  # a family that does not serve batches at different positions


class RowCache:
    """One entry of a cache, as a batch of one-token rows sees it.

    Args:
        entry: a cache entry of mlx-lm that holds the rows' columns, in order of time.
        chosen: [B, n], places among the last `among` columns.
        positions: [B, n], the tokens' positions (default: those of their columns).
    """

    def __init__(self, entry: Any, chosen: mx.array, among: int, positions: mx.array | None = None):
        self._entry, self._grid = entry, chosen.shape
        stored: Any = entry.keys_and_values()[0]
        self._width = (stored[0] if isinstance(stored, tuple | list) else stored).shape[2]
        self._columns = chosen + (self._width - among)
        offset = entry.offset if isinstance(entry.offset, int) else entry.offset[:, None]
        self.offset = (chosen + (offset - among) if positions is None else positions).reshape(-1)
        self.fetched: tuple[Any, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "_entry":
            raise AttributeError(name)
        return getattr(self._entry, name)  # `bits` and `group_size` of a quantized entry, a window's size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Overwrite the rows' entries with `keys` and `values` [B * n, heads, 1, width]."""
        entry = self._entry
        entry.keys, entry.values = self._put(entry.keys, keys), self._put(entry.values, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        B, n = self._grid

        def spread(a: mx.array) -> mx.array:
            return mx.broadcast_to(a[:, None], (B, n, *a.shape[1:])).reshape(B * n, *a.shape[1:])

        keys, values = tree_map(spread, self._entry.keys_and_values())
        self.fetched = (keys, values)
        return keys, values

    @property
    def state(self) -> tuple[Any, Any]:
        return self.keys_and_values()

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """[B * n, 1, 1, columns]: each row sees the columns up to its own, as far as its window reaches."""
        window = window_size or getattr(self._entry, "max_size", None)
        own, columns = self._columns[..., None], mx.arange(self._width)
        mask = columns <= own
        if window:
            mask = mask & (own < columns + window)
        padding = getattr(self._entry, "left_padding", None)
        if padding is not None:
            mask = mask & (columns >= padding[:, None, None])
        return mask.reshape(-1, 1, 1, self._width)

    def group(self, array: mx.array) -> mx.array:
        """[B * n, heads, 1, width] as one batch of B: [B, heads, n, width]."""
        return array.reshape(*self._grid, array.shape[1], array.shape[3]).swapaxes(1, 2)

    def ungroup(self, array: mx.array) -> mx.array:
        B, heads, n, width = array.shape
        return array.swapaxes(1, 2).reshape(B * n, heads, 1, width)

    def _put(self, stored: Any, rows: mx.array) -> Any:
        new: Any = self.group(rows)
        if not isinstance(stored, mx.array):
            new = mx.quantize(new, group_size=self._entry.group_size, bits=self._entry.bits)
            return tuple(self._place(s, part) for s, part in zip(stored, new, strict=True))
        return self._place(stored, new.astype(stored.dtype))

    def _place(self, stored: mx.array, new: mx.array) -> mx.array:
        if not new.size:
            return stored
        columns = mx.broadcast_to(self._columns[:, None, :, None], new.shape)
        return mx.put_along_axis(stored, columns, new, axis=2)


def _grouped(
    attention: Any, queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any
) -> mx.array:
    """All rows of a batch attend to one copy of its keys and values, where the model passes them on as they are."""
    stored = cache.fetched if isinstance(cache, RowCache) else None
    rows = queries.shape[0]
    plain = stored is not None and keys is stored[0] and values is stored[1]
    if not plain or not isinstance(mask, mx.array) or mask.shape[:3] != (rows, 1, 1):
        return attention(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
    keys, values = cache._entry.keys_and_values()
    B, n = cache._grid
    output = attention(
        cache.group(queries), keys, values, cache, scale=scale, mask=mask.reshape(B, 1, n, -1), sinks=sinks
    )
    return cache.ungroup(output)


def close(expected: mx.array, found: mx.array) -> bool:
    """Equal but for the rounding of low precision; a wrong position or mask differs by the size of the entries."""
    if expected.shape != found.shape:
        return False
    return bool(mx.abs(expected - found).max() <= 0.05 * mx.abs(expected).max())
