"""What can be asked about an attention matrix that is never stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from regard import errors
from regard.opaque import opaque

if TYPE_CHECKING:
    from regard.form.looks import Statistics, TopK
    from regard.matrix import Attention


class Looking:
    """The looks of `Attention`: sums over its weights, tile by tile, and the largest of them.

    Several of them cost little more than one where `statistics` is asked for all.
    """

    @property
    def _matrix(self) -> Attention:
        return cast("Attention", self)  # nothing else inherits this

    @opaque
    def logsumexp(self) -> Tensor:
        """log sum_j exp(logit_ij), [*batch, heads, n]; -inf for a row without visible keys.

        With a sink, its logit is one of the terms, so that exp(logits - logsumexp) are the weights.
        Of other normalizers' logits it is the same formula, though it plays no part in them.
        """
        from regard.form import tiled

        return tiled.logsumexp(self._matrix)

    @opaque
    @torch.no_grad()
    def topk(self, k: int) -> TopK:
        """The k largest weights of each row, descending, and their keys: (values, indices).

        [*batch, heads, n, k] each; where a row sees fewer keys, index -1 and weight 0. A row with a
        weight that is NaN has no order: its values are NaN and its indices -1.

        >>> import regard
        >>> regard.attention(torch.zeros(2, 1), torch.zeros(2, 1)).topk(3).values
        tensor([[0.5000, 0.5000, 0.0000],
                [0.5000, 0.5000, 0.0000]])
        """
        from regard.form import looks

        return looks.topk(self._matrix, k)

    @opaque
    @torch.no_grad()
    def entropy(self) -> Tensor:
        """Entropy of each row in nats, [*batch, heads, n]; its exp is an effective number of keys.

        Of p_ij = |weight_ij| / sum_j |weight_ij|, which is the weight itself under softmax; 0 for a
        row without weight.
        """
        from regard.form import looks

        return looks.entropy(self._matrix)

    @opaque
    @torch.no_grad()
    def distance(self, *, offset: int = 0) -> Tensor:
        """Mean distance |i + offset - j| that each row looks, [*batch, heads, n].

        Under p as in `entropy`. Its mean over rows is the non-locality of d'Ascoli et al. 2021
        (ConViT), arXiv:2103.10697, eq. 8.
        """
        from regard.form import looks

        return looks.distance(self._matrix, offset)

    def received(self) -> Tensor:
        """Sum of the weights that each key receives from all rows, [*batch, heads, m]."""
        from regard.form import looks

        return looks.received(self._matrix)

    @opaque
    def offsets(self, left: int, right: int, *, offset: int = 0) -> Tensor:
        """Sum of each row's weights by relative position, [*batch, heads, n, left + 1 + right].

        found_io = sum of weight_ij over j with clip(j - i - offset, -left, right) = o - left

        Keys farther away count for the first and the last entry, so that a row sums to what its
        weights do. It has gradients: `A.offsets(left, right) @ table` is the part of the values in
        Shaw et al. 2018, arXiv:1803.02155, eq. 3. Cost: one pass over the tiles, and two backward.
        offset: position of the first query

        >>> import regard
        >>> A = regard.attention(torch.zeros(3, 1), torch.zeros(4, 1))
        >>> A.offsets(1, 1)
        tensor([[0.0000, 0.2500, 0.7500],
                [0.2500, 0.2500, 0.5000],
                [0.5000, 0.2500, 0.2500]])
        """
        from regard.form import offsets

        for name, number in (("left", left), ("right", right)):
            errors.check_number(f"offsets' {name}", number, whole=True, least=0)
        errors.check_number("offsets' offset", offset, whole=True)
        return offsets.offsets(self._matrix, offsets.Offsets(left, right, offset))

    @opaque
    @torch.no_grad()
    def pool(self, size: int, reduce: str = "mean") -> Tensor:
        """The whole map in cells of size x size pairs: [*batch, heads, ceil(n/size), ceil(m/size)].

        reduce: "mean" shows where mass goes, "max" shows needles
        Pairs that are not visible count as weight 0.
        """
        from regard.form import looks

        return looks.pool(self._matrix, size, reduce)

    @opaque
    @torch.no_grad()
    def statistics(
        self, *, topk: int | None = None, pool: int | None = None, offset: int = 0
    ) -> Statistics:
        """All looks at rows, columns and the map, for little more than the cost of one of them.

        logsumexp_i = log sum_j exp(logit_ij)                  [*batch, heads, n]
        entropy_i   = - sum_j p_ij log p_ij                    [*batch, heads, n]
        distance_i  = sum_j p_ij |i + offset - j|              [*batch, heads, n]
        received_j  = sum_i weight_ij                          [*batch, heads, m]
        topk        = values and indices                       [*batch, heads, n, topk]
        pool        = mean and max of cells of size x size     [*batch, heads, n/size, m/size]

        Each is what the method of its name gives (where p is defined, too), but `received` is in
        float32 of half precision as all others are, and nothing has gradients.
        topk: how many weights of each row; None leaves them out, and the result has None there
        pool: the side of a cell; None leaves the map out
        Raises ValueError for numbers below 1.
        Cost: 2 n m d flops and n m exponentials; O(n + m) memory, what is returned, and at most
        8 MiB for each thread. Compiled, twice the flops for keys beyond the first 32 768 (16 384 in
        float64), in PyTorch for all; and without softmax one pass more, for logsumexp.

        >>> import regard
        >>> A = regard.attention(torch.zeros(4, 2), torch.zeros(4, 2))
        >>> found = A.statistics(topk=1, pool=2)
        >>> found.entropy.exp(), found.topk.values[0], found.pool.max[0]
        (tensor([4., 4., 4., 4.]), tensor([0.2500]), tensor([0.2500, 0.2500]))
        """
        from regard.form import looks

        return looks.statistics(self._matrix, topk, pool, offset)
