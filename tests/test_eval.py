"""`kvpred-mlx eval`: the scorers, the sandbox, and whole runs on small local data."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
from conftest import DATA, fails
from pairs import make_first_layers_pair
from processes import command
from test_making import write_model

from kvpred_mlx.bench.common.flops import full_prefill_flops, ttft_flops
from kvpred_mlx.bench.evaluate import batches, candidate, report, sandbox, tasks
from kvpred_mlx.bench.evaluate import run as run_module
from kvpred_mlx.bench.evaluate.journal import Journal
from kvpred_mlx.bench.evaluate.run import Evaluation
from kvpred_mlx.bench.evaluate.sandbox import Limits
from kvpred_mlx.bench.evaluate.scores import interval, mean_flops, summarize
from kvpred_mlx.bench.evaluate.settings import EvaluationSettings
from kvpred_mlx.bench.evaluate.tasks import HUMANEVAL, TRIVIAQA
from kvpred_mlx.cli import values
from kvpred_mlx.making.pairing import join_first_layers, load_part
from kvpred_mlx.pair.loading import save
from kvpred_mlx.pair.modes import Mode
from kvpred_mlx.pair.predictor import FirstLayersPredictor
from kvpred_mlx.taps.kv_taps import KVTaps

FILES = {name: DATA / "eval" / f"{name}.jsonl" for name in ("triviaqa", "humaneval")}
ROWS = {task.name: tasks.rows(task, FILES[task.name], None) for task in (TRIVIAQA, HUMANEVAL)}
ADD = ROWS["humaneval"][0]
QUICK = Limits(seconds=10, memory_bytes=256 << 20)
QUICKER = Limits(seconds=1, memory_bytes=256 << 20)


@pytest.fixture(scope="module")
def demo_pair(unquantized_pair):
    """How answers are scored is the same of any weights."""
    return unquantized_pair


@pytest.fixture(autouse=True)
def few_counted_lengths(monkeypatch):
    """Counting FLOPs at a length takes as long as answering several prompts."""
    monkeypatch.setattr("kvpred_mlx.bench.evaluate.scores.FLOPS_LENGTHS", 2)


def test_the_prompts_are_the_paper_s():
    assert tasks.prompt(TRIVIAQA, ROWS["triviaqa"][1]) == "Question: Who wrote 'Dracula'?\nAnswer:"
    assert tasks.prompt(TRIVIAQA, ROWS["triviaqa"][0]).count("?") == 0
    assert tasks.prompt(HUMANEVAL, ADD) == ADD["prompt"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Bram Stoker", True), (" bram stoker", True), ("'Bram' Stoker!", True), ("ABRAHAM STOKER", True),
        ("Stoker", False), ("Bram  Stoker", False), ("Bram Stoker wrote it", False), ("", False),
    ],
)  # fmt: skip
def test_exact_match(answer, right):
    assert tasks.matches(answer, ROWS["triviaqa"][1]["answer"]["aliases"]) is right


@pytest.mark.slow
def test_exact_match_is_lm_eval_s():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    for answer in ("Bram Stoker", "bram stoker", "Bram-Stoker", "Bram", "A.B.", "", "Mars (planet)"):
        for alias in ("Bram Stoker", "BramStoker", "AB", "Mars planet"):
            theirs = metrics.exact_match_hf_evaluate(
                predictions=[answer], references=[alias], ignore_case=True, ignore_punctuation=True
            )["exact_match"]
            assert tasks.matches(answer, [alias]) is bool(theirs), (answer, alias)


def test_answers_are_cut_at_the_first_stop():
    assert tasks.cut(" Paris, France. Or", TRIVIAQA.stops) == " Paris"
    assert tasks.cut("    return a\n\nclass A:\n", HUMANEVAL.stops) == "    return a\n"
    assert tasks.cut("    return a", HUMANEVAL.stops) == "    return a"


def test_pass_at_k():
    assert tasks.pass_at_k(10, 0, 10) == 0.0
    assert tasks.pass_at_k(10, 1, 10) == 1.0
    assert tasks.pass_at_k(20, 1, 10) == pytest.approx(0.5)
    assert tasks.pass_at_k(5, 2, 1) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="5 samples, expected at least 10"):
        tasks.pass_at_k(5, 2, 10)


@pytest.mark.parametrize("row", ROWS["humaneval"])
def test_the_known_solution_passes(row):
    assert tasks.check(row, row["canonical_solution"]) == sandbox.Outcome(True, "passed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("    return a - b\n", "AssertionError"),
        ("    return a +\n", "SyntaxError"),
        ("    return undefined\n", "NameError"),
        ("    while True:\n        pass\n", "timed out"),
        ("    import time\n    time.sleep(60)\n", "timed out"),
        ("    x = []\n    while True:\n        x.append(bytearray(10_000_000))\n", "emory"),
        ("    import sys\n    sys.exit(0)\n", "SystemExit"),
        ("    import os\n    os._exit(0)\n", "ended before"),
        ("    import os\n    os.fork()\n", "PermissionError: os.fork"),
        ("    import os\n    os.kill(os.getppid(), 9)\n", "PermissionError: os.kill"),
        ("    import subprocess\n    subprocess.run(['true'])\n", "PermissionError: subprocess.Popen"),
        ("    import os\n    os.system('true')\n", "PermissionError: os.system"),
        ("    import socket\n    socket.create_connection(('127.0.0.1', 9))\n", "PermissionError: socket."),
        ("    import ctypes\n    ctypes.CDLL(None)\n", "PermissionError: ctypes.dlopen"),
        ("    open('big', 'w').write('x' * 50_000_000)\n", "OSError"),
        ("    raise BaseException('no')\n", "BaseException: no"),
        ("    def again(n):\n        return again(n + 1)\n    again(0)\n", "RecursionError"),
    ],
)  # fmt: skip
def test_candidates_that_do_not_pass(completion, reason):
    program = f"{ADD['prompt']}{completion}\n{ADD['test']}\ncheck(add)\n"
    started = time.monotonic()
    outcome = sandbox.run(program, QUICKER if reason == "timed out" else QUICK)
    assert not outcome.passed and reason in outcome.reason, outcome
    assert time.monotonic() - started < 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "attempt",
    [
        "open({0!r}, 'w').write('x')",
        "open('../outside', 'w')",
        "import os; os.open({0!r}, os.O_CREAT | os.O_WRONLY)",
        "import os; os.symlink({1!r}, 'link'); open('link/outside', 'w')",
        "import os; os.remove({2!r})",
        "import os; os.rename({2!r}, {0!r})",
        "import os; os.truncate({2!r}, 0)",
        "import os; os.chmod({2!r}, 0)",
        "import shutil; shutil.rmtree({1!r})",
        "import pathlib; pathlib.Path({2!r}).unlink()",
    ],
)
def test_nothing_is_written_outside_the_folder(attempt, tmp_path):
    (tmp_path / "kept").write_text("kept")
    program = attempt.format(str(tmp_path / "outside"), str(tmp_path), str(tmp_path / "kept"))
    outcome = sandbox.run(program, QUICK)
    assert not outcome.passed and "Error" in outcome.reason, outcome
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"kept": "kept"}
    assert not (tmp_path.parent / "outside").exists()


def test_inside_its_folder_a_candidate_may_write():
    program = (
        "import os\nopen('a', 'w').write('x')\nos.mkdir('b')\nos.rename('a', 'b/c')\n"
        "assert open('b/c').read() == 'x'\nprint('x' * 100_000)\nos.remove('b/c')\n"
    )
    assert sandbox.run(program, QUICK) == sandbox.Outcome(True, "passed")


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Landlock and network namespaces are Linux's"
)
def test_the_kernel_refuses_too(tmp_path):
    """What gets around Python's hook, where the kernel knows Landlock and lets users make namespaces."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(candidate.__file__).parent)!r})\n"
        "import candidate, os, socket, ctypes\n"
        "candidate.isolate(os.getcwd())\n"
        "open('inside', 'w').close()\n"
        f"try: open({str(tmp_path / 'outside')!r}, 'w'); print('written')\n"
        "except PermissionError: print('refused')\n"
        "print(','.join(name for _, name in socket.if_nameindex()))\n"
    )
    inside = tmp_path / "inside"
    inside.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=inside, capture_output=True, text=True, check=True
    )
    written, interfaces = done.stdout.splitlines()
    if written == "written":
        pytest.skip("this kernel has no Landlock")
    assert written == "refused" and not (tmp_path / "outside").exists()
    assert set(interfaces.split(",")) <= {"lo"} or os.geteuid() != 0


