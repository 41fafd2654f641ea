"""Repair behind the first token."""

from __future__ import annotations

import signal
import subprocess

import mlx.core as mx
import pytest
import typer
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from pairs import PAIRS, difference, make_first_layers_pair, make_pair, reference_cache, tokens
from processes import command

from kvpred_mlx import ExactPositions
from kvpred_mlx.bench.studies import repair as bench
from kvpred_mlx.generation import repair as module
from kvpred_mlx.generation import stream as generation
from kvpred_mlx.generation.chunks import announce_prompt
from kvpred_mlx.generation.repair import RepairingModel
from kvpred_mlx.pair.locating import DEMO_PAIR

TOLERANCE = 1e-4


def generate(model, prompt, n, cache=None):
    """`n` greedy tokens with mlx-lm's own `generate_step`, and the cache."""
    pair = getattr(model, "pair", model)
    options = {"prompt_cache": cache}
    announce_prompt(pair, prompt.size, options)
    steps = generate_step(prompt[0], model, max_tokens=n, **options)
    return [token for token, _ in steps], options["prompt_cache"]


def exact_continuation(model, given, n):
    """What the base alone gives after `given` [1, L], greedily."""
    return [token for token, _ in generate_step(given[0], model.base, max_tokens=n)]


def repaired_on_a_clock(monkeypatch, budget, prompt, n, seconds_per_token=0.1):
    """A repair where a decode step takes a second and a slice `seconds_per_token` for each of its tokens.

    Returns the model, and for each token the seconds until it was out.
    """
    model, now, times = RepairingModel(make_pair(), budget), [0.0], []
    work, decode = model._work, type(model.pair)._decode
    finish, evaluate = work.finish, mx.eval

    def timed(step, *arguments, seconds):
        now[0] += seconds
        return step(*arguments)

    def slice_of(entry):
        return seconds_per_token * min(work.slice, work.lag(entry))

    def read(entry, status):
        seconds = slice_of(entry)
        with monkeypatch.context() as patch:
            patch.setattr(mx, "eval", lambda *a: timed(evaluate, *a, seconds=seconds))
            type(work).read(work, entry, status)

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(work, "read", read)
    monkeypatch.setattr(work, "finish", lambda i, c, p: timed(finish, i, c, p, seconds=1 + slice_of(c[-1])))
    monkeypatch.setattr(type(model.pair), "_decode", lambda self, *a: timed(decode, self, *a, seconds=1))
    options = {}
    announce_prompt(model.pair, prompt.size, options)
    for _ in generate_step(prompt[0], model, max_tokens=n, **options):
        times.append(now[0])
    return model, times


@pytest.mark.variations(2)
@pytest.mark.parametrize(("base", "auxiliary"), PAIRS)
@pytest.mark.parametrize("dial", [None, ExactPositions(last=9)], ids=str)
def test_the_final_cache_and_all_later_tokens_are_the_exact_bases(base, auxiliary, dial):
    pair = make_pair(base, auxiliary, exact_positions=dial)
    model, prompt = RepairingModel(pair, budget=1), tokens(61)
    found, cache = generate(model, prompt, 20)
    start = model.status.exact_from
    assert start is not None and 3 <= start <= 14
    fed = mx.concatenate([prompt, mx.array([found])], axis=1)
    plain = make_prompt_cache(pair.base)
    pair.base(fed, cache=plain)
    assert difference(cache, [*plain, None]) < TOLERANCE
    prefix = mx.concatenate([prompt, mx.array([found[:start]])], axis=1)
    assert found[start:] == exact_continuation(pair, prefix, 20 - start)
    unrepaired, other = generate(pair, prompt, 20)
    assert found[:3] == unrepaired[:3] and difference(other, [*plain, None]) > 0.01


@pytest.mark.variations
@pytest.mark.parametrize("more", [2, 3])
def test_a_chunk_of_one_token_is_no_generated_one(demo_pair, monkeypatch, more):
    """A short prompt after a predicted one: all but its last token come in one call, be they one or several."""
    _, cache = generate(demo_pair[0], tokens(41), 1)
    before, known, finish = cache[-1].size(), [], module._Work.finish

    def noted(work, inputs, cache, status):
        known.append(cache[-1].size())
        return finish(work, inputs, cache, status)

    monkeypatch.setattr(module._Work, "finish", noted)
    options = {"max_tokens": 14, "prompt_cache": cache, "repair": True, "repair_budget": 1}
    *_, last = generation.stream_generate(*demo_pair, tokens(more, seed=1)[0].tolist(), **options)
    assert last.repair.exact_from == known[0] - (before + more - 1) > 3


