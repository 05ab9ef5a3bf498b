"""A scene as one HTML string: styles, script and numbers inline, nothing fetched."""

from __future__ import annotations

import html
import json
from importlib.resources import files

from regard.look.payload import payload
from regard.look.scene import Scene

# In this order: each file may use what the ones before it define.
SCRIPTS = (
    "attend.js",
    "tiles.js",
    "numbers.js",
    "paint.js",
    "kinds.js",
    "heads.js",
    "map.js",
    "tokens.js",
    "steps.js",
    "worked.js",
    "figure.js",
    "arcs.js",
    "rollout.js",
    "image.js",
    "hover.js",
    "panels.js",
    "look.js",
)

# The page cannot reach a network even if it wanted to: everything not named here is refused.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page_of(scene: Scene) -> str:
    """The whole page.

    Raises ShapeError if it would be larger than a browser opens with pleasure.
    """
    numbers = json.dumps(payload(scene), ensure_ascii=False, allow_nan=False)
    title = html.escape(f"{scene.title}: attention")
    script = "\n".join(_read(name) for name in SCRIPTS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{_read("look.css")}</style>
</head>
{_read("look.html")}
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
