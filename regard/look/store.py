"""Typed arrays as text inside a page: bytes of one place together, deflated, two signs per 13 bits.

Halves of floats compress when all their high bytes stand together (most exponents are alike).
Thirteen bits in two of 91 signs are basE91 (Henke 2006): 1.23 signs per byte, base64 has 1.33.
"""

from __future__ import annotations

import ctypes
import hashlib
import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Printable, and none that JSON or HTML give a meaning to: not the quote, backslash or less-than.
SIGNS = bytes(x for x in range(33, 127) if chr(x) not in '"\\<')
_GROUP = 13  # bytes, in eight numbers of 13 bits


@dataclass
class Store:
    """The arrays of a page; equal arrays (a mask shared by all layers) are kept once.

    arrays: of each its kind, how many bytes its deflated form has, and the text
    """

    arrays: list[dict[str, str | int]] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)

    def add(self, tensor: Tensor | None) -> int | None:
        """The index of a tensor in the page, or None for None."""
        if tensor is None:
            return None
        kinds = {torch.float32: "f4", torch.float16: "f2", torch.int32: "i4", torch.uint8: "u1"}
        kind = kinds[tensor.dtype]
        raw = _bytes(tensor)
        digest = hashlib.sha256(kind.encode() + raw).hexdigest()
        if digest not in self.known:
            self.known[digest] = len(self.arrays)
            width = tensor.element_size()
            packed = zlib.compress(b"".join(raw[at::width] for at in range(width)), 6)
            self.arrays.append({"type": kind, "bytes": len(packed), "data": written(packed)})
        return self.known[digest]


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous()
    # Not tensor.numpy(): torch may be installed without NumPy.
    return ctypes.string_at(flat.data_ptr(), flat.numel() * flat.itemsize) if flat.numel() else b""


def written(data: bytes) -> str:
    """Bytes as text, 16 signs for every 13 bytes; the last group is filled with zeros.

    >>> written(bytes(13)), len(written(bytes(14)))
    ('!!!!!!!!!!!!!!!!', 32)
    """
    if not data:
        return ""
    groups = -(-len(data) // _GROUP)
    padded = bytearray(data) + bytearray(_GROUP * groups - len(data) + 2)
    flat = torch.frombuffer(padded, dtype=torch.uint8)
    signs = torch.tensor(list(SIGNS), dtype=torch.uint8)
    text = torch.zeros(groups, 16, dtype=torch.uint8)
    places = _GROUP * torch.arange(groups)
    for number in range(8):
        start, shift = divmod(_GROUP * number, 8)
        three = [flat[places + start + at].int() << (8 * at) for at in range(3)]
        value = ((three[0] | three[1] | three[2]) >> shift) & 8191
        text[:, 2 * number] = signs[value // len(SIGNS)]
        text[:, 2 * number + 1] = signs[value % len(SIGNS)]
    return _bytes(text).decode("ascii")
