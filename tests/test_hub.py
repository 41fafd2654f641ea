"""Pairs to and from the Hugging Face hub: a stand-in for its client, a server that refuses, a cache without network."""

from __future__ import annotations

import http.server
import json
import shutil
import threading

import huggingface_hub
import pytest
from conftest import DATA, fails
from huggingface_hub import HfApi, ModelCard

import kvpred_mlx
from kvpred_mlx.making import hub
from kvpred_mlx.pair.locating import DEMO_PAIR, find_pair


@pytest.fixture
def api(monkeypatch):
    """What the hub was asked for; it agrees to everything."""
    calls = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "someone"})

    def create_repo(self, repo_id, exist_ok):
        calls.append(("create", repo_id, exist_ok))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, repo_id, folder_path, commit_message):
        calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def test_upload_takes_the_card_that_is_there(api, tmp_path):
    pair = shutil.copytree(DEMO_PAIR, tmp_path / "pair")
    card = (pair / "README.md").read_text()
    assert hub.upload(pair, "someone/pair") == "https://huggingface.co/someone/pair"
    assert api[0] == ("create", "someone/pair", True)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(api[1][2])
    assert (pair / "README.md").read_text() == card


def test_upload_of_a_model_without_a_card_gets_one(api, golden_pair, tmp_path):
    pair = shutil.copytree(golden_pair, tmp_path / "pair")
    (pair / "README.md").unlink(missing_ok=True)
    hub.upload(pair, "someone/pair", "Made here.")
    card = ModelCard.load(pair / "README.md")
    assert card.data.library_name == "mlx" and "kv-prediction" in card.data.tags
    assert "kvpred-mlx generate --model someone/pair" in card.text and "Made here." in card.text


def test_convert_uploads(run, api, tmp_path):
    golden = DATA / "golden_tiny"
    arguments = ["convert", "--checkpoint", golden / "checkpoint.pt", "--config", golden / "config.yaml"]
    code, out, _ = run(*arguments, "--mlx-path", tmp_path / "out", "--upload-repo", "someone/pair")
    assert code == 0 and out.splitlines()[-1] == "https://huggingface.co/someone/pair"
    assert "README.md" in api[1][2]


def test_only_models_are_uploaded(api, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hub.upload(tmp_path, "someone/pair")
    assert api == []


def test_wrong_names_are_one_line_before_any_work(run, tmp_path):
    golden = DATA / "golden_tiny"
    arguments = ["convert", "--checkpoint", golden / "checkpoint.pt", "--config", golden / "config.yaml"]
    result = run(*arguments, "--mlx-path", tmp_path / "out", "--upload-repo", "a/b/c")
    fails(result, 1, "'a/b/c' is no repository's name")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def refusing_hub():
    """A server on the loopback interface that knows nobody."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = json.dumps({"error": "Invalid username or password."}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_hub_that_refuses_is_one_line(run, refusing_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", refusing_hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    golden = DATA / "golden_tiny"
    arguments = ["convert", "--checkpoint", golden / "checkpoint.pt", "--config", golden / "config.yaml"]
    fails(run(*arguments, "--mlx-path", tmp_path / "out", "--upload-repo", "someone/pair"), 1, "hub refused")
    assert not (tmp_path / "out").exists()
    fails(run("generate", "-p", "x", "--model", "someone/pair"), 1, "someone/pair", "hub")


def test_a_pair_in_the_hub_s_cache_needs_no_network(tmp_path, monkeypatch):
    """Also a revision of it; a revision that is not there is one line."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--pair"
    commit = "0" * 39 + "1"
    snapshot = shutil.copytree(DEMO_PAIR, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(commit)
    for revision in (None, "v1", commit):
        assert find_pair("someone/pair", revision) == snapshot
    assert kvpred_mlx.load("someone/pair", revision="v1", lazy=True)[1] is not None
    with pytest.raises(FileNotFoundError, match="someone/pair") as missing:
        kvpred_mlx.load("someone/pair", revision="v2")
    assert "\n" not in str(missing.value)
