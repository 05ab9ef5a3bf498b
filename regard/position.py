"""Position: what is added to relevance because of where a query and a key stand.

A position part may act in three places, and does nothing in the others: on the query and on the
key vectors (once per token), and on the score (per tile). Parts add up: `Alibi.of(8) + Bias(b)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from regard import errors
from regard.part import Index, Part, per_head


class Position(Part):
    """Base of all position parts. Row i of the matrix stands at position i + offset."""

    shift_invariant: ClassVar[bool] = False
    """Whether moving query and key by the same amount leaves every score as it was."""
    toeplitz: ClassVar[bool] = False
    """Whether it adds a bias that depends on i - j alone, and nothing else."""

    def on_query(self, query: Tensor, i: Tensor) -> Tensor:
        """Change the queries [*batch, heads, n, d] at positions i [n]."""
        return query

    def on_key(self, key: Tensor, j: Tensor) -> Tensor:
        """Change the keys [*batch, key heads, m, d] at positions j [m]."""
        return key

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor | None:
        """Return what to add to the scores of a tile: broadcasts to [*batch, heads, r, c]."""
        return None

    def check(self, rows: int, columns: int) -> None:
        """Raise ShapeError where the part does not fit the matrix's rows and columns."""

    def __add__(self, other: Position) -> Position:
        if not isinstance(other, Position):
            return NotImplemented
        return Positions((*_terms(self), *_terms(other)))


@dataclass(frozen=True, eq=False, repr=False)
class Positions(Position):
    """Several position parts at once: vectors change in the order given, biases add up.

    >>> Alibi.of(2) + Bias(torch.zeros(5, 5))
    Alibi(tensor(2)) + Bias(tensor(5, 5))
    """

    parts: tuple[Position, ...]

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        """True if every part is."""
        return all(part.shift_invariant for part in self.parts)

    @property
    def toeplitz(self) -> bool:  # type: ignore[override]
        """True if every part is."""
        return all(part.toeplitz for part in self.parts)

    def on_query(self, query: Tensor, i: Tensor) -> Tensor:
        for part in self.parts:
            query = part.on_query(query, i)
        return query

    def on_key(self, key: Tensor, j: Tensor) -> Tensor:
        for part in self.parts:
            key = part.on_key(key, j)
        return key

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor | None:
        biases = [part.on_score(query, key, i, j) for part in self.parts]
        present = [bias.to(query.dtype) for bias in biases if bias is not None]
        return sum(present[1:], present[0]) if present else None

    def check(self, rows: int, columns: int) -> None:
        for part in self.parts:
            part.check(rows, columns)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


@dataclass(frozen=True, eq=False, repr=False)
class Bias(Position):
    """An explicit bias: b_ij is added to the score of query i and key j, after scale.

    bias: broadcasts to [*batch, heads, n, m]; -inf forbids a pair. The gradient has its shape.
    A mask as runs (`Causal`, `Dense`, ...) is cheaper where entries are only 0 or -inf.
    Raises ShapeError where it does not broadcast to the matrix.

    >>> import regard
    >>> query = key = torch.zeros(2, 1)
    >>> regard.attention(query, key, position=Bias(torch.tensor([[0.0, -torch.inf]]))).dense()
    tensor([[1., 0.],
            [1., 0.]])
    """

    bias: Tensor

    trailing: ClassVar[dict[str, int]] = {"bias": 2}

    def __post_init__(self) -> None:
        errors.check_tensor("Bias", self.bias, shape="[*batch, heads, n, m]")

    def cut(self, rows: Index, columns: Index) -> Self:
        """Only the entries of the tile: its gradient is as small as the tile."""
        row_axis, column_axis = self.bias.shape[-2:]
        bias = self.bias if row_axis == 1 else self.bias[..., rows, :]
        return self.with_tensors([bias if column_axis == 1 else bias[..., columns]])

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return the bias itself, which `cut` has made as large as the tile."""
        return self.bias

    def check(self, rows: int, columns: int) -> None:
        given, wanted = self.bias.shape[-2:], (rows, columns)
        if any(g not in (1, w) for g, w in zip(given, wanted, strict=True)):
            raise errors.ShapeError(
                f"Bias has shape {errors.show(self.bias.shape)}, but the matrix has {rows} rows "
                f"and {columns} columns; its last two axes must be {errors.show(wanted)} or 1."
            )


@dataclass(frozen=True, eq=False, repr=False)
class Alibi(Position):
    """Linear distance penalty: bias_ij = -slope |i + offset - j|, one slope for each head.

    slopes: [heads], or anything that broadcasts to [*batch, heads]
    offset: position of the first query, where queries continue a sequence of cached keys
    Cost: O(n m) additions, nothing stored.  Press, Smith, Lewis 2022, arXiv:2108.12409, section 3.
    Raises ShapeError where the slopes do not fit the heads.

    >>> alibi = Alibi.of(2)
    >>> alibi.slopes
    tensor([0.0625, 0.0039])
    >>> query, key = torch.zeros(2, 1, 4), torch.zeros(2, 3, 4)
    >>> alibi.on_score(query, key, torch.tensor([2]), torch.arange(3))
    tensor([[[-0.1250, -0.0625, -0.0000]],
    <BLANKLINE>
            [[-0.0078, -0.0039, -0.0000]]])
    """

    slopes: Tensor
    offset: int = 0

    shift_invariant: ClassVar[bool] = True
    toeplitz: ClassVar[bool] = True

    def __post_init__(self) -> None:
        errors.check_tensor("Alibi's slopes", self.slopes, shape="[heads]", dims=0)
        errors.check_number("Alibi's offset", self.offset, whole=True)

    @staticmethod
    def of(num_heads: int, offset: int = 0) -> Alibi:
        """Use the paper's slopes 2 ** (-8 k / heads), k = 1..heads, for powers of two.

        Other numbers of heads take the slopes of the next lower power of two, then every other
        slope of the next higher one, as the authors' code does.

        >>> Alibi.of(3).slopes
        tensor([0.0625, 0.0039, 0.2500])
        """
        errors.check_number("Alibi.of's num_heads", num_heads, whole=True, least=1)
        lower = 1 << (num_heads.bit_length() - 1)
        slopes = [2.0 ** (-8 * k / lower) for k in range(1, lower + 1)]
        between = [2.0 ** (-4 * k / lower) for k in range(1, 2 * lower + 1, 2)]
        return Alibi(torch.tensor((slopes + between)[:num_heads]), offset)

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # Floating point is a third of the cost of int64 here, and exact to 2^24 positions.
        wide = torch.promote_types(self.slopes.dtype, torch.float32)
        distance = ((i + self.offset).to(wide)[:, None] - j.to(wide)).abs()
        return -per_head(self.slopes, distance) * distance


def _terms(position: Position) -> tuple[Position, ...]:
    return position.parts if isinstance(position, Positions) else (position,)
