"""Products that have first derivatives only, and say so where more is asked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from regard import errors


class FirstOrder(torch.autograd.Function):
    """Base of products that recompute tiles: no forward mode, no vmap, no second derivatives."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise errors.FormError(
            "form 'tiled' cannot be mapped by torch.vmap; give query, key and value the mapped "
            "axis as a batch axis, over which attention broadcasts."
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise errors.FormError(
            "form 'tiled' has no forward-mode derivatives; A.matmul(value, form='dense') has."
        )


def check_transforms() -> None:
    """Raise FormError inside torch.func transforms."""
    if torch._C._are_functorch_transforms_active():
        raise errors.FormError(
            "form 'tiled' has no gradients inside torch.func transforms; use "
            "torch.autograd.grad or .backward(), or A.matmul(value, form='dense')."
        )


def once(gradients: Iterable[Tensor | None], *depends_on: Tensor) -> list[Tensor | None]:
    """The gradients; under create_graph=True they raise where they are differentiated again."""
    if not torch.is_grad_enabled():
        return list(gradients)
    apply: Any = _Once.apply
    return [g if g is None else apply(g, *depends_on) for g in gradients]


class _Once(torch.autograd.Function):
    """A gradient that may be part of a graph, as create_graph=True asks, but has no gradient."""

    @staticmethod
    def forward(gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *from_above: Tensor) -> Any:
        raise errors.FormError(
            "this form has first derivatives only; multiply with "
            "A.matmul(value, form='dense') to differentiate twice."
        )
