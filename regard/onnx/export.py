"""From a layer to an ONNX program, by way of torch's own exporter."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard import errors
from regard.onnx.product import OPSET
from regard.opaque import FOR_ONNX


class _Tensors(nn.Module):
    """A module as a function of tensors to tensors: what else goes in is fixed, or left out."""

    def __init__(self, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self.kwargs = module, dict(kwargs)

    def forward(self, *inputs: Tensor) -> Any:
        """The tensors among the module's results, without the lazy matrices."""
        found = self.module(*inputs, **self.kwargs)
        if not isinstance(found, tuple):
            return found
        tensors = tuple(item for item in found if isinstance(item, Tensor))
        return tensors[0] if len(tensors) == 1 else tensors


def export(
    module: nn.Module,
    inputs: Sequence[Tensor],
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    axes: Sequence[Mapping[int, str]] | None = None,
    opset_version: int = OPSET,
) -> torch.onnx.ONNXProgram:
    """Write a module whose attention is regard's as an ONNX program; see `regard.onnx`.

    inputs: example tensors, in the order of the module's arguments; they become inputs of the graph
    path: where the program is saved; default not at all
    kwargs: further arguments, which become part of the graph, such as mask=Causal()
    axes: for each input its axes that may vary, by name, such as ({0: "batch", 1: "length"},); one
        name is one length
    opset_version: at least 23, the first with the operator `Attention`
    Lazy matrices among the results are left out.
    Raises MissingPackageError without onnx and onnxscript, FormError for what has no ONNX graph,
    ValueError for an older opset.

        >>> from regard import Causal
        >>> from regard.nn import SelfAttention
        >>> layer, x = SelfAttention(64, 8).eval(), torch.randn(2, 10, 64)
        >>> program = export(layer, (x,), kwargs={"mask": Causal()})  # doctest: +SKIP
        >>> program.save("layer.onnx")  # doctest: +SKIP
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise errors.MissingPackageError(package, extra="onnx")
    if opset_version < OPSET:
        raise ValueError(
            f"opset {opset_version} has no operator Attention; {OPSET} is the first that has it."
        )
    shapes = None if axes is None else (_dims(axes, inputs),)
    token = FOR_ONNX.set(True)
    try:  # not strict: Python runs, so that an error says what it says
        program = torch.export.export(
            _Tensors(module, kwargs or {}),
            tuple(inputs),
            dynamic_shapes=shapes,
            strict=False,
        )
    finally:
        FOR_ONNX.reset(token)
    names = [*inspect.signature(module.forward).parameters][: len(inputs)]
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset_version,
        input_names=names,
        dynamic_shapes=shapes,  # already fixed; only for the names of axes
        verbose=False,
    )
    assert made is not None  # None is what the older exporter returns
    if path is not None:
        made.save(path)
    return made


def _dims(axes: Sequence[Mapping[int, str]], inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Names as torch.export takes them: the same object for the same name."""
    for given, x in zip(axes, inputs, strict=True):
        for axis, name in given.items():
            if x.shape[axis] < 2:
                raise errors.ShapeError(
                    f"the axis {name!r} may vary, but its example has length {x.shape[axis]}, "
                    "which torch.export takes for the only one; give an example of 2 or more."
                )
    known = {name: torch.export.Dim(name) for given in axes for name in given.values()}
    return tuple({axis: known[name] for axis, name in given.items()} for given in axes)
