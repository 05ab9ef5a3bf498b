"""What is said when an input cannot work: every check of shape, dtype and device, in one place.

A message says what was asked, what was given, and what would work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "DeviceError",
    "DtypeError",
    "FormError",
    "MissingPackageError",
    "RegardError",
    "ShapeError",
]


T = TypeVar("T")


class RegardError(Exception):
    """The base of every error that `regard` raises on purpose."""


class ShapeError(RegardError, ValueError):
    """Shapes, lengths, widths or indices that do not fit together."""


class DtypeError(RegardError, TypeError):
    """A tensor or an argument of a kind that cannot be used here."""


class DeviceError(RegardError, ValueError):
    """Tensors that live on different devices, or on one that has no numbers."""


class FormError(RegardError, ValueError):
    """A form was asked for what it cannot compute exactly."""


class MissingPackageError(RegardError, ImportError):
    """An optional package is not installed; the message names the command that installs it.

    >>> str(MissingPackageError("transformers", extra="look"))
    'this needs the package transformers, which is not installed: pip install "regard[look]"'
    """

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(
            f"this needs the package {package}, which is not installed: "
            f'pip install "regard[{extra}]"'
        )


def show(shape: Sequence[int]) -> str:
    """A shape as people write it.

    >>> show(torch.Size([2, 8, 5, 64]))
    '(2, 8, 5, 64)'
    """
    return str(tuple(shape))


def check_number(
    name: str, number: object, *, whole: bool = False, least: float | None = None
) -> None:
    """Raise unless `number` is a plain number: a whole one, and not below `least`, if so asked.

    >>> check_number("topk's k", 2.5, whole=True)
    Traceback (most recent call last):
    regard.errors.DtypeError: topk's k must be a whole number, not 2.5.
    """
    # Of any library, such as numpy's, and lengths that torch.export has not fixed.
    kind = (Integral, torch.SymInt) if whole else (Real, torch.SymInt, torch.SymFloat)
    if isinstance(number, bool) or not isinstance(number, kind):
        wanted = "a whole number" if whole else "a number"
        raise DtypeError(f"{name} must be {wanted}, not {number!r}.")
    if least is not None and not float(number) >= least:
        raise ValueError(f"{name} must be at least {least}, not {number!r}.")


def check_scale(name: str, scale: object) -> None:
    """Raise unless a scale is a number or a floating point tensor that fits [*batch, heads]."""
    if isinstance(scale, Tensor):
        check_tensor(name, scale, shape="[heads]", dims=0)
    else:
        check_number(name, scale)


OPERAND = "[*batch, heads, length, width], or [length, width] for a single head"


def check_tensor(name: str, tensor: object, *, shape: str = OPERAND, dims: int = 2) -> None:
    """Raise unless `tensor` is a floating point tensor with at least `dims` axes."""
    if not isinstance(tensor, Tensor):
        raise DtypeError(
            f"{name} must be a torch.Tensor, not {type(tensor).__name__}; "
            "torch.as_tensor(...) makes one."
        )
    if not tensor.is_floating_point():
        raise DtypeError(
            f"{name} has dtype {tensor.dtype}; attention needs a floating point dtype: "
            ".float() makes one."
        )
    if tensor.dim() < dims:
        raise ShapeError(f"{name} has shape {show(tensor.shape)}; it must be {shape}.")


def are_alike(query: object, key: object) -> bool:
    """Whether two operands agree in all that they may differ in, so that no check can fail."""
    return (
        type(query) is Tensor
        and type(key) is Tensor
        and query.dim() >= 2
        and (query.shape == key.shape or query.shape[:-2] == key.shape[:-2])  # cutting costs more
        and query.is_floating_point()
        and query.dtype == key.dtype
        and query.device == key.device
    )


def check_bool(what: str, keep: object) -> None:
    """Raise unless a mask is a bool tensor."""
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        given = f"dtype {keep.dtype}" if isinstance(keep, Tensor) else type(keep).__name__
        raise DtypeError(
            f"{what} takes a bool tensor, True = may attend, not {given}; a 0/1 mask converts with "
            ".bool(), and a float mask that is added to the scores is position=Bias(tensor)."
        )


def check_integers(what: str, tensor: object) -> None:
    """Raise unless `tensor` is a tensor of integers."""
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex():
        given = f"dtype {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DtypeError(f"{what} takes a tensor of integers, not {given}; use .long().")


def check_length(what: str, tensor: Tensor, length: int, of: str) -> None:
    """Raise unless the last axis of a tensor about tokens is as long as the rows or keys."""
    if not tensor.dim() or tensor.shape[-1] != length:
        raise ShapeError(
            f"{what} has shape {show(tensor.shape)}, but the matrix has {length} {of}; its last "
            f"axis must be {length}."
        )


def check_kind(name: str, given: Any, kind: type[T]) -> T:
    """Return a part if it is an instance of `kind`; raise, with a hint, if it is not."""
    if isinstance(given, kind) and not isinstance(given, type):
        return given
    hint = "; Dropout(0.1) makes one" if name == "dropout" else ""
    if isinstance(given, type):
        hint = f"; did you mean {given.__name__}(...), an instance"
    if isinstance(given, Tensor):
        hint = "; an added float tensor is position=Bias(tensor)"
        given = f"a tensor {show(given.shape)}"
    else:
        given = repr(given)
    wanted = f"a regard {kind.__name__}"
    if name == "score":
        wanted = "a regard Score, or a function of (query, key, i, j)"
    raise DtypeError(f"{name} must be {wanted}, not {given}{hint}.")


def check_pair(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors share dtype and device."""
    if tensor.dtype != other.dtype:
        raise DtypeError(
            f"{name} has dtype {tensor.dtype} but {other_name} has {other.dtype}; "
            f"convert one of them, for example {name}.to({other_name}.dtype)."
        )
    if tensor.device != other.device:
        raise DeviceError(
            f"{name} is on {tensor.device} but {other_name} is on {other.device}; "
            f"move one of them, for example {name}.to({other_name}.device)."
        )


