"""Heads in groups that share keys, as axes of their own, for products that broadcast."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from regard import errors

if TYPE_CHECKING:
    from regard.matrix import Attention


class Groups(NamedTuple):
    """Heads as [key heads, heads that share one], so that what is shared broadcasts."""

    shared: int
    size: int

    @staticmethod
    def of(matrix: Attention, batch: tuple[int, ...]) -> Groups:
        """Of a product with these batch and head axes."""
        heads, key_heads = batch[-1] if batch else 1, errors.heads_of(matrix.key)
        shared = key_heads if key_heads > 1 else heads
        return Groups(shared, heads // max(shared, 1))

    @property
    def heads(self) -> int:
        """All heads."""
        return self.shared * self.size

    def split(self, x: Tensor) -> Tensor:
        """[*batch, heads, r, c] -> [*batch, key heads, size, r, c]; axes that are shared are 1."""
        if x.dim() < 3:
            return x[None, None]
        if x.shape[-3] in (1, self.shared):
            return x.unsqueeze(-3)
        parted: Tensor = x.unflatten(-3, (self.shared, self.size))
        return parted

    def split_if_tensor(self, x: float | Tensor | None) -> float | Tensor | None:
        """A part's own tensor next to what was split."""
        return self.split(x) if isinstance(x, Tensor) else x

    def join(self, x: Tensor, batch: tuple[int, ...] | None) -> Tensor:
        """Undo `split`; with `batch`, for all of its lanes."""
        if batch is not None:
            x = x.expand(*batch[:-1], self.shared, self.size, *x.shape[-2:])
        joined: Tensor = x.flatten(-4, -3)
        alone = joined.dim() == 3 and joined.shape[0] == 1
        return joined[0] if alone and not batch else joined
