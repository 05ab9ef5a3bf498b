"""The compiled kernels as guests of a process: instruction sets, threads, forks, memory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import laws
import pytest
import torch
from laws import Case, Sizes
from test_laws import LOW, assert_rounding

from regard import Causal, attention
from regard.kernel import extension

ROOT = Path(__file__).parent.parent
CPU = extension.load()
pytestmark = pytest.mark.skipif(CPU is None, reason="the compiled kernels are not installed")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ISAS = [] if CPU is None else CPU.isas()

SIZES = Sizes(batch=2, heads=4, key_heads=2, n=130, m=200, width=20, value_width=12)
CASES = [
    Case("dot softcap", "alibi", "causal", "sinks", SIZES, 1),
    Case("distance", "bias", "window", "sigmoid", SIZES, 2),
    Case("dot", "shaw", "causal", "softmax", SIZES, 7),
    Case("tanh", "alibi + row bias", "dense", "softmax", SIZES, 3),
    Case("leaky_relu", "none", "documents", "relu mean", SIZES, 4),
    Case("cosine", "bias", "padding", "softmax plus one", SIZES, 6),
    Case("bilinear", "transformer-xl", "window", "identity", SIZES, 8),
    Case("relu", "none", "causal window", "row sum", SIZES, 9),
]


@pytest.fixture(autouse=True)
def one_thread_again():
    yield
    torch.set_num_threads(1)


def fused(case: Case, threads: int = 1) -> dict[str, torch.Tensor]:
    """Output and gradients of a case, in float64."""
    matrix, value = case.build(torch.float64)
    torch.set_num_threads(threads)
    return laws.results(matrix, value, "fused")


def run(code: str, **environment: str) -> str:
    """What a fresh process prints; one that hangs is killed with its children, and fails."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the process hangs")
    assert process.returncode == 0, printed
    return printed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.score)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_numbers_of_dense(isa, case):
    wanted = laws.results(*case.build(torch.float64), "dense")
    with extension.instruction_set(isa):
        assert CPU.isa() == isa
        assert_rounding(fused(case), wanted, 1)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_rounds_at_most_twice_as_much_as_dense(isa, dtype):
    """Conversions differ by instruction set; pooled over cases, see test_laws."""
    found = allowed = 0.0
    for case in CASES[:4]:
        exact, low = case.build(torch.float64), case.build(dtype)
        for high, rounded in zip(laws.inputs(*exact), laws.inputs(*low), strict=True):
            high.data.copy_(rounded)
        reference = laws.results(*exact, "dense")
        with extension.instruction_set(isa):
            got = laws.results(*low, "fused")
        dense = laws.results(*low, "dense")
        for name in ("output", "gradient of query", "gradient of key", "gradient of value"):
            scale = torch.finfo(dtype).eps * float(reference[name].norm())
            found += (float((got[name] - reference[name]).norm()) / scale) ** 2 / 16
            allowed += (float((dense[name] - reference[name]).norm()) / scale) ** 2 / 16
    assert 0 < found**0.5 <= 2 * allowed**0.5 + 1


ATTEND = """
import torch, regard
x = torch.linspace(-1, 1, 2 * 300 * 8).reshape(2, 300, 8)
A = regard.attention(x, x)
"""


def test_the_environment_picks_the_instruction_set():
    show = "A @ x; print(regard.kernel.extension.load().isa())"
    assert run(ATTEND + show, REGARD_ISA=ISAS[-1]).split() == [ISAS[-1]]
    printed = run(
        ATTEND + "try:\n    A @ x\nexcept ValueError as error:\n    print(error)", REGARD_ISA="mmx"
    )
    assert printed.strip() == f"REGARD_ISA is 'mmx'; this machine runs: {', '.join(ISAS)}."


def test_an_instruction_set_is_picked_for_a_while():
    before = CPU.isa()
    with pytest.raises(ZeroDivisionError), extension.instruction_set(ISAS[-1]):
        raise ZeroDivisionError
    assert CPU.isa() == before
    with pytest.raises(ValueError, match=f"runs: {', '.join(ISAS)}"):
        extension.instruction_set("mmx").__enter__()
    assert CPU.isa() == before


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.score)
def test_threads_change_nothing_but_rounding(case, threads):
    """And at one number of threads the same bits come out every time."""
    first = fused(case, threads)
    again = fused(case, threads)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert_rounding(first, fused(case, 1), 1)


@LINUX
def test_threads_are_those_of_torch():
    """Counted in a process of its own: one pool, torch's, of as many threads as torch may use."""
    code = """
import os
def tasks():
    return len(os.listdir('/proc/self/task'))
torch.set_num_threads(1)
alone = tasks()
with torch.no_grad():
    A @ x
    print(tasks() - alone)
    torch.set_num_threads(3)
    A @ x
    print(tasks() - alone)
    torch.rand(10**6).exp()  # torch's own threads are the same
    print(tasks() - alone)
assert regard.kernel.extension.load().isa()
maps = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]}
print(len(maps), maps)
"""
    alone, three, shared, pools = run(ATTEND + code).splitlines()
    assert (alone, three, shared) == ("0", "2", "2")
    assert pools.startswith("1 "), pools


def test_python_threads_may_attend_at_once():
    wanted = [fused(case, 2) for case in CASES]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for got, alone in zip(pool.map(lambda c: fused(c, 2), CASES), wanted, strict=True):
                assert all(torch.equal(got[name], alone[name]) for name in alone)