def test_data_that_does_not_fit_is_named(tmp_path):
    file = tmp_path / "data.jsonl"
    for content, message in [
        ("", "no rows"),
        ("{", "line 1 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"question": "x"}\n', "row 1 has no answer, as triviaqa needs"),
        ('{"question": "x", "answer": {"value": "y"}}\n', "row 1 has no list of answer.aliases"),
    ]:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            tasks.rows(TRIVIAQA, file, None)
    assert len(tasks.rows(TRIVIAQA, FILES["triviaqa"], 1)) == 1


def test_intervals():
    low, high = interval([1.0] * 30 + [0.0] * 70)
    assert (round(low, 3), round(high, 3)) == (0.219, 0.396)  # Wilson's, 30 of 100
    assert interval([0.0] * 10)[0] == 0.0 < interval([0.0] * 10)[1]
    low, high = interval([0.5] * 50 + [1.0] * 50)
    assert 0.69 < low < 0.75 < high < 0.81


@pytest.mark.slow
def test_mean_flops(demo_pair, monkeypatch):
    pair = demo_pair[0]
    monkeypatch.setattr(pair, "min_prompt_tokens", 1)
    flops = [ttft_flops(pair, n) for n in (20, 40, 40)]
    assert mean_flops(pair, "exact", [20, 40, 40]) == pytest.approx(sum(f.exact for f in flops) / 3)
    assert mean_flops(pair, "predicted", [20, 40, 40]) == pytest.approx(sum(f.predicted for f in flops) / 3)
    assert mean_flops(pair, "auxiliary", [20]) == flops[0].auxiliary
    monkeypatch.setattr("kvpred_mlx.bench.evaluate.scores.FLOPS_LENGTHS", 3)
    lengths = range(20, 61, 10)  # more than are counted one by one
    expected = sum(ttft_flops(pair, n).predicted for n in lengths) / len(lengths)
    assert mean_flops(pair, "predicted", list(lengths)) == pytest.approx(expected, rel=1e-3)


def arguments(folder, *extra, tasks="triviaqa,humaneval"):
    data = [f"--data={name}={FILES[name]}" for name in FILES if name in tasks]
    return [
        "eval",
        "--tasks",
        tasks,
        *data,
        "-m",
        4,
        "--output-dir",
        folder,
        "--confirm-run-unsafe-code",
        *extra,
    ]


@pytest.mark.slow
def test_a_whole_run(run, tmp_path):
    code, out, err = run(*arguments(tmp_path / "out", "--limit", 1, "--num-samples", 0, "--json"))
    assert code == 0, err
    results = json.loads(out)
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    assert results["complete"] and (tmp_path / "out/quality.png").stat().st_size > 10_000
    rows = {(r["task"], r["metric"], r["mode"]): r for r in results["rows"]}
    metrics = [("triviaqa", "exact_match"), ("humaneval", "pass@1")]
    assert set(rows) == {(*m, mode) for m in metrics for mode in ("exact", "predicted", "auxiliary")}
    for row in rows.values():
        assert row["items"] == 1 and 0 <= row["score"] <= 1
        assert row["ttft"] > 0 and row["prompt_tokens"] > 4
    flops = [
        rows["triviaqa", "exact_match", mode]["ttft_flops"] for mode in ("exact", "predicted", "auxiliary")
    ]
    assert flops[0] > flops[1] > flops[2] > 0
    items = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()[1:]]
    assert len(items) == 6 and len(items[-1]["answers"]) == len(items[-1]["reasons"]) == 1