def check_device(what: object, tensors: Iterable[Tensor], device: torch.device) -> None:
    """Raise unless every tensor of a part lives on `device`."""
    for tensor in tensors:
        if tensor.device != device:
            raise DeviceError(
                f"{what} holds a tensor on {tensor.device} but query is on {device}; "
                f"build it with tensors moved by .to({str(device)!r})."
            )


def check_numbers(device: torch.device) -> None:
    """Raise on the meta device, whose tensors have a shape and no numbers."""
    if device.type == "meta":
        raise DeviceError(
            "query and key are on the meta device, which has shapes and no numbers; tiles and the "
            "runs of masks are made of numbers. What works: .to_empty(device=...) and weights, or "
            "for shapes alone torch.compile and torch.export, whose fake tensors have a device."
        )


def is_mapped(tensor: Tensor) -> bool:
    """Whether torch.vmap hides an axis of a tensor."""
    kinds = torch._C._functorch
    while kinds.is_functorch_wrapped_tensor(tensor):
        if kinds.is_batchedtensor(tensor):
            return True
        tensor = kinds.get_unwrapped(tensor)
    return False


def check_unmapped(mask: object, tensors: Iterable[Tensor]) -> None:
    """Raise FormError for a mask of which torch.vmap hides an axis."""
    if any(map(is_mapped, tensors)):
        raise FormError(
            f"torch.vmap maps {mask}, whose visible keys are read from its numbers, which differ. "
            "What works: query, key, value and mask with the mapped axis as a batch axis, without "
            "torch.vmap; or torch.vmap with in_dims=None for the mask."
        )


def check_width(query: Tensor, key: Tensor, score: object) -> None:
    """Raise unless query and key vectors have the same width."""
    if query.shape[-1] != key.shape[-1]:
        raise ShapeError(
            f"{score} compares vectors of one width, but query has width {query.shape[-1]} and "
            f"key has width {key.shape[-1]}; project one of them, or use Bilinear, whose weight "
            "maps between two widths."
        )


