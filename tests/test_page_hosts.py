"""The notebook view inside pages built like Colab's and VS Code's; neither is run here.

What they do is taken from their sources and addresses: Colab puts an output into a frame of another
site (`*-colab.googleusercontent.com/outputframe.html`) that its page sandboxes, and writes the
output there as it arrives in a message. VS Code's webview (`webview/browser/pre/index.html`) has a
policy of its own, writes the notebook into a sandboxed `fake.html`, and the notebook has a second
policy if its setting `notebook.experimental.enableCsp` is on (`backLayerWebView.ts`).
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree

import pytest
import torch
from reader import Reader

from regard.look import look

FLAGS = "allow-same-origin allow-pointer-lock allow-scripts allow-downloads allow-forms"
NOTEBOOK = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' https: http: data:; font-src 'self' https:; "
    "connect-src https:; child-src https: data:;"
)


@pytest.fixture(scope="module")
def output():
    """What a cell's output is: the view that a notebook shows."""
    torch.manual_seed(0)
    seen = look({name: torch.randn(2, 9, 8) for name in ("query", "key", "value")})
    return f'<div class="output">{seen._repr_html_()}</div>'


@pytest.fixture
def site():
    """Pages by path on a port of their own; gives a function that sets them and their address."""
    servers = []

    def start(pages, host="127.0.0.1"):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.split("?")[0]
                body = "" if path == "/favicon.ico" else pages.get(path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write((body or "").encode())

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://{host}:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def page_of(head, body):
    return f'<!doctype html><meta charset="utf-8">{head}<body>{body}</body>'


def script_json(value):
    return json.dumps(value).replace("<", "\\u003c")


def colab(site, output, flags):
    """A page with the output's frame on another site, to which the output is sent."""
    receive = (
        "<div id='output-area'></div><script>addEventListener('message', (event) => {"
        "document.getElementById('output-area').innerHTML = event.data; });"
        "parent.postMessage('ready', '*');</script>"
    )
    other = site({"/outputframe.html": page_of("", receive)}, host="localhost")
    send = (
        f"<script>addEventListener('message', () => frames[0].postMessage({script_json(output)},"
        f"'*'), {{once: true}});</script><iframe sandbox='{flags}' width='1000' height='950' "
        f"src='{other}/outputframe.html'></iframe>"
    )
    return site({"/": page_of("", send)}) + "/", 2


def code(site, output, policy):
    """A webview with its policy, and a frame into which the notebook is written."""
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">' if policy else ""
    notebook = f"<html><head><meta charset='utf-8'>{meta}</head><body>{output}</body></html>"
    write = (
        "const frame = document.createElement('iframe');"
        f"frame.setAttribute('sandbox', '{FLAGS}'); frame.src = './fake.html?id=1';"
        "frame.style.cssText = 'width: 1000px; height: 950px';"
        "frame.addEventListener('load', () => { const inside = frame.contentDocument;"
        f"inside.open(); inside.write({script_json(notebook)});"
        "inside.close(); }, {once: true});"
        "document.body.append(frame);"
    )
    known = base64.b64encode(hashlib.sha256(write.encode()).digest()).decode()
    outer = (
        f"default-src 'none'; script-src 'sha256-{known}' 'self'; frame-src 'self'; "
        "style-src 'unsafe-inline';"
    )
    webview = page_of(
        f'<meta http-equiv="Content-Security-Policy" content="{outer}">',
        f"<script async type='module'>{write}</script>",
    )
    inside = site({"/index.html": webview, "/fake.html": "<!doctype html>"}, host="localhost")
    frame = (
        f"<iframe sandbox='allow-scripts allow-same-origin allow-forms allow-pointer-lock "
        f"allow-downloads' width='1040' height='990' src='{inside}/index.html'></iframe>"
    )
    return site({"/": page_of("", frame)}) + "/", 3


HOSTS = {
    "colab": (colab, f"{FLAGS} allow-popups allow-modals"),
    "colab-opaque": (colab, "allow-scripts allow-downloads"),
    "code": (code, ""),
    "code-policy": (code, NOTEBOOK),
}


def opened(browser, url, depth):
    """A reader of the view in the innermost frame."""
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(url)
    page = Reader.__new__(Reader)
    page.driver, page.url = browser, url
    for _ in range(depth):
        page.until(lambda: browser.find_elements("tag name", "iframe"))
        browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    page.until(lambda: page.run("return document.body && document.body.dataset.state") is not None)
    return page


@pytest.mark.parametrize("host", HOSTS)
def test_it_draws_answers_and_saves(browser, site, output, host, tmp_path):
    make, more = HOSTS[host]
    url, depth = make(site, output, more)
    page = opened(browser, url, depth)
    try:
        page.driver.find_element("css selector", '#heads [data-head="1"]').click()
        page.settles(head=1)
        page.run("window.focus()")  # the driver's click does not, in a frame of another process
        page.driver.switch_to.active_element.send_keys("[")
        page.settles(head=0)
        assert page.text("readout").startswith("weight ")
        shades = page.run(
            "const canvas = document.getElementById('map'), {box, cell} = "
            "JSON.parse(canvas.dataset.shown), context = canvas.getContext('2d');"
            "return Array.from({length: 9}, (_, j) => String(context.getImageData("
            "box.x + (j + 0.5) * cell, box.y + 2.5 * cell, 1, 1).data))"
        )
        assert len(set(shades)) > 4  # cells of one row have colours of their own
        page.save_into(tmp_path)
        header, *rows = page.saved("map", "csv")
        assert len(rows) == 9
        assert header[0] == "query \\ key"
        assert ElementTree.fromstring(page.saved("map", "svg")).tag.endswith("svg")
        assert page.saved("map", "png").startswith(b"\x89PNG")
        assert page.driver.get_log("browser") == []
    finally:
        page.driver.switch_to.default_content()


@pytest.mark.parametrize("flags", ["allow-scripts", "allow-scripts allow-same-origin"])
def test_where_downloads_are_forbidden_the_view_says_so(browser, site, output, flags, tmp_path):
    url, depth = colab(site, output, flags)
    page = opened(browser, url, depth)
    try:
        page.save_into(tmp_path)
        page.run("document.querySelector('.save[data-panel=map] button').click()")
        page.until(lambda: "forbids" in page.text("saved"))
        assert page.run("return getComputedStyle(document.getElementById('saved')).position") != (
            "absolute"
        )
        assert "seen.figure" in page.text("saved")
        assert list(tmp_path.iterdir()) == []
    finally:
        page.driver.switch_to.default_content()
