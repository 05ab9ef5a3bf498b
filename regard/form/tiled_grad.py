"""Gradients of the tiled form: every tile is computed again, none is kept.

For the bilinear form sum_ij left_i weight_ij right_j:
    dweight_ij = left_i . right_j,  dright_j = sum_i weight_ij left_i
    softmax:  dlogit_ij = weight_ij (dweight_ij - delta_i),  delta_i = sum_j weight_ij dweight_ij
and autograd takes dlogit through score and position, one tile at a time.

delta comes from the tiles' own dweight, in a pass of its own where a row has several tiles. The
shorter way, delta_i = left_i . output_i (Dao et al. 2022, arXiv:2205.14135, eq. 4), rounds apart
from dweight: for a row on one key their difference is all rounding, and gradients of positions,
which multiply it by distances, had 3 to 6 times the error of dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard import grouped
from regard.form.tiles import Tiles, compute_dtype, part_of
from regard.normalizer import Row
from regard.part import widest
from regard.runs import Span


@dataclass(frozen=True)
class _Work:
    """One tile again: logits with a graph from `leaves`, weights, and the gradient of weights."""

    span: Span
    logits: Tensor
    leaves: tuple[Tensor, ...]
    weights: Tensor
    used: Tensor
    dweights: Tensor


class Backward:
    """One pass over the tiles that collects every gradient of sum_ij left_i weight_ij right_j."""

    def __init__(
        self,
        tiles: Tiles,
        query: Tensor,
        key: Tensor,
        right: Tensor,
        wanted: Sequence[bool],
    ) -> None:
        """wanted: whether query, key, right and each of the rule's tensors need a gradient."""
        self.tiles = tiles
        _, _, self.wants_right, *wants_own = wanted
        self.wants = (*wanted[:2], *wants_own)
        self.dtype = compute_dtype(query.dtype)
        self.operands = query, key, right
        self.query, self.key, self.right = (
            torch.zeros_like(x, dtype=self.dtype) for x in self.operands
        )
        # Gradients of the parts' tensors have a home that is cut to a tile like the parts are.
        self.home = tiles.rule.with_tensors(
            [torch.zeros_like(x, dtype=widest(x.device)) for x in tiles.rule.tensors()]
        )

    def run(self, left: Tensor, row: Row, dtotal: Tensor | None) -> None:
        """Go through all tiles; dtotal: gradient of row.total from above."""
        normalizer = self.tiles.rule.normalizer
        for rows in self.tiles.row_blocks():
            of_rows, of_left = part_of(row, rows), left[..., rows, :].to(self.dtype)
            spans = self.tiles.spans(rows)
            works: Iterable[_Work] = self._works(rows, spans, of_left, of_rows, graph=True)
            delta = torch.zeros_like(of_rows.total, dtype=widest(left.device))
            if normalizer.couples:
                first: Iterable[_Work] = self._works(rows, spans, of_left, of_rows, graph=False)
                if len(spans) == 1:
                    first = works = list(works)
                for work in first:
                    delta += (work.weights * work.dweights).sum(-1)
            above = None if dtotal is None else dtotal[..., rows]
            drow = normalizer.row_gradient(of_rows, delta.to(self.dtype), above)
            for work in works:
                self._add(work, rows, of_left, of_rows, drow)
            own = normalizer.own_gradients(of_rows, drow)
            for home, gradient in zip(self.home.normalizer.tensors(), own, strict=True):
                home += gradient.sum(-1).sum_to_size(home.shape)

    def _works(
        self, rows: slice, spans: list[Span], of_left: Tensor, of_rows: Row, *, graph: bool
    ) -> Iterator[_Work]:
        for span in spans:
            logits, leaves = self._logits(rows, span, graph=graph)
            weights = self.tiles.rule.normalizer.weights(logits.detach(), of_rows)
            dweights = self._dweights(rows, span, of_left)
            drop = self.tiles.drop(rows, span.columns, self.dtype)
            used = weights
            if drop is not None:
                used, dweights = weights * drop, dweights * drop
            dweights = dweights.sum_to_size(weights.shape)
            yield _Work(span, logits, leaves, weights, used, dweights)

    def _dweights(self, rows: slice, span: Span, of_left: Tensor) -> Tensor:
        """left_i . right_j, [*, r, c]."""
        right = self.operands[2][..., span.columns, :].to(self.dtype)
        return grouped.matmul(of_left, right.mT)

    def _logits(self, rows: slice, span: Span, *, graph: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The logits of a tile, and the tensors that they are computed from."""
        rule = self.tiles.rule.cut(rows, span.columns)
        starts = (
            self.operands[0][..., rows, :].to(self.dtype),
            self.operands[1][..., span.columns, :].to(self.dtype),
            *rule.tensors(),
        )
        leaves = tuple(
            tensor.detach().requires_grad_(graph and wanted)
            for tensor, wanted in zip(starts, self.wants, strict=True)
        )
        query, key, *tensors = leaves
        with torch.set_grad_enabled(graph):
            return self.tiles.logits(query, key, rows, span, rule.with_tensors(tensors)), leaves

    def _add(self, work: _Work, rows: slice, of_left: Tensor, of_rows: Row, drow: Tensor) -> None:
        """Add a tile's gradients where they belong."""
        columns = work.span.columns
        if self.wants_right:
            home = self.right[..., columns, :]
            home += grouped.matmul_transposed(work.used, of_left, home)
        dlogits = self.tiles.rule.normalizer.pullback(
            work.logits.detach(), work.weights, work.dweights, of_rows, drow
        )
        homes = (
            self.query[..., rows, :],
            self.key[..., columns, :],
            *self.home.cut(rows, columns).tensors(),
        )
        if not work.logits.requires_grad:
            return  # nothing that is wanted is read, as by position-only scores
        wanted = [place for place, leaf in enumerate(work.leaves) if leaf.requires_grad]
        leaves = [work.leaves[place] for place in wanted]
        gradients = torch.autograd.grad(work.logits, leaves, dlogits, allow_unused=True)
        for place, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                home = homes[place]
                home += gradient