def broadcast_batch(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """The batch and head axes of the matrix; raise where they do not fit.

    Heads are axis -3. Fewer key heads than query heads are groups: query head h reads key head
    h // (heads / key heads).
    """
    heads, key_heads = heads_of(query), heads_of(key)
    if not (groups(heads, key_heads) and heads >= key_heads) and heads != 1:
        raise ShapeError(
            f"query has {heads} heads and key has {key_heads}; the number of query heads must be "
            "a multiple of the number of key heads (grouped-query attention). "
            f"query {show(query.shape)}, key {show(key.shape)}; heads are axis -3."
        )
    try:
        batch = broadcast(query.shape[:-3], key.shape[:-3])
    except RuntimeError:
        raise ShapeError(
            f"the batch axes of query {show(query.shape)} and key {show(key.shape)} do not "
            "broadcast; all axes before [heads, length, width] must be equal or 1."
        ) from None
    if query.dim() < 3 and key.dim() < 3:
        return ()
    return (*batch, max(heads, key_heads))


def check_product(name: str, shape: Sequence[int], x: Tensor, query: Tensor, heads: int) -> None:
    """Raise unless a matrix of `shape` with this query can be multiplied with x, see below."""
    check_tensor(name, x)
    check_pair(name, x, "query", query)
    check_factor(name, shape, x, heads)


def check_factor(name: str, shape: Sequence[int], x: Tensor, key_heads: int) -> None:
    """Raise unless a matrix of `shape` can be multiplied with x [*batch, key_heads, length, any].

    x may also have all of the matrix's heads, or one for all of them.
    """
    length = shape[-1]
    if x.shape[-2] != length:
        raise ShapeError(
            f"the matrix has shape {show(shape)}, so {name} must have length {length} on axis -2, "
            f"but it has shape {show(x.shape)}."
        )
    heads, total = heads_of(x), shape[-3] if len(shape) > 2 else 1
    if total != 1 and not any(heads == fit for fit in (1, key_heads, total)):
        wanted = sorted({1, key_heads, total})
        raise ShapeError(
            f"{name} has {heads} heads (axis -3 of {show(x.shape)}), but the matrix has {total}; "
            f"{name} must have {' or '.join(map(str, wanted))}."
        )
    try:
        broadcast(x.shape[:-3], shape[:-3])
    except RuntimeError:
        raise ShapeError(
            f"the batch axes of {name} {show(x.shape)} do not broadcast against the matrix "
            f"{show(shape)}."
        ) from None


def common_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of several that are known to broadcast; torch's own takes as long as a step.

    >>> common_shape([(2, 1), (), (3, 1, 5)])
    (3, 2, 5)
    """
    longest = max(map(len, shapes))
    whole = [(1,) * (longest - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((size for size in axis if size != 1), 1) for axis in zip(*whole, strict=True))


def broadcast(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """`torch.broadcast_shapes` of two shapes, whose 30 us matter where a matrix is small."""
    return tuple(one) if one == other else tuple(torch.broadcast_shapes(one, other))


def fits(given: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a shape broadcasts to another without enlarging it.

    >>> fits((3, 1), (2, 3, 4)), fits((2, 3, 4), (3, 4))
    (True, False)
    """
    missing = len(wanted) - len(given)
    # In `g in (1, w)` torch.compile takes a length that it does not know for another number.
    pairs = zip(given, wanted[missing:], strict=True)
    return missing >= 0 and all(g == 1 or g == w for g, w in pairs)  # noqa: PLR1714


def check_fits(what: object, given: Sequence[int], batch: Sequence[int]) -> None:
    """Raise unless axes `given` broadcast to the matrix's [*batch, heads] without enlarging it."""
    if not fits(given, batch):
        raise ShapeError(
            f"{what} has batch and head axes {show(given)}, but the matrix has {show(batch)} "
            "([*batch, heads]); each must be equal or 1. Masks about tokens (Padding, Documents, "
            "Prefix) take [*batch, length] and add the head axis themselves."
        )


def groups(heads: int, key_heads: int) -> bool:
    """Whether `heads` query heads can share `key_heads` key heads in equal groups."""
    return heads == key_heads or (key_heads > 0 and heads % key_heads == 0)


def heads_of(tensor: Tensor) -> int:
    """Heads are axis -3; a tensor without that axis is one head."""
    return tensor.shape[-3] if tensor.dim() > 2 else 1
