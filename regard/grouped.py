"""Products of heads with the keys and values that a group of heads shares, without copies.

Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): H query heads read G key heads,
head h the key head h // (H / G). Folding the H / G heads of a group into the rows turns each
product into one plain matrix product; expanding the keys instead would copy them H / G times.
"""

from __future__ import annotations

from torch import Tensor


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """[*batch, H, r, x] @ [*batch, G, x, c] -> [*batch, H, r, c].

    >>> import torch
    >>> matmul(torch.ones(8, 5, 4), torch.ones(2, 4, 3)).shape
    torch.Size([8, 5, 3])
    """
    size = _group(left, right)
    if size == 1:
        return left @ right
    product = _fold(left, size) @ right  # [*batch, G, H/G r, c]
    unfolded: Tensor = product.unflatten(-2, (size, left.shape[-2])).flatten(-4, -3)
    return unfolded


def matmul_transposed(weights: Tensor, left: Tensor, like: Tensor) -> Tensor:
    """Sum over rows and over the heads of a group: weights^T left, in the shape of `like`.

    weights [*batch, H, r, c], left [*batch, H, r, x], like [*batch, G, c, x].

    >>> import torch
    >>> matmul_transposed(torch.ones(8, 5, 3), torch.ones(8, 5, 4), torch.ones(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """
    size = _group(weights, like)
    if size == 1:
        return (weights.mT @ left).sum_to_size(like.shape)
    return (_fold(weights, size).mT @ _fold(left, size)).sum_to_size(like.shape)


def match(key: Tensor, heads: int) -> Tensor:
    """Repeat each key head for its group, so that key has `heads` heads: a copy, of one tile."""
    if key.dim() < 3 or key.shape[-3] == 1 or key.shape[-3] >= heads:
        return key
    return key.repeat_interleave(heads // key.shape[-3], dim=-3)


def _group(left: Tensor, right: Tensor) -> int:
    if left.dim() < 3 or right.dim() < 3 or left.shape[-3] <= right.shape[-3]:
        return 1
    return int(left.shape[-3] // right.shape[-3])


def _fold(tensor: Tensor, size: int) -> Tensor:
    folded: Tensor = tensor.unflatten(-3, (tensor.shape[-3] // size, size)).flatten(-3, -2)
    return folded
