"""The linear maps, stacked and checked."""

from __future__ import annotations

import mlx.core as mx
import pytest

from kvpred_mlx import Predictor
from kvpred_mlx.taps.kv import KV

AUXILIARY, BASE = [(6, 4), (8, 8)], [(3, 5), (7, 2), (4, 4)]


def test_stacked_maps_are_the_separate_maps():
    predictor = Predictor([1, 0, 1], AUXILIARY, BASE)
    maps = [
        [
            (mx.random.normal((b[part], AUXILIARY[m][part])), mx.random.normal((b[part],)))
            for b, m in zip(BASE, [1, 0, 1], strict=True)
        ]
        for part in (0, 1)
    ]
    predictor.load_maps(*maps)
    raw = [KV(mx.random.normal((2, 5, k)), mx.random.normal((2, 5, v))) for k, v in AUXILIARY]
    for i, (m, kv) in enumerate(zip([1, 0, 1], predictor(raw), strict=True)):
        for part in (0, 1):
            weight, bias = maps[part][i]
            assert mx.allclose(kv[part], raw[m][part] @ weight.T + bias, atol=1e-5)
    assert [linear.weight.shape for linear in predictor.key_maps] == [(7, 6), (7, 8)]


def test_latent_attention_has_no_values():
    predictor = Predictor([0, 0], [(8, 8)], [(4, 0), (6, 0)])
    (first, second) = predictor([KV(mx.zeros((1, 3, 8)), mx.zeros((1, 3, 8)))])
    assert [a.shape for a in (*first, *second)] == [(1, 3, 4), (1, 3, 0), (1, 3, 6), (1, 3, 0)]


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ([0, 1], "layer map has 2 entries, expected 3"),
        ([0, 1, 2], r"entries \{2: 2\} .* are not auxiliary layers 0 to 1"),
        ([0, -1, 5], r"\{1: -1, 2: 5\}"),
        ([0, 1.0, True], r"\{1: 1.0, 2: True\}"),
    ],
)
def test_wrong_layer_maps(layer_map, message):
    with pytest.raises(ValueError, match=message):
        Predictor(layer_map, AUXILIARY, BASE)


def test_values_from_a_layer_without_values():
    with pytest.raises(
        ValueError, match=r"base layers \[1\] are mapped to auxiliary layers that have no values"
    ):
        Predictor([0, 1, 0], [(6, 4), (8, 0)], BASE)
