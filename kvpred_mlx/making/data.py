"""Text for fitting, training and measuring: documents, a deterministic held-out split, packed sequences."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.quant.utils import load_data

from kvpred_mlx.errors import check_ranges, one_line

CALIBRATION_TOKENS = 512
DOCUMENT_CHARACTERS = 32768
HELD_OUT_SHARE = 0.05


def check_paths(paths: Sequence[Path]) -> None:
    """Raise FileNotFoundError for the first of `paths` that is not there."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")


def read_documents(path: Path, text_key: str = "text", tokenizer: Any = None) -> Iterator[str]:
    """The documents of a file or of all files below a directory, in order of their paths.

    A `.jsonl` file has a document a line: a text under `text_key`, or a conversation under `messages`, which becomes
    text by the tokenizer's chat template, as in mlx-lm's own training.  Any other file is a text.  A document of more
    than `DOCUMENT_CHARACTERS` is cut at line ends into several, so that one long text can be split too.  Hidden files
    and empty documents are passed over.

    Raises:
        FileNotFoundError: `path` is not there.
        ValueError: a file is not UTF-8, a line is not JSON or has neither, or there is no chat template.
    """
    check_paths([path])
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if not any(part.startswith(".") for part in file.relative_to(path).parts):
            for text in _texts(file, text_key, tokenizer):
                yield from (piece for piece in _pieces(text) if piece.strip())


def calibration_text(tokenizer: Any) -> list[str]:
    """The text that mlx-lm's own quantizers are calibrated on, fetched by mlx-lm once, in pieces.

    Raises:
        OSError: it is not there and cannot be fetched.
    """
    try:
        rows = load_data(tokenizer, num_samples=-1, sequence_length=CALIBRATION_TOKENS)
    except OSError as error:
        raise OSError(
            f"mlx-lm's calibration text cannot be fetched ({one_line(error)}): give text of your own with --data"
        ) from error
    return [tokenizer.decode(row) for row in np.array(rows).tolist()]


def is_held_out(document: str) -> bool:
    """Whether a document is kept from training: one in twenty, told by its text alone."""
    digest = blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < HELD_OUT_SHARE * 2**64


def split(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """Training documents and held-out documents; the same document is always on the same side."""
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        sides[is_held_out(document)].append(document)
    return sides


def encode(tokenizer: Any, documents: Sequence[str]) -> list[list[int]]:
    """Token ids of each document, without special tokens, as far as the tokenizer says."""
    return [tokenizer.encode(document, add_special_tokens=False) for document in documents]


@dataclass(frozen=True)
class PackedSequences:
    """Documents one after the other, each closed by the end-of-text token, cut into rows of equal length.

    Args:
        rows: `[N, L + 1]` token ids: L inputs, and each one's target one to the right.
    """

    rows: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], length: int, end: int | None) -> PackedSequences:
        """Pack token ids into rows of `length` inputs; what does not fill a row is left out.

        Raises:
            ValueError: there is not one whole row, or the length is out of range.
        """
        check_ranges({"length": length}, {"length": 1}, whole=["length"])
        closing = [] if end is None else [end]
        ids = np.fromiter((i for d in documents for i in (*d, *closing)), np.int32)
        n = len(ids) // (length + 1)
        if not n:
            raise ValueError(
                f"the data has {len(ids)} tokens, expected at least {length + 1}, one sequence and its next token"
            )
        return cls(ids[: n * (length + 1)].reshape(n, length + 1))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens_per_row(self) -> int:
        """L."""
        return self.rows.shape[1] - 1

    def checksum(self) -> int:
        """Of all token ids, to tell other data from the same."""
        return zlib.crc32(np.ascontiguousarray(self.rows, np.int64).tobytes())

    def batch(self, index: int, batch_size: int, seed: int) -> mx.array:
        """Batch number `index`, `[batch_size, L + 1]`: every row once an epoch, in an order of its own.

        It depends on nothing but the arguments, so that training can go on where it was stopped.
        """
        places = range(index * batch_size, (index + 1) * batch_size)
        epochs = {place // len(self) for place in places}
        orders = {e: np.random.default_rng([seed, e]).permutation(len(self)) for e in epochs}
        return mx.array(self.rows[[orders[p // len(self)][p % len(self)] for p in places]])


def _texts(file: Path, text_key: str, tokenizer: Any) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}, expected UTF-8 text") from error
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _field(line, text_key, tokenizer, f"{file}, line {number}")


def _field(line: str, text_key: str, tokenizer: Any, where: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list) and text_key not in entry:
        return _chat(entry, tokenizer, where)
    text = entry.get(text_key) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        keys = list(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{where}: no text under {text_key!r}, found {keys}")
    return text


def _chat(entry: dict[str, Any], tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "has_chat_template", False):
        raise ValueError(f"{where}: a conversation, but the base's tokenizer has no chat template")
    try:
        text: str = tokenizer.apply_chat_template(entry["messages"], tools=entry.get("tools"), tokenize=False)
    except Exception as error:  # templates raise what they like
        raise ValueError(f"{where}: the chat template refuses the messages: {one_line(error)}") from error
    return text


def _pieces(text: str) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if piece and size + len(line) > DOCUMENT_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    yield "".join(piece)