def test_nothing_is_repaired_before_the_first_token_is_out(monkeypatch):
    model, reads = RepairingModel(make_pair(), budget=1), []
    read, finish = model._work.read, model._work.finish
    monkeypatch.setattr(model._work, "read", lambda *a: (reads.append(len(out)), read(*a)))
    monkeypatch.setattr(model._work, "finish", lambda *a: (reads.append(len(out)), finish(*a))[1])
    out, options = [], {}
    announce_prompt(model.pair, 80, options)
    for token, _ in generate_step(tokens(80)[0], model, max_tokens=10, **options):
        out.append(token)
    assert reads and min(reads) >= 1


@pytest.mark.variations
@pytest.mark.parametrize("budget", [0.5, 0.3, 0.1])
@pytest.mark.parametrize("seconds_per_token", [0.02, 0.1, 0.3])
def test_the_budget_bounds_the_slow_down_at_every_token(monkeypatch, budget, seconds_per_token):
    """But for the first slice, of which nothing is known."""
    model, times = repaired_on_a_clock(monkeypatch, budget, tokens(200), 150, seconds_per_token)
    assert model.status.slices > 1
    unknown = seconds_per_token * module.FIRST_SLICE
    for i, seconds in enumerate(times):
        assert seconds - times[0] <= i / (1 - budget) + unknown + 1e-6
    end = model.status.exact_from
    if budget == 0.5 and seconds_per_token < 0.3:
        assert end is not None and times[end] - times[0] <= (end + 1) / (1 - budget)
        assert times[end] - times[0] > 0.7 * end / (1 - budget)  # it is used, too
        assert times[-1] - times[end] == len(times) - 1 - end  # nothing is spent any more


@pytest.mark.slow
def test_a_repair_that_cannot_catch_up_is_given_up(monkeypatch):
    model, times = repaired_on_a_clock(monkeypatch, 0.3, tokens(200), 200, seconds_per_token=0.6)
    assert model.status.given_up and model.status.exact_from is None
    assert model.status.slices == module.PATIENCE and model._work._cache is None
    ends = [b - a for a, b in zip(times[-40:], times[-39:], strict=False)]
    assert ends == pytest.approx([1.0] * len(ends))  # decoding is as fast as without a repair again


