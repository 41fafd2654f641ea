"""Recall: facts planted in real text at chosen depths, and asked for at the end.

Two kinds: `key-value` (the code of one of several names) and `passkey` (one number).  The text is lines of
code or prose; facts are lines of their own, written as comments, so that a base trained on source code can do
it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("key-value", "passkey")
DIGITS = 4
FACTS_SHARE = 0.7  # of the tokens of a row to train on, at most
PASSKEY_SHARE = 0.2  # of those rows
ADJECTIVES = [
    "amber", "azure", "bold", "brave", "bright", "broad", "calm", "clear", "cold", "dark", "deep", "dry",
    "early", "fair", "fast", "firm", "free", "fresh", "grand", "green", "happy", "hard", "high", "kind",
    "large", "late", "light", "long", "loud", "lucky", "mild", "new", "noble", "old", "plain", "proud",
    "quick", "quiet", "rapid", "red", "rich", "round", "sharp", "short", "silent", "slow", "small", "smart",
    "soft", "solid", "stable", "still", "strong", "sweet", "swift", "tall", "thin", "true", "vast", "warm",
    "white", "wide", "wild", "young",
]  # fmt: skip
NOUNS = [
    "anchor", "apple", "arrow", "basket", "bell", "bird", "book", "bottle", "box", "bridge", "brook",
    "button", "cable", "camera", "candle", "castle", "chair", "circle", "clock", "cloud", "coin", "cup",
    "desk", "door", "eagle", "engine", "feather", "field", "flag", "flower", "forest", "garden", "gate",
    "glass", "hammer", "harbor", "hill", "house", "island", "key", "ladder", "lake", "lamp", "leaf",
    "letter", "lion", "map", "mirror", "moon", "mountain", "needle", "ocean", "paper", "pencil", "pillow",
    "river", "road", "rocket", "rope", "ship", "spoon", "star", "stone", "table", "tower", "train", "tree",
    "valley", "wagon", "wheel", "window",
]  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A prompt, as token ids, and what should follow it.

    Args:
        prompt: `n` token ids.
        answer: token ids of the value that was asked for.
        kind: one of `KINDS`.
        depth: where the fact stands, from 0 (the beginning) to 1 (just before the question).
    """

    prompt: list[int]
    answer: list[int]
    kind: str
    depth: float


class RecallTask:
    """Makes recall prompts of an exact number of tokens.

    Args:
        tokenizer: must encode lines one by one as it encodes them together.
        documents: real text to plant facts in.
        seed: the same seed and calls make the same prompts.
    """

    def __init__(self, tokenizer: Any, documents: Sequence[str], seed: int = 0):
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self._lines = [line for document in documents for line in document.splitlines(keepends=True)]
        self._random = random.Random(seed)

    def question(self, kind: str, tokens: int, depth: float, facts: int = 4) -> Question:
        """A prompt of `tokens` tokens whose answer stands at `depth`; the other facts stand anywhere.

        Raises:
            ValueError: the facts and the question alone have more tokens, or the text is too short.
        """
        statements, asked = self._facts(kind, facts)
        name, value = asked[0]
        depths = [depth, *(self._random.random() for _ in statements[1:])]
        ids = self._document(list(zip(depths, statements, strict=True)), tokens, _ask(kind, name))
        return Question(ids, self._encode(f" {value}"), kind, depth)

    def row(self, tokens: int) -> list[int]:
        """`tokens` ids to train on: facts stand several times, and can be recalled from the second time on.

        Raises:
            ValueError: the facts alone have more tokens, or the text is too short.
        """
        kind = "passkey" if self._random.random() < PASSKEY_SHARE else "key-value"
        (statement,), _ = self._facts(kind, 1)
        most = max(2, int(FACTS_SHARE * tokens / len(self._encode(statement))))
        times = self._random.randint(2, min(4, most))
        statements, _ = self._facts(kind, max(1, self._random.randint(most // 3, most) // times))
        return self._document([(self._random.random(), s) for s in statements * times], tokens, "")

    def _facts(self, kind: str, count: int) -> tuple[list[str], list[tuple[str, str]]]:
        names = [""] if kind == "passkey" else self._names(count)
        facts = [(name, f"{self._random.randrange(10**DIGITS):0{DIGITS}}") for name in names]
        return [f"{_ask(kind, name)} {value}\n" for name, value in facts], facts

    def _names(self, count: int) -> list[str]:
        names: set[str] = set()
        while len(names) < count:
            names.add(f"{self._random.choice(ADJECTIVES)} {self._random.choice(NOUNS)}")
        return self._random.sample(sorted(names), count)

    def _document(self, facts: list[tuple[float, str]], tokens: int, closing: str) -> list[int]:
        end = self._encode(closing)
        planted = [(depth, self._encode(statement)) for depth, statement in facts]
        room = tokens - len(end) - sum(len(ids) for _, ids in planted)
        if room < 0:
            raise ValueError(
                f"{tokens} tokens, expected at least {tokens - room}, the facts and the question"
            )
        lines = self._filler(room)
        places = sorted((round(depth * len(lines)), ids) for depth, ids in planted)
        for shift, (place, ids) in enumerate(places):
            lines.insert(place + shift, ids)
        return [i for line in lines for i in line] + end

    def _filler(self, tokens: int) -> list[list[int]]:
        """Consecutive lines of the text of `tokens` tokens in all; the first one may lack its beginning."""
        lines: list[list[int]] = []
        start, count = self._random.randrange(len(self._lines)), 0
        while count < tokens:
            lines.append(self._encode(self._lines[(start + len(lines)) % len(self._lines)]))
            count += len(lines[-1])
        if count > tokens:
            self._shorten(lines, count - tokens)
        return lines

    @staticmethod
    def _shorten(lines: list[list[int]], by: int) -> None:
        while by >= len(lines[0]):
            by -= len(lines.pop(0))
        lines[0] = lines[0][by:]


def _ask(kind: str, name: str) -> str:
    return "# the pass key is" if kind == "passkey" else f"# the code of {name} is"
