"""What is computed: the tensors of a case, and the right numbers for some of them.

The right numbers are those of regard's definition in float64, row by row (`A[..., rows, :]` is the
textbook formula on whole rows), for the first and the last head: enough to catch a contestant
that answers another question, at a cost that does not grow with the number of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import regard
from regard import Attention
from regard.explain import Explanation

Tensors = dict[str, Tensor]
Parts = dict[str, Any]
"""Keywords of `regard.attention`."""

SEED = 7
CHECKED_ROWS = 64
"""Rows of a forward pass that are compared; of a backward pass it must be all of them."""
BLOCK_NUMBERS = 2**24
"""Numbers in a block of the float64 definition: 128 MiB."""
TOP, CELL = 8, 256
"""How many weights of a row are asked for, and the side of the cells of a map."""


class Shape(NamedTuple):
    """Sizes of query, key and value; what is left out is as in query (or in key)."""

    batch: int
    heads: int
    n: int
    width: int
    keys: int | None = None
    key_heads: int | None = None
    value_width: int | None = None

    @property
    def m(self) -> int:
        """Number of keys."""
        return self.keys or self.n

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // (self.key_heads or self.heads)

    @property
    def out(self) -> int:
        """Width of value and output."""
        return self.value_width or self.width

    def __str__(self) -> str:
        more = {"keys": self.keys, "key heads": self.key_heads, "wide value": self.value_width}
        said = [f"{number} {name}" for name, number in more.items() if number]
        return ", ".join([f"({self.batch}, {self.heads}, {self.n}, {self.width})", *said])


class Expected(NamedTuple):
    """What `result[name][at]` must be."""

    name: str
    at: tuple[int | Tensor | slice, ...]
    value: Tensor


def nothing(given: object) -> dict[str, Any]:
    """No parts, or no tensors beside query, key and value."""
    return {}


@dataclass(frozen=True)
class Problem:
    """One matrix, and what is asked of it.

    parts: from the tensors to the keywords of `regard.attention`
    extras: tensors of the parts, of which floating ones begin with the head axis
    learned: which of the extras get gradients in a backward pass
    looked: topk, entropy, received and pool are asked for, instead of a product with value
    """

    shape: Shape
    parts: Callable[[Tensors], Parts] = nothing
    extras: Callable[[Shape], Tensors] = nothing
    learned: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    train: bool = False
    looked: bool = False

    def tensors(self) -> Tensors:
        """Fresh inputs, the same ones every time."""
        shape = self.shape
        torch.manual_seed(SEED)
        head = (shape.batch, shape.heads // shape.group)
        found = {
            "query": torch.randn(shape.batch, shape.heads, shape.n, shape.width),
            "key": torch.randn(*head, shape.m, shape.width),
            "value": torch.randn(*head, shape.m, shape.out),
            "upstream": torch.randn(shape.batch, shape.heads, shape.n, shape.out),
            **self.extras(shape),
        }
        cast = {name: _cast(tensor, self.dtype) for name, tensor in found.items()}
        for name in self.leaves:
            cast[name].requires_grad_()
        return cast

    @property
    def leaves(self) -> tuple[str, ...]:
        """Tensors that get gradients: none in a forward pass."""
        return ("query", "key", "value", *self.learned) if self.train else ()

    def matrix(self, tensors: Tensors) -> Attention:
        """The matrix as a user of regard writes it."""
        return regard.attention(tensors["query"], tensors["key"], **self.parts(tensors))

    def explain(self, tensors: Tensors) -> Explanation:
        """What regard says it runs."""
        with torch.set_grad_enabled(self.train):
            return self.matrix(tensors).explain(None if self.looked else tensors["value"])

    def answer(self, output: Tensor | tuple[Tensor, ...], tensors: Tensors) -> Tensors:
        """Name the results of a contestant, after its backward pass if there is one."""
        if isinstance(output, tuple):
            return dict(zip(("topk", "entropy", "received", "pool"), output, strict=True))
        if not self.train:
            return {"output": output}
        leaves = [tensors[name] for name in self.leaves]
        gradients = torch.autograd.grad(output, leaves, tensors["upstream"], materialize_grads=True)
        named = {f"gradient of {n}": g for n, g in zip(self.leaves, gradients, strict=True)}
        return {"output": output.detach(), **named}

    def expected(self, tensors: Tensors) -> Iterator[Expected]:
        """The definition's own numbers, in float64."""
        exact = {name: _cast(t.detach(), torch.float64) for name, t in tensors.items()}
        if self.looked:
            found = looked_in_rows(exact["query"], exact["key"], rows=256)
            for name, value in self.answer(found, exact).items():
                yield Expected(name, (), value)
            return
        for name in self.leaves:
            exact[name].requires_grad_()
        shape = self.shape
        for lane in sorted({(0, 0), (shape.batch - 1, shape.heads - 1)}):
            yield from self._lane(exact, lane)

    def _lane(self, exact: Tensors, lane: tuple[int, int]) -> Iterator[Expected]:
        """One batch entry and head: some rows of the output, or all rows and their gradients."""
        shape = self.shape
        of_key = (lane[0], lane[1] // shape.group)
        leaves = [exact[name] for name in self.leaves]
        totals = [torch.zeros_like(leaf) for leaf in leaves]
        every = torch.arange(shape.n)
        count = shape.n if self.train else min(shape.n, CHECKED_ROWS)
        rows = every[torch.linspace(0, shape.n - 1, count).long()]
        # Additive scores need `width` numbers a pair; a block that is too small costs little.
        for block in rows.split(max(BLOCK_NUMBERS // (shape.m * shape.width), 1)):
            with torch.set_grad_enabled(self.train):
                weights = self.matrix(exact)[lane][block, :]
                output = weights @ exact["value"][of_key]
            yield Expected("output", (*lane, block), output.detach())
            if self.train:
                upstream = exact["upstream"][lane][block]
                for total, part in zip(
                    totals,
                    torch.autograd.grad(output, leaves, upstream, materialize_grads=True),
                    strict=True,
                ):
                    total += part
        for name, total in zip(self.leaves, totals, strict=True):
            # A part's tensor is shared by the batch: its gradient is one head's if that is one.
            at = {"query": lane, "key": of_key, "value": of_key}.get(name, lane[1:])
            if len(at) == 2 or shape.batch == 1:
                yield Expected(f"gradient of {name}", at, total[at])


def looked_in_rows(query: Tensor, key: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Top 8, entropy, column sums and means of square cells; `rows` at a time, whole cells."""
    values, entropies, cells = [], [], []
    received = query.new_zeros(*query.shape[:-2], key.shape[-2])
    for block in query.split(rows, -2):
        weights = torch.softmax(block @ key.mT * query.shape[-1] ** -0.5, -1)
        values.append(weights.topk(TOP, dim=-1).values)
        entropies.append(torch.special.entr(weights).sum(-1))
        received += weights.sum(-2)
        wide = weights.unflatten(-1, (-1, CELL)).mean(-1)
        cells.append(wide.unflatten(-2, (-1, CELL)).mean(-2))
    return torch.cat(values, -2), torch.cat(entropies, -1), received, torch.cat(cells, -2)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Another floating dtype; numbers of documents stay integers."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
