"""The page on loopback: for this machine alone, and for those who know the token in its address."""

from __future__ import annotations

import hmac
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from regard.errors import RegardError

HOST = "127.0.0.1"


class ServeError(RegardError):
    """The page cannot be served: why, and what would work."""


class Server:
    """Serves one page until it is closed; `url` holds the token without which nothing is given.

    html: the page
    port: 0 for any free one
    Raises ServeError if the port is taken.

    >>> import urllib.request
    >>> with Server("<!doctype html>words") as server:
    ...     urllib.request.urlopen(server.url).read()
    b'<!doctype html>words'
    """

    def __init__(self, html: str, port: int = 0) -> None:
        if not 0 <= port < 2**16:
            raise ServeError(f"there is no port {port}; ports are 0 (any that is free) to 65535")
        self.token = secrets.token_urlsafe(24)
        try:
            self._server = ThreadingHTTPServer((HOST, port), _answering(html, self.token))
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


def _answering(html: str, token: str) -> type[BaseHTTPRequestHandler]:
    page, path = html.encode(), f"/{token}/".encode()

    class Answer(BaseHTTPRequestHandler):
        """Gives the page at its address, and nothing else to anybody."""

        server_version, sys_version = "regard", ""

        def do_GET(self) -> None:
            # A page of another site may reach this port by a name of its own (DNS rebinding), but
            # then the browser says that name.
            port = self.connection.getsockname()[1]
            named = self.headers.get("Host", "") in (f"{HOST}:{port}", f"localhost:{port}")
            asked = self.path.split("?")[0].encode(errors="replace")
            known = named and hmac.compare_digest(asked, path)
            body = page if known else b"not here: the address needs its token\n"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", f"text/{'html' if known else 'plain'}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: addresses hold the token."""

    return Answer
