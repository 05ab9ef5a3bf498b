"""What `capture(model)` gives: a list, layers by name, tables and figures."""

import pytest
import torch
from torch import nn

from regard.errors import ShapeError
from regard.look import CaptureError, Record, capture, look
from regard.nn import SelfAttention
from regard.normalizer import Sigmoid


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SelfAttention(16, 2)
        self.cross = SelfAttention(16, 2)

    def forward(self, x):
        x, _ = self.attention(x)
        return self.cross(x)[0]


class Model(nn.Module):
    def __init__(self, count=11):
        super().__init__()
        self.layer = nn.ModuleList([Layer() for _ in range(count)])

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def ran():
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 7, 16)
    with torch.no_grad(), capture(model) as record:
        model(x)
    return model, x, record


def test_it_is_the_list_of_calls(ran):
    record = ran[2]
    assert isinstance(record, list)
    assert isinstance(record, Record)
    assert len(record) == 22
    assert record[1].name == "layer.0.cross"
    assert [call.name for call in record[-2:]] == ["layer.10.attention", "layer.10.cross"]


def test_layers_by_name_and_by_a_part_of_one(ran):
    record = ran[2]
    for name in ("layer.1.cross", "1.cross"):
        assert torch.equal(record[name].entropy(), record[3].matrix.entropy())
    assert record["layer.1.cross"].shape == (2, 2, 7, 7)


def test_a_name_that_is_unknown_or_of_several(ran):
    record = ran[2]
    with pytest.raises(ShapeError, match=r"'layer\.1' is part of several names: 'layer\.1\.att"):
        record["layer.1"]
    with pytest.raises(ShapeError, match=r"no layer 'decoder' here; there are 0 'layer\.0\.att"):
        record["decoder"]
    with pytest.raises(ShapeError, match="no layer 'cros' here"):  # whole parts alone
        record["cros"]
    with pytest.raises(ShapeError, match="none: nothing has run"):
        Record("model")["layer"]


def test_a_name_called_twice_is_its_last_call():
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": SelfAttention(8, 2)}).eval()
    with torch.no_grad(), capture(model) as record:
        for length in (3, 5):
            model["one"](torch.randn(1, length, 8))
    assert record["one"].shape == (1, 2, 5, 5)


def test_table_and_figures_are_those_of_look(ran):
    model, x, record = ran
    seen = look(model, x)
    assert record.table().csv() == seen.table().csv()
    drawn = record.figure("sent", layer="1.cross", head=1, query=4)
    assert drawn.csv() == seen.figure("sent", layer=3, head=1, query=4).csv()
    with pytest.raises(ShapeError, match="head is 2"):
        record.figure(layer="1.cross", head=2)
    with pytest.raises(ShapeError, match="no layer 22 here"):
        record.figure(layer=22)


def test_what_no_page_shows_still_has_its_matrix():
    torch.manual_seed(0)
    layer = SelfAttention(8, 2, normalizer=Sigmoid()).eval()
    with torch.no_grad(), capture(nn.ModuleDict({"sig": layer})) as record:
        layer(torch.randn(1, 4, 8))
    assert record["sig"].shape == (1, 2, 4, 4)
    with pytest.raises(CaptureError, match="softmax"):
        record.table()
    with pytest.raises(CaptureError, match="none of its attention could be recorded"):
        Record("model").figure()
