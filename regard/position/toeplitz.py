"""Biases that depend on i - j alone: one vector of n + m - 1 numbers per head says them all.

Forms that know this (`fused`) read that vector; the others make tiles of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard import errors
from regard.position.base import Position


class Toeplitz(Position):
    """Base of biases by i + offset - j; a part says `by_distance`."""

    offset: int

    shift_invariant: ClassVar[bool] = True
    toeplitz: ClassVar[bool] = True

    def by_distance(self, distance: Tensor) -> Tensor:
        """Return the biases at distances i + offset - j, [*x]: [*batch, heads, *x]."""
        raise NotImplementedError

    def vector(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Every bias of a matrix, [*batch, heads, rows + columns - 1], i - j from 1 - columns."""
        return self.by_distance(torch.arange(1 - columns, rows, device=device) + self.offset)

    def of_pairs(self, i: Tensor, j: Tensor) -> Tensor:
        """Return the biases of pairs of query i [*x] and key j [*x]: [*batch, heads, *x]."""
        return self.by_distance(i + self.offset - j)

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if 0 in (i.numel(), j.numel()) or not (_is_range(i) and _is_range(j)):
            return self.of_pairs(i[:, None], j)
        # Row a of the tile is the window of the vector that begins a places from its end.
        first = int(i[0] - j[0]) + self.offset
        down = torch.arange(first + i.numel() - 1, first - j.numel(), -1, device=i.device)
        windows: Tensor = self.by_distance(down).unfold(-1, j.numel(), 1)
        return windows.flip(-2)


def _is_range(x: Tensor) -> bool:
    return int(x[-1] - x[0]) == x.numel() - 1 and bool((x.diff() == 1).all())


@dataclass(frozen=True, eq=False, repr=False)
class Relative(Toeplitz):
    """A free bias for every relative position: bias_ij = table[clip(j - i - offset, -left, right)].

    table: [heads, left + 1 + right], or anything that broadcasts to [*batch, heads] before it
    left: how far back the table reaches; what is farther, on either side, takes its last entries
    offset: position of the first query
    Cost: O(n + m) per head.  Liu et al. 2021 (Swin), arXiv:2103.14030, eq. 4, in one dimension.
    Raises ShapeError where the table is shorter than left + 1 or does not fit the heads.

    >>> relative = Relative(torch.tensor([[1.0, 2.0, 3.0]]), left=1)
    >>> query, key = torch.zeros(1, 2, 4), torch.zeros(1, 4, 4)
    >>> relative.on_score(query, key, torch.arange(2), torch.arange(4))
    tensor([[[2., 3., 3., 3.],
             [1., 2., 3., 3.]]])
    """

    table: Tensor
    left: int
    offset: int = 0

    trailing: ClassVar[dict[str, int]] = {"table": 1}

    def __post_init__(self) -> None:
        check_table("Relative's table", self.table, self.left, "[heads, left + 1 + right]", 1)
        errors.check_number("Relative's offset", self.offset, whole=True)

    @staticmethod
    def of(num_heads: int, left: int, right: int, offset: int = 0) -> Relative:
        """Make a table of zeros that requires gradients."""
        errors.check_number("Relative.of's num_heads", num_heads, whole=True, least=1)
        errors.check_number("Relative.of's right", right, whole=True, least=0)
        return Relative(torch.zeros(num_heads, left + 1 + right, requires_grad=True), left, offset)

    def by_distance(self, distance: Tensor) -> Tensor:
        return self.table[..., clipped(distance, self.left, self.table.shape[-1])]


