"""`generate`'s prompt: the text that was given, and its tokens with mlx-lm's chat template."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import typer

from kvpred_mlx.cli.opening import use_default_template

QUERY = "<query>"


def read_prompt(prompt: str | None) -> str:
    """The text of `--prompt`; `-` reads standard input."""
    if prompt is None:
        raise typer.BadParameter("missing, expected text, or - to read standard input", param_hint="--prompt")
    try:
        # As mlx-lm: \n and \t on the command line are a newline and a tab.
        text = (
            sys.stdin.buffer.read().decode("utf-8")
            if prompt == "-"
            else prompt.replace("\\n", "\n").replace("\\t", "\t")
        )
        text.encode("utf-8")
    except UnicodeError as error:
        where = (
            f"at position {error.start}" if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else ""
        )
        raise typer.BadParameter(f"not UTF-8 {where}, expected UTF-8 text", param_hint="--prompt") from error
    if not text:
        raise typer.BadParameter("empty, expected at least one character", param_hint="--prompt")
    return text


@dataclass
class ChatTemplate:
    """How a text becomes a conversation: mlx-lm's options of the same names.

    Args:
        ignore: the raw prompt.
        use_default: a tokenizer without a template takes its class's default, if there is one.
        config: more arguments of the template.
    """

    ignore: bool = False
    use_default: bool = False
    system_prompt: str | None = None
    prefill_response: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def encode(self, tokenizer: Any, text: str, is_suffix: bool = False) -> list[int]:
        """The tokens of `text`, as mlx-lm's generate makes them.

        Args:
            is_suffix: what stands before the text in the conversation is in the prompt cache already.
        """
        if self.use_default:
            use_default_template(tokenizer)
        if self.ignore or not tokenizer.has_chat_template:
            self._warn()
            from kvpred_mlx.generation.stream import encode

            return encode(tokenizer, text)
        chat = self._apply(tokenizer, text)
        if is_suffix:
            before, found, _ = self._apply(tokenizer, QUERY).partition(QUERY)
            if not found:
                raise ValueError(
                    "the chat template does not show the prompt as it is, so --prompt-cache-file needs "
                    "--ignore-chat-template"
                )
            chat = chat[len(before) :]
        return tokenizer.encode(chat, add_special_tokens=False)

    def _apply(self, tokenizer: Any, text: str) -> str:
        said = (("system", self.system_prompt), ("user", text), ("assistant", self.prefill_response))
        messages = [{"role": role, "content": content} for role, content in said if content is not None]
        begun = self.prefill_response is not None
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=begun,
            add_generation_prompt=not begun,
            **self.config,
        )

    def _warn(self) -> None:
        """Name what takes no effect without a template; mlx-lm does not."""
        given = {
            "--system-prompt": self.system_prompt is not None,
            "--prefill-response": self.prefill_response is not None,
            "--chat-template-config": bool(self.config),
            "--use-default-chat-template": self.use_default,
        }
        unused = [option for option, is_given in given.items() if is_given]
        if unused:
            print(f"no chat template is used, so {', '.join(unused)} changes nothing", file=sys.stderr)
