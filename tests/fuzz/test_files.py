"""Pairs on disk with entries removed, retyped and out of range, and files cut or changed at every structural place."""

from __future__ import annotations

import json
import shutil
import zipfile

import mlx.core as mx
import pytest
import torch
import yaml
from checkpoints import pair_state, pair_yaml
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from odd import VALUES, changed, few
from test_making import write_model

from kvpred_mlx import load, load_model, save
from kvpred_mlx.cli.prompt_cache import read_cache
from kvpred_mlx.convert.checkpoint import convert_checkpoint
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


def damaged(whole, places, data):
    """A file's bytes, cut somewhere or with a bit turned over, at one of some (first, last) places or anywhere."""
    first, last = data.draw(st.sampled_from([*places, (0, len(whole) - 1)]), label="part")
    at = data.draw(st.integers(first, min(last, len(whole) - 1)), label="at")
    if data.draw(st.booleans(), label="cut"):
        return whole[:at]
    changed = bytearray(whole)
    changed[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    return bytes(changed)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint in both of PyTorch's formats, as a zip file and as pickles in a row; and its YAML."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    state = pair_state()
    torch.save(state, root / "zip.pt")
    torch.save(state, root / "pickles.pt", _use_new_zipfile_serialization=False)
    pair_yaml(root / "model.yaml")
    return root


def structure(file):
    """Where a checkpoint's headers are, its pickle and its directory: (first, last) byte of each, storages apart."""
    if not zipfile.is_zipfile(file):
        return [(0, 2000), (2000, 9000)]  # magic number, versions, pickle
    with zipfile.ZipFile(file) as members:
        infos, directory = members.infolist(), members.start_dir
    pickled = next(i for i in infos if i.filename.endswith("data.pkl"))
    starts = [i.header_offset for i in infos]
    end = starts[starts.index(pickled.header_offset) + 1]
    return [
        (end - pickled.file_size - 200, end),
        *((s, s + 80) for s in starts[:6]),
        (directory, file.stat().st_size),
    ]


@few
@given(st.sampled_from(["zip", "pickles"]), st.data())
def test_checkpoints(checkpoints, name, data):
    folder = checkpoints / "odd"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    file, whole = folder / "model.pt", checkpoints / f"{name}.pt"
    file.write_bytes(damaged(whole.read_bytes(), structure(whole), data))
    try:
        convert_checkpoint(file, checkpoints / "model.yaml", folder / "pair")
    except (*REFUSED, ImportError) as error:
        assert str(error).strip() and "\n" not in str(error), error
        assert [p.name for p in folder.iterdir()] == ["model.pt"]
    else:
        assert sorted(p.name for p in folder.iterdir()) == ["model.pt", "pair"]
        mx.eval(load_model(folder / "pair").parameters())


@pytest.fixture(scope="module")
def saved_cache(tmp_path_factory, demo_pair):
    """A prompt cache's file."""
    file, pair = tmp_path_factory.mktemp("caches") / "cache.safetensors", demo_pair[0]
    cache = make_prompt_cache(pair)
    mx.eval(pair(mx.arange(1, 40)[None], cache=cache))
    save_prompt_cache(str(file), cache, {"model": "a pair"})
    return file


@few
@given(st.data())
def test_prompt_caches(saved_cache, data):
    whole = saved_cache.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    odd = saved_cache.with_name("odd.safetensors")
    odd.write_bytes(damaged(whole, [(0, 15), (0, header + 8)], data))
    try:
        entries = read_cache(odd).entries
        mx.eval([entry.state for entry in entries])
    except REFUSED as error:
        assert str(error).strip() and "\n" not in str(error), error
