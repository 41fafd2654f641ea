"""A Hugging Face hub on the loopback interface: directories as repositories, downloads that break off."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LocalHub:
    """Repositories by name, each a directory at one commit.

    `break_after`: bytes of a large file after which its connection is closed (None: never).
    """

    def __init__(self, repositories: dict[str, Path], commit: str):
        self.repositories, self.commit, self.break_after = repositories, commit, None
        self.sent: list[str] = []

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self._facts(handler, *found.groups())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            return self._tree(handler, *found.groups())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(handler, *found.groups())
        return self._send(handler, 404, b"{}")

    def _facts(self, handler: http.server.BaseHTTPRequestHandler, name: str, revision: str) -> None:
        folder = self.repositories.get(name)
        if folder is None or revision not in ("main", self.commit):
            return self._send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = [{"rfilename": f.name} for f in folder.iterdir()]
        facts = {"id": name, "sha": self.commit, "siblings": files, "private": False}
        return self._send(handler, 200, json.dumps(facts).encode())

    def _tree(self, handler: http.server.BaseHTTPRequestHandler, name: str, revision: str) -> None:
        files = [
            {
                "type": "file",
                "path": f.name,
                "size": f.stat().st_size,
                "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
            }
            for f in self.repositories[name].iterdir()
        ]
        return self._send(handler, 200, json.dumps(files).encode())

    def _file(self, handler: http.server.BaseHTTPRequestHandler, name: str, revision: str, file: str) -> None:
        data = (self.repositories[name] / file).read_bytes()
        start = int(re.sub(r"\D.*", "", handler.headers.get("Range", "bytes=0-")[6:]) or 0)
        tag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(handler, 206 if start else 200, data[start:], headers)

    def _send(
        self,
        handler: http.server.BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
    ) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        self.sent.append(handler.path)
        if self.break_after is not None and len(body) > self.break_after:
            handler.wfile.write(body[: self.break_after])
            handler.close_connection = True
            handler.connection.close()
        else:
            handler.wfile.write(body)


@contextmanager
def local_hub(repositories: dict[str, Path], commit: str) -> Iterator[tuple[LocalHub, dict[str, str]]]:
    """The hub, and the environment in which a process takes it for the real one."""
    hub = LocalHub(repositories, commit)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        yield hub, {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    finally:
        server.shutdown()
        server.server_close()
