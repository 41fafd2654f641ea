"""Repair behind the first token: the base recomputes the prompt exactly while it already answers."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from kvpred_mlx.pair.auxiliary_cache import AuxiliaryCache
from kvpred_mlx.pair.model import KVPredictionModel

BUDGET = 0.3
FIRST_SLICE = 16  # tokens; then as many as take two to four decode steps
SMALLEST_SLICE = 8  # less would not outrun the tokens that are generated meanwhile
LARGEST_SLICE = 512
FIRST_COST = 2  # decode steps: what the first slice is expected to take
PATIENCE = 8  # slices in which the lag must fall
STEPS_TIMED = 9  # the latest ones without a slice, for the median


@dataclass
class RepairStatus:
    """How far a repair is.

    Args:
        exact_from: the generated token (from 0) that is the first to come from an exact cache; None before, 0 if there
            was nothing to repair.
        seconds: by which the slices delayed decoding, but for the one that a decode step closes the repair with.
        slices: how many there were, without that one.
        given_up: within the budget the repair does not outrun the tokens that are generated meanwhile.
    """

    exact_from: int | None = None
    seconds: float = 0.0
    slices: int = 0
    given_up: bool = False


class RepairingModel(nn.Module):
    """A pair that makes its cache exact while it decodes; mlx-lm's generation takes it as a model.

    Between decode steps the base reads the prompt, slice by slice, into a second cache, then the tokens that were
    generated meanwhile: their entries were computed from predicted ones.  Once it has caught up the second cache
    takes the first one's place in `cache`, and every later token is what the exact base gives for that prefix.
    Until then the first cache is whole: an interrupted generation leaves it as if there had been no repair.  A repair
    that does not catch up within its budget is given up.

    Not a moment before the first token is out is spent on it.  One prompt at a time, batch size 1.

    Args:
        pair: predicts and decodes.
        budget: the share of decoding's time that the repair may take: at any moment since it began, tokens come at
            least at (1 - budget) times their speed without it, as far as times can be foretold; 1 reads a slice
            with every token.
        max_kv_size: as in `KVPredictionModel.make_cache`.
        prompt_tokens: of the prompt that comes; without it a chunk of one token counts as a generated one.

    Raises:
        ValueError: the budget is not a share.
    """

    def __init__(
        self,
        pair: KVPredictionModel,
        budget: float = BUDGET,
        max_kv_size: int | None = None,
        prompt_tokens: int = 1,
    ):
        super().__init__()
        if not 0 < budget <= 1:
            raise ValueError(f"the repair budget is {budget!r}, expected a share of time above 0 and up to 1")
        self.pair = pair
        self.status = RepairStatus()
        self._work = _Work(pair, budget, max_kv_size)
        self._to_come = prompt_tokens - 1  # in chunks, before the last one

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        work, entry = self._work, cache[-1]
        if inputs.shape[1] > 1 or self._to_come > 0:
            self._to_come -= inputs.shape[1]
            work.start(cache)
            with work.watching(cache):
                return self.pair(inputs, cache=cache)
        if not work.steps:
            work.needed = isinstance(entry, AuxiliaryCache) and entry.exact_tokens < entry.size()
            if work.needed:
                work.start(cache)
            else:
                self.status.exact_from = 0
        work.steps += 1
        if work.needed:
            work.account(self.status)
            lag = work.lag(entry)
            if work.affordable(lag):
                if lag <= work.slice:
                    return work.finish(inputs, cache, self.status)
                if work.catches_up(lag):
                    work.read(entry, self.status)
                else:
                    work.give_up(self.status)
        with work.watching(cache):
            return self.pair(inputs, cache=cache)

    @property
    def layers(self) -> list[Any]:
        """The pair's."""
        return self.pair.layers

    def make_cache(self) -> list[Any]:
        """The pair's."""
        return self.pair.make_cache()


