"""Biases by position that read the query or the key as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from regard import errors, grouped
from regard.position.base import Band, Position
from regard.position.sinusoid import sinusoid
from regard.position.toeplitz import check_table, clipped

if TYPE_CHECKING:
    from regard.matrix import Attention


@dataclass(frozen=True, eq=False, repr=False)
class Shaw(Position):
    """Relative position representations: a vector learned for each offset joins the key.

    bias_ij = scale q_i . keys[o],  o = clip(j - i - offset, -left, right) + left

    Another may join the value: sum_j weight_ij values[o] is no product of the matrix with a value;
    it is `on_output(A)`, which the layers of `regard.nn` add, or `A.offsets(...) @ values`.

    keys: [left + 1 + right, head_dim], or with [*batch, heads] before it
    left: how far back the tables reach; what is farther, on either side, takes the last entries
    values: [left + 1 + right, value width] or with [*batch, heads] before it, or None
    scale: that of the score it is added to; default width ** -0.5, as Dot's
    offset: position of the first query
    Cost: 2 n (left + 1 + right) d flops per head, then one number per pair.
    Shaw, Uszkoreit, Vaswani 2018, arXiv:1803.02155, eq. 3 to 5.
    Raises ShapeError where tables do not fit the queries' width, the heads or `left`.

    >>> shaw = Shaw(torch.tensor([[0.0], [1.0], [2.0]]), left=1)
    >>> query, key = torch.tensor([[1.0], [10.0]]), torch.zeros(3, 1)
    >>> shaw.on_score(query, key, torch.arange(2), torch.arange(3))
    tensor([[ 1.,  2.,  2.],
            [ 0., 10., 20.]])
    """

    keys: Tensor
    left: int
    values: Tensor | None = None
    scale: float | None = None
    offset: int = 0

    shift_invariant: ClassVar[bool] = True
    trailing: ClassVar[dict[str, int]] = {"keys": 2, "values": 2}

    def __post_init__(self) -> None:
        shape = "[left + 1 + right, head_dim]"
        check_table("Shaw's keys", self.keys, self.left, shape, 2)
        if self.values is not None:
            check_table("Shaw's values", self.values, self.left, shape, 2)
        if self.scale is not None:
            errors.check_number("Shaw's scale", self.scale)
        errors.check_number("Shaw's offset", self.offset, whole=True)

    @staticmethod
    def of(head_dim: int, left: int, right: int, *, values: bool = True) -> Shaw:
        """Tables for all heads that require gradients, drawn from Xavier's uniform distribution."""
        errors.check_number("Shaw.of's head_dim", head_dim, whole=True, least=1)
        errors.check_number("Shaw.of's right", right, whole=True, least=0)
        tables = [torch.empty(left + 1 + right, head_dim) for _ in range(1 + values)]
        for table in tables:
            torch.nn.init.xavier_uniform_(table)
            table.requires_grad_()
        return Shaw(tables[0], left, tables[1] if values else None)

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        table = self.band(query, i).table
        at = clipped(i[:, None] + self.offset - j, self.left, self.keys.shape[-2])
        return table.gather(-1, at.expand(*table.shape[:-1], at.shape[-1]))

    def band(self, query: Tensor, i: Tensor) -> Band:
        scale = max(query.shape[-1], 1) ** -0.5 if self.scale is None else self.scale
        return Band(self.left, self.offset, (query * scale) @ self.keys.to(query.dtype).mT)

    def on_output(self, matrix: Attention) -> Tensor | None:
        if self.values is None:
            return None
        right = self.values.shape[-2] - 1 - self.left
        weights: Tensor = matrix.offsets(self.left, right, offset=self.offset)
        return weights @ self.values.to(weights.dtype)

    def check(self, query: Tensor, key: Tensor) -> None:
        _check_reads("Shaw's keys", self.keys, query)


