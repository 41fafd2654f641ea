"""How a pair reads prompts, as a value that can be named, compared and applied: exact, predicted, or in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpred_mlx.dial.positions import ExactPositions

if TYPE_CHECKING:
    from kvpred_mlx.pair.model import KVPredictionModel

# The fields of `ExactPositions`; as flags `--exact-last`, in requests `exact_last`.
_DIAL = ("first", "last", "top")


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

        Raises:
            ValueError: naming what is not known, or out of range.
        """
        if name in ("exact", "predicted"):
            return cls(name == "exact")
        given = {}
        for part in name.split("+"):
            field, _, value = part.partition("=")
            if not field.startswith("exact-") or field.removeprefix("exact-") not in _DIAL:
                raise ValueError(
                    f"mode {part!r}, expected exact, predicted, or a dial such as exact-last=32 or exact-top=0.1"
                )
            given[field.removeprefix("exact-")] = _number(part, value)
        return cls(positions=_positions(given))

    def override(self, given: Any) -> Mode:
        """This mode with what a request asks for: `exact`, `exact_first`, `exact_last`, `exact_top`.

        Raises:
            ValueError: naming what is not known, of the wrong type, or out of range.
        """
        names = ["exact", *(f"exact_{field}" for field in _DIAL)]
        if not isinstance(given, dict) or not given.keys() <= set(names):
            raise ValueError(f"kvpred is {given!r}, expected an object with {', '.join(names)}")
        exact = given.get("exact", self.exact and len(given) == 0)
        if type(exact) is not bool:
            raise ValueError(f"kvpred.exact is {exact!r}, expected true or false")
        dial = {name.removeprefix("exact_"): value for name, value in given.items() if name != "exact"}
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
        """
        if self.positions and self.positions.top:
            pair.rows.check()
            pair.importance.check()

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
        return "+".join(f"exact-{field}={value}" for field, value in self._dial().items() if value)

    def _dial(self) -> dict[str, Any]:
        return {field: getattr(self.positions, field) for field in _DIAL} if self.positions else {}


def _positions(fields: dict[str, Any]) -> ExactPositions | None:
    return ExactPositions(**fields) or None


def _number(part: str, value: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    raise ValueError(f"mode {part!r}, expected a number of tokens or a fraction after '='")