@pytest.mark.slow
def test_a_whole_run_in_batches(run, tmp_path):
    """With candidates in their sandboxes beside the generation."""
    code, out, err = run(*arguments(tmp_path / "out", "--batch-size", 4, "--json", "--no-plot"))
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert len(rows) == 9 and all(row["items"] == 2 and row["ttft"] is None for row in rows)
    assert all(row["ttft_flops"] > 0 for row in rows)
    items = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()[1:]]
    assert [len(item["answers"]) for item in items] == [1] * 6 + [11] * 6
    assert all(len(item["reasons"]) == 11 for item in items[6:])


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    options = ["--modes", "exact,predicted", "--no-plot"]
    whole_answer, answered = Evaluation._answer, []

    def answer(self, model, *rest):
        if len(answered) == 3:
            raise KeyboardInterrupt
        answered.append(model)
        return whole_answer(self, model, *rest)

    monkeypatch.setattr(Evaluation, "_answer", answer)
    assert run(*arguments(folder, *options, tasks="triviaqa"))[0] == 130
    journal = folder / "items.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 3
    with journal.open("a") as file:
        file.write('{"task": "triviaqa", "mode": "predi')  # killed while it wrote
    answered.clear()
    code, out, _ = run(*arguments(folder, *options, tasks="triviaqa"))
    assert code == 0 and len(answered) == 1
    assert "triviaqa exact_match" in out.replace("\n", " ") or "exact_match" in out
    answered.clear()
    assert run(*arguments(folder, "--modes", "exact,auxiliary", "--no-plot", tasks="triviaqa"))[0] == 0
    assert len(answered) == 2, "a mode more"
    fails_at_the_end(
        run(*arguments(folder, "--seed", 1, tasks="triviaqa")), "seed was 0 and is 1", "--output-dir"
    )


