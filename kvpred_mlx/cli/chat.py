"""`kvpred-mlx chat`: mlx-lm's chat with a pair, in a terminal or a pipe."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from kvpred_mlx.cli import options as o
from kvpred_mlx.cli.dial import Depth, ExactFirst, ExactLast, ExactTop, dial
from kvpred_mlx.cli.opening import OtherModels, one_pair, open_pair
from kvpred_mlx.errors import one_line

if TYPE_CHECKING:
    from kvpred_mlx.generation.conversation import Conversation

HELP = "/reset  forget the conversation    /exact on|off  the base alone, or predicted    /help    /exit"


def chat(
    pair: o.PairArgument = None,
    model: o.ModelOption = None,
    base: o.OtherBase = None,
    auxiliary: o.OtherAuxiliary = None,
    force: o.Force = False,
    trust_remote_code: o.TrustRemoteCode = False,
    temp: o.Temp = 0.0,
    top_p: o.TopP = 1.0,
    xtc_probability: o.XtcProbability = 0.0,
    xtc_threshold: o.XtcThreshold = 0.1,
    seed: Annotated[int, typer.Option(min=0, max=o.LARGEST_SEED, help="Seed of the sampling.")] = 0,
    max_kv_size: o.MaxKvSize = None,
    prefill_step_size: o.PrefillStepSize = 2048,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Tokens of an answer.")] = 256,
    system_prompt: o.SystemPrompt = None,
    exact: Annotated[bool, typer.Option("--exact", help="Begin with /exact on.")] = False,
    exact_first: ExactFirst = None,
    exact_last: ExactLast = None,
    exact_top: ExactTop = None,
    depth: Depth = None,
    draft_model: o.DraftModel = None,
    draft: o.Draft = None,
    num_draft_tokens: o.NumDraftTokens = 3,
) -> None:
    """Chat: each answer begins with a predicted prompt cache, and ends with its TTFT."""
    model, given_dial = one_pair(model, pair), dial(exact_first, exact_last, exact_top, depth)
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from kvpred_mlx.generation.conversation import Conversation

    config = {"trust_remote_code": trust_remote_code}
    opened = open_pair(
        model, OtherModels(base, auxiliary, force), exact=exact, dial=given_dial, tokenizer_config=config
    )
    tokenizer = opened.tokenizer
    mx.random.seed(seed)
    options: dict[str, Any] = {
        "sampler": make_sampler(
            temp,
            top_p,
            xtc_probability=xtc_probability,
            xtc_threshold=xtc_threshold,
            xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
        ),
        "prefill_step_size": prefill_step_size,
        "max_kv_size": max_kv_size,
    }
    if draft_model or draft:
        options |= {"draft_model": opened.pair.auxiliary_model, "num_draft_tokens": num_draft_tokens}
    conversation = Conversation(opened.pair, tokenizer, system_prompt, opened.context, **options)
    shown = Namespace(
        model=opened.name, adapter_path=None, max_tokens=max_tokens, system_prompt=system_prompt
    )
    _talk(conversation, shown)


def _talk(conversation: Conversation, shown: Namespace) -> None:
    """Read, answer, until /exit or the end of the input."""
    with _ui(shown) as ui:
        while True:
            try:
                text = _text(ui.prompt())
            except UnicodeDecodeError as error:
                ui.note(f"that line is not UTF-8 text ({one_line(error)}), and is passed over")
                continue
            except EOFError:
                break
            except KeyboardInterrupt:
                ui.note("/exit ends the chat")
                continue
            if text == "/exit":
                break
            if text.startswith("/"):
                ui.note(_command(conversation, text))
            elif text.strip():
                _answer(conversation, ui, text, shown.max_tokens)
        ui.note("bye")


def _text(line: str) -> str:
    """A line as it was meant: bytes that the terminal's encoding could not tell are UTF-8.

    Raises:
        UnicodeDecodeError: they are not.
    """
    return line.encode("utf-8", "surrogateescape").decode("utf-8")


def _answer(conversation: Conversation, ui: Any, text: str, max_tokens: int) -> None:
    response = None
    answers = conversation.say(text, max_tokens)
    try:
        for response in answers:
            ui.stream_token(response.text)
        ui.end_turn(response)
    except KeyboardInterrupt:
        answers.close()  # type: ignore[attr-defined]
        ui.end_turn(response)
        ui.note("interrupted")
    except ValueError as error:
        ui.note(str(error))


def _command(conversation: Conversation, text: str) -> str:
    """Carry out a command; returns what to say about it."""
    name, _, argument = text.partition(" ")
    if name == "/reset" and not argument:
        conversation.reset()
        return "reset: context cleared"
    if name == "/exact" and argument.strip() in ("on", "off"):
        conversation.pair.exact = argument.strip() == "on"
        conversation.forget_cache()
        return "exact: the base alone" if conversation.pair.exact else "predicted"
    return HELP if name == "/help" else f"{text!r} is no command, expected {HELP}"


def _ui(shown: Namespace) -> Any:
    """mlx-lm's chat on the terminal; in a pipe its plain text, without boxes and control sequences."""
    from mlx_lm.cli_ui import ChatUI, print_header_panel

    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if in_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - `input` edits lines with it, and keeps their history

    class PairUI(ChatUI):
        def __enter__(self) -> Self:
            if in_terminal:
                rows = [("model", str(shown.model)), ("max tokens", f"{shown.max_tokens:,}")]
                print_header_panel(self._console, "kvpred-mlx chat", rows)
            self.note(HELP)
            return self

        def prompt(self) -> str:
            return super().prompt() if in_terminal else input()

        def note(self, text: str) -> None:
            if in_terminal:
                self._console.print(f"  {text}", style="ui.muted", markup=False)
            else:
                print(text, flush=True)

        def end_turn(self, response: Any) -> None:
            if in_terminal:
                super().end_turn(response)
            else:
                print(flush=True)
            if response is not None:
                self.note(_ttft(response, in_terminal))

    return PairUI(shown)


def _ttft(response: Any, in_terminal: bool) -> str:
    mode = (
        "" if in_terminal else f"{response.generation_tokens} tokens, {response.generation_tps:.1f} tok/s, "
    )
    draft = f", {response.accepted} of {response.drafted} drafted accepted" if response.drafted else ""
    return f"{mode}TTFT {response.ttft:.3f} s{draft}"
