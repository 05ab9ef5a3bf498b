"""Functions that torch.compile leaves alone: its graph breaks there, and they run as they are."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from regard import errors

P = ParamSpec("P")
R = TypeVar("R")


def opaque(
    function: Callable[P, R], instead: Callable[..., Callable[..., R] | None] | None = None
) -> Callable[P, R]:
    """Keep torch.compile out of a function and of all that it calls.

    `torch.compiler.disable` does that, but applying it at import would load the compiler, which
    takes as long as loading torch; so it is applied on the first call that is being compiled.
    instead: of the same arguments, says what a graph takes in the function's place, or None

    >>> opaque(abs)(-2)
    2
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            followed = None if instead is None else instead(*args, **kwargs)
            if followed is not None:
                return followed(*args, **kwargs)
            if is_for_onnx():  # torch.export would run it once, for the lengths of the example
                raise errors.FormError(
                    f"an ONNX graph holds products of regard's own parts; {function.__name__!r} of "
                    "these arguments looks at weights, keeps a state, or has a function of your "
                    "own, and runs outside of graphs."
                )
            torch._dynamo.graph_break(
                msg=f"regard runs {function.__name__!r} of these arguments outside of graphs; "
                "fullgraph=True forbids that."
            )
        elif (
            instead is product_in_graph and torch._C._is_tracing() and kwargs.get("form") != "dense"
        ):
            raise errors.FormError(  # the numbers of the example, whatever the input
                "torch.jit.trace, and torch.onnx.export with dynamo=False, would record a product "
                "of regard as a constant. What works: torch.export.export, regard.onnx.export or "
                'torch.onnx.export(..., dynamo=True, opset_version=23); in a trace form="dense".'
            )
        # torch.compile gives up on some functions and runs them, but compiles what they call.
        elif (
            "torch._dynamo" not in sys.modules
            or not torch._C._dynamo.eval_frame.get_eval_frame_callback()
        ):
            return function(*args, **kwargs)
        apart: Callable[P, R] = torch.compiler.disable(function)
        return apart(*args, **kwargs)

    # torch.compile counts how often it has compiled a code, and here one stands for many functions.
    call.__code__ = call.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return call


def opaque_unless(
    instead: Callable[..., Callable[..., Any] | None],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`opaque`, unless there is something for a graph to take in the function's place.

    >>> opaque_unless(lambda number: abs)(abs)(-2)
    2
    """
    return lambda function: opaque(function, instead)


FOR_ONNX: ContextVar[bool] = ContextVar("FOR_ONNX", default=False)
"""Whether the graph being made is for `regard.onnx.export`."""


def is_for_onnx() -> bool:
    """Whether the graph being made is for ONNX; torch.compile, which cannot ask, makes none."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return FOR_ONNX.get() or torch.onnx.is_in_onnx_export()


def product_in_graph(factor: Factor, x: Tensor, *, form: str | None = None) -> Any:
    """What a graph takes in the place of `factor.matmul`: an operator of its own, or None."""
    if is_for_onnx():
        from regard import onnx

        return onnx.product
    from regard.form import in_graph

    return in_graph.instead(factor, form)


_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul)


class Factor:
    """A lazy matrix as a factor: `A @ x` and `x @ A` of tensors x."""

    if TYPE_CHECKING:

        @property
        def shape(self) -> torch.Size: ...
        @property
        def mT(self) -> Factor: ...
        def dense(self) -> Tensor: ...
        def matmul(self, x: Tensor, *, form: str | None = None) -> Tensor: ...

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Python sends `x @ A` and torch.matmul here, `A @ x` to A.

        torch.compile sends both here as one call with the same arguments. Where the lengths fit
        both, the graph breaks and Python tells them apart; where they fit one, it is that one.

        What torch.stack and torch.cat return can only be a tensor: of weights, up to the limit of
        `dense`. Everything else is refused.
        """
        if function in _PRODUCTS and len(args) == 2 and not kwargs:
            one, other = args
            if isinstance(one, Factor):
                return one.matmul(other)
            if function is Tensor.matmul and torch.compiler.is_dynamo_compiling():
                return _one_side(one, other)
            return other.__rmatmul__(one)
        if torch.compiler.is_compiling():
            return NotImplemented
        if function in (torch.stack, torch.cat):
            given = dict(kwargs or {})
            first, *rest = args or (given.pop("tensors"),)
            several = [x.dense() if isinstance(x, Factor) else x for x in first]
            return function(several, *rest, **given)
        raise TypeError(
            f"{getattr(function, '__name__', function)} takes tensors; a lazy matrix is none. "
            "A.dense() is one, of n x m numbers; A @ x, A.mT @ x and x @ A multiply without it."
        )

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """y_rj = sum_i x_ri weight_ij: (A.mT @ x.mT).mT."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x @ A takes a tensor x, not {type(x).__name__}.")
        rows, columns = self.shape[-2:]
        if x.dim() < 2 or x.shape[-1] != rows:
            raise errors.ShapeError(
                f"x @ A sums over the {rows} rows of A, a matrix of {rows} x {columns}, but x has "
                f"shape {errors.show(x.shape)}; it must be [*batch, heads, r, {rows}]. A @ x sums "
                "over columns."
            )
        return self.mT.matmul(x.mT).mT


def _one_side(x: Tensor, factor: Factor) -> Tensor:
    """`x @ factor` or `factor @ x`, whichever the lengths fit."""
    rows, columns = factor.shape[-2:]
    if x.dim() < 2 or x.shape[-1] != rows:
        return factor.matmul(x)
    if x.shape[-2] == columns:
        torch._dynamo.graph_break(
            msg="to torch.compile, x @ A and A @ x of these lengths look alike; A.matmul(x), or "
            "A.mT.matmul(x.mT).mT for x @ A, tells it which is meant."
        )
    return factor.__rmatmul__(x)
