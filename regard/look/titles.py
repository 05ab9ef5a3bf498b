"""What two runs beside each other are called: by what differs between them."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import PurePath

from regard.look.scene import Scene, Tokens

_LONGEST = 40  # characters of a name; figures have room for so many
_BEFORE = 2  # words shown before the first that differs


def names_of(scene: Scene) -> tuple[str, str]:
    """The names of a run and the one beside it, never the same, without control characters.

    Labels that were given come first, then titles, the paths of the files that were read, the
    words from the first that differs, and last the order.

    >>> one, other = (Tokens.of_labels(x.split()) for x in ("the cat sat", "the cat lay"))
    >>> names_of(Scene("MiniLM", (), one, beside=Scene("MiniLM", (), other)))
    ('“the cat sat”', '“the cat lay”')
    """
    other = scene.beside
    assert other is not None
    for pair in (
        (scene.label or scene.title, other.label or other.title),
        _paths(scene.sources, other.sources),
        _words(scene.tokens, other.tokens),
    ):
        one, two = (_middle(_plain(name)) for name in pair)
        if one and two and one != two:
            return one, two
    return "first run", "second run"


def of_both(scene: Scene) -> str:
    """The title of a page or figure of two runs."""
    one, other = names_of(scene)
    assert scene.beside is not None
    same = _plain(scene.title) == _plain(scene.beside.title) and one != _plain(scene.title)
    return f"{_plain(scene.title)}: {one} and {other}" if same else f"{one} · {other}"


def _paths(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, str]:
    """The ends of two paths from the part on that differs last."""
    for mine, theirs in zip_longest(one, other, fillvalue=""):
        if not (mine and theirs) or mine == theirs:
            continue
        parts = [PurePath(path).parts for path in (mine, theirs)]
        same = 0
        while same < min(map(len, parts)) and parts[0][-1 - same] == parts[1][-1 - same]:
            same += 1
        first, second = ("/".join(x[max(0, len(x) - same - 1) :]) for x in parts)
        return first, second
    return "", ""


def _words(one: Tokens, other: Tokens) -> tuple[str, str]:
    """The texts, quoted from shortly before the first word that differs."""
    mine, theirs = (_text(tokens) for tokens in (one, other))
    same = 0
    while same < min(len(mine), len(theirs)) and mine[same] == theirs[same]:
        same += 1
    start = same - _BEFORE if same > _BEFORE else 0
    first, second = (_shortened(" ".join(words[start:])) for words in (mine, theirs))
    before = "… " if start else ""
    return f"“{before}{first}”", f"“{before}{second}”"


def _text(tokens: Tokens) -> list[str]:
    """The words, of which the tokenizer made several tokens of some."""
    words: list[str] = []
    for label, joined, special in zip(tokens.labels, tokens.joined, tokens.special, strict=True):
        if special:
            continue
        if joined and words:
            words[-1] += label
        else:
            words.append(label)
    return words


def _shortened(text: str) -> str:
    """Words whose difference stands at their beginning."""
    return text if len(text) <= _LONGEST - 4 else f"{text[: _LONGEST - 5].rstrip()}…"


def _middle(text: str) -> str:
    """A name, both of whose ends may be what differs."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[: half - 1]}…{text[-half:]}"


def _plain(text: str) -> str:
    """One line of characters that print; no control characters, no marks that turn its order."""
    return " ".join("".join(x if x.isprintable() else " " for x in text).split())