def fails_at_the_end(result, *parts):
    code, _, err = result
    last = err.strip().splitlines()[-1]
    assert code == 1 and last.startswith("kvpred-mlx: error: ") and "Traceback" not in err
    assert all(part in last for part in parts), last


@pytest.mark.slow
def test_right_answers_score(demo_pair, tmp_path, monkeypatch):
    """The exact mode answers rightly, the predicted one half of the time: scores and retention say so."""
    answers = {"Question: Which": " mars", "Question: Who": " Bram Stoker"}
    right = {row["prompt"]: row["canonical_solution"] for row in ROWS["humaneval"]}
    pair, tokenizer = demo_pair

    def answer(self, model, task, prompt, sampler):
        text = tokenizer.decode(prompt[1:])
        known = next((a for q, a in {**answers, **right}.items() if text.strip().startswith(q.strip())), "")
        wrong = not pair.exact and (text.startswith("Question: Who") or "largest" in text)
        return ("    pass\n" if wrong else known), 0.1

    monkeypatch.setattr(Evaluation, "_answer", answer)
    settings = EvaluationSettings(tasks=["triviaqa", "humaneval"], modes=["exact", "predicted"], data=FILES)
    results = Evaluation(pair, tokenizer, "pair", settings, tmp_path).run()
    scores = {(r["metric"], r["mode"]): (r["score"], r["retention"]) for r in results["rows"]}
    for metric in ("exact_match", "pass@1", "pass@10"):
        assert scores[metric, "exact"] == (1.0, 1.0)
        assert scores[metric, "predicted"] == (0.5, 0.5)
    assert pair.min_prompt_tokens > 1 and not pair.exact
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()[1:]]
    assert len(items[-1]["answers"]) == len(items[-1]["reasons"]) == 11


def test_prompts_that_are_too_long_score_nothing(demo_pair, tmp_path):
    settings = EvaluationSettings(tasks=["triviaqa"], modes=["exact"], data=FILES, max_tokens=2)
    results = Evaluation(*demo_pair, "pair", settings, tmp_path, context=8).run()
    assert results["rows"][0]["score"] == 0 and results["rows"][0]["ttft"] is None
    json.dumps(results, allow_nan=False)


def evaluation(pair, tokenizer, folder, task, modes, **options):
    """Answers and records of a run on eight short items of unequal lengths."""
    text = ROWS["humaneval"][1]["prompt"]
    rows = [
        {**ADD, "task_id": f"t{n}", "prompt": text[:n], "question": text[:n], "answer": {"aliases": []}}
        for n in (110, 9, 60, 61, 1, 85, 40, 60)
    ]
    context = options.pop("context", None)
    folder.mkdir(exist_ok=True)
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluationSettings(
        tasks=[task], modes=modes, data={task: file}, **{"max_tokens": 6, "num_samples": 0, **options}
    )
    made = Evaluation(pair, tokenizer, "pair", settings, folder, context=context)
    results = made.run()
    lines = (folder / "items.jsonl").read_text().splitlines()[1:]
    return results, {(r["mode"], r["id"]): r for r in map(json.loads, lines)}


