"""What scores, positions, normalizers and dropout have in common: they are values.

A part is a frozen dataclass. Its tensors (learned or not) are plain fields, so a form can read
them all, cut them to one tile, and hand back gradients in the same places.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from regard import errors

Index = slice | Tensor
"""The rows or columns of a tile: a slice, or a tensor of positions."""


class Part:
    """A value made of numbers, tensors and other parts."""

    trailing: ClassVar[dict[str, int]] = {}
    """For each tensor field, how many last axes are not [*batch, heads]; 0 if not named."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor this part holds, in the order of its fields."""
        known: tuple[Tensor, ...] | None = self.__dict__.get("_tensors")
        if known is None:  # fields never change, so they are gone through once
            known = tuple(tensor for _, tensor in self.named_tensors())
            self.__dict__["_tensors"] = known
        return known

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every tensor with the path of the field that holds it, such as `parts.0.slopes`."""
        for name, item in self._items():
            if isinstance(item, Tensor):
                yield prefix + name, item
            elif isinstance(item, Part):
                yield from item.named_tensors(f"{prefix}{name}.")

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same part holding other tensors, given in the order of `tensors()`."""
        source = iter(tensors)
        return self._map(lambda owner, name, tensor: next(source))

    def narrow(self, batch: tuple[int, ...], index: tuple[Any, ...]) -> Self:
        """The part as it applies to the batch entries and heads that `index` picks."""

        def pick(owner: Part, name: str, tensor: Tensor) -> Tensor:
            return narrow(tensor, owner.trailing.get(name.partition(".")[0], 0), batch, index)

        return self._map(pick, lambda part: part.narrow(batch, index))

    def check_heads(self, batch: Sequence[int]) -> None:
        """Raise ShapeError where a tensor does not broadcast to the matrix's [*batch, heads]."""
        for name, item in self._items():
            if isinstance(item, Part):
                item.check_heads(batch)
            elif isinstance(item, Tensor):
                axes = item.dim() - self.trailing.get(name.partition(".")[0], 0)
                if not errors.fits(item.shape[:axes], batch):
                    errors.check_fits(f"{self!r}, in its {name},", item.shape[:axes], batch)

    def cut(self, rows: Index, columns: Index) -> Self:
        """The part as one tile needs it: views of its tensors, so that gradients add up in place.

        Most tensors do not belong to single rows or columns and stay whole.
        """
        return self._map(lambda owner, name, tensor: tensor, lambda part: part.cut(rows, columns))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the part to a safetensors file, from which `regard.load(path)` makes it again.

        Raises FileError for what no file can hold, see `Attention.save`.
        """
        from regard import interchange

        interchange.save(self, path)

    def _items(self) -> Iterator[tuple[str, Any]]:
        for field in fields(self):  # type: ignore[arg-type]
            item = getattr(self, field.name)
            if isinstance(item, tuple):
                yield from ((f"{field.name}.{k}", entry) for k, entry in enumerate(item))
            else:
                yield field.name, item

    def _map(
        self,
        change: Callable[[Part, str, Tensor], Tensor],
        descend: Callable[[Part], Part] | None = None,
    ) -> Self:
        def apply(name: str, item: Any) -> Any:
            if isinstance(item, Tensor):
                return change(self, name, item)
            if isinstance(item, Part):
                return descend(item) if descend else item._map(change)
            return item

        # A copy skips __post_init__: what was valid stays valid, and tiles are many.
        twin = copy.copy(self)
        twin.__dict__.pop("_tensors", None)
        for field in fields(self):  # type: ignore[arg-type]
            item = getattr(self, field.name)
            if isinstance(item, tuple):
                item = tuple(apply(f"{field.name}.{k}", entry) for k, entry in enumerate(item))
            else:
                item = apply(field.name, item)
            object.__setattr__(twin, field.name, item)
        return twin

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):  # type: ignore[arg-type]
            item = getattr(self, field.name)
            if field.default is MISSING and field.default_factory is MISSING:
                shown.append(describe(item))
            elif not _is_default(item, field.default):
                shown.append(f"{field.name}={describe(item)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def describe(item: object) -> str:
    """A field in a repr: tensors by their shape.

    >>> describe(torch.zeros(8, 64))
    'tensor(8, 64)'
    """
    if isinstance(item, Tensor):
        return f"tensor({', '.join(map(str, item.shape))})"
    if isinstance(item, tuple):
        return f"({', '.join(map(describe, item))})"
    return getattr(item, "__name__", None) or repr(item)


def narrow(tensor: Tensor, trailing: int, batch: tuple[int, ...], index: tuple[Any, ...]) -> Tensor:
    """Index the leading axes of a tensor that broadcasts against [*batch, *trailing axes].

    `index` has one entry for each axis of `batch`; an axis of size 1 stays as it is, or goes if
    the index is an integer.

    >>> narrow(torch.arange(4.0), 0, (2, 4), (0, slice(1, 3)))
    tensor([1., 2.])
    """
    missing = len(batch) + trailing - tensor.dim()
    tensor = tensor.reshape((1,) * max(missing, 0) + tuple(tensor.shape))
    picks = []
    for axis, pick in enumerate(index):
        shared = tensor.shape[axis] == 1 and batch[axis] != 1
        picks.append((0 if isinstance(pick, int) else slice(None)) if shared else pick)
    return tensor[tuple(picks)]


def per_head(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of [*batch, heads] made to multiply or add to [*batch, heads, rows, columns]."""
    return tensor.to(like.dtype)[..., None, None]


def _is_default(item: object, default: object) -> bool:
    if isinstance(item, Tensor) or isinstance(default, Tensor):
        return item is default
    return bool(type(item) is type(default) and item == default)


def positions(index: Index, length: int, device: torch.device) -> Tensor:
    """The positions that an index picks, as a tensor of int64.

    >>> positions(slice(2, 5), 10, torch.device("cpu"))
    tensor([2, 3, 4])
    """
    if isinstance(index, Tensor):
        return index
    return torch.arange(*index.indices(length), device=device)


def widest(device: torch.device) -> torch.dtype:
    """The most exact dtype of a device, for few numbers on which many depend."""
    return torch.float32 if device.type == "mps" else torch.float64
