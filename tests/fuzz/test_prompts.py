"""Prompts of any kind: answered, or refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd import NUMBERS, few

from kvpred_mlx import stream_generate

pytestmark = pytest.mark.slow

IDS = st.lists(st.integers(-2, 4100) | st.sampled_from([2**31, 2**40, -1]), max_size=40)


@few
@given(
    st.text(max_size=40)
    | st.sampled_from(["\ud83d", "\0" * 9, "😀" * 9])
    | IDS
    | st.lists(NUMBERS, max_size=3)
)
def test_prompts(demo_pair, prompt):
    pair, tokenizer = demo_pair
    try:
        text = "".join(r.text for r in stream_generate(pair, tokenizer, prompt, max_tokens=2))
        assert isinstance(text, str)
    except ValueError as error:
        assert str(error).strip() and "\n" not in str(error), error
