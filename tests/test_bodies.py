"""Windows whose prompts end where a body begins."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import load as load_tokenizer
from test_asked_conversations import DOCUMENTED, OTHERS

from kvpred_mlx.bench.recipe import bodies
from kvpred_mlx.bench.recipe.requests import documented_functions
from kvpred_mlx.making.pairing import LoadedModel
from kvpred_mlx.pair.locating import DEMO_PAIR


@pytest.fixture
def base(demo_pair):
    return LoadedModel("it", demo_pair[0].base, {}, load_tokenizer(DEMO_PAIR))


def test_what_precedes_a_body_ends_with_its_docstring():
    befores = [function["before"] for function in documented_functions([*OTHERS, DOCUMENTED])]
    assert len(befores) == 5
    assert befores[1] == DOCUMENTED[
        : DOCUMENTED.index("self.level += litres\n        if self.level > 1")
    ].rstrip(" ")


def test_bodies_are_the_bases_own(base, monkeypatch):
    """Prompts are the ends of what precedes, and answers what mlx-lm generates greedily after them."""
    monkeypatch.setattr(bodies, "BATCH", 2)
    befores = [function["before"] for function in documented_functions([DOCUMENTED])]
    found = bodies.body_windows(base, befores, 40, 7, 9)
    assert found.prompts.shape == (len(found), 40) and found.continuations.shape == (len(found), 7)
    ends = [base.tokenizer.encode(text, add_special_tokens=False) for text in befores]
    assert {tuple(row) for row in found.prompts.tolist()} <= {
        tuple(ids[-40:]) for ids in ends if len(ids) >= 40
    }
    steps = generate_step(mx.array(found.prompts[0]), base.model, max_tokens=7)
    assert [int(token) for token, _ in steps] == found.continuations[0].tolist()


def test_bodies_that_end_at_once_are_left_out(base, monkeypatch):
    befores = [function["before"] for function in documented_functions([DOCUMENTED])]
    whole = bodies.body_windows(base, befores, 40, 7, 9)
    stop = int(whole.continuations[0, 3])
    monkeypatch.setattr(type(base.tokenizer), "eos_token_ids", {stop}, raising=False)
    ended = np.isin(whole.continuations, stop).any(axis=1)
    if ended.all():
        with pytest.raises(ValueError, match="it ends every body within 7 tokens"):
            bodies.body_windows(base, befores, 40, 7, 9)
    else:
        assert len(bodies.body_windows(base, befores, 40, 7, 9)) == (~ended).sum()
    with pytest.raises(ValueError, match="no function with a docstring has 4000 tokens"):
        bodies.body_windows(base, befores, 4000, 7, 9)
