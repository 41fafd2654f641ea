"""How long the first token takes, and how fast the others come while a cache is repaired."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from kvpred_mlx.generation.repair import RepairStatus


class Rates:
    """Decode speed while a cache is repaired, and after."""

    def __init__(self, status: RepairStatus | None):
        self._status = status
        self._times: list[float] = []

    def __call__(self, tokens: int) -> dict[str, Any]:
        """The response's fields when `tokens` tokens are out."""
        if self._status is None:
            return {}
        if len(self._times) < tokens:
            self._times.append(time.perf_counter())
        end = self._status.exact_from
        split = len(self._times) if end is None else min(end + 1, len(self._times))
        rates = {"repair_tps": _rate(self._times[:split]), "repaired_tps": _rate(self._times[split - 1 :])}
        return {"repair": dataclasses.replace(self._status), **rates}


def _rate(times: list[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


class FirstToken:
    """mlx-lm's prompt progress callback as a clock: it is called when the first token's value is ready."""

    def __init__(self, then: Callable[[int, int], None] | None):
        self._then, self._start = then, time.perf_counter()
        self.ttft = self.prefill_time = 0.0

    def __call__(self, processed: int, total: int) -> None:
        elapsed = time.perf_counter() - self._start
        if processed < total:
            self.prefill_time = elapsed
        else:
            self.ttft = elapsed
        if self._then is not None:
            self._then(processed, total)

    def first_response(self, total: int | None = None) -> None:
        """Speculative decoding reports no progress: its first response is the first sign."""
        if not self.ttft and total is not None:
            self(total, total)
        elif not self.ttft:
            self.ttft = time.perf_counter() - self._start
