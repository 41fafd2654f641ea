"""Stop strings in streams of tokens, without a server."""

from __future__ import annotations

import random

import pytest
from mlx_lm.server import Response

from kvpred_mlx.serving.stops import stopped


def responses(pieces, finish=None):
    last = len(pieces) - 1
    return [Response(p, i, 0.0, finish if i == last else None, ()) for i, p in enumerate(pieces)]


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["ab", "cd", "ef"], ["bc"], ["a", ""]),  # begins and ends inside tokens
        (["ab", "cd", "ef"], ["cd"], ["ab", ""]),
        (["ab", "cd", "ef"], ["d", "b"], ["a"]),  # the first occurrence wins
        (["ab", "cd", "ef"], ["bcde"], ["a", "", ""]),
        (["ab", "ab", "ac"], ["abac"], ["", "ab", ""]),  # an end that begins it may begin it again
        (["ab", "cd"], ["dx"], ["ab", "cd"]),  # begun and not ended: shown at the end
        (["ab", "cd"], [], ["ab", "cd"]),
        (["a", "", "b"], ["ab"], ["", "", ""]),
    ],
)
def test_text_before_the_first(pieces, stops, expected):
    found = list(stopped(iter(responses(pieces)), stops))
    assert [r.text for r in found] == expected
    assert [r.token for r in found] == list(range(len(found)))


def test_finish_reasons():
    assert [r.finish_reason for r in stopped(iter(responses(["ab", "cd"], "length")), ["cd"])] == [None, None]
    assert [r.finish_reason for r in stopped(iter(responses(["ab", "cd"], "length")), ["x"])] == [
        None,
        "length",
    ]
    ended = list(stopped(iter(responses(["ab", "c", "x"], "stop")), ["cd"]))
    assert [(r.text, r.finish_reason) for r in ended] == [("ab", None), ("c", None), ("x", "stop")]
    assert "".join(r.text for r in stopped(iter(responses(["ab", "c"], "length")), ["cd"])) == "abc"


def test_as_a_search_in_the_whole_text():
    rng = random.Random(0)
    for _ in range(3000):
        pieces = ["".join(rng.choices("abc", k=rng.randint(0, 3))) for _ in range(rng.randint(1, 8))]
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        text, made, cut = "".join(pieces), "", None
        for piece in pieces:  # the earliest place of those that are complete after the fewest tokens
            made += piece
            places = [i for stop in stops if (i := made.find(stop)) >= 0]
            if places:
                cut = min(places)
                break
        shown = list(stopped(iter(responses(pieces)), stops))
        assert "".join(r.text for r in shown) == text[:cut]
        assert not any(stop in "".join(r.text for r in shown) for stop in stops)
