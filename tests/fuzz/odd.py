"""Values that nobody expects, and how many of them are tried.

KVPRED_MLX_FUZZ_EXAMPLES is the number of examples of each test: few in `make test`, thousands in a nightly run.
"""

from __future__ import annotations

import copy
import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("KVPRED_MLX_FUZZ_EXAMPLES", "60"))

few = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

NUMBERS = st.one_of(
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from([0, -1, 1e-300, 1e300, 2**31, -(2**31) - 1, 2**63, 2**64, 10**20, -(10**20), 0.5, 1.0]),
)
TEXTS = st.one_of(
    st.text(max_size=6), st.sampled_from(["", "\0", "\ud83d", "😀"[:1], "true", "1", "x" * 5000, "<s>"])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def changed(tree: object, places: st.DataObject, values: st.SearchStrategy = VALUES) -> object:
    """A copy of a JSON tree with one to three of its entries removed or replaced."""
    tree = json.loads(json.dumps(tree))
    for _ in range(places.draw(st.integers(1, 3), label="how many")):
        node, key = places.draw(st.sampled_from(list(_entries(tree))), label="where")
        if places.draw(st.booleans(), label="removed"):
            del node[key]
        else:
            node[key] = copy.deepcopy(places.draw(values, label="replaced by"))  # never the same list twice
        if not list(_entries(tree)):
            break
    return tree


def _entries(tree):
    """(node, key) of everything in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _entries(value)