class _Work:
    """The second cache, and the accounts: seconds earned by decoding, seconds spent on repair.

    Times are those from one call to the next, so that all a slice causes counts, also that decoding no longer runs
    ahead.

    Where the base's own first layers read, their entries are exact already, also those of generated tokens: repair
    begins at the depth, from the hidden states that layer read, which are kept.
    """

    def __init__(self, pair: KVPredictionModel, budget: float, max_kv_size: int | None):
        self._pair, self._max_kv_size = pair, max_kv_size
        self._per_second = budget / max(1 - budget, 1e-9)  # seconds earned by a second of decoding
        self._cache: list[Any] | None = None
        self._depth: int | None = None  # the layer to begin at (None: the first)
        self._hidden: list[mx.array] = []  # what it read, of the tokens that are still to be read
        self._read = self.steps = 0
        self._credit = 0.0
        self._plain: deque[float] = deque(maxlen=STEPS_TIMED)  # seconds of steps without a slice
        self._per_token: float | None = None  # seconds of the last slice
        self._since: float | None = None
        self._lags: deque[int] = deque(maxlen=PATIENCE + 1)  # before each of the latest slices
        self._sliced = 0  # tokens that were read in the call before this one
        self._own = 0.0  # seconds that reading them took
        self.needed, self.slice = False, FIRST_SLICE

    def start(self, cache: list[Any]) -> None:
        """Before a prompt's first call: what earlier turns left exact need not be read again."""
        if self._cache is not None or not isinstance(cache[-1], AuxiliaryCache):
            return
        exact = cache[-1].exact_tokens
        self._depth = self._shallowest() if exact == cache[-1].size() else None
        self._cache = make_prompt_cache(self._pair.base, self._max_kv_size)
        if exact and can_trim_prompt_cache(cache[:-1]):
            self._cache = copy.deepcopy(cache[:-1])
            trim_prompt_cache(self._cache, cache[-1].size() - exact)
            self._read = exact

    def _shallowest(self) -> int | None:
        """The layer that repair can begin at, if not at the first."""
        reader, dial = self._pair.first_layers_reader, self._pair.exact_positions
        if reader is None or (dial and dial.top):  # tokens in the middle would come twice
            return None
        depth = min((k for k, _ in dial.depth), default=reader.depth) if dial else reader.depth
        return depth if reader.resumable(depth) else None

    @contextmanager
    def watching(self, cache: list[Any]) -> Iterator[None]:
        """Keep hidden states of the block's call, as long as they may be needed."""
        reader = self._pair.first_layers_reader
        if reader is None or self._depth is None or self._cache is None:
            yield
            return
        with reader.watched(self._depth, cache[:-1], self._hidden):
            yield

    def _process(self, tokens: mx.array) -> None:
        """Read the next `tokens` [1, L] into the second cache."""
        assert self._cache is not None
        reader = self._pair.first_layers_reader
        if reader is None or self._depth is None:
            self._pair.base(tokens, cache=self._cache)
        else:
            hidden = mx.concatenate(self._hidden, axis=1)
            n = tokens.shape[1]
            reader.resume(self._depth, hidden[:, :n], tokens, self._cache)
            self._hidden = [hidden[:, n:]]
        self._read += tokens.shape[1]

    def lag(self, entry: AuxiliaryCache) -> int:
        """Tokens that the first cache has and the second has not."""
        return entry.size() - self._read

    def account(self, status: RepairStatus) -> None:
        """At the beginning of a decode step: what the one before it earned or cost."""
        # mlx-lm asks for the second token before it hands out the first: only the third call begins a plain step.
        if self.steps < 3:
            return
        now = time.perf_counter()
        if self._since is not None:
            self._enter(now - self._since, status)
        self._since = now

    def _enter(self, seconds: float, status: RepairStatus) -> None:
        if not self._sliced:
            self._plain.append(seconds)
        step = median(self._plain)
        self._credit += step * self._per_second
        if not self._sliced:
            return
        # Beside its own time a slice keeps decoding from running a step ahead; what is more, it did not cause.
        spent = max(0.0, min(seconds - step, self._own + step))
        self._credit -= spent
        status.seconds += spent
        self._per_token, self._sliced = spent / self._sliced, 0
        if spent > 4 * step:
            self.slice = max(SMALLEST_SLICE, self.slice // 2)
        elif spent < 2 * step:
            self.slice = min(LARGEST_SLICE, self.slice * 2)

    def affordable(self, lag: int) -> bool:
        """Whether decoding has earned what the next slice is going to take."""
        if not self._plain:
            return False
        per_token = self._per_token
        cost = FIRST_COST * median(self._plain) if per_token is None else per_token * min(self.slice, lag)
        return self._credit >= cost

    def catches_up(self, lag: int) -> bool:
        """Whether the lag has fallen over the latest slices."""
        self._lags.append(lag)
        return len(self._lags) <= PATIENCE or lag < self._lags[0]

    def give_up(self, status: RepairStatus) -> None:
        """No more slices; the second cache is let go."""
        self.needed, self._cache, self._hidden, status.given_up = False, None, [], True

    def read(self, entry: AuxiliaryCache, status: RepairStatus) -> None:
        """The next slice."""
        assert self._cache is not None
        began = time.perf_counter()
        tokens = entry.tail(self.lag(entry))[:, : self.slice]
        self._process(tokens)
        mx.eval([c.state for c in self._cache[self._depth or 0 :]], self._hidden)
        self._own = time.perf_counter() - began
        self._sliced = tokens.shape[1]
        status.slices += 1

    def finish(self, inputs: mx.array, cache: list[Any], status: RepairStatus) -> mx.array:
        """The last slice and the decode step in one; from here on the second cache is the cache."""
        assert self._cache is not None
        entry: AuxiliaryCache = cache[-1]
        rest = entry.tail(self.lag(entry)).astype(inputs.dtype)
        if self._depth is None:
            logits = self._pair.base(mx.concatenate([rest, inputs], axis=1), cache=self._cache)[:, -1:]
            cache[:-1] = self._cache
        else:
            if rest.size:
                self._process(rest)
            cache[self._depth : -1] = self._cache[self._depth :]
            logits = self._pair.base(inputs, cache=cache[:-1])
        self.needed, self._hidden, self._cache = False, [], None
        status.exact_from = self.steps - 1
        entry.repaired()
        return mx.depends(logits, entry.decoded(inputs))
