"""Functions' bodies that a base writes itself."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import load as load_tokenizer
from test_asked_conversations import DOCUMENTED, OTHERS

from kvpred_mlx.bench.recipe import bodies, requests
from kvpred_mlx.bench.recipe.requests import documented_functions
from kvpred_mlx.making.pairing import LoadedModel
from kvpred_mlx.pair.locating import DEMO_PAIR

STOP = 2


@pytest.fixture
def base(demo_pair):
    made = LoadedModel("it", demo_pair[0].base, {}, load_tokenizer(DEMO_PAIR))
    made.tokenizer.eos_token_ids = {STOP}
    return made


@pytest.fixture
def befores():
    return [function["before"] for function in documented_functions([*OTHERS, DOCUMENTED])]


def test_what_precedes_a_body_ends_with_its_docstring(befores, monkeypatch):
    assert len(befores) == 5
    end = DOCUMENTED.index("        self.level += litres\n        if self.level > 1")
    assert befores[1] == DOCUMENTED[:end]
    monkeypatch.setattr(requests, "BEFORE", 6)
    short = documented_functions([DOCUMENTED])[1]["before"]
    assert short == "".join(befores[1].splitlines(keepends=True)[-6:])


def test_bodies_are_the_bases_own(base, befores, monkeypatch):
    """Prompts are the ends of what precedes, and answers what mlx-lm generates greedily after them."""
    monkeypatch.setattr(bodies, "TOKENS", 80)
    rows = bodies.write_bodies(base, befores, 40, 7, 3)
    assert rows.shape == (3, 47)
    ends = [tuple(base.tokenizer.encode(text, add_special_tokens=False)[-40:]) for text in befores]
    prompts = [tuple(row) for row in rows[:, :40].tolist()]
    assert len(set(prompts)) == 3 and set(prompts) < set(ends)
    for row in rows:
        steps = generate_step(mx.array(row[:40]), base.model, max_tokens=7)
        assert [int(token) for token, _ in steps] == row[40:].tolist()
    assert (rows == bodies.write_bodies(base, befores, 40, 7, 3)).all()
    assert (rows != bodies.write_bodies(base, befores, 40, 7, 3, seed=1)).any()


def test_bodies_that_end_sooner_are_left_out(base, befores, monkeypatch):
    written = np.array([[5, 6], [5, STOP], [STOP, 5], [7, 8], [6, 7]])
    monkeypatch.setattr(bodies, "greedy", lambda base, prompts, tokens: written)
    assert bodies.write_bodies(base, befores, 20, 2, 9)[:, 20:].tolist() == [[5, 6], [7, 8], [6, 7]]
    written[:, 1] = STOP
    with pytest.raises(ValueError, match="it ends every body within 2 tokens"):
        bodies.write_bodies(base, befores, 20, 2, 9)
    with pytest.raises(ValueError, match="no function with a docstring has 4000 tokens"):
        bodies.write_bodies(base, befores, 4000, 7, 9)
