"""The text that a front's quality is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from kvpred_mlx.bench.front.settings import FrontSettings
from kvpred_mlx.making.windows import Windows, cut_windows


@dataclass(frozen=True)
class Data:
    """Held-out text: token ids for scoring, the text itself for recall."""

    tokenizer: Any
    documents: Sequence[str]
    ids: Sequence[Sequence[int]]

    def windows(self, settings: FrontSettings) -> dict[int, Windows]:
        """Prompts of real text, by their length.

        Raises:
            ValueError: no document is long enough.
        """
        return {
            n: cut_windows(self.ids, n, settings.score_tokens, self.tokenizer, settings.windows)
            for n in settings.prompt_lens
        }

    def describe(self, windows: dict[int, Windows]) -> dict[str, Any]:
        """What tells this text from another, and how much of it is scored."""
        checksum = 0
        for ids in self.ids:
            checksum = crc32(np.asarray(ids, np.int64).tobytes(), checksum)
        return {
            "checksum": checksum,
            "windows": {str(n): len(cut) for n, cut in windows.items()},
            "documents": {str(n): len(set(cut.documents)) for n, cut in windows.items()},
        }
