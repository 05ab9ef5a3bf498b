"""The compiled extension: whether it is here, which instruction set it uses, and why not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

log = logging.getLogger("regard")


@cache
def load() -> ModuleType | None:
    """Return the extension, or None; a missing one is logged once.

    torch is imported before it, so that both use one OpenMP pool.
    """
    import torch  # noqa: F401

    try:
        module = import_module("regard.kernel._cpu")
    except ImportError as error:
        log.warning("%s %s", missing(), f"({error})")
        return None
    return module


def missing() -> str:
    """What to say where the extension is not there."""
    tree = Path(__file__).parents[2]
    if (tree / "CMakeLists.txt").exists():
        # Python looks into the current folder first, whatever is installed.
        remedy = (
            f"this regard is the source tree {tree}; run from another folder to use the installed "
            "one, or build the kernels here: pip install -e ."
        )
    else:
        remedy = "installing regard again where there is a C++20 compiler builds them."
    return (
        "regard's compiled kernels are not installed, so attention runs in plain PyTorch, several "
        f"times slower; {remedy}"
    )


@contextmanager
def instruction_set(name: str, *, pairs: bool | None = None) -> Iterator[None]:
    """Run the kernels of one instruction set: "avx512_bf16", "avx512", "avx2" or "base"; for tests.

    pairs: whether bfloat16 is multiplied in pairs; by default where that is faster.
    Raises ValueError for an instruction set that this machine does not run.
    """
    extension = load()
    if extension is None:
        raise ValueError(missing())
    before = extension.isa()
    extension.select_isa(name)
    extension.select_pairs(pairs)
    try:
        yield
    finally:
        extension.select_isa(before)
        extension.select_pairs(None)
