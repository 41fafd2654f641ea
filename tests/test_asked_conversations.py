"""Requests about code that a base answers itself."""

import json

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from kvpred_mlx.bench.recipe import requests as module
from kvpred_mlx.bench.recipe.requests import requests, write_conversations
from kvpred_mlx.making.pairing import LoadedModel
from kvpred_mlx.pair.locating import DEMO_PAIR

CONVERSATION = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
DOCUMENTED = "".join(
    f'''
class Tank{i}:
    def fill_{i}(self, litres):
        """Fill it.

        And no more than that.
        """
        self.level += litres
        if self.level > {i}:
            raise ValueError("full")
        return self.level
'''
    for i in range(5)
)
OTHERS = [
    "not Python (",
    "def short():\n    'Says.'\n    return 1\n",
    "def bare():\n    pass\n" + "    pass\n" * 9,
]


def test_each_request_is_about_another_function():
    asked = requests([*OTHERS, DOCUMENTED], 9)
    assert len(asked) == 5
    for i in range(5):
        assert sum(f"def fill_{i}(self, litres):\n" in text for text in asked) == 1
    assert asked == requests([DOCUMENTED], 9)
    assert asked != requests([DOCUMENTED], 9, seed=1)
    assert all(text.endswith("\n```") for text in asked)
    with pytest.raises(ValueError, match="no Python function"):
        requests(OTHERS, 3)


def test_a_function_to_complete_or_to_document():
    """Without its body, or without its docstring; never indented."""
    texts = [text for seed in range(40) for text in requests([DOCUMENTED], 5, seed)]
    whole = DOCUMENTED.split("\n\nclass")[0].partition("class Tank0:\n")[2]
    head = whole.partition('than that.\n        """\n')[0]
    head = head.replace("    def", "def").replace("\n    ", "\n") + 'than that.\n    """'
    about = [text for text in texts if "fill_0" in text]
    completed = [text for text in about if text.startswith("Complete")]
    assert completed and all(text.endswith(f"```python\n{head}\n```") for text in completed)
    documented = [text for text in about if text.startswith("Write a docstring")]
    assert documented and all("def fill_0(self, litres):\n    self.level += " in text for text in documented)


def test_the_base_answers_what_is_not_answered_yet(tmp_path, demo_pair, monkeypatch):
    monkeypatch.setattr(module, "ANSWER_TOKENS", 6)
    base = LoadedModel(
        "it", demo_pair[0].base, {}, load_tokenizer(DEMO_PAIR, {"chat_template": CONVERSATION})
    )
    out, told = tmp_path / "requests.jsonl", []
    asked = requests([DOCUMENTED], 3)
    assert asked[:1] == requests([DOCUMENTED], 1)
    write_conversations(base, asked[:1], out)
    first = out.read_text()
    out.write_text(first + first[:40])  # cut off in the middle of a line
    write_conversations(base, asked, out, lambda *now: told.append(now[:2]))
    lines = out.read_text().splitlines()
    assert out.read_text().startswith(first) and len(lines) == 3 and told == [(1, 3), (3, 3)]
    for line, text in zip(lines, asked, strict=True):
        question, answer = json.loads(line)["messages"]
        assert question == {"role": "user", "content": text}
        assert answer["role"] == "assistant" and answer["content"]
    plain = LoadedModel("it", demo_pair[0].base, {}, load_tokenizer(DEMO_PAIR))
    with pytest.raises(ValueError, match="it: no chat template"):
        write_conversations(plain, asked, tmp_path / "new.jsonl")
