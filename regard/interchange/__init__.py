"""Matrices and parts as files of numbers and words, which run nothing: safetensors.

The tensors stand under the path of the field that holds them (`query`, `position.slopes`), and the
file's metadata has three texts:

    format     "regard"
    version    "1"
    structure  what the parts are, in JSON

    null, true, 3, 0.5, "halves"                  themselves
    {"number": "-inf"}                            what JSON cannot write: inf, -inf, nan
    [1, 2]                                        a tuple
    {"tensor": name, "shape": .., "trains": ..}   a tensor of the file; expanded; with gradients
    {"function": "torch.exp"}                     a function of those in `functions()`
    {"part": "Alibi", "fields": {..}}             a part of regard, by its class and fields

Reading builds the parts by their own constructors, which check what they are given, and each field
is held to its annotation: names that are not regard's mean nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from regard import errors
from regard.interchange.names import FileError
from regard.interchange.reading import Reading
from regard.interchange.words import Words
from regard.matrix import Attention
from regard.part import Part

__all__ = ["VERSION", "FileError", "load", "save"]

VERSION = 1


def save(item: Attention | Part, path: str | os.PathLike[str]) -> None:
    """Write a matrix or a part to a file; see `Attention.save`."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise errors.MissingPackageError("safetensors", extra="save") from error
    words = Words()
    structure = words.matrix(item) if isinstance(item, Attention) else words.of("", item)
    metadata = {"format": "regard", "version": str(VERSION), "structure": json.dumps(structure)}
    # Beside the file and then in its place: its tensors may be read from the file it replaces.
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a directory; {path.name} needs one.")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(words.tensors, beside, metadata=metadata)
        beside.replace(path)
    except (SafetensorError, KeyError, TypeError) as error:
        dtypes = sorted({str(tensor.dtype) for tensor in words.tensors.values()})
        raise FileError(f"{path} could not be written with {', '.join(dtypes)}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Any:
    """Read what `A.save(path)` or `part.save(path)` wrote: an `Attention`, or the part.

    Numbers, dtypes, and which tensors require gradients are those that were saved; tensors that
    were one are one, and expanded ones take no more memory than before. Nothing in a file is run.

    device: where its tensors are put
    Raises MissingPackageError without safetensors, OSError where there is no file, and
    `regard.interchange.FileError` for a file that regard did not write, or not like this.

    >>> import tempfile
    >>> from regard import Alibi
    >>> path = Path(tempfile.mkdtemp()) / "alibi.safetensors"
    >>> Alibi.of(2).save(path)
    >>> load(path), load(path).slopes
    (Alibi(tensor(2)), tensor([0.0625, 0.0039]))
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise errors.MissingPackageError("safetensors", extra="save") from error
    if not Path(path).is_file():
        state = "is a directory" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {state}; A.save(path) writes what regard.load reads.")
    try:
        with safe_open(path, framework="pt", device=str(torch.device(device))) as archive:
            names = list(archive.keys())
            structure = _structure(path, archive.metadata() or {}, names)
            tensors = {name: archive.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise FileError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        return Reading(tensors).item(structure)
    except (errors.RegardError, ValueError, TypeError, RuntimeError) as error:
        raise FileError(f"{path} holds what regard does not accept: {error}") from error


def _structure(path: object, metadata: Mapping[str, str], names: Sequence[str]) -> Any:
    """What a file says it is, if regard wrote it and this regard knows how to read it."""
    if metadata.get("format") != "regard":
        held = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise FileError(
            f"{path} was not written by regard: it has tensors ({held or 'none'}), but no word of "
            "what they are. Query and key make a matrix by regard.attention(query, key, ...); "
            "safetensors.torch.load_file reads the tensors."
        )
    version = metadata.get("version", "")
    if not version.isdecimal():
        raise FileError(f"{path} has the version {version!r}, which is no number.")
    if int(version) > VERSION:
        raise FileError(
            f"{path} was written in version {version} of the format; this regard reads versions up "
            f"to {VERSION}. A newer regard reads it: pip install --upgrade regard"
        )
    try:
        return json.loads(metadata["structure"])
    except (KeyError, ValueError, RecursionError) as error:
        raise FileError(f"{path} has no readable structure: {error!r}") from error
