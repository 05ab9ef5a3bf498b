"""What `capture(model)` gives: the calls in their order, and layers by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import SupportsIndex, overload

from torch import nn

from regard.look.capture import taps
from regard.look.joined import Beginnings, joined
from regard.look.named import call_named
from regard.look.record import Captured
from regard.look.scene import Scene, of_calls
from regard.look.shown import Shown
from regard.matrix import Attention


class Record(list[Captured], Shown):
    """The attention calls of a model, a list in the order in which they happened.

    name: of the model, for titles

    `record[0]` is a `Captured`, `record["encoder.layer.3"]` that layer's lazy matrix.

    >>> import torch
    >>> from regard.look import capture
    >>> layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> model, x = torch.nn.ModuleDict({"mixer": layer}), torch.randn(1, 5, 8)
    >>> with torch.no_grad(), capture(model) as record:
    ...     _ = layer(x, x, x, need_weights=False)
    >>> record["mixer"].entropy().shape, record.table()[1].head, len(record)
    (torch.Size([1, 2, 5]), 1, 1)
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._beginnings = Beginnings()

    def append(self, call: Captured) -> None:
        """Add a call; the keys of a cache that it shares with earlier ones are kept once."""
        super().append(self._beginnings.shared(call))

    @overload
    def __getitem__(self, at: str) -> Attention: ...
    @overload
    def __getitem__(self, at: SupportsIndex) -> Captured: ...
    @overload
    def __getitem__(self, at: slice) -> list[Captured]: ...

    def __getitem__(self, at: str | SupportsIndex | slice) -> Attention | Captured | list[Captured]:
        """A layer's lazy matrix by its name, a call by its place, or several calls.

        A name may be any part of one between dots, "layer.3", that no other layer has. Of a module
        that was called several times it is the last call; the steps of a generation with a cache
        count as one call, whose row t is from the step that made token t (see `joined`).
        Raises ShapeError naming the layers there are, or those that a part leaves open.
        """
        if isinstance(at, str):
            return call_named(self.joined(), at).matrix
        return super().__getitem__(at)

    def joined(self) -> list[Captured]:
        """The calls, numbered, with the steps of one generation as one call of each layer.

        >>> import torch
        >>> from regard.nn import SelfAttention
        >>> layer, x = SelfAttention(8, 2).eval(), torch.randn(1, 6, 8)
        >>> state = layer.state()
        >>> with torch.no_grad(), capture(torch.nn.ModuleDict({"own": layer})) as record:
        ...     _ = layer(x[:, :4], state=state)
        ...     _ = [layer.step(x[:, at], state) for at in (4, 5)]
        >>> len(record), len(record.joined()), record["own"].shape, record.joined()[0].steps
        (3, 1, torch.Size([1, 2, 6, 6]), (4, 1, 1))
        """
        return [replace(call, number=number) for number, call in enumerate(joined(self))]

    def shown(self) -> Scene:
        """The first sequence of every call that softmax normalizes, for pages and figures.

        The steps of a generation are one call. Raises CaptureError if there is none.
        """
        return of_calls(self.name, self.joined())


@contextmanager
def capture(model: nn.Module) -> Iterator[Record]:
    """Record every attention call that `model` makes while the block runs.

    Yields the record that the calls are added to, in the order in which they happen. The model, its
    configuration and its registered functions are the same afterwards. The interface route wraps
    a method that all Hugging Face models of the process share, the route of regard's own one that
    all matrices share; calls of other models pass through unrecorded.

    Raises CaptureError where a call does something that the record could not hold, rather than
    recording something else.

    >>> import torch
    >>> layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 8)
    >>> with torch.no_grad(), capture(layer) as record:
    ...     _ = layer(x, x, x, need_weights=False)
    >>> record[0].matrix.shape
    torch.Size([1, 2, 5, 5])
    """
    record = Record(type(model).__name__)
    with taps(model, record):
        yield record