@dataclass(frozen=True, eq=False, repr=False)
class TransformerXL(Position):
    """Relative sinusoids seen by the query, and two learned vectors in the query's place.

    bias_ij = scale (u . k_j + (q_i + v) . W R_{i + offset - j}),  R_d = sinusoid(d, "halves")

    so that the whole score is scale ((q_i + u) . k_j + (q_i + v) . W R). A sinusoid of a difference
    is a sum of products of sinusoids: the bias is a dot product of further channels.

    weight: W, [heads, head_dim, width of R]; u, v: [heads, head_dim]
    scale: that of the score it is added to; default width ** -0.5, as Dot's
    offset: position of the first query
    Cost: 2 (head_dim + width of R) flops per pair.
    Dai et al. 2019, arXiv:1901.02860, section 3.3.
    Raises ShapeError where the tensors do not fit the queries' width or the heads.

    >>> TransformerXL.of(8, 64, 512)
    TransformerXL(tensor(8, 64, 512), tensor(8, 64), tensor(8, 64))
    """

    weight: Tensor
    u: Tensor
    v: Tensor
    scale: float | None = None
    offset: int = 0

    shift_invariant: ClassVar[bool] = True
    trailing: ClassVar[dict[str, int]] = {"weight": 2, "u": 1, "v": 1}

    def __post_init__(self) -> None:
        weight, shape = self.weight, "[heads, head_dim, width]"
        errors.check_tensor("TransformerXL's weight", weight, shape=shape)
        for name, tensor in (("u", self.u), ("v", self.v)):
            errors.check_tensor(
                f"TransformerXL's {name}", tensor, shape="[heads, head_dim]", dims=1
            )
            if tensor.shape[-1] != weight.shape[-2]:
                raise errors.ShapeError(
                    f"TransformerXL's {name} has width {tensor.shape[-1]}, but its weight maps to "
                    f"vectors of width {weight.shape[-2]}; both are compared with queries and keys."
                )
        if weight.shape[-1] % 2:
            raise errors.ShapeError(
                f"TransformerXL's weight has {weight.shape[-1]} columns, one for each channel of a "
                "sinusoid; they come in pairs of sine and cosine, so there must be an even number."
            )
        if self.scale is not None:
            errors.check_number("TransformerXL's scale", self.scale)
        errors.check_number("TransformerXL's offset", self.offset, whole=True)

    @staticmethod
    def of(num_heads: int, head_dim: int, width: int) -> TransformerXL:
        """W as torch.nn.Linear initialises it, u and v zero; all require gradients."""
        errors.check_number("TransformerXL.of's num_heads", num_heads, whole=True, least=1)
        bound = max(width, 1) ** -0.5
        weight = torch.empty(num_heads, head_dim, width).uniform_(-bound, bound)
        u, v = torch.zeros(2, num_heads, head_dim)
        return TransformerXL(weight.requires_grad_(), u.requires_grad_(), v.requires_grad_())

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen, fixed = self._seen(query), self._scaled(self.u, query)
        distance = i[:, None] + self.offset - j
        low, high = (int(distance.min()), int(distance.max())) if distance.numel() else (0, 0)
        distances = torch.arange(low, high + 1, device=i.device)
        relative = seen @ self._sinusoid(distances, query.dtype).mT  # [*, h, r, distances]
        at = (distance - low).expand(*relative.shape[:-1], distance.shape[-1])
        return relative.gather(-1, at) + grouped.matmul(fixed[..., None, :], key.mT)

    def channels(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """With s = sin and c = cos of the angles: s_{i-j} = s_i c_j - c_i s_j, and so on."""
        seen, fixed = self._seen(query), self._scaled(self.u, query)
        sine, cosine = self._sinusoid(i + self.offset, query.dtype).chunk(2, -1)
        of_sine, of_cosine = seen.chunk(2, -1)
        by_cosine = of_sine * sine + of_cosine * cosine
        by_sine = of_cosine * sine - of_sine * cosine
        fixed = fixed[..., None, :].expand(*by_sine.shape[:-1], -1)
        of_keys = self._sinusoid(j, key.dtype).roll(self.weight.shape[-1] // 2, -1)
        of_keys = of_keys.expand(*key.shape[:-1], -1)
        return torch.cat([by_cosine, by_sine, fixed], -1), torch.cat([of_keys, key], -1)

    def check(self, query: Tensor, key: Tensor) -> None:
        _check_reads("TransformerXL's weight", self.weight.mT, query)

    def _seen(self, query: Tensor) -> Tensor:
        """What a query sees of a sinusoid: scale (q_i + v) W, [*batch, heads, n, width of R]."""
        bias = self._scaled(self.v, query)[..., None, :]
        scaled = query * self._scale(query) + bias
        return scaled @ self.weight.to(query.dtype)

    def _sinusoid(self, distances: Tensor, dtype: torch.dtype) -> Tensor:
        exact = distances.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return sinusoid(exact, self.weight.shape[-1], layout="halves").to(dtype)

    def _scaled(self, vector: Tensor, query: Tensor) -> Tensor:
        return vector.to(query.dtype) * self._scale(query)

    def _scale(self, query: Tensor) -> float:
        return max(query.shape[-1], 1) ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True, eq=False, repr=False)
class Cope(Position):
    """Contextual position encoding: positions count only the tokens that a query finds relevant.

    gate_it = sigmoid(scale q_i . k_t),  p_ij = sum of gate_it over t = j..i + offset
    bias_ij = q_i . table[p_ij], linear between whole numbers, p_ij at most the table's last entry

    Keys after the query have p_ij = 0. A pair's position depends on the keys between, whatever the
    mask, so tiles are whole rows: memory is O(m) for a few rows at a time.

    table: [entries, head_dim], or with [*batch, heads] before it
    scale: of the gates; default width ** -0.5
    offset: position of the first query
    Cost: 2 d flops per pair beyond the score's, and 2 n entries d.
    Golovneva et al. 2024, arXiv:2405.18719, section 4 and appendix B.
    Raises ShapeError where the table does not fit the queries' width or the heads.

    >>> cope = Cope(torch.tensor([[0.0], [1.0], [2.0]]))
    >>> query, key = torch.ones(2, 1), torch.zeros(2, 1)  # every gate is 1/2
    >>> cope.on_score(query, key, torch.arange(2), torch.arange(2))
    tensor([[0.5000, 0.0000],
            [1.0000, 0.5000]])
    """

    table: Tensor
    scale: float | None = None
    offset: int = 0

    whole_rows: ClassVar[bool] = True
    trailing: ClassVar[dict[str, int]] = {"table": 2}

    def __post_init__(self) -> None:
        errors.check_tensor("Cope's table", self.table, shape="[entries, head_dim]")
        if self.table.shape[-2] < 1:
            raise errors.ShapeError("Cope's table has no entries; position 0 needs one at least.")
        if self.scale is not None:
            errors.check_number("Cope's scale", self.scale)
        errors.check_number("Cope's offset", self.offset, whole=True)

    @staticmethod
    def of(head_dim: int, entries: int) -> Cope:
        """Make a table of zeros for all heads that requires gradients, as the authors do."""
        errors.check_number("Cope.of's entries", entries, whole=True, least=1)
        return Cope(torch.zeros(entries, head_dim, requires_grad=True))

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        scale = max(query.shape[-1], 1) ** -0.5 if self.scale is None else self.scale
        gates = grouped.matmul(query * scale, key.mT).sigmoid()
        gates = torch.where(j <= (i + self.offset)[:, None], gates, 0)
        position = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=self.table.shape[-2] - 1)
        biases = query @ self.table.to(query.dtype).mT  # [*, h, r, entries]
        below = position.detach().floor().long()
        above = (below + 1).clamp(max=self.table.shape[-2] - 1)
        part = position - below
        biases = biases.expand(*position.shape[:-1], -1)
        return biases.gather(-1, below) * (1 - part) + biases.gather(-1, above) * part

    def check(self, query: Tensor, key: Tensor) -> None:
        _check_reads("Cope's table", self.table, query)
        errors.check_width(query, key, self)

    def numbers_per_pair(self) -> int:
        return 6


def _check_reads(name: str, table: Tensor, query: Tensor) -> None:
    if table.shape[-1] != query.shape[-1]:
        raise errors.ShapeError(
            f"{name} is for queries of width {table.shape[-1]}, but query has width "
            f"{query.shape[-1]}; it is compared with each query, so both must be alike."
        )
