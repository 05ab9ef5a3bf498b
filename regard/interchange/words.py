"""From matrices and parts to tensors with names, and words that say what they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from regard.custom import Custom
from regard.interchange.names import FileError, functions, is_known, kinds
from regard.mask import Compiled
from regard.matrix import Attention
from regard.part import Part


@dataclass(frozen=True)
class Words:
    """What is saved, as words, and the tensors that the words name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    storages: set[int] = field(default_factory=set)

    def matrix(self, matrix: Attention) -> dict[str, Any]:
        """A matrix; a mask that is not regard's as its runs, which say all about it."""
        mask = matrix.mask
        if mask is not None and not is_known(mask):
            mask = Compiled(matrix.runs, repr(mask))  # type: ignore[arg-type]
        held = {
            "query": matrix.query, "key": matrix.key, "score": matrix.score,
            "position": matrix.position, "mask": mask, "normalizer": matrix.normalizer,
            "dropout": matrix.dropout, "lanes": matrix.given_lanes,
        }  # fmt: skip
        return {"part": "Attention", "fields": {k: self.of(k, v) for k, v in held.items()}}

    def of(self, path: str, item: Any) -> Any:
        """Words for anything that a part may hold."""
        words: Any
        if item is None or isinstance(item, (bool, str)):
            words = item
        elif isinstance(item, Tensor):
            words = self.tensor(path, item)
        elif isinstance(item, Integral):
            words = int(item)
        elif isinstance(item, Real):
            number = float(item)
            words = number if math.isfinite(number) else {"number": str(number)}
        elif isinstance(item, (tuple, list)):
            words = [self.of(f"{path}.{k}", entry) for k, entry in enumerate(item)]
        elif is_dataclass(item) and kinds().get(type(item).__name__) is type(item):
            lead = f"{path}." if path else ""
            held = {f.name: self.of(lead + f.name, getattr(item, f.name)) for f in fields(item)}
            words = {"part": type(item).__name__, "fields": held}
        else:
            words = self.function(item)
        return words

    def function(self, item: Any) -> dict[str, str]:
        """A function by its name; FileError for what a file cannot hold."""
        for name, known in functions().items():
            if item is known:
                return {"function": name}
        if isinstance(item, Custom):
            what = f"the score function {item!r}"
        elif isinstance(item, Part):
            what = f"{item!r}, a part of your own ({type(item).__module__}),"
        else:
            what = f"{_name(item)}, a map or value of your own,"
        raise FileError(
            f"{what} is code, and a file of numbers that runs nothing cannot hold it. What works: "
            "save query, key and the tensors it reads with safetensors.torch.save_file, and put "
            "the matrix together again with it. Functions that a file can name: "
            f"{', '.join(functions())}."
        )

    def tensor(self, path: str, item: Tensor) -> dict[str, Any]:
        """A tensor by its name; once, if it is met again."""
        if item.layout != torch.strided or item.device.type == "meta":
            raise FileError(
                f"{path} is a tensor without numbers of its own ({item.layout}, on {item.device}); "
                "only dense tensors of numbers can be saved."
            )
        key = (
            item.device, item.data_ptr(), item.dtype, item.shape, item.stride(), item.is_neg(),
            item.requires_grad,
        )  # fmt: skip
        if key not in self.names:
            compact = item.detach()
            for axis, (size, step) in enumerate(zip(item.shape, item.stride(), strict=True)):
                if step == 0 and size > 1:  # expanded: one number stands for all of them
                    compact = compact.narrow(axis, 0, 1)
            words: dict[str, Any] = {"tensor": path}
            if compact.shape != item.shape:
                words["shape"] = list(item.shape)
            if item.requires_grad:
                words["trains"] = True
            self.names[key] = words
            self.tensors[path] = self._alone(compact.resolve_neg().cpu().contiguous())
        return self.names[key]

    def _alone(self, numbers: Tensor) -> Tensor:
        """The numbers in memory that no other tensor of the file shares, as safetensors asks."""
        storage = numbers.untyped_storage()
        if storage.nbytes() != numbers.nbytes or storage.data_ptr() in self.storages:
            numbers = numbers.clone()
        self.storages.add(numbers.untyped_storage().data_ptr())
        return numbers


def _name(item: object) -> str:
    """How a message names a thing that has no name in a file."""
    return str(getattr(item, "__qualname__", None) or repr(item))
