"""How a pair reads prompts, as a value that can be named, compared and applied: exact, predicted, or in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpred_mlx.dial.positions import ExactPositions, parse_depth
from kvpred_mlx.pair.predictor import FirstLayersPredictor

if TYPE_CHECKING:
    from kvpred_mlx.pair.model import KVPredictionModel

# The fields of `ExactPositions` by their names in modes; as flags `--exact-last`, in requests `exact_last`.
_DIAL = {"exact-first": "first", "exact-last": "last", "exact-top": "top", "depth": "depth"}


@dataclass(frozen=True)
class Mode:
    """How a pair reads prompts.

    Args:
        exact: the base alone.
        positions: which positions are exact among predicted ones (`ExactPositions`, None: none).
    """

    exact: bool = False
    positions: ExactPositions | None = None

    @classmethod
    def of(cls, pair: KVPredictionModel) -> Mode:
        """The mode that `pair` is in."""
        return cls(pair.exact, pair.exact_positions or None)

    @classmethod
    def parse(cls, name: str) -> Mode:
        """The mode called `name`: exact, predicted, or settings of the dial such as exact-last=32+exact-top=0.1.

        Depths are named as in `parse_depth`, with / in the place of commas: depth=8:0.6/14:0.9.

        Raises:
            ValueError: naming what is not known, or out of range.
        """
        if name in ("exact", "predicted"):
            return cls(name == "exact")
        given = {}
        for part in name.split("+"):
            field, _, value = part.partition("=")
            if field not in _DIAL:
                raise ValueError(
                    f"mode {part!r}, expected exact, predicted, or a dial: exact-last=32, exact-top=0.1, depth=14"
                )
            given[_DIAL[field]] = parse_depth(value) if field == "depth" else _number(part, value)
        return cls(positions=_positions(given))

    def override(self, given: Any) -> Mode:
        """This mode with what a request asks for: `exact`, `exact_first`, `exact_last`, `exact_top`,
        `depth` (as in `parse_depth`, or pairs).

        Raises:
            ValueError: naming what is not known, of the wrong type, or out of range.
        """
        fields = {name.replace("-", "_"): field for name, field in _DIAL.items()}
        names = ["exact", *fields]
        if not isinstance(given, dict) or not given.keys() <= set(names):
            raise ValueError(f"kvpred is {given!r}, expected an object with {', '.join(names)}")
        exact = given.get("exact", self.exact and len(given) == 0)
        if type(exact) is not bool:
            raise ValueError(f"kvpred.exact is {exact!r}, expected true or false")
        dial = {fields[name]: value for name, value in given.items() if name != "exact"}
        if isinstance(text := dial.get("depth"), str):
            dial["depth"] = parse_depth(text)
        if exact and dial:
            raise ValueError(
                f"kvpred.exact is true, so {' and '.join(given.keys() - {'exact'})} cannot apply"
            )
        if exact:
            return Mode(exact=True)
        return Mode(positions=_positions(self._dial() | dial) if dial else self.positions)

    def check(self, pair: KVPredictionModel) -> None:
        """Make sure that `pair` can be put in this mode.

        Raises:
            UnsupportedModelError: its families cannot choose or compute the top positions.
            ValueError: it has no maps for a depth.
        """
        if self.positions and self.positions.top:
            pair.check_top()
        for depth, _ in self.positions.depth if self.positions else ():
            if not isinstance(pair.predictor, FirstLayersPredictor):
                raise ValueError(
                    f"depth {depth}, but the pair reads with an auxiliary, not with its base's layers"
                )
            pair.predictor.check_depth(depth)

    def apply(self, pair: KVPredictionModel) -> None:
        """Put `pair` in this mode; the one place where a mode becomes attributes of a pair."""
        pair.exact = self.exact
        pair.exact_positions = self.positions

    @contextmanager
    def applied(self, pair: KVPredictionModel) -> Iterator[None]:
        """`pair` in this mode, and afterwards in the mode it was in."""
        before = Mode.of(pair)
        self.apply(pair)
        try:
            yield
        finally:
            before.apply(pair)

    def __str__(self) -> str:
        if self.exact or not self.positions:
            return "exact" if self.exact else "predicted"
        values = {name: getattr(self.positions, field) for name, field in _DIAL.items()}
        values["depth"] = "/".join(f"{layers}:{end:g}" for layers, end in self.positions.depth)
        return "+".join(f"{name}={value}" for name, value in values.items() if value)

    def _dial(self) -> dict[str, Any]:
        return {field: getattr(self.positions, field) for field in _DIAL.values()} if self.positions else {}


def _positions(fields: dict[str, Any]) -> ExactPositions | None:
    return ExactPositions(**fields) or None


def _number(part: str, value: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    raise ValueError(f"mode {part!r}, expected a number of tokens or a fraction after '='")
