"""The server: loopback alone, nothing without the token, a port in use says so."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from reader import Reader

from regard.cli import main
from regard.look import ServeError, Server, look


def ask(server, path, host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer


@pytest.fixture
def server():
    with Server("<p>words</p>") as server:
        yield server


@pytest.fixture
def arrays(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = tmp_path / "a.safetensors"
    safetensors.save_file({"query": torch.ones(3, 2), "key": torch.ones(3, 2)}, path)
    return path


def test_the_page_needs_its_token(server):
    status, body, answer = ask(server, f"/{server.token}/")
    assert (status, body) == (200, "<p>words</p>")
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    wrong = server.token[:-1] + ("A" if server.token[-1] != "A" else "B")
    for path in ("/", f"/{wrong}/", f"/{server.token}", f"/{server.token}/etc/passwd", "/é/"):
        path = path.encode().decode("latin-1")
        status, body, _ = ask(server, path.replace("\xc3\xa9", "%C3%A9"))
        assert status == 404
        assert "words" not in body
    assert len(server.token) >= 32


def test_a_name_of_another_site_is_refused(server):
    path = f"/{server.token}/"
    assert ask(server, path, f"localhost:{server.port}")[0] == 200
    assert ask(server, path, f"evil.example:{server.port}")[0] == 404


def test_it_listens_on_loopback_alone(server):
    assert server._server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_and_one_that_is_none(capsys, arrays):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"port {port} cannot be used .*leave the port out"):
            Server("", port)
        assert main(["look", str(arrays), "--serve", str(port)]) == 1
        assert f"port {port} cannot be used" in capsys.readouterr().err
    with pytest.raises(ServeError, match="there is no port 70000"):
        Server("", 70000)


def test_the_port_is_free_again_after_closing():
    with Server("one") as first:
        port = first.port
    with Server("two", port) as second:
        assert ask(second, f"/{second.token}/")[1] == "two"


def test_the_served_page_in_a_browser(browser):
    torch.manual_seed(0)
    data = {name: torch.randn(2, 6, 8) for name in ("query", "key", "value")}
    with look(data).serve() as server:
        page = Reader(browser, server.url)
        page.go("#head=1&i=3&j=2")
        page.settles(head=1, i=3, j=2)
        weight = float(look(data)[0][0, 1, 3, 2])
        assert float(page.text("readout").split()[1].rstrip(",")) == pytest.approx(weight, abs=6e-4)
        page.assert_quiet()


def test_serving_from_the_command_line_until_interrupted(arrays):
    command = [sys.executable, "-m", "regard", "look", str(arrays), "--serve"]
    # A background job of a shell ignores SIGINT, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    signal.signal(signal.SIGINT, before)
    try:
        told = ""
        while not (address := re.search(r"http://127\.0\.0\.1:(\d+)(/\S+)\n", told)):
            line = process.stdout.readline()
            assert line, f"the process ended after {told!r}"
            told += line
        connection = http.client.HTTPConnection("127.0.0.1", int(address[1]))
        connection.request("GET", address[2])
        assert "a.safetensors" in connection.getresponse().read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
    finally:
        process.kill()


def test_an_interrupt_before_it_waits_is_no_error(arrays, monkeypatch, capsys):
    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "wait", interrupted)
    assert main(["look", str(arrays), "--serve"]) == 0
    address = capsys.readouterr().out.split()[-1]
    port = int(re.search(r":(\d+)/", address)[1])
    with Server("", port):  # it was freed
        pass
