"""mlx-lm's HTTP handler with OpenAI's errors, a mode for each request, and the TTFT in the usage block."""

from __future__ import annotations

import json
import logging
import select
import socket
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any
from urllib.parse import unquote

from jinja2 import TemplateError
from mlx_lm.server import APIHandler

from kvpred_mlx.errors import one_line
from kvpred_mlx.generation.draft import AUXILIARY
from kvpred_mlx.pair.modes import Mode
from kvpred_mlx.serving.bodies import HeadersOnly, read_body
from kvpred_mlx.serving.checks import RequestError, check_input, check_types, plain_text, without_nulls
from kvpred_mlx.serving.generator import PairGenerator
from kvpred_mlx.serving.logprobs import logprobs
from kvpred_mlx.serving.served import BASE, ServedPair

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20


class _Answered(Exception):
    """mlx-lm is about to answer with an error of its own form; its reason is this exception's context."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class PairHandler(APIHandler):
    """Requests for pairs.

    mlx-lm reads the request and writes the answer.  What it would refuse, and what it would trip over, ends
    in `_refuse`.
    """

    response_generator: PairGenerator
    timeout = 120  # seconds for a client to send its request, or to take a piece of the answer

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def do_HEAD(self) -> None:
        body, self.wfile = self.wfile, HeadersOnly(self.wfile)  # type: ignore[assignment]
        try:
            self.do_GET()
        finally:
            self.wfile = body

    def _post(self) -> None:
        """Hand mlx-lm the body in one piece, without the fields that are null."""
        raw, stream = read_body(self.rfile, self.headers, MAX_BODY_BYTES), self.rfile
        try:
            body = json.loads(raw.decode())
        except (ValueError, RecursionError):
            body = None  # mlx-lm says what is wrong with it
        if isinstance(body, dict):
            raw = json.dumps(without_nulls(body)).encode()
        del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(raw))
        self.rfile = BytesIO(raw)
        try:
            super().do_POST()
        finally:
            self.rfile = stream

    def _answer(self, handle: Callable[[], None]) -> None:
        self._streaming = False
        self._request: Any = None
        try:
            handle()
        except (ConnectionError, TimeoutError):  # the client has gone, and mlx-lm has stopped generating
            self.close_connection = True
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer
            self._refuse(error)

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if status_code >= 400:
            raise _Answered(status_code)
        super()._set_completion_headers(status_code)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self._streaming = True

    def _refuse(self, error: Exception) -> None:
        """Answer with an error in OpenAI's shape."""
        status, fields = _describe(error, self.path)
        if status >= 500:
            logger.error("%s: %s", self.path, fields["message"], exc_info=error)
        body = json.dumps({"error": fields})
        try:
            if self._streaming:  # the status has been sent: the error is the stream's last event
                self.wfile.write(f"data: {body}\n\n".encode())
                return
            self._headers_buffer: list[bytes] = []
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body.encode())))
            self._set_cors_headers()
            self.end_headers()
            self.wfile.write(body.encode())
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def validate_model_parameters(self) -> None:
        """mlx-lm's checks, and those of what it takes as it comes.

        Raises:
            ValueError: naming the parameter, what was given and what was expected.
        """
        check_types(self.body)
        for name in ("xtc_probability", "xtc_threshold"):  # where mlx-lm takes no 1 for 1.0
            setattr(self, name, float(getattr(self, name)))
        super().validate_model_parameters()
        self._served = self._requested_pair()
        size = self._served.pair.vocab_size
        self.top_k = 0 if self.top_k >= size else self.top_k  # all of them, which mlx-lm calls 0
        if self.logit_bias and not all(0 <= token < size for token in self.logit_bias):
            raise RequestError(f"logit_bias has token ids outside 0 to {size - 1}", "logit_bias")
        check_input(self.body, chat="/chat/" in self.path)
        options = self.body.get("stream_options") or {}
        self.stream_options = {"include_usage": options.get("include_usage") is True}
        self._mode = self._requested_mode()
        self._draft = self._requested_draft()

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        request.served, request.mode, request.draft = self._served, self._mode, self._draft
        request.ttft, request.started = None, time.perf_counter()
        request.check_client = self._check_client
        self._request = request
        super().handle_completion(request, stop_words)

    def _check_client(self) -> None:
        """Raise ConnectionError if nobody waits for the answer any more: mlx-lm then ends the request."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError("the client has gone")

    def handle_chat_completions(self) -> Any:
        """mlx-lm's; where there is no chat template, content is text, whatever form it came in."""
        if not self._served.tokenizer.has_chat_template:
            self.body["messages"] = [
                m | {"content": plain_text(m.get("content"))} for m in self.body["messages"]
            ]
        if self.body.get("tool_choice") == "none":
            self.body.pop("tools", None)
        return super().handle_chat_completions()

    def generate_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        response = super().generate_response(*args, **kwargs)
        choice = response["choices"][0]
        if "logprobs" in choice:
            names = ("tokens", "token_logprobs", "top_tokens")
            choice["logprobs"] = logprobs(
                self._served.tokenizer, *(kwargs.get(name) or [] for name in names), chat="message" in choice
            )
        return self._with_ttft(response)

    def completion_usage_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        response = super().completion_usage_response(*args, **kwargs)
        return self._with_ttft(response | {"object": self.object_type})

    def handle_models_request(self) -> None:
        """The pairs and their bases, or one of them by name."""
        created = self.created
        models: list[dict[str, Any]] = [
            {"id": name, "object": "model", "created": created, "owned_by": "kvpred-mlx"}
            for name in self._names
        ]
        wanted = unquote(self.path.partition("?")[0]).removeprefix("/v1/models").strip("/")
        found = [m for m in models if m["id"].strip("/") == wanted]
        if wanted and not found:
            raise _unknown_model(wanted, self._names)
        self._set_completion_headers(200)
        self.end_headers()
        answer = found[0] if wanted else {"object": "list", "data": models}
        self.wfile.write(json.dumps(answer).encode())

    def _with_ttft(self, response: dict[str, Any]) -> dict[str, Any]:
        if "usage" in response:
            response["usage"] |= {"ttft": self._request.ttft, "mode": str(self._mode)}
        return response

    @property
    def _names(self) -> list[str]:
        """All that requests may call a model."""
        return [
            name for pair in self.response_generator.model_provider.served.values() for name in pair.names
        ]

    def _requested_pair(self) -> ServedPair:
        provider, name = self.response_generator.model_provider, self.requested_model
        if name == "default_model":
            return provider.default
        found = next((pair for pair in provider.served.values() if name in pair.names), None)
        if found is None:
            raise _unknown_model(name, self._names)
        return found

    def _requested_mode(self) -> Mode:
        name, override = self.requested_model, self.body.get("kvpred")
        mode = self._served.default_mode
        if name == self._served.name + BASE:
            mode = Mode(exact=True)
            if override not in (None, {}, {"exact": True}):
                raise RequestError(f"kvpred is {override!r}, but {name} is the base alone", "kvpred")
        try:
            asked = mode if override is None else mode.override(override)
            asked.check(self._served.pair)
            return asked
        except ValueError as error:
            raise RequestError(str(error), "kvpred") from error

    def _requested_draft(self) -> str | None:
        draft = self.body.get("draft_model", "default_model")
        if draft == "default_model":
            draft = self.response_generator.cli_args.draft
        if draft not in (None, AUXILIARY):
            raise RequestError(f"draft_model is {draft!r}, expected {AUXILIARY!r} or null", "draft_model")
        most = self._served.pair.min_prompt_tokens - 2
        if draft and not 1 <= self.num_draft_tokens <= most:
            raise RequestError(
                f"num_draft_tokens is {self.num_draft_tokens}, expected 1 to {most}", "num_draft_tokens"
            )
        return draft