def test_a_stall_is_no_earning_and_no_cost(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    work, status = RepairingModel(make_pair(), 0.5)._work, module.RepairStatus()
    work.steps = 3
    for seconds in (1, 1, 1, 100, 1):
        work.account(status)
        now[0] += seconds
    work.account(status)
    assert work._credit == 5 and status.seconds == 0


@pytest.mark.parametrize(("spent", "stall", "size"), [(12, 0, 8), (3, 0, 16), (1, 0, 32), (1, 500, 16)])
def test_slices_take_two_to_four_steps(monkeypatch, spent, stall, size):
    """What stands still after a slice, a reader of the answer for example, is not its cost."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    model = RepairingModel(make_pair(), budget=0.5)
    cache, work = model.make_cache(), model._work
    model(tokens(300), cache=cache)
    work.steps = 3
    for _ in range(6):
        work.account(model.status)
        now[0] += 1
    work.account(model.status)
    assert work.affordable(work.lag(cache[-1]))
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *a: (evaluate(*a), now.__setitem__(0, now[0] + spent)))
    work.read(cache[-1], model.status)
    now[0] += stall + 1
    work.account(model.status)
    assert work.slice == size and model.status.seconds == (spent if not stall else spent + 1)


def test_a_second_turn_reads_only_what_is_not_exact_yet():
    pair = make_pair()
    _, cache = generate(RepairingModel(pair, budget=1), tokens(50, 1), 12)
    assert cache[-1].exact_tokens == cache[-1].size() == 62
    model, second, read = RepairingModel(pair, budget=1), tokens(45, 2), []
    read_slice = model._work.read
    model._work.read = lambda *a: (read_slice(*a), read.append(model._work._sliced))[0]
    logged = cache[-1].tail(62)
    found, cache = generate(model, second, 12, cache)
    everything = mx.concatenate([logged, second, mx.array([found])], axis=1)
    assert difference(cache, reference_cache(pair, [("exact", everything)])) < TOLERANCE
    assert 0 < sum(read) <= 45 + 12  # of 119; how many slices they take, times decide


def test_what_is_exact_already_is_not_repaired():
    for settings in ({"exact": True}, {"min_prompt_tokens": 500}):
        model = RepairingModel(make_pair(), budget=1)
        for name, value in settings.items():
            setattr(model.pair, name, value)
        _, cache = generate(model, tokens(60), 8)
        assert model.status.slices == 0 and model.status.exact_from == 0
        assert cache[-1].exact_tokens == cache[-1].size() == 68


@pytest.mark.parametrize("turn", [1, 5])
def test_a_short_turn_repairs_what_an_earlier_one_left_predicted(turn):
    pair = make_pair()
    first, second = tokens(50, 1), tokens(turn, 2)
    found, cache = generate(pair, first, 4)
    logged = mx.concatenate([first, mx.array([found])], axis=1)
    assert cache[-1].exact_tokens == 0
    model = RepairingModel(pair, budget=1)
    answer, cache = generate(model, second, 20, cache)
    assert model.status.exact_from and cache[-1].exact_tokens == cache[-1].size()
    everything = mx.concatenate([logged, second, mx.array([answer])], axis=1)
    assert cache[-1].size() == everything.shape[1]
    assert difference(cache, reference_cache(pair, [("exact", everything)])) < TOLERANCE


def test_an_exact_turn_is_not_read_again():
    pair = make_pair()
    pair.exact = True
    _, cache = generate(pair, tokens(120, 1), 2)
    pair.exact = False
    model = RepairingModel(pair, budget=1)
    generate(model, tokens(40, 2), 14, cache)
    assert model.status.exact_from and model.status.slices <= 5  # of 8 tokens at least, not of 160


def test_interrupted_repair_leaves_the_predicted_cache(monkeypatch):
    pair, prompt = make_pair(), tokens(150)
    model, options, found = RepairingModel(pair, budget=1), {}, []
    announce_prompt(pair, 150, options)
    base, calls = type(pair.base).__call__, []

    def stop(self, inputs, cache=None, **rest):
        if cache is not None and cache is model._work._cache:
            calls.append(inputs.shape[1])
            if len(calls) == 3:
                raise KeyboardInterrupt
        return base(self, inputs, cache=cache, **rest)

    monkeypatch.setattr(type(pair.base), "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        for token, _ in generate_step(prompt[0], model, max_tokens=40, **options):
            found.append(token)
    cache = options["prompt_cache"]
    fed = [("predicted", prompt[:, :-1]), ("exact", prompt[:, -1:])]
    fed += [("exact", mx.array([[token]])) for token in found]
    monkeypatch.undo()
    assert difference(cache, reference_cache(pair, fed)) < TOLERANCE
    model(tokens(40, 7), cache=cache)  # the conversation goes on


def test_responses_and_footer(demo_pair):
    model, tokenizer = demo_pair
    prompt = "def add(a, b):\n    return a + b\n\n" * 6
    *_, last = generation.stream_generate(model, tokenizer, prompt, 60, repair=True, repair_budget=1)
    assert last.repair.exact_from and last.repair_tps > 0 and last.repaired_tps > 0
    assert f"exact from generated token {last.repair.exact_from + 1} on" in generation.footer(last)
    *_, last = generation.stream_generate(model, tokenizer, prompt, 6, repair=True, repair_budget=1e-9)
    assert last.repair.exact_from is None and "Repair: not finished" in generation.footer(last)
    *_, last = generation.stream_generate(model, tokenizer, "x = 1", 3, repair=True)
    assert last.repair.exact_from == 0 and "Repair: nothing to do" in generation.footer(last)
    *_, last = generation.stream_generate(model, tokenizer, prompt, 3)
    assert last.repair is None and "Repair" not in generation.footer(last)


def test_what_cannot_be_repaired(demo_pair):
    model, tokenizer = demo_pair
    for wrong in ({"draft_model": model.auxiliary}, {"model": model.base}):
        arguments = {"model": model, "tokenizer": tokenizer, "prompt": "x", "repair": True} | wrong
        with pytest.raises(ValueError, match="only a pair without a draft model"):
            next(generation.stream_generate(**arguments))
    for budget in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="the repair budget is"):
            RepairingModel(model, budget)


@pytest.mark.slow
def test_ctrl_c_on_the_command_line():
    process = subprocess.Popen(
        command("generate", "--repair", "--repair-budget", 0.01, "-m", 400,
                "-p", "def add(a, b):\n    return a + b\n" * 20, "--extra-eos-token", "\ufffd"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(40)  # the first tokens are out
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and b"Traceback" not in err, err


def test_the_bench_compares_with_the_exact_base():
    pair, prompt = make_pair(), tokens(60)[0].tolist()
    plain = bench.answer(pair, prompt, 12, None)
    repaired = bench.answer(pair, prompt, 12, 1)
    since = repaired.exact_from
    assert since is not None and all(repaired.agrees[since:]) and len(plain.agrees) == 12
    assert plain.exact_from is None and plain.speed(0, 12) > 0 and plain.speed(10, 12) is None


def test_the_benchs_table():
    plain = [bench.Answer([True, False, False, True], None, [0.0, 0.5, 1.0, 1.5])]
    repaired = [bench.Answer([True, False, True, True], 2, [0.0, 1.0, 2.0, 2.25])]
    lines = [line.split() for line in bench.report(plain, repaired, width=2)]
    assert lines[1:3] == [
        ["1", "to", "2", "0.500", "0.500", "0%"],
        ["3", "to", "4", "0.500", "1.000", "100%"],
    ]
    assert [" ".join(line) for line in lines[3:]] == [
        "not repaired: 2.0 tokens-per-sec", "during repair: 1.0 tokens-per-sec", "after repair: too few tokens",
        "speed during repair / not repaired, prompt by prompt: 0.50 (0.50 to 0.50)",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_benchs_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n\n" * 40)
    bench.main(text, str(DEMO_PAIR), prompt_tokens=64, max_tokens=8, prompts=2, budget=1, dequantize=True)
    assert capsys.readouterr().out.startswith("2 prompts of 64 tokens, budget 1\n")
    with pytest.raises(typer.BadParameter, match="expected at least 5000"):
        bench.main(text, str(DEMO_PAIR), prompt_tokens=5000)


@pytest.mark.variations
@pytest.mark.parametrize("base", ["qwen3", "llama", "gemma3_text", "openelm"])
@pytest.mark.parametrize("dial", [None, ExactPositions(depth=((1, 0.5), (2, 0.9))), ExactPositions(top=0.2)])
def test_repair_of_a_first_layers_pair(base, dial):
    """The cache ends exact; from the depth on, and not from the first layer, where hidden states tell all."""
    pair = make_first_layers_pair(base, [1, 2], exact_positions=dial)
    model, prompt = RepairingModel(pair, budget=1), tokens(60)
    called = []
    first = type(pair.base.layers[0])
    plain = first.__call__

    def noted(self, x, *args, **kwargs):
        if self is pair.base.layers[0]:
            called.append(x.shape[1])
        return plain(self, x, *args, **kwargs)

    first.__call__ = noted
    try:
        found, cache = generate(model, prompt, 14)
    finally:
        first.__call__ = plain
    assert model.status.exact_from and model.status.slices
    everything = mx.concatenate([prompt, mx.array([found])], axis=1)
    assert difference(cache, reference_cache_of_base(pair, everything)) < TOLERANCE
    since = model.status.exact_from
    given = mx.concatenate([prompt, mx.array([found[:since]])], axis=1)
    assert found[since:] == exact_continuation(pair, given, len(found) - since)
    if dial is None or not dial.top:
        assert pair.first_layers_reader.resumable(1)
        assert not set(called) & {16, 32}  # no slice begins below the depth; 8 are those of the trial


def reference_cache_of_base(pair, everything):
    cache = make_prompt_cache(pair.base)
    pair.base(everything, cache=cache)
    return [*cache, None]


def test_a_second_turn_of_a_first_layers_pair_is_repaired_whole():
    """Hidden states of what an earlier turn predicted are gone: it is read from the first layer."""
    pair = make_first_layers_pair("qwen3", [1])
    first, second = tokens(50, 1), tokens(45, 2)
    found, cache = generate(pair, first, 4)
    logged = mx.concatenate([first, mx.array([found])], axis=1)
    model = RepairingModel(pair, budget=1)
    answer, cache = generate(model, second, 20, cache)
    everything = mx.concatenate([logged, second, mx.array([answer])], axis=1)
    assert model.status.exact_from
    assert difference(cache, reference_cache_of_base(pair, everything)) < TOLERANCE
