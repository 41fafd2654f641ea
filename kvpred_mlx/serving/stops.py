"""Stop strings: an answer ends before the first one, wherever in a token it begins or ends, and shows none of it.

mlx-lm stops at sequences of tokens, and cuts other occurrences out of the text; OpenAI's interface promises more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any


def stopped(responses: Iterator[Any], stops: Sequence[str]) -> Iterator[Any]:
    """mlx-lm's responses, one for each token, up to the first stop string in their text.

    Text that may be the beginning of a stop string is held back until that is known.  An answer that ends here has no
    finish reason: for mlx-lm's handler that is "stop".
    """
    held, waiting = "", None  # text, and a response to which it can still be given
    for response in responses:
        if response.finish_reason == "stop":  # an end token: nothing of it is shown
            if waiting is not None:
                yield replace(waiting, text=waiting.text + held)
            yield response
            return
        if waiting is not None:
            yield waiting
        text = held + response.text
        place = min((i for stop in stops if (i := text.find(stop)) >= 0), default=None)
        if place is not None:
            yield replace(response, text=text[:place], finish_reason=None)
            return
        held = "" if response.finish_reason else _begun(text, stops)
        shown = replace(response, text=text[: len(text) - len(held)])
        waiting = shown if held else None
        if waiting is None:
            yield shown
    if waiting is not None:
        yield replace(waiting, text=waiting.text + held)


def _begun(text: str, stops: Sequence[str]) -> str:
    """The longest end of a text that a stop string begins with."""
    longest = max(map(len, stops), default=1) - 1
    ends = (text[-n:] for n in range(min(longest, len(text)), 0, -1))
    return next((end for end in ends if any(stop.startswith(end) for stop in stops)), "")