@pytest.fixture
def passing(monkeypatch):
    monkeypatch.setattr(tasks, "check", lambda row, answer: sandbox.Outcome(True, "passed"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "least"),
    [
        ("exact", 1), ("predicted", 1), ("predicted", 16), ("auxiliary", 1), ("exact-last=0.2", 1),
        ("exact-first=2+exact-top=0.3", 1), ("sparse-top=0.3", 1), ("sparse-first=2+sparse-top=0.3", 16),
    ],
)  # fmt: skip
def test_batches_answer_as_one_by_one(demo_pair, tmp_path, passing, mode, least):
    options = {"task": "humaneval", "modes": [mode], "min_prompt_tokens": least}
    alone = evaluation(*demo_pair, tmp_path / "alone", **options)[1]
    results, found = evaluation(*demo_pair, tmp_path / "found", batch_size=3, **options)
    assert {k: r["answers"] for k, r in found.items()} == {k: r["answers"] for k, r in alone.items()}
    assert len({r["answers"][0] for r in found.values()}) > 3
    assert all(r["ttfts"] == [] and alone[k]["ttfts"] for k, r in found.items())
    assert [r["ttft"] for r in results["rows"]] == [None] and results["rows"][0]["prompt_tokens"] > 1
    assert json.dumps(results, allow_nan=False) and report.table(results)


@pytest.mark.slow
@pytest.mark.variations
@pytest.mark.parametrize("mode", ["depth=1:0.5/2:0.8", "depth=1:0.7"])
def test_batches_are_read_as_deep_as_one_by_one(demo_pair, tmp_path, passing, mode):
    pair = make_first_layers_pair(demo_pair[0].base, [1, 2])
    runs = [
        evaluation(pair, demo_pair[1], tmp_path / str(n), "humaneval", [mode], batch_size=n)[1]
        for n in (1, 3)
    ]
    alone, found = ({k: r["answers"] for k, r in run.items()} for run in runs)
    assert found == alone


@pytest.mark.slow
def test_batches_draw_as_one_by_one(demo_pair, tmp_path, passing):
    runs = [
        evaluation(
            *demo_pair, tmp_path / str(n), "humaneval", ["predicted"], num_samples=10, limit=3, batch_size=n
        )[1]
        for n in (1, 4)
    ]
    alone, found = ({k: r["answers"] for k, r in run.items()} for run in runs)
    assert found == alone and all(len(set(answers)) > 3 for answers in found.values())


@pytest.mark.slow
def test_batches_end_at_stops_and_at_the_end(demo_pair, monkeypatch):
    """A row ends at its stop, at an end of text, or full; the others go on."""
    pair, tokenizer = demo_pair
    prompts = [tokenizer.encode(ROWS["humaneval"][1]["prompt"][:n]) for n in (110, 60, 85, 40)]
    asked = [batches.Asked(i, prompt, 12) for i, prompt in enumerate(prompts)]
    whole = dict(batches.answer_all(pair, tokenizer, asked, ["never said"], 2))
    stop = whole[1][3:5]
    cut = dict(batches.answer_all(pair, tokenizer, asked, [stop], 2))
    assert cut == {i: tasks.cut(text, [stop]) for i, text in whole.items()} and len(cut[1]) <= 3
    last = tokenizer.encode(whole[0])[-1]
    monkeypatch.setattr(tokenizer, "_eos_token_ids", {last})
    assert whole[0].startswith(dict(batches.answer_all(pair, tokenizer, asked, [], 2))[0])
    assert dict(batches.answer_all(pair, tokenizer, [], [], 2)) == {}


