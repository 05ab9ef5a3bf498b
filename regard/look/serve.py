"""The page on loopback: for this machine alone, and for those who know the token in its address."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from regard.errors import RegardError, ShapeError

HOST = "127.0.0.1"
Answering = Callable[[str, Mapping[str, str]], dict[str, Any] | None]


class ServeError(RegardError):
    """The page cannot be served: why, and what would work."""


class Server:
    """Serves one page until it is closed; `url` holds the token without which nothing is given.

    html: the page
    port: 0 for any free one
    answer: of (name, numbers) that the page asks for below its address, None for no such name;
        a ShapeError of its own is told to the page
    closed: called once the port is free again
    Raises ServeError if the port is taken.

    >>> import urllib.request
    >>> with Server("<!doctype html>words") as server:
    ...     urllib.request.urlopen(server.url).read()
    b'<!doctype html>words'
    """

    def __init__(
        self,
        html: str,
        port: int = 0,
        *,
        answer: Answering | None = None,
        closed: Callable[[], None] | None = None,
    ) -> None:
        if not 0 <= port < 2**16:
            raise ServeError(f"there is no port {port}; ports are 0 (any that is free) to 65535")
        self._closed = closed
        self.token = secrets.token_urlsafe(24)
        try:
            self._server = ThreadingHTTPServer((HOST, port), _answering(html, self.token, answer))
        except OSError as error:
            raise ServeError(
                f"port {port} cannot be used ({error.strerror}); leave the port out to take any "
                "that is free"
            ) from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address, with the token."""
        return f"http://{HOST}:{self.port}/{self.token}/"

    def wait(self) -> None:
        """Serve until the process is interrupted, and close."""
        try:
            self._thread.join()
        except KeyboardInterrupt:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        if self._closed is not None:
            self._closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Server({self.url})"


def _answering(html: str, token: str, answer: Answering | None) -> type[BaseHTTPRequestHandler]:
    page, path = html.encode(), f"/{token}/".encode()

    def answered(address: str) -> tuple[int, str, bytes]:
        """Status, kind and body; the caller knows that the host is ours."""
        parts = urlsplit(address)
        asked = parts.path.encode(errors="replace")
        if not hmac.compare_digest(asked[: len(path)], path):
            return 404, "text/plain", b"not here: the address needs its token\n"
        name = asked[len(path) :].decode(errors="replace")
        if not name:
            return 200, "text/html", page
        try:
            found = None if answer is None else answer(name, dict(parse_qsl(parts.query)))
        except ShapeError as error:
            return 400, "application/json", json.dumps({"error": str(error)}).encode()
        if found is None:
            return 404, "text/plain", b"there is nothing of this name here\n"
        return 200, "application/json", json.dumps(found, allow_nan=False).encode()

    class Answer(BaseHTTPRequestHandler):
        """Gives the page at its address, its answers below it, and nothing else to anybody."""

        server_version, sys_version = "regard", ""

        def do_GET(self) -> None:
            # A page of another site may reach this port by a name of its own (DNS rebinding), but
            # then the browser says that name.
            port = self.connection.getsockname()[1]
            named = self.headers.get("Host", "") in (f"{HOST}:{port}", f"localhost:{port}")
            status, kind, body = answered(self.path if named else "/")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            # The page may have asked for another view meanwhile, and taken this question back.
            with suppress(ConnectionError):
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: addresses hold the token."""

    return Answer
