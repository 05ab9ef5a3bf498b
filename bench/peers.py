"""How regard is called, and the best of what else there is."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from bench.contestant import Call, MissingPeerError, Prepared, fastest
from bench.problem import CELL, TOP, Problem, Tensors, looked_in_rows


def product(problem: Problem, tensors: Tensors) -> Prepared:
    """Regard: parts are made anew in every call, as in a model's forward pass."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    return Prepared(lambda: regard.attention(query, key, **problem.parts(tensors)) @ value)


def product_in(problem: Problem, tensors: Tensors, form: str) -> Prepared:
    """Regard, in a form that it would not choose."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    return Prepared(
        lambda: regard.attention(query, key, **problem.parts(tensors)).matmul(value, form=form)
    )


def convolution(problem: Problem, tensors: Tensors, taps: int) -> Prepared:
    """Gaussian heads by hand: conv(value, w) / conv(1, w), as their authors' code does it."""
    shape, side = problem.shape, math.isqrt(problem.shape.n)
    ones = torch.ones(1, shape.heads, side, side)
    axis = torch.arange(taps) - taps // 2
    displacements = torch.cartesian_prod(axis, axis)

    def call() -> Tensor:
        away = displacements - tensors["centre"][:, None]
        alpha = tensors["sharpness"].square()[:, None]
        w = (-alpha * away.square().sum(-1)).exp().view(shape.heads, 1, taps, taps)
        image = tensors["value"].mT.reshape(1, shape.heads * shape.out, side, side)
        wide = w.repeat_interleave(shape.out, 0)
        sums = F.conv2d(image, wide, padding=taps // 2, groups=shape.heads * shape.out)
        sums = sums.view(shape.heads, shape.out, shape.n)
        totals = F.conv2d(ones, w, padding=taps // 2, groups=shape.heads)
        return (sums / totals.view(shape.heads, 1, shape.n)).mT[None]

    return Prepared(call)


def looks(problem: Problem, tensors: Tensors) -> Prepared:
    """Regard: four ways of looking at one matrix, and what comes with them."""

    def call() -> tuple[Tensor, ...]:
        found = problem.matrix(tensors).statistics(topk=TOP, pool=CELL)
        assert found.topk
        assert found.pool
        return found.topk.values, found.entropy, found.received, found.pool.mean

    return Prepared(call)


def sdpa(problem: Problem, tensors: Tensors, **options: Any) -> Prepared:
    """Torch's fused kernel."""
    operands = tensors["query"], tensors["key"], tensors["value"]
    return Prepared(partial(F.scaled_dot_product_attention, *operands, **options))


def sdpa_folded(problem: Problem, tensors: Tensors) -> Prepared:
    """Torch's fused kernel, with the query heads of a group as rows of their key head."""
    shape = problem.shape
    folded = (shape.batch, shape.heads // shape.group, shape.group * shape.n, -1)
    unfolded = (shape.batch, shape.heads, shape.n, -1)

    def call() -> Tensor:
        query = tensors["query"].reshape(folded)
        output = F.scaled_dot_product_attention(query, tensors["key"], tensors["value"])
        return output.reshape(unfolded)

    return Prepared(call)


def sdpa_window(problem: Problem, tensors: Tensors, left: int) -> Prepared:
    """Torch's fused kernel with a mask tensor, which is made beforehand."""
    at = torch.arange(problem.shape.n)
    mask = (at <= at[:, None]) & (at >= at[:, None] - left)
    return sdpa(problem, tensors, attn_mask=mask)


def flex_window(problem: Problem, tensors: Tensors, left: int) -> Prepared:
    """FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - left)

    n = problem.shape.n
    mask = create_block_mask(visible, None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    operands = tensors["query"], tensors["key"], tensors["value"]
    return Prepared(partial(compiled, *operands, block_mask=mask))


def additive(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, activation: str) -> Tensor:
    """Additive attention as everybody writes it; in place, where the gradient allows it."""
    total = query[..., :, None, :] + key[..., None, :, :]  # [*, h, r, m, d]
    active = total.tanh_() if activation == "tanh" else F.leaky_relu_(total, 0.2)
    logits = (active @ weight[:, None, :, None]).squeeze(-1)
    return torch.softmax(logits, -1) @ value


def additive_to_compile(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, activation: str
) -> Tensor:
    """The same as a sum, which a compiler fuses with the activation: no [n, m, d] is stored."""
    total = query[..., :, None, :] + key[..., None, :, :]
    active = torch.tanh(total) if activation == "tanh" else F.leaky_relu(total, 0.2)
    logits = (active * weight[:, None, None, :]).sum(-1)
    return torch.softmax(logits, -1) @ value


def eager_additive(problem: Problem, tensors: Tensors, activation: str) -> Prepared:
    """Eager torch, some rows at a time."""
    run = partial(additive, activation=activation)
    return _best_chunk(problem, tensors, run, (4, 8, 16))


def compiled_additive(problem: Problem, tensors: Tensors, activation: str) -> Prepared:
    """torch.compile of the naive form, some rows at a time or all at once."""
    run = torch.compile(partial(additive_to_compile, activation=activation), dynamic=False)
    return _best_chunk(problem, tensors, run, (16, 128, problem.shape.n))


def edge_by_edge(problem: Problem, tensors: Tensors, edges: Tensor) -> Prepared:
    """GATv2 as libraries of graph networks write it: gathered, and summed by target."""
    source, target = edges

    def call() -> Tensor:
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        total = F.leaky_relu(query[..., target, :] + key[..., source, :], 0.2)
        logits = (total * tensors["weight"][:, None]).sum(-1)
        sums = logits.new_zeros(*logits.shape[:-1], problem.shape.n)
        with torch.no_grad():
            peaks = sums.index_reduce(-1, target, logits, "amax", include_self=False)
        weights = (logits - peaks[..., target]).exp()
        weights = weights / sums.index_add(-1, target, weights)[..., target]
        zeros = torch.zeros_like(tensors["upstream"])
        return zeros.index_add(-2, target, weights[..., None] * value[..., source, :])

    return Prepared(call)


def keops_additive(problem: Problem, tensors: Tensors, activation: str) -> Prepared:
    """KeOps' LazyTensor, which has no tanh: 1 - 2 / (exp(2 x) + 1)."""
    for quiet in ("PYKEOPS_VERBOSE", "KEOPS_VERBOSE"):  # it prints to where the table goes
        os.environ.setdefault(quiet, "0")
    try:
        from pykeops.torch import LazyTensor
    except ImportError:
        raise MissingPeerError("not installed: pip install pykeops") from None
    lanes = problem.shape.heads
    query, key, value = (tensors[name].detach()[0] for name in ("query", "key", "value"))
    weight = LazyTensor(tensors["weight"].detach().view(lanes, 1, 1, -1).contiguous())

    def call() -> Tensor:
        total = LazyTensor(query[:, :, None, :]) + LazyTensor(key[:, None, :, :])
        if activation == "tanh":
            active = 1 - 2 / ((2 * total).exp() + 1)
        else:
            active = 0.2 * total + 0.8 * total.relu()
        logits = (weight * active).sum(-1)
        options = {"axis": 2, "backend": "CPU"}
        output: Tensor = logits.sumsoftmaxweight(LazyTensor(value[:, None, :, :]), **options)
        return output[None]

    return Prepared(call)


def looked_eagerly(problem: Problem, tensors: Tensors) -> Prepared:
    """Eager torch: the weights of some rows at a time."""
    options: dict[str, Call] = {
        f"{rows}-row chunks": partial(looked_in_rows, tensors["query"], tensors["key"], rows)
        for rows in (256, 512, 1024)
    }
    return fastest(problem, tensors, options)


def _best_chunk(
    problem: Problem, tensors: Tensors, run: Callable[..., Tensor], sizes: tuple[int, ...]
) -> Prepared:
    """The fastest number of query rows at a time."""

    def chunked(rows: int) -> Tensor:
        rest = tensors["key"], tensors["value"], tensors["weight"]
        pieces = tensors["query"].split(rows, -2)
        return torch.cat([run(piece, *rest) for piece in pieces], -2)

    return fastest(
        problem, tensors, {f"{rows}-row chunks": partial(chunked, rows) for rows in sizes}
    )
