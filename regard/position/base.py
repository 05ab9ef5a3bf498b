"""Position: what is added to relevance because of where a query and a key stand.

A position part may act in three places, and does nothing in the others: on the query and on the
key vectors (once per token), and on the score (per tile). Parts add up: `Alibi.of(8) + Bias(b)`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from torch import Tensor

from regard import errors
from regard.part import Index, Part

if TYPE_CHECKING:
    from regard.matrix import Attention


class Band(NamedTuple):
    """A bias of row i and key j that is entry clip(j - (i + offset), -left, right) + left of row i.

    table: [*batch, heads, n, left + 1 + right], or what broadcasts to its batch and head axes
    """

    left: int
    offset: int
    table: Tensor


class Position(Part):
    """Base of all position parts. Row i of the matrix stands at position i + offset.

    A part says how it acts (`on_query`, `on_key`, `on_score` are its definition), and states facts
    from which forms choose.
    """

    shift_invariant: ClassVar[bool] = False
    """Whether moving query and key by the same amount leaves every score as it was."""
    toeplitz: ClassVar[bool] = False
    """Whether it adds a bias that depends on i - j alone, and nothing else."""
    whole_rows: ClassVar[bool] = False
    """Whether the bias of one pair depends on other keys, so that a tile must be whole rows."""

    def on_query(self, query: Tensor, i: Tensor) -> Tensor:
        """Change the queries [*batch, heads, n, d] at positions i [n]."""
        return query

    def on_key(self, key: Tensor, j: Tensor) -> Tensor:
        """Change the keys [*batch, key heads, m, d] at positions j [m]."""
        return key

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor | None:
        """Return what to add to the scores of a tile: broadcasts to [*batch, heads, r, c]."""
        return None

    def band(self, query: Tensor, i: Tensor) -> Band | None:
        """The bias of `on_score` by clipped offset, for the rows i [n], if it is one.

        It is n (left + 1 + right) numbers instead of n m. `query` is what `on_score` sees. Asked
        for no rows, it says whether the compiled kernels know the part.
        """
        return None

    def channels(
        self, query: Tensor, key: Tensor, i: Tensor, j: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """The bias of `on_score` as a dot product of further channels, if it is one.

        An identity that a form may use where scores are dot products. `query` and `key` are what
        `on_score` sees.

        [*batch, heads, n, c] of the queries at i [n] and [*batch, key heads or 1, m, c] of the keys
        at j [m]. What both sides depend on, as cos w (i - j) does on w, gets a gradient that is the
        difference of two sums over positions, and loses digits by that.
        """
        return None

    def on_output(self, matrix: Attention) -> Tensor | None:
        """What a layer adds to the product of the matrix and value: [*batch, heads, n, e]."""
        return None

    def check(self, query: Tensor, key: Tensor) -> None:
        """Raise ShapeError where the part does not fit the vectors or the matrix's lengths."""

    def numbers_per_pair(self) -> int:
        """How many numbers a tile holds for each pair, beyond the score's."""
        return 0

    def at(self, offset: int) -> Self:
        """The same part where the first query stands at position `offset`.

        What a sequence continued from cached keys needs: with m keys and n new queries that are
        the last of them, `position.at(m - n)`.
        """
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return replace(self, offset=offset) if "offset" in names else self  # type: ignore[type-var]

    def __add__(self, other: Position) -> Position:
        if not isinstance(other, Position):
            return NotImplemented
        return Positions((*terms(self), *terms(other)))


@dataclass(frozen=True, eq=False, repr=False)
class Positions(Position):
    """Several position parts at once: vectors change in the order given, biases add up.

    >>> import torch
    >>> from regard import Alibi
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

    @property
    def whole_rows(self) -> bool:  # type: ignore[override]
        """True if any part is."""
        return any(part.whole_rows for part in self.parts)

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

    def on_output(self, matrix: Attention) -> Tensor | None:
        more = [part.on_output(matrix) for part in self.parts]
        present = [output for output in more if output is not None]
        return sum(present[1:], present[0]) if present else None

    def check(self, query: Tensor, key: Tensor) -> None:
        for part in self.parts:
            part.check(query, key)

    def numbers_per_pair(self) -> int:
        return sum(part.numbers_per_pair() for part in self.parts)

    def at(self, offset: int) -> Positions:
        return Positions(tuple(part.at(offset) for part in self.parts))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


@dataclass(frozen=True, eq=False, repr=False)
class Bias(Position):
    """An explicit bias: b_ij is added to the score of query i and key j, after scale.

    bias: broadcasts to [*batch, heads, n, m]; -inf forbids a pair. The gradient has its shape.
    A mask as runs (`Causal`, `Dense`, ...) is cheaper where entries are only 0 or -inf.
    Raises ShapeError where it does not broadcast to the matrix.

    >>> import regard, torch
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

    def check(self, query: Tensor, key: Tensor) -> None:
        given, (rows, columns) = self.bias.shape[-2:], (query.shape[-2], key.shape[-2])
        if not errors.fits(given, (rows, columns)):
            raise errors.ShapeError(
                f"Bias has shape {errors.show(self.bias.shape)}, but the matrix has {rows} rows "
                f"and {columns} columns; its last two axes must be {(rows, columns)} or 1."
            )


def terms(position: Position | None) -> tuple[Position, ...]:
    """The parts that add up to a position."""
    if position is None:
        return ()
    return position.parts if isinstance(position, Positions) else (position,)
