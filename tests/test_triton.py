"""The recurrence's kernels for GPUs: their laws in Triton's interpreter, and that they compile.

The laws are in `triton_laws.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard import Causal, Features, Identity, MissingPackageError, attention
from regard.form import chunks_gpu

LAWS = Path(__file__).parent / "triton_laws.py"


def laws_hold(**environment):
    """Every law, and none of them skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(LAWS)],
        env=os.environ | environment,
        cwd=LAWS.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed in", done.stdout), done.stdout


def test_the_laws_hold_in_the_interpreter():
    pytest.importorskip("triton", reason="the package triton is not installed")
    laws_hold(TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; interpreted instead")
def test_the_laws_hold_on_a_gpu():
    laws_hold(TRITON_INTERPRET="0")


@pytest.mark.parametrize("decayed", [True, False])
@pytest.mark.parametrize("name", ["_carry", "_read", "_decays"])
def test_kernels_compile_for_a_gpu_that_is_not_here(name, decayed):
    """The interpreter takes more than the compiler does."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from regard.kernel import chunks_triton

    if name == "_decays" and not decayed:
        return
    kernel = getattr(chunks_triton, name)
    fixed = {"READERS": 2, "SHARE": 1, "REVERSE": not decayed, "TURNED": not decayed}
    fixed |= {"C": 16, "D": 16, "E": 16, "PRECISION": "ieee"}
    fixed |= {} if decayed else {"decay": None}
    constants = {key: fixed[key] for key in kernel.arg_names if key in fixed}
    signature = {
        key: "constexpr" if key in constants else "i32" if key in ("n", "d", "e") else "*fp32"
        for key in kernel.arg_names
    }
    done = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
    assert done.asm["cubin"]


def test_without_triton_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(chunks_gpu, "lacks", lambda device, **facts: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "regard.kernel.chunks_triton", raising=False)
    x = torch.randn(20, 4)
    A = attention(x, x, score=Features(), mask=Causal(), normalizer=Identity())
    with pytest.raises(MissingPackageError, match=r"regard\[gpu\]"):
        A.matmul(x, form="recurrent")


def test_on_a_cpu_nothing_of_it_is_said():
    x = torch.randn(300, 4)
    A = attention(x, x, score=Features(), mask=Causal(), normalizer=Identity())
    assert "Triton" not in A.explain(x).kernel