@pytest.mark.slow
def test_batches_go_on_where_they_stopped(demo_pair, tmp_path, monkeypatch):
    """With another batch size too; what was answered has been scored."""
    whole, given = run_module.answer_all, []

    def interrupted(*rest):
        for i, answer in enumerate(whole(*rest)):
            if i == 3:
                raise KeyboardInterrupt
            yield answer

    def counted(*rest):
        for answer in whole(*rest):
            given.append(answer)
            yield answer

    options = {"task": "triviaqa", "modes": ["exact", "auxiliary"]}
    monkeypatch.setattr(run_module, "answer_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluation(*demo_pair, tmp_path, batch_size=4, **options)
    before = (tmp_path / "items.jsonl").read_text()
    monkeypatch.setattr(run_module, "answer_all", counted)
    results, records = evaluation(*demo_pair, tmp_path, batch_size=2, **options)
    assert (tmp_path / "items.jsonl").read_text().startswith(before)
    assert len(records) == 16 and len(given) == 16 - len(before.splitlines()[1:])
    assert results["complete"] and [row["items"] for row in results["rows"]] == [8, 8]


def test_flops_of_prompts_that_sparse_prefill_reads_exactly(demo_pair, monkeypatch):
    pair = demo_pair[0]
    monkeypatch.setattr(pair, "min_prompt_tokens", 40)
    lengths = [1, 2, 3, 40]
    exact = [full_prefill_flops(pair.base, n) for n in lengths]
    assert [mean_flops(pair, "sparse-top=0.2", [n]) for n in lengths] == exact
    assert mean_flops(pair, "sparse-top=0.2", [200]) < full_prefill_flops(pair.base, 200)


def test_sparse_prefill_is_of_own_tasks_alone(demo_pair, tmp_path):
    settings = EvaluationSettings(tasks=["gsm8k"], modes=["sparse-top=0.2"])
    with pytest.raises(ValueError, match=r"'sparse-top=0.2', expected another one for tasks of lm-eval"):
        Evaluation(*demo_pair, "pair", settings, tmp_path)


def test_prompts_that_are_too_long_score_nothing_in_batches(demo_pair, tmp_path):
    results, records = evaluation(*demo_pair, tmp_path, "triviaqa", ["exact"], batch_size=4, context=30)
    unanswered = [r for r in records.values() if not r["answers"]]
    assert 0 < len(unanswered) < 8 and all(r["prompt_tokens"] == [] for r in unanswered)
    assert results["rows"][0]["items"] == 8


def test_models_that_cannot_answer_in_batches(demo_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(type(demo_pair[0].rows), "supported", False)
    settings = EvaluationSettings(tasks=["triviaqa"], data=FILES, batch_size=2)
    with pytest.raises(ValueError, match="cannot answer in batches: give --batch-size 1"):
        Evaluation(*demo_pair, "pair", settings, tmp_path)


def test_journals_of_something_else(tmp_path):
    (tmp_path / "items.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="not a journal"):
        Journal(tmp_path / "items.jsonl", {})


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
{rest}
metadata:
  version: 1.0
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""
UNTIL = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def lm_eval_tasks(tmp_path, monkeypatch):
    """A folder with two of lm-eval's tasks on local data; its own thousands are not read, and pip is not asked."""
    pytest.importorskip("lm_eval")
    from kvpred_mlx.bench.evaluate import lm_eval_model

    manager = functools.partial(lm_eval_model.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_model, "TaskManager", manager)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rest in (("local_choices", CHOICES), ("local_until", UNTIL)):
        text = TASK.format(name=name, data=DATA / "eval/choices.jsonl", rest=rest)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.slow
def test_tasks_of_lm_eval(run, lm_eval_tasks, tmp_path):
    options = ["--include-path", lm_eval_tasks, "--output-dir", tmp_path / "out", "--json", "--no-plot"]
    code, out, err = run("eval", "--tasks", "local_choices,local_until", *options)
    assert code == 0, err
    rows = {(r["task"], r["metric"], r["mode"]): r for r in json.loads(out)["rows"]}
    modes = ("exact", "predicted", "auxiliary")
    assert set(rows) == {
        (t, m, mode) for t, m in (("local_choices", "acc"), ("local_until", "exact_match")) for mode in modes
    }
    for mode in modes:
        assert rows["local_choices", "acc", mode]["score"] in (0.0, 0.5, 1.0)
        assert rows["local_choices", "acc", mode]["ttft"] > 0
        assert rows["local_choices", "acc", mode]["items"] == 2
        assert rows["local_choices", "acc", mode]["higher_is_better"] is True
    code, _, err = run("eval", "--tasks", "nothing_known", *options)
    assert code == 2 and "nothing_known: not triviaqa nor humaneval, and not known to lm-eval" in err


def test_a_pair_without_an_auxiliary(run, tmp_path, demo_pair):
    """By default the modes that it has; one that it has not is refused before anything is answered."""
    base = load_part(str(write_model(tmp_path / "base", "qwen3", demo_pair[1])))
    taps = KVTaps(base.model)
    predictor = FirstLayersPredictor([1], taps.input_widths, taps.widths)
    mx.eval(predictor.parameters())
    save(tmp_path / "pair", join_first_layers(base, predictor, linked=True))
    command = [
        "eval", "--model", tmp_path / "pair", "--tasks", "triviaqa", "--data", FILES["triviaqa"], "-m", 2, "--no-plot",
        "--json", "--output-dir",
    ]  # fmt: skip
    code, out, err = run(*command, tmp_path / "out")
    assert code == 0, err
    assert [row["mode"] for row in json.loads(out)["rows"]] == ["exact", "predicted"]
    fails(run(*command, tmp_path / "other", "--modes", "exact,auxiliary"), 1, "no auxiliary model")
    assert not (tmp_path / "other").exists()


def test_lower_may_be_better(demo_pair):
    """No share of the exact score is kept of a perplexity, and it is no percentage; more than all is all."""
    record = lambda score, better: {"scores": {"m": score}, "higher_is_better": {"m": better},
                                    "errors": {"m": 0.5}, "prompt_tokens": [], "ttfts": []}  # fmt: skip
    shown = []
    for better, scores in ((False, (12.0, 15.0)), (True, (0.5, 0.6)), (True, (31.5, 0.8))):
        modes = dict(zip(("exact", "predicted"), ([record(s, better)] for s in scores), strict=True))
        rows = summarize(demo_pair[0], "task", modes)
        results = {"pair": {"name": "demo", "dtype": "float32"}, "rows": rows}
        cells = [list(column.cells)[2] for column in report.table(results).columns]
        shown.append((cells[2], cells[3], rows[1]["retention"]))
    assert shown[0] == ("15 (14.02 to 15.98)", "", None)
    assert shown[1][:2] == ("60.0 % (-38.0 to 158.0)", "100.0 %") and shown[1][2] == pytest.approx(1.2)
    assert shown[2][:2] == ("0.8 (-0.18 to 1.78)", "2.5 %")


@pytest.mark.slow
def test_scoring_is_the_base_after_the_prompt(demo_pair, monkeypatch):
    """Predicted: the context's cache is predicted but for its last token; the continuation is the base's."""
    model = pytest.importorskip("kvpred_mlx.bench.evaluate.lm_eval_model")
    pair, tokenizer = demo_pair
    monkeypatch.setattr(pair, "min_prompt_tokens", 1)
    context, rest = tokenizer.encode(ROWS["humaneval"][1]["prompt"]), tokenizer.encode("    return max(")[1:]

    def score(of):
        lm = model.LoadedLM(of, tokenizer, 1, None)
        logprobs, cache = lm._process_prompt(context)
        found = lm._score_fn(mx.array([rest]), cache=cache)[0]
        return logprobs[0, rest[0]].item() + found.sum().item()

    def reference():
        cache = pair.make_cache()
        pair(mx.array([context[:-1]]), cache=cache)
        total, token = 0.0, context[-1]
        for following in rest:
            logits = pair(mx.array([[token]]), cache=cache)[0, -1]
            total += (logits - mx.logsumexp(logits))[following].item()
            token = following
        return total

    assert score(pair) == pytest.approx(reference(), abs=1e-2)
    with Mode(exact=True).applied(pair):
        assert score(pair) == pytest.approx(score(pair.base), abs=1e-3)


@pytest.mark.slow
def test_an_answer_s_length_cuts_no_context(demo_pair, monkeypatch):
    """Of tasks that are scored; one that is longer than the model's context is counted."""
    model = pytest.importorskip("kvpred_mlx.bench.evaluate.lm_eval_model")
    pair, tokenizer = demo_pair
    monkeypatch.setattr(pair, "min_prompt_tokens", 1)
    asked = [
        Namespace(args=(ROWS["humaneval"][1]["prompt"], rest)) for rest in ("    return max(", "    pass")
    ]

    def scores(max_tokens, context):
        lm = model.LoadedLM(pair, tokenizer, 1, max_tokens, context)
        return lm.loglikelihood(asked), lm.cut

    whole = scores(None, None)
    assert scores(2, None) == whole and whole[1] == 0
    shorter = scores(None, len(tokenizer.encode(asked[0].args[0])) - 4)
    assert shorter[1] == 1 and shorter[0] != whole[0]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--tasks", "humaneval"], ["--confirm-run-unsafe-code"]),
        (["--tasks", "triviaqa,,"], ["--tasks"]),
        (["--modes", "fast"], ["--modes", "'fast'", "exact-last"]),
        (["--modes", "sparse-top=2"], ["--modes", "'sparse-top=2'", "sparse-top=0.2"]),
        (["--modes", "sparse-last=4"], ["--modes", "'sparse-last=4'", "a share to choose"]),
        (["--modes", "exact-last=4+sparse-top=0.2"], ["--modes", "exact-last=4", "a share to choose"]),
        (["--num-samples", "5"], ["--num-samples", "0, or 10"]),
        (["--data", "no.jsonl"], ["--data", "no.jsonl: no such file"]),
        (["--data", f"gsm8k={FILES['triviaqa']}"], ["--data", "no such file"]),
        (["--limit", "0"], ["--limit"]),
    ],
)
def test_wrong_usage(run, given, parts):
    fails(run("eval", *given), 2, *parts)


@pytest.mark.parametrize(("task", "needed"), [("gsm8k", "lm-eval"), ("triviaqa", "datasets")])
def test_packages_that_are_not_there_are_needed_for_some_tasks_alone(run, monkeypatch, task, needed):
    there = lambda name: None if name in ("lm_eval", "datasets") else object()
    monkeypatch.setattr(values, "find_spec", there)
    fails(run("eval", "--tasks", task), 1, f"eval needs {needed}: pip install 'kvpred-mlx[eval]'")


@pytest.mark.slow
def test_no_hub_is_one_line(tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    arguments = command("eval", "--tasks", "triviaqa", "--output-dir", tmp_path / "o")
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    fails_at_the_end(
        (done.returncode, done.stdout, done.stderr), "mandarjoshi/trivia_qa", "--data takes a file"
    )


@pytest.fixture(params=["SentencePiece", "byte-level BPE"])
def answering(request, demo_pair, tmp_path):
    """The bundled pair with its own tokenizer, or with one of the other kind, made of its vocabulary's code."""
    pair, tokenizer = demo_pair
    if request.param == "SentencePiece":
        return pair, tokenizer
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([ROWS["humaneval"][1]["prompt"] * 9], vocab_size=400)
    made.save(str(tmp_path / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="!").save_pretrained(
        tmp_path
    )
    return pair, mlx_lm.utils.load_tokenizer(tmp_path)


@pytest.mark.variations
@pytest.mark.parametrize("size", [None, 4])
def test_an_answer_keeps_the_space_that_it_begins_with(answering, tmp_path, size):
    """mlx-lm's detokenizers of one kind drop it, and a body that continues a function is then indented by three."""
    pair, tokenizer = answering
    prompt = tokenizer.encode("def f(x):\n")
    before = tokenizer.decode(prompt[-1:])
    texts = {t: tokenizer.decode([prompt[-1], t]).removeprefix(before) for t in range(400)}
    indents = {len(text) - len(text.lstrip(" ")): t for t, text in texts.items() if text.startswith(" ")}
    assert 1 in indents and len(indents) > 1
    for width, token in {min(indents): indents[min(indents)], max(indents): indents[max(indents)]}.items():
        settings = EvaluationSettings(["humaneval"], max_tokens=1, batch_size=size)
        evaluation = Evaluation(pair, tokenizer, "demo", settings, tmp_path / f"results-{width}")
        answer = lambda logprobs, token=token: mx.full(logprobs.shape[:-1], token)
        if size is None:
            text, _ = evaluation._answer(pair, HUMANEVAL, prompt, answer)
        else:
            asked = [batches.Asked(0, prompt, 1, answer)]
            ((_, text),) = batches.answer_all(pair, tokenizer, asked, HUMANEVAL.stops, size)
        assert text == texts[token]
