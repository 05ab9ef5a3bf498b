"""The attention matrix as a value: a lazy linear operator that costs O(n d) until it is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard import errors
from regard.custom import Custom, PairFunction
from regard.dropout import Dropout
from regard.looking import Looking
from regard.mask import Compiled, Dense, Mask
from regard.normalizer import Normalizer, Softmax
from regard.opaque import Factor, opaque, opaque_unless, product_in_graph
from regard.part import Index
from regard.position.base import Position
from regard.rule import Rule
from regard.runs import Runs, compile_mask
from regard.score import Dot, Score
from regard.transposed import Transposed

if TYPE_CHECKING:
    from regard.explain import Explanation

DENSE_LIMIT = 2**26
"""Numbers that may be stored without being told to: 256 MiB in float32."""


def _followed(*_: Tensor, score: Score | PairFunction = Dot(), **parts: Any) -> Any:
    """What a graph can follow: the checks of every part but of a function of a tile."""
    return attention.__wrapped__ if isinstance(score, Score) else None  # type: ignore[attr-defined]


@opaque_unless(_followed)
def attention(
    query: Tensor,
    key: Tensor,
    *,
    score: Score | PairFunction = Dot(),
    position: Position | None = None,
    mask: Mask | Tensor | None = None,
    normalizer: Normalizer = Softmax(),
    dropout: Dropout | None = None,
) -> Attention:
    """Make the attention matrix of queries and keys; nothing is computed yet.

    weight_ij = normalizer over j of (score(query_i, key_j) + bias_ij where mask_ij, else -inf)

    query: [*batch, heads, n, d], or [n, d] for a single head without axes before it
    key: [*batch, key heads, m, d]; fewer key heads than heads are shared by groups of heads
    score: a part of `regard.score`, or your function(query, key, i, j) of a tile
    position: a part of `regard.position`; explicit biases are `Bias(tensor)`; parts add up
    mask: a part of `regard.mask`, or a bool tensor [*batch, heads, n, m]; True = may attend
    normalizer: a part of `regard.normalizer`
    dropout: `Dropout(probability)` on the weights
    Raises ShapeError, DtypeError or DeviceError where these do not fit together.

    >>> query, key, value = torch.randn(3, 2, 8, 5, 16).unbind(0)
    >>> A = attention(query, key)
    >>> A
    Attention(2, 8, 5, 5): Dot(), Softmax(); float32, lazy
    >>> (A @ value).shape, A[0, 3, 4].shape
    (torch.Size([2, 8, 5, 16]), torch.Size([5]))
    """
    batch: tuple[int, ...]
    if errors.are_alike(query, key):  # nothing to say about them, and no time lost over it
        batch = query.shape[:-2]
    else:
        errors.check_tensor("query", query)
        errors.check_tensor("key", key)
        errors.check_pair("key", key, "query", query)
        batch = errors.broadcast_batch(query, key)
    if not isinstance(score, Score):
        function: Any = errors.check_kind("score", score, Callable)  # type: ignore[arg-type]
        score = Custom(function).probe(query, key)
    score.check(query, key)
    mask = Dense(mask) if isinstance(mask, Tensor) else mask
    errors.check_kind("normalizer", normalizer, Normalizer)
    for name, part, kind in (
        ("position", position, Position),
        ("mask", mask, Mask),
        ("dropout", dropout, Dropout),
    ):
        if part is not None:
            errors.check_kind(name, part, kind)
    for formula in (score, position, normalizer):
        if formula is not None and formula.tensors():
            errors.check_device(formula, formula.tensors(), query.device)
            formula.check_heads(batch)
    if position is not None:
        position.check(query, key)
    if mask is not None:
        mask.check(query.shape[-2], key.shape[-2])
        errors.check_device(mask, mask.tensors(), query.device)
        errors.check_fits(mask, mask.axes(), batch)
    matrix = Attention(query, key, Rule.of(score, position, normalizer), mask, dropout)
    matrix.__dict__["shape"] = torch.Size((*batch, query.shape[-2], key.shape[-2]))
    return matrix


# Not frozen: torch.compile rebuilds frozen dataclasses from placeholders, which parts refuse.
@dataclass(eq=False, repr=False)
class Attention(Factor, Looking):
    """A lazy attention matrix, made by `regard.attention`; rows are queries, columns are keys.

    Operations cost O(n d) memory unless they return more. Products, rows, columns, blocks,
    `logsumexp`, `received` and `offsets` have gradients; the other looks (see `Looking`) have none.
    Weights are what multiplies the value: with any dropout.
    """

    query: Tensor
    key: Tensor
    rule: Rule
    mask: Mask | None = None
    dropout: Dropout | None = None
    given_lanes: Tensor | None = None

    @cached_property
    def shape(self) -> torch.Size:
        """(*batch, heads, n, m)."""
        batch = errors.broadcast_batch(self.query, self.key)
        return torch.Size((*batch, self.query.shape[-2], self.key.shape[-2]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of query and key, and of products."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """The device of query and key."""
        return self.query.device

    def to(self, device: torch.device | str) -> Attention:
        """The same matrix on another device: its query, key and the tensors of its parts."""
        rule, mask, lanes = self.rule, self.mask, self.given_lanes
        return Attention(
            self.query.to(device),
            self.key.to(device),
            rule.with_tensors([x.to(device) for x in rule.tensors()]),
            None if mask is None else mask.with_tensors([x.to(device) for x in mask.tensors()]),
            self.dropout,
            None if lanes is None else lanes.to(device),
        )

    def cpu(self) -> Attention:
        """The same matrix in the computer's own memory; see `to`."""
        return self.to("cpu")

    @property
    def score(self) -> Score:
        """The score."""
        return self.rule.score

    @property
    def position(self) -> Position | None:
        """The position part, or None."""
        return self.rule.position

    @property
    def normalizer(self) -> Normalizer:
        """The normalizer."""
        return self.rule.normalizer

    @cached_property
    def runs(self) -> Runs | None:
        """The mask as each row's visible keys, or None if every row sees every key."""
        if self.mask is None:
            return None
        errors.check_numbers(self.device)
        errors.check_unmapped(self.mask, self.mask.tensors())
        return compile_mask(self.mask, self.shape[-2], self.shape[-1], self.device)

    @cached_property
    def lanes(self) -> Tensor:
        """A number for each batch entry and head, [*batch, heads], which dropout depends on."""
        if self.given_lanes is not None:
            return self.given_lanes
        batch = self.shape[:-2]
        return torch.arange(batch.numel(), device=self.device).reshape(batch)

    @property
    def mT(self) -> Transposed:
        """The transpose, as lazy as the matrix: `A.mT @ x` sums over queries."""
        return Transposed(self)

    def __matmul__(self, value: Tensor) -> Tensor:
        """output_i = sum_j weight_ij value_j, in the cheapest exact form."""
        return self.matmul(value)

    @opaque_unless(product_in_graph)
    def matmul(self, value: Tensor, *, form: str | None = None) -> Tensor:
        """output_i = sum_j weight_ij value_j: [*batch, key heads, m, e] -> [*batch, heads, n, e].

        form: "tiled" or "dense"; default the cheapest that applies (see `explain`)
        Raises FormError for a form that does not apply, ShapeError for a value that does not fit.

        >>> query = key = torch.zeros(4, 2)
        >>> attention(query, key).matmul(torch.eye(4), form="dense")[0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        from regard import form as forms

        if form is None and forms.is_plain(self, value):
            return forms.product_plain(self, value)
        errors.check_product("value", self.shape, value, self.query, errors.heads_of(self.key))
        return forms.product(self, value, form)

    @opaque
    def __getitem__(self, index: Any) -> Tensor | Attention:
        """Rows, columns and blocks as tensors; whole batch entries and heads stay lazy.

        Indices are those of a tensor of the same shape: `A[..., 17, :]` is what position 17 attends
        to, `A[..., :, 3]` who attends to key 3, `A[0, 5]` one head, lazily. Lazy is what leaves
        both last axes out or gives them as `:`; any other slice makes a tensor, however long.
        Of grouped heads, `A[:, :2]` takes a value with two heads, like any matrix of two heads.
        A row or a block costs the logits of its whole rows, a column one pass over the tiles.
        Raises ShapeError for None, and for two lists of positions, which would pair.

        >>> A = attention(torch.randn(8, 5, 2), torch.randn(8, 6, 2))
        >>> A[3], A[..., 1, :].shape, A[:, :2, 4].shape
        (Attention(5, 6): Dot(), Softmax(); float32, lazy, torch.Size([8, 6]), torch.Size([8, 2]))
        """
        from regard import indexing

        return indexing.take(self, index)

    @opaque
    def dense(self, *, limit: int = DENSE_LIMIT) -> Tensor:
        """All weights, [*batch, heads, n, m], by the textbook formulas.

        Raises ShapeError above `limit` numbers; give a larger limit to insist.
        """
        from regard.form import dense

        numbers = self.shape.numel()
        if numbers > limit:
            gib = numbers * self.query.element_size() / 2**30
            raise errors.ShapeError(
                f"dense() would store {numbers:,} weights ({gib:.1f} GiB), more than "
                f"limit={limit:,}. Most questions need less: A[..., i, :] is one row, A.topk(8) "
                "the largest weights, A.pool(256) the whole map in cells, A @ value the output. To "
                f"store them all the same: dense(limit={numbers})."
            )
        return dense.weights(self.wide()).to(self.dtype)

    @opaque
    def logits(self, rows: Index | int = slice(None), columns: Index | int = slice(None)) -> Tensor:
        """Scores plus biases of a block, before the normalizer; -inf where the mask forbids.

        rows, columns: slices, tensors of positions, or single positions (which keep their axis)

        >>> attention(torch.ones(3, 4), torch.ones(3, 4)).logits(rows=slice(0, 1))
        tensor([[2., 2., 2.]])
        """
        from regard import indexing
        from regard.form import dense

        rows, columns = (
            indexing.as_index(pick, length, name, self.device)
            for pick, length, name in zip(
                (rows, columns), self.shape[-2:], ("row", "column"), strict=True
            )
        )
        return dense.logits(self.wide(), rows, columns).to(self.dtype)

    @opaque
    def explain(self, value: Tensor | None = None) -> Explanation:
        """Say which form runs and why, its work, its bytes and its memory; nothing is computed.

        value: what would be multiplied; default as wide as key
        """
        from regard import explain

        return explain.explain(self, value)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write query, key and all parts to a safetensors file; `regard.load(path)` reads it.

        Cost: O(n d) bytes, what the matrix holds; tensors by the names of their fields, so that
        other programs read them, too. A mask of your own is saved as its runs.
        Raises MissingPackageError without the package safetensors, and
        `regard.interchange.FileError` for what is code: a score function of your own, a lambda.

        >>> import pathlib, tempfile, regard
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "matrix.safetensors"
        >>> A = attention(torch.randn(8, 5, 4), torch.randn(8, 5, 4), mask=regard.Causal())
        >>> A.save(path)
        >>> torch.equal(regard.load(path).dense(), A.dense())
        True
        """
        from regard import interchange

        interchange.save(self, path)

    def wide(self) -> Attention:
        """The same matrix computed in float32, if its dtype is a half precision; else itself."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if dtype == self.dtype:
            return self
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype))

    def detach(self) -> Attention:
        """The same matrix without gradients: what to keep for looking at it later."""
        tensors = [tensor.detach() for tensor in self.rule.tensors()]
        query, key = self.query.detach(), self.key.detach()
        return replace(self, query=query, key=key, rule=self.rule.with_tensors(tensors))

    def with_normalizer(self, normalizer: Normalizer) -> Attention:
        """The same logits under another normalizer."""
        errors.check_kind("normalizer", normalizer, Normalizer).check_heads(self.shape[:-2])
        return replace(self, rule=replace(self.rule, normalizer=normalizer))

    def narrow(self, index: tuple[Any, ...]) -> Attention:
        """The lazy matrix of some batch entries and heads; one index for each such axis."""
        from regard import indexing

        batch = tuple(self.shape[:-2])
        runs = None if self.runs is None else self.runs.narrow(batch, index)
        return Attention(
            indexing.operand(self.query, batch, index),
            indexing.operand(self.key, batch, index),
            self.rule.narrow(batch, index),
            None if runs is None else Compiled(runs, repr(self.mask)),
            self.dropout,
            self.lanes[index],
        )

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        parts = [self.score, self.position, self.mask, self.normalizer, self.dropout]
        formula = ", ".join(repr(part) for part in parts if part is not None)
        return f"Attention({shape}): {formula}; {str(self.dtype).removeprefix('torch.')}, lazy"

    def _repr_html_(self) -> str:
        from regard import picture

        return picture.html(self)
