"""`kvpred-mlx eval`: quality on tasks, mode by mode."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.bench import NEEDED
from kvpred_mlx.cli.opening import OtherModels, one_pair, open_pair
from kvpred_mlx.cli.values import check_installed, names
from kvpred_mlx.console import progress_bar

if TYPE_CHECKING:
    from kvpred_mlx.bench.evaluate.run import Evaluation

DEFAULT_MODES = "exact,predicted,auxiliary"


def evaluate(
    pair: o.PairArgument = None,
    model: o.ModelOption = None,
    base: o.OtherBase = None,
    auxiliary: o.OtherAuxiliary = None,
    force: o.Force = False,
    tasks: Annotated[
        str, typer.Option(help="triviaqa, humaneval, or any task of lm-eval, with commas between.")
    ] = "triviaqa",
    modes: Annotated[
        str | None,
        typer.Option(
            help="exact, predicted, auxiliary, dials: exact-last=32, exact-top=0.1+exact-first=4; or sparse prefill: "
            "sparse-top=0.2. "
            "Default: the first two, and the third if the pair has one."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="JSON lines instead of the hub's data: FILE, or TASK=FILE; repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task. Default: all.")] = None,
    num_samples: Annotated[
        int, typer.Option(min=0, help="Samples of each HumanEval problem for pass@10; 0: pass@1 only.")
    ] = 10,
    temp: Annotated[float, typer.Option(min=0, help="Temperature of the samples.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Top-p of the samples.")] = 0.95,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-m", min=1, help="Tokens of an answer. Default: the task's."),
    ] = None,
    min_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Shorter prompts are not predicted; 1 predicts all, as in the paper.")
    ] = 1,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Items that are answered together. Default: 8 of lm-eval's tasks, 1 of triviaqa and humaneval, "
            "whose items have no time to the first token in batches.",
        ),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more tasks for lm-eval.")] = None,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Run code that the model writes (humaneval).")
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for results; one that has some goes on. Default: eval-results/DATE-PAIR."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")] = False,
    no_plot: o.NoPlot = False,
    seed: Annotated[
        int, typer.Option(min=0, max=o.LARGEST_SEED, help="Seed of the samples and of the intervals.")
    ] = 0,
) -> None:
    """Evaluate a pair on tasks: the base alone, predicted, and the auxiliary alone, in one table."""
    check_installed("eval", NEEDED)
    from kvpred_mlx.bench.evaluate.run import Evaluation
    from kvpred_mlx.bench.evaluate.settings import EvaluationSettings
    from kvpred_mlx.files import kept_if_filled

    model = one_pair(model, pair)
    task_names, mode_names = names("--tasks", tasks), names("--modes", modes or DEFAULT_MODES)
    if "humaneval" in task_names and not confirm_run_unsafe_code:
        raise typer.BadParameter(
            "humaneval runs code that the model writes, in a sandbox that stops accidents and not attackers: "
            "add --confirm-run-unsafe-code",
            param_hint="--tasks",
        )
    if 0 < num_samples < 10:
        raise typer.BadParameter(f"{num_samples}, expected 0, or 10 or more", param_hint="--num-samples")
    files = _files(data or [], task_names)
    _check_modes(mode_names)
    _check_tasks(task_names, files, include_path)
    settings = EvaluationSettings(
        tasks=task_names, modes=mode_names, data=files, limit=limit, num_samples=num_samples, temp=temp,
        top_p=top_p, max_tokens=max_tokens, min_prompt_tokens=min_prompt_tokens, batch_size=batch_size,
        include_path=include_path, seed=seed,
    )  # fmt: skip
    opened = open_pair(model, OtherModels(base, auxiliary, force))
    if modes is None and opened.pair.auxiliary is None:
        settings = replace(settings, modes=[m for m in mode_names if m != "auxiliary"])
    folder = output_dir or Path("eval-results", f"{datetime.now():%Y%m%d-%H%M%S}-{opened.short_name}")
    with kept_if_filled(folder):
        run = Evaluation(opened.pair, opened.tokenizer, opened.name, settings, folder, opened.context)
        _run(run, folder, as_json, not no_plot)


def _run(evaluation: Evaluation, folder: Path, as_json: bool, plot: bool) -> None:
    from rich.console import Console

    from kvpred_mlx.bench.evaluate.report import table, write

    results: dict[str, Any] = {}

    def finished(so_far: dict[str, Any]) -> None:
        results.update(so_far)
        write(folder, results, plot)

    try:
        with progress_bar("loading data") as progress:
            evaluation.run(progress, finished)
    finally:
        if results:
            print(json.dumps(results)) if as_json else Console().print(table(results))
        if evaluation.has_items():
            print(f"results: {folder}", file=sys.stderr)


def _files(given: list[str], names: list[str]) -> dict[str, Path]:
    """`TASK=FILE`, or a plain file where only one of the tasks takes one."""
    from kvpred_mlx.bench.evaluate.tasks import TASKS

    own = [name for name in names if name in TASKS]
    files: dict[str, Path] = {}
    for text in given:
        task, _, file = text.partition("=")
        if task not in TASKS:
            task, file = own[0] if len(own) == 1 else "", text
        if task not in own:
            raise typer.BadParameter(
                f"{text!r}, expected TASK=FILE with a task of {', '.join(own) or 'triviaqa or humaneval'}",
                param_hint="--data",
            )
        if not Path(file).is_file():
            raise typer.BadParameter(f"{file}: no such file", param_hint="--data")
        files[task] = Path(file)
    return files


def _check_modes(modes: list[str]) -> None:
    from kvpred_mlx.bench.evaluate.modes import parse

    for mode in modes:
        try:
            parse(mode)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--modes") from error


def _check_tasks(names: list[str], files: Mapping[str, Path], include_path: Path | None) -> None:
    from kvpred_mlx.bench.evaluate.tasks import TASKS

    if any(name in TASKS and name not in files for name in names):
        check_installed("eval", ("datasets",))
    others = [name for name in names if name not in TASKS]
    if not others:
        return
    check_installed("eval", ("lm-eval",))
    from kvpred_mlx.bench.evaluate.lm_eval_model import known_tasks

    unknown = set(others) - set(known_tasks(others, include_path))
    if unknown:
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: not {' nor '.join(TASKS)}, and not known to lm-eval",
            param_hint="--tasks",
        )
