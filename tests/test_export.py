"""torch.compile and torch.export of layers: products are one operator of the graph."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from regard import Additive, Alibi, Causal, Padding, Softmax
from regard.kernel import extension
from regard.nn import MultiHeadAttention, SelfAttention
from tests.test_compile import compare, normal

if extension.load() is None:  # the header of the run says so
    pytest.skip(extension.missing(), allow_module_level=True)


class Layer(nn.Module):
    """A layer that returns its output alone, as graphs that are exported must."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, real=None):
        mask = Causal() if real is None else Causal() & Padding(real)
        return self.layer(x, mask=mask)[0]


LAYERS = {
    "grouped": lambda: SelfAttention(16, 4, num_kv_heads=2),
    "multihead": lambda: MultiHeadAttention(16, 4, batch_first=True),
    "parts": lambda: SelfAttention(
        16, 4, score=Additive.of(4, 4), position=Alibi.of(4),
        normalizer=Softmax(sink=torch.zeros(4).requires_grad_()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["multihead", "parts"])
def test_layers_in_one_graph(name):
    layer = LAYERS[name]()
    compare(lambda x: layer(x, mask=Causal())[0], [normal(2, 5, 16)], [*layer.parameters()])
    x, arguments = torch.randn(2, 5, 16), {"mask": Causal()}
    if name == "multihead":
        arguments["need_weights"] = "lazy"
    output, A = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, **arguments)
    assert torch.equal(A.entropy(), layer(x, **arguments)[1].entropy())
    assert torch.equal(layer(x, **arguments)[0], output)


@pytest.mark.parametrize(("name", "strict"), [("grouped", False), ("parts", True)])
def test_exported_layers_give_the_same_numbers(name, strict):
    layer, x = Layer(LAYERS[name]()), torch.randn(2, 10, 16)
    real = torch.arange(10) < torch.tensor([[10], [6]])
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2)}
    program = torch.export.export(layer, (x, real), dynamic_shapes=(axes, axes), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for n in (10, 17):
        x, real = torch.randn(3, n, 16), torch.rand(3, n) < 0.7
        wanted, found = layer(x, real), exported(x, real)
        assert torch.equal(wanted, found)
        parameters = dict(exported.named_parameters())
        for (path, _), gradient, other in zip(
            layer.named_parameters(),
            torch.autograd.grad(wanted.sum(), list(layer.parameters())),
            torch.autograd.grad(found.sum(), [parameters[p] for p, _ in layer.named_parameters()]),
            strict=True,
        ):
            assert torch.equal(gradient, other), path


def test_an_exported_layer_loads_in_another_process(tmp_path):
    torch.manual_seed(0)
    layer, x = Layer(SelfAttention(16, 4)), torch.randn(1, 6, 16)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    torch.save((x, layer(x).detach()), tmp_path / "numbers.pt")
    code = f"""
import torch, regard.form.in_graph
x, wanted = torch.load({str(tmp_path / "numbers.pt")!r})
layer = torch.export.load({str(tmp_path / "layer.pt2")!r}).module()
# Another number of threads adds the 16 products of a sum in another order.
bound = 16 * torch.finfo(torch.float32).eps * wanted.abs().max()
assert (layer(x) - wanted).abs().max() <= bound
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
