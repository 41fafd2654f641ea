"""Pairs on disk with entries removed, retyped and out of range, and files cut or changed at every structural place."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
import yaml
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st
from odd import VALUES, changed, few
from test_making import write_model

from kvpred_mlx import load, save
from kvpred_mlx.convert.corenet import read_yaml
from kvpred_mlx.making.pairing import join_first_layers, load_part
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.taps.kv_taps import KVTaps

pytestmark = pytest.mark.slow

REFUSED = (ValueError, OSError)  # UnsupportedModelError among them
SMALL = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 7, 33, 1.5, -0.0, 1e300, "", "x", [], {}, [1], {"a": 1}]),
)  # nothing that a model of that size could not be built for, and refused, in a moment


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, demo_pair):
    """A linked pair beside its base, and a standalone one."""
    root = tmp_path_factory.mktemp("pairs")
    base = load_part(str(write_model(root / "base", "qwen3", demo_pair[1])))
    for name, linked in (("linked", True), ("standalone", False)):
        taps = KVTaps(base.model)
        predictor = FirstLayersPredictor([1], taps.input_widths, taps.widths)
        mx.eval(predictor.parameters())
        save(root / name, join_first_layers(base, predictor, linked=linked), base.tokenizer)
    return root


def tried(folder):
    """Load a pair that may be anything; nothing but a refusal, in one line, or a pair that answers."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        pair, _ = load(folder)
        mx.eval(pair(mx.arange(1, 6)[None]))
    except REFUSED as error:
        assert str(error).strip() and "\n" not in str(error), error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@few
@given(st.sampled_from(["linked", "standalone"]), st.data())
def test_configs(pairs, name, data):
    config = json.loads((pairs / name / "config.json").read_text())
    folder = pairs / "odd"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pairs / name, folder)
    (folder / "config.json").write_text(json.dumps(changed(config, data, SMALL)))
    tried(folder)


@few
@given(st.sampled_from(["linked", "standalone"]), st.data())
def test_weights(pairs, name, data):
    folder = pairs / "odd"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pairs / name, folder)
    place = folder / "model.safetensors"
    whole = bytearray(place.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(
        st.integers(0, 15) | st.integers(0, header + 8) | st.integers(0, len(whole) - 1), label="at"
    )
    if data.draw(st.booleans(), label="cut"):
        whole = whole[:at]
    else:
        whole[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    place.write_bytes(whole)
    tried(folder)


@few
@given(st.data())
def test_checkpoint_yaml(tmp_path_factory, data):
    tree = yaml.safe_load((DATA / "golden_tiny/config.yaml").read_text())
    place = tmp_path_factory.mktemp("yaml") / "config.yaml"
    place.write_text(yaml.safe_dump(changed(tree, data, VALUES)))
    try:
        read_yaml(place)
    except REFUSED as error:
        assert str(error).strip() and "\n" not in str(error), error
