"""A scene as one HTML string: styles, script and numbers inline, nothing fetched."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any

from regard.look.payload import payload
from regard.look.scene import Scene
from regard.look.stream import about
from regard.look.titles import of_both

# In this order: each file may use what the ones before it define.
SCRIPTS = (
    "attend.js",
    "tiles.js",
    "numbers.js",
    "paint.js",
    "kinds.js",
    "thumbs.js",
    "heads.js",
    "view.js",
    "axes.js",
    "keys.js",
    "map.js",
    "tokens.js",
    "around.js",
    "steps.js",
    "worked.js",
    "figure.js",
    "arcs.js",
    "rollout.js",
    "image.js",
    "beside.js",
    "own-beside.js",
    "hover.js",
    "panels.js",
    "look.js",
)

# Of a page that asks its server for what it shows.
STREAMED_SCRIPTS = (
    "attend.js",
    "paint.js",
    "thumbs.js",
    "view.js",
    "axes.js",
    "keys.js",
    "figure.js",
    "beside.js",
    "streamed-map.js",
    "streamed-beside.js",
    "streamed-panels.js",
    "streamed.js",
)

# The page cannot reach a network even if it wanted to: everything not named here is refused.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page_of(scene: Scene) -> str:
    """The whole page.

    Raises ShapeError if it would be larger than a browser opens with pleasure.
    """
    return _document(_titled(scene), payload(scene), ("look.html", SCRIPTS), _POLICY)


def streamed_page_of(scene: Scene) -> str:
    """The page of a map of any length, which asks the server that it came from for its numbers."""
    # Its own server alone: the token is in the address below which it asks.
    policy = f"{_POLICY}; connect-src 'self'"
    return _document(_titled(scene), about(scene), ("streamed.html", STREAMED_SCRIPTS), policy)


def _titled(scene: Scene) -> str:
    return scene.title if scene.beside is None else of_both(scene)


def _document(name: str, data: Any, parts: tuple[str, tuple[str, ...]], policy: str) -> str:
    """One file; parts: its body and its scripts."""
    numbers = json.dumps(data, ensure_ascii=False, allow_nan=False)
    title = html.escape(f"{name}: attention")
    body, scripts = parts
    laid_out = _read(body).replace("<!-- beside.html -->", _read("beside.html").strip())
    script = "\n".join(_read(script) for script in scripts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{_read("look.css")}</style>
</head>
{laid_out}
<script type="application/json" id="data">{_inert(numbers)}</script>
<script type="module">
{script}</script>
</html>
"""


def _read(name: str) -> str:
    return files("regard.look").joinpath(name).read_text(encoding="utf-8")


def _inert(text: str) -> str:
    """JSON that cannot close its script element or open a comment, whatever the tokens are."""
    return text.replace("<", "\\u003c")