def _unknown_model(name: str, known: list[str]) -> RequestError:
    message = f"the model {name!r} does not exist, expected {' or '.join(map(repr, known))}"
    return RequestError(message, "model", "model_not_found", status=404)


def _describe(error: Exception, path: str) -> tuple[int, dict[str, Any]]:
    """The status and the fields of an error."""
    status = 500
    reason: BaseException = error
    if isinstance(error, _Answered):
        status, reason = error.status, error.__context__ or _without_reason(error.status, path)
        if status == 404 and not isinstance(
            reason, RequestError
        ):  # before the first token: a template, or worse
            status = 400 if isinstance(reason, ValueError | TypeError | LookupError | TemplateError) else 500
    message = one_line(reason)
    if isinstance(reason, RequestError):
        status = reason.status
    elif isinstance(reason, UnicodeDecodeError | json.JSONDecodeError | RecursionError):
        status, message = 400, f"the body is not JSON: {message}"
    kind = "invalid_request_error" if status < 500 else "server_error"
    param, code = (getattr(reason, name, None) for name in ("param", "code"))
    return status, {"message": message, "type": kind, "param": param, "code": code}


def _without_reason(status: int, path: str) -> RequestError:
    if status == 404:
        return RequestError(f"unknown path {path}", code="unknown_url", status=404)
    return RequestError("the body is not a JSON object", status=status)
