"""A part inside a module: its tensors become parameters and buffers."""

from __future__ import annotations

from dataclasses import fields

from torch import nn

from regard.part import Part


class Learnable(nn.Module):
    """Hold a part, so that a layer can train it, move it and save it.

    Tensors of the part that require gradients become parameters, the others buffers; the names are
    those of the part's fields. A module that is a field, such as the map of `Features`, becomes a
    child. Calling the module gives the part on its present tensors and children.

    >>> import torch
    >>> from regard import Additive, Alibi
    >>> [name for name, _ in Learnable(Additive.of(8, 64)).named_parameters()]
    ['weight']
    >>> [name for name, _ in Learnable(Alibi.of(8)).named_buffers()]
    ['slopes']
    >>> Learnable(Alibi.of(8))()
    Alibi(tensor(8))
    """

    def __init__(self, part: Part) -> None:
        super().__init__()
        self._names = []
        for path, tensor in part.named_tensors():
            name = path.replace(".", "_")
            self._names.append(name)
            if tensor.requires_grad:
                self.register_parameter(name, nn.Parameter(tensor.detach().clone()))
            else:
                self.register_buffer(name, tensor.clone())
        for field in fields(part):  # type: ignore[arg-type]
            item = getattr(part, field.name)
            if isinstance(item, nn.Module):
                self.add_module(field.name, item)
        # Only the shapes are kept of the part's own tensors: the module's are the ones that count.
        self._part = part.with_tensors([tensor.detach().to("meta") for tensor in part.tensors()])

    def forward(self) -> Part:
        """The part on the module's present tensors and children."""
        part = self._part.with_tensors([getattr(self, name) for name in self._names])
        for name, child in self.named_children():
            object.__setattr__(part, name, child)  # of a copy that nobody else has
        return part

    def extra_repr(self) -> str:
        """The part's own repr."""
        return repr(self._part)