@dataclass(frozen=True, eq=False, repr=False)
class Alibi(Toeplitz):
    """Linear distance penalty: bias_ij = -slope |i + offset - j|, one slope for each head.

    slopes: [heads], or anything that broadcasts to [*batch, heads]
    offset: position of the first query, where queries continue a sequence of cached keys
    Cost: O(n + m) per head.  Press, Smith, Lewis 2022, arXiv:2108.12409, section 3.
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

    def by_distance(self, distance: Tensor) -> Tensor:
        return -(_against(self.slopes, distance) * distance.abs().to(wide(self.slopes)))


@dataclass(frozen=True, eq=False, repr=False)
class T5(Toeplitz):
    """A learned bias for each bucket of distances: bias_ij = table[bucket(j - i - offset)].

    The first half of the buckets are single distances, the others grow as logarithms up to
    max_distance, beyond which all share the last one. T5 does not scale its scores: give
    `score=Dot(scale=1.0)` for the same numbers.

    table: [heads, buckets] (T5's `relative_attention_bias.weight`, transposed)
    bidirectional: half of the buckets for keys after the query; otherwise those count as distance 0
    max_distance: where the logarithms end; the last bucket begins a little before it (at 91 of 128
        with 32 buckets both ways, at 113 one way), since they are rounded down
    Cost: O(n + m) per head.  Raffel et al. 2020, arXiv:1910.10683, section 2.1.
    Raises ShapeError where the table does not fit the heads or has too few buckets.

    >>> T5(torch.zeros(1, 32)).bucket(torch.tensor([0, 1, 7, 8, 90, 91, -1]))
    tensor([ 0,  1,  7,  8, 14, 15, 17])
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128
    offset: int = 0

    trailing: ClassVar[dict[str, int]] = {"table": 1}

    def __post_init__(self) -> None:
        errors.check_tensor("T5's table", self.table, shape="[heads, buckets]", dims=1)
        errors.check_number("T5's offset", self.offset, whole=True)
        buckets = self.table.shape[-1]
        exact = buckets // (4 if self.bidirectional else 2)
        if exact < 1 or (self.bidirectional and buckets % 2):
            least = "an even number of at least 4" if self.bidirectional else "at least 2"
            raise errors.ShapeError(
                f"T5's table has {buckets} buckets on its last axis; it must have {least}."
            )
        errors.check_number("T5's max_distance", self.max_distance, whole=True, least=exact + 1)

    @staticmethod
    def of(num_heads: int, num_buckets: int = 32, *, bidirectional: bool = True) -> T5:
        """Make a table of zeros that requires gradients, with T5's max_distance of 128."""
        errors.check_number("T5.of's num_heads", num_heads, whole=True, least=1)
        return T5(torch.zeros(num_heads, num_buckets, requires_grad=True), bidirectional)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance i + offset - j, in float32 like T5's own weights were."""
        buckets, start = self.table.shape[-1], torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            start = (distance < 0) * buckets
            distance = distance.abs()
        distance = distance.clamp(min=0)
        exact = buckets // 2
        ratio = distance.clamp(min=1).float() / exact
        # As T5 does: the logarithm divided by a rounded one, then multiplied, in this order.
        steps = ratio.log() / math.log(self.max_distance / exact) * (buckets - exact)
        far = (exact + steps.long()).clamp(max=buckets - 1)
        return start + torch.where(distance < exact, distance, far)

    def by_distance(self, distance: Tensor) -> Tensor:
        return self.table[..., self.bucket(distance)]


LEAST = 1e-2


@dataclass(frozen=True, eq=False, repr=False)
class Kerple(Toeplitz):
    """Kernelised distance penalty, learned, with d = |i + offset - j| and one r1, r2 per head.

    kind "log":    bias_ij = -r1 log(1 + r2 d)
    kind "power":  bias_ij = -r1 d^r2, r2 at most 2

    r1, r2: [heads], or anything that broadcasts to [*batch, heads]; both count as at least 0.01,
        as in the authors' code, so that training cannot make them negative
    Cost: O(n + m) per head.  Chi et al. 2022, arXiv:2205.09921 (its log and power kernels).
    Raises ShapeError where r1, r2 do not fit the heads.

    >>> kerple = Kerple(torch.tensor([2.0]), torch.tensor([1.0]))
    >>> kerple.by_distance(torch.tensor([0, 1, -1]))
    tensor([[-0.0000, -1.3863, -1.3863]])
    """

    r1: Tensor
    r2: Tensor
    kind: str = "log"
    offset: int = 0

    def __post_init__(self) -> None:
        for name, tensor in (("r1", self.r1), ("r2", self.r2)):
            errors.check_tensor(f"Kerple's {name}", tensor, shape="[heads]", dims=0)
        errors.check_number("Kerple's offset", self.offset, whole=True)
        if self.kind not in ("log", "power"):
            raise ValueError(f"Kerple's kind is 'log' or 'power', not {self.kind!r}.")

    @staticmethod
    def of(num_heads: int, kind: str = "log") -> Kerple:
        """Random r1 in (0, 2) and r2 in (0, 1) (log) or (0, 2) (power) that require gradients."""
        errors.check_number("Kerple.of's num_heads", num_heads, whole=True, least=1)
        r1, r2 = torch.rand(2, num_heads)
        most = 1.0 if kind == "log" else 2.0
        return Kerple((2 * r1).requires_grad_(), (most * r2).requires_grad_(), kind)

    def by_distance(self, distance: Tensor) -> Tensor:
        r1, r2 = (_against(r.clamp(min=LEAST), distance) for r in (self.r1, self.r2))
        distance = distance.abs().to(wide(self.r1))
        if self.kind == "log":
            return -r1 * torch.log1p(r2 * distance)
        return -r1 * distance ** r2.clamp(max=2.0)


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which distances are exact and biases are computed."""
    return torch.promote_types(tensor.dtype, torch.float32)


def clipped(distance: Tensor, left: int, entries: int) -> Tensor:
    """The entry of a table by offset for each distance i - j: clip(j - i, -left, right) + left."""
    return (left - distance).clamp(0, entries - 1)


def check_table(name: str, table: Tensor, left: int, shape: str, trailing: int) -> None:
    """Raise unless a table by offset reaches from -left to 0 at least."""
    errors.check_tensor(name, table, shape=shape, dims=trailing)
    errors.check_number(f"{name.split(chr(39), maxsplit=1)[0]}'s left", left, whole=True, least=0)
    entries = table.shape[-trailing]
    if entries < left + 1:
        raise errors.ShapeError(
            f"{name} has {entries} entries for offsets from -left = {-left} up; it needs left + 1 "
            f"= {left + 1} at least, one more for each offset to the right."
        )


def _against(tensor: Tensor, distance: Tensor) -> Tensor:
    """[*batch, heads] made to multiply [*batch, heads, *axes of distance]."""
    return tensor.to(wide(tensor)).reshape(*tensor.shape, *[1] * distance.dim())
