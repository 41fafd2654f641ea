"""Bodies of HTTP requests and answers: with a length, in chunks, or none."""

from __future__ import annotations

from email.message import Message
from io import BufferedIOBase
from typing import Any

from kvpred_mlx.serving.checks import RequestError


class HeadersOnly:
    """The answer to a HEAD request: what is written after the headers is dropped."""

    def __init__(self, stream: Any):
        self._stream, self._ended = stream, False

    def write(self, data: bytes) -> int:
        if not self._ended:
            self._stream.write(data)
            self._ended = True  # http.server writes all headers at once
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


def read_body(stream: BufferedIOBase, headers: Message[str, str], most: int) -> bytes:
    """A request's body.

    Args:
        most: bytes of it.

    Raises:
        RequestError: it has no length that could be told, or is longer than `most`.
    """
    if "chunked" in headers.get("Transfer-Encoding", "").lower():
        return _read_chunks(stream, most)
    length = headers.get("Content-Length")
    if length is None:
        raise RequestError("expected a Content-Length", status=411)
    if not (length.isascii() and length.isdigit()):
        raise RequestError(f"Content-Length is {length!r}, expected a number of bytes")
    _check_size(int(length), most)
    return stream.read(int(length))


def _read_chunks(stream: BufferedIOBase, most: int) -> bytes:
    body = b""
    while True:
        line = stream.readline(64).split(b";")[0].strip()
        try:
            size = int(line, 16)
        except ValueError as error:
            raise RequestError(f"a chunk's size is {line!r}, expected a hexadecimal number") from error
        if size == 0:
            break
        _check_size(len(body) + size, most)
        body += stream.read(size)
        stream.readline(64)
    while stream.readline(1 << 16).strip():  # trailers
        pass
    return body


def _check_size(size: int, most: int) -> None:
    if size < 0 or size > most:
        raise RequestError(f"the body has {size} bytes, expected at most {most}", status=413)