@pytest.mark.parametrize("mask", [None, Causal(3000)], ids=["plain", "masked"])
def test_other_python_threads_go_on_meanwhile(mask):
    query, key, value = torch.randn(3, 4, 3000, 64, dtype=torch.float64).unbind(0)
    A = attention(query, key, mask=mask)
    worker = threading.Thread(target=lambda: A.matmul(value, form="fused"))
    worker.start()
    steps = 0
    while worker.is_alive():
        time.sleep(0.001)
        steps += 1
    assert steps > 20  # with Python's lock held it is a few, before and after


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_can_attend():
    """The child has none of the threads of the pool that its parent used."""
    code = """
import os, torch.utils.data
torch.set_num_threads(2)
with torch.no_grad():
    wanted = A @ x
def agrees():
    y = x.clone().requires_grad_()
    output = regard.attention(y, y).matmul(y, form='fused')
    output.sum().backward()
    return torch.allclose(output, wanted, atol=1e-6) and bool(y.grad.isfinite().all())
child = os.fork()
if not child:
    os._exit(not agrees())
assert os.waitpid(child, 0)[1] == 0
class Data(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, i): return agrees()
context = torch.multiprocessing.get_context('fork')
loader = torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context=context)
assert [bool(x) for x in loader] == [True, True]
assert agrees()
"""
    run(ATTEND + code)


LAYOUTS = {
    "heads inside": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "columns": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "every second row": lambda x: torch.stack([x, x], -2)[..., 0, :],
    "odd address": lambda x: torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape),
    "one batch entry": lambda x: x[:1].expand(x.shape),
    "one row": lambda x: x[..., :1, :].expand(x.shape),
    "one number": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("mask", ["none", "causal window"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, mask):
    """Inputs, and what comes from above in the backward pass, lie in memory in any way."""
    draw = laws.Draw(5, torch.float64)
    mask = laws.MASKS[mask](draw, SIZES)
    shapes = [(2, 4, 70, 8), (2, 2, 100, 8), (2, 2, 100, 6), (2, 4, 70, 6)]
    query, key, value, above = (layout(draw.normal(*shape)) for shape in shapes)
    A = attention(query, key, mask=mask)
    found = {}
    for form in ("fused", "dense"):
        output = A.matmul(value, form=form)
        gradients = torch.autograd.grad(output, (query, key, value), above.detach())
        names = ("output", "query", "key", "value")
        found[form] = dict(zip(names, (output, *gradients), strict=True))
    assert_rounding(found["fused"], found["dense"], 1)
    with torch.no_grad():  # a way of its own, where there is no mask
        assert torch.equal(A.matmul(value, form="fused"), found["fused"]["output"])


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "rows"])
def test_numbers_beyond_2_to_the_31(axis, tmp_path):
    """Operands in a file with holes: 8 GiB of addresses, a few pages of memory."""
    far, shape = 1_500_000_000, (3, 3, 3, 8)
    file = str(tmp_path / "numbers")
    memory = torch.from_file(file, shared=True, size=2 * far + 10_000, dtype=torch.float16)
    strides = [far if a == axis else step for a, step in enumerate((72, 24, 8))]
    query, key, value = (
        memory[offset:].as_strided(shape, (*strides, 1)) for offset in (0, 1000, 2000)
    )
    generator = torch.Generator().manual_seed(0)
    for x in (query, key, value):
        x.copy_(torch.randn(shape, generator=generator))
        x.requires_grad_()
    near = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    got = laws.results(attention(query, key), value, "fused")
    wanted = laws.results(attention(near[0], near[1]), near[2], "fused")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        assert torch.equal(attention(query, key) @ value, wanted["output"])


@pytest.mark.parametrize(("file", "table"), [("isa", "kernels"), ("isa_chunks", "chunk_kernels")])
def test_a_build_for_an_instruction_set_shares_no_function(file, table, tmp_path):
    """What two builds share may be linked from the one that this machine cannot run.

    Without optimization every function that is not always inlined shows.
    """
    compiler, nm = shutil.which(os.environ.get("CXX", "c++")), shutil.which("nm")
    if not compiler or not nm:
        pytest.skip("no C++ compiler, or no nm")
    flags = ["-std=c++20", "-O0", "-fno-exceptions", "-fno-rtti", "-Wno-psabi", "-DREGARD_ISA=base"]
    source = ROOT / "csrc" / f"{file}.cpp"
    subprocess.run([compiler, *flags, "-c", source, "-o", tmp_path / "isa.o"], check=True)
    listed = subprocess.run([nm, "-C", tmp_path / "isa.o"], check=True, capture_output=True)
    symbols = [line[17:] for line in listed.stdout.decode().splitlines()]
    shared = [s for s in symbols if re.match("[WwVvuTDBR] ", s) and "regard::base::" not in s]
    assert not shared
    assert {f"{kind} regard::base::{table}" for kind in "DR"} & set(symbols)


def test_without_the_extension_attention_runs_in_pytorch_and_says_so_once():
    code = """
import logging, sys
sys.modules['regard.kernel._cpu'] = None  # as if it were not installed
logging.basicConfig(format='%(name)s: %(message)s')
"""
    show = """
explained = A.explain(x)
(A @ x, A.mT @ x)
print(explained.form, explained.not_chosen['fused'], sep='; ')
"""
    printed = run(code + ATTEND + show).splitlines()
    assert len(printed) == 2, printed
    assert printed[0].startswith(f"regard: {extension.missing()}")
    assert printed[1] == f"tiled; does not run: {extension.missing()}"
