"""Functions that torch.compile leaves alone: its graph breaks there, and they run as they are."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

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


class Factor:
    """A left factor of tensors for which torch.compile follows `A @ x`."""

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Python sends `A @ x` to A; torch.compile sends it here, with the factors exchanged.

        What torch.stack and torch.cat return can only be a tensor: of weights, up to the limit of
        `dense`. Everything else is refused, as is x @ A where nothing is compiled.
        """
        if torch.compiler.is_compiling():
            if function is operator.matmul and isinstance(args[0], cls):  # in torch.export
                return args[0].matmul(args[1])  # type: ignore[attr-defined]
            if function in (Tensor.matmul, Tensor.__matmul__) and isinstance(args[1], cls):
                return args[1].matmul(args[0])  # type: ignore[attr-defined]
            return NotImplemented
        if function in (torch.stack, torch.cat):
            given = dict(kwargs or {})
            first, *rest = args or (given.pop("tensors"),)
            several = [x.dense() if isinstance(x, Factor) else x for x in first]  # type: ignore[attr-defined]
            return function(several, *rest, **given)
        raise TypeError(f"{getattr(function, '__name__', function)} takes tensors; {_NO_TENSOR}")

    def __rmatmul__(self, x: Any) -> Any:
        """Refused: torch.compile cannot tell it from `A @ x`."""
        raise TypeError(f"x @ A would multiply tensors; {_NO_TENSOR}")


_NO_TENSOR = (
    "a lazy matrix is none. A.dense() is one, of n x m numbers; A @ x and A.mT @ x multiply "
    "without it, and (A.mT @ x.mT).mT is x @ A."
)
