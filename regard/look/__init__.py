"""Look at a model's attention: one self-contained page, in a notebook or in a file.

    look("The animal didn't cross the street because it was too tired").save("page.html")
    look(model, inputs)                                  # any PyTorch or Hugging Face model
    look({"query": q, "key": k, "value": v})             # tensors or arrays

The page carries query, key and value, of length n, and computes weights where they are looked at;
no n x n weights are stored.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regard.errors import DtypeError, ShapeError
from regard.look.drawing import Figure, FigureError
from regard.look.page import page_of, streamed_page_of
from regard.look.payload import is_streamed
from regard.look.record import Captured, CaptureError
from regard.look.recording import Record, capture
from regard.look.rollout import rollout
from regard.look.scene import Scene, Tokens, of_arrays, of_calls, of_model
from regard.look.serve import ServeError, Server
from regard.look.shown import Shown
from regard.look.sources import ARRAY_FILES, SourceError, of_file, of_text
from regard.look.spot import spot_of
from regard.look.statistics import HeadRow, Table
from regard.look.stream import Stream
from regard.matrix import Attention

__all__ = [
    "CaptureError",
    "Captured",
    "Figure",
    "FigureError",
    "HeadRow",
    "Look",
    "Record",
    "ServeError",
    "Server",
    "SourceError",
    "Table",
    "capture",
    "look",
]


@dataclass(frozen=True, eq=False, repr=False)
class Look(Shown):
    """What was looked at. Shows itself in a notebook; `save` writes the page."""

    scene: Scene

    @property
    def captured(self) -> tuple[Captured, ...]:
        """One record per attention call, each with its lazy `matrix`."""
        return self.scene.captured

    def __getitem__(self, layer: int | str) -> Attention:
        """The lazy matrix of a layer, by its number or its module's name.

        A name may stop early, "encoder.layer.3", where one module alone begins with it. One that
        was called several times means its last call; `captured` has them all.
        Raises ShapeError naming the layers there are.
        """
        return spot_of(self.scene, layer, 0, 0, 0).call.matrix

    def named(self, label: str) -> Look:
        """The same under a name of its own, for two runs beside each other.

        Without one they are told apart by what differs: their models or files, or their words.

        >>> import torch
        >>> before = look({"query": torch.zeros(5, 8), "key": torch.zeros(5, 8)}).named("before")
        >>> before.scene.label
        'before'
        """
        return Look(replace(self.scene, label=label))

    def rollout(self, query: int) -> Tensor:
        """What the last layer's output of one token comes from: shares [layers, n], row 0 inputs.

        See `regard.look.rollout`, which says what this assumes. Raises ShapeError unless all
        layers are self-attention of one sequence.

        >>> import torch
        >>> seen = look({"query": torch.zeros(2, 1, 4, 8), "key": torch.zeros(2, 1, 4, 8)})
        >>> seen.rollout(1)[0]
        tensor([0.1875, 0.4375, 0.1875, 0.1875])
        """
        return rollout(self.captured, query)

    def shown(self) -> Scene:
        """The scene that tables and figures are of."""
        return self.scene

    @cached_property
    def html(self) -> str:
        """The page. Raises ShapeError if it would be too large, naming what would fit."""
        return page_of(self.scene)

    def serve(self, port: int = 0) -> Server:
        """Serve the page on loopback, at an address with a token: `server.url`, `server.close()`.

        Above 16,384 tokens, or where the page would be too large, it is a page of one map at a
        time, of any length: this process computes what is looked at, first from a sample of the
        queries, with its error, and then from all of them.

        port: 0 for any that is free. Raises ServeError if the port is taken.
        """
        if not is_streamed(self.scene):
            return Server(self.html, port)
        stream = Stream(self.scene)
        try:
            page = streamed_page_of(self.scene)
            return Server(page, port, answer=stream.answer, closed=stream.close)
        except ServeError:
            stream.close()
            raise

    def save(self, path: str | Path) -> Path:
        """Write the page and return where it is. Raises OSError if it cannot be written."""
        target = Path(path)
        target.write_text(self.html, encoding="utf-8")
        return target

    def __repr__(self) -> str:
        calls = f"{len(self.captured)} attention calls"
        return f"Look({self.scene.title}: {calls}, {self.scene.tokens.total} tokens); .save(path)"

    def _repr_html_(self) -> str:
        # An iframe keeps the page's script and styles apart from the notebook's, and survives
        # the notebook's export, which a live widget does not.
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" width="100%" height="900" '
            'style="border:0" title="attention"></iframe>'
        )


def look(
    what: str | Path | nn.Module | Mapping[str, Any] | Record,
    inputs: Any = None,
    *,
    tokens: Sequence[str] | None = None,
    limit: int | None = None,
    layers: Sequence[int] | None = None,
    causal: bool = False,
    beside: Look | None = None,
) -> Look:
    """Run or read something once and look at its attention.

    what: a text, for the MiniLM model of the `look` extra; a `Path` to a .safetensors or .npz
        file; a mapping of arrays (`query`, `key`, optionally `value` and `tokens`; shapes [n, d],
        [heads, n, d] or [layers, heads, n, d]); a model, with `inputs`; or a record of `capture`,
        in which the steps of a generation are one map
    inputs: for a model: a tensor, a tuple of arguments, or a mapping of keyword arguments
    tokens: for a model or a record: labels for the tokens of its input; of a generation also that
        of the last token, which was made and never read
    limit: for a text or arrays: only the first tokens
    layers: which attention layers to keep, counted from 0
    causal: for arrays: key j is visible to query i only if j <= i
    beside: another look, of another text or model with as many layers, heads and tokens: the page
        shows both and their difference

    Raises CaptureError, SourceError, MissingPackageError, ShapeError or DtypeError, each saying
    what would work.

    >>> import torch
    >>> seen = look({"query": torch.randn(2, 5, 8), "key": torch.randn(2, 5, 8)}, causal=True)
    >>> seen.captured[0].matrix.shape
    torch.Size([1, 2, 5, 5])
    """
    if beside is not None:
        seen = look(what, inputs, tokens=tokens, limit=limit, layers=layers, causal=causal)
        return Look(seen.scene.placed_beside(beside.scene))
    if limit is not None and limit < 1:
        raise ShapeError(f"limit is {limit}; at least one token must be left to look at")
    is_model = isinstance(what, nn.Module)
    _refuse(is_model, {"limit": limit}, "a model: pass shorter inputs")
    _refuse(not is_model, {"inputs": inputs}, "anything but a model")
    labels = None if tokens is None else Tokens.of_labels(tokens)
    if isinstance(what, Record):
        _refuse(True, {"limit": limit, "causal": causal or None}, "a record: it is as it was made")
        return Look(of_calls(what.name, what.joined(), tokens=labels, layers=layers))
    _refuse(not is_model, {"tokens": tokens}, "anything but a model or a record")
    if isinstance(what, nn.Module):
        if inputs is None:
            raise DtypeError("a model needs inputs: look(model, inputs)")
        _refuse(True, {"causal": causal or None}, "a model: its own masks are read")
        return Look(of_model(what, inputs, tokens=labels, layers=layers))
    if isinstance(what, Mapping):
        return Look(of_arrays(what, causal=causal, limit=limit, layers=layers))
    if isinstance(what, Path):
        if what.suffix not in ARRAY_FILES:
            raise SourceError(f"{what} is not one of {' or '.join(ARRAY_FILES)}; give text as str")
        return Look(of_file(what, causal=causal, limit=limit, layers=layers))
    if isinstance(what, str) and what.endswith(tuple(ARRAY_FILES)):
        raise SourceError(f"{what!r} is a text; to look at the file, give Path({what!r})")
    if not isinstance(what, str):
        raise DtypeError(
            f"{type(what).__name__} cannot be looked at; what works: a text, a Path, a mapping "
            "of arrays, a record, or a model with its inputs"
        )
    _refuse(True, {"causal": causal or None}, "a text: the model's own masks are read")
    return Look(of_text(what, limit=limit, layers=layers))


def _refuse(applies: bool, options: Mapping[str, Any], where: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if applies and given:
        raise DtypeError(f"{' and '.join(given)} cannot be used with {where}")
