"""What mypy must see of `bench/` and `convert/`; read by `make lint`, never run.

Were the two folders not found under the package, everything imported from them would be `Any`, which
`assert_type` does not take for the types of this file (Python's own: a class from there would be `Any` too).
"""

from __future__ import annotations

from typing import Any, assert_type

from kvpred_mlx.bench.common import statistics
from kvpred_mlx.convert import openelm


def bench_is_typed(seconds: list[float]) -> None:
    assert_type(statistics.spread(seconds), float)
    assert_type(statistics.paired_ratio(seconds, seconds).as_dict(), dict[str, float])


def convert_is_typed(config: dict[str, Any]) -> None:
    assert_type(openelm.ffn_dims(config), tuple[int, ...])
