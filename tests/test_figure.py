"""Figures drawn in Python: valid SVG with text as text, and the numbers of the matrix as CSV."""

import base64
import csv
import re
import struct
import sys
import zlib
from xml.etree import ElementTree

import pytest
import torch

from regard.cli import main
from regard.errors import MissingPackageError, ShapeError
from regard.look import FigureError, look
from regard.look.drawing import Figure, highest_lift
from regard.look.figure import PANELS
from regard.picture import png

NAME = "{http://www.w3.org/2000/svg}"
HOSTILE = ["</text><script>alert(1)</script>", "a & b", "\x00\x07", '"quoted"', "=1+1", "ок"]


def arrays(n=6, causal_layers=2):
    torch.manual_seed(0)
    return {
        "query": torch.randn(causal_layers, 4, n, 8),
        "key": torch.randn(causal_layers, 2, n, 8),
    }


def texts(figure):
    return [node.text for node in ElementTree.fromstring(figure.svg).iter(f"{NAME}text")]


@pytest.mark.parametrize("panel", [x for x in PANELS if x != "difference"])
@pytest.mark.parametrize("scale", ["lift", "weight"])
def test_every_panel_is_valid_and_says_what_it_is(panel, scale):
    seen = look({**arrays(), "tokens": HOSTILE}, causal=True)
    figure = seen.figure(panel, layer=1, head=3, query=4, key=2, scale=scale)
    said = texts(figure)
    assert ElementTree.fromstring(figure.svg).tag == f"{NAME}svg"
    assert "<script" not in figure.svg
    if panel == "heads":
        assert "L1 H3" in said
    else:
        assert said[0].endswith("layer 1, head 3")
        assert HOSTILE[0] in " ".join(said) or HOSTILE[0][:24] in said
        assert "\ufffd\ufffd" in said
    if panel in ("heads", "map"):  # bars have their numbers, colours need a scale
        unit = "weight" if scale == "weight" else "weight, times the even weight"
        assert said[-1].startswith(unit)
    assert figure._repr_html_() == figure.svg


def test_the_numbers_are_those_of_the_matrix():
    seen = look({**arrays(), "tokens": HOSTILE}, causal=True)
    weights = seen[1][0, 3].dense()
    rows = list(csv.reader(seen.figure("map", layer=1, head=3).csv().splitlines()))
    assert rows[0][1] == f"{HOSTILE[0]} (0)"
    for i, row in enumerate(rows[1:]):
        assert row[i + 2 :] == [""] * (5 - i)  # masked
        assert [float(x) for x in row[1 : i + 2]] == pytest.approx(weights[i, : i + 1].tolist())
    sent = list(csv.DictReader(seen.figure("sent", layer=1, head=3, query=4).csv().splitlines()))
    assert [float(row["weight"]) for row in sent] == pytest.approx(weights[4].tolist())
    assert [float(row["lift"]) for row in sent] == pytest.approx((5 * weights[4]).tolist())
    column = seen.figure("received", layer=1, head=3, key=2).rows
    assert [row[2] for row in column] == pytest.approx(weights[:, 2].tolist())
    assert [row[3] for row in column] == pytest.approx(
        (weights[:, 2] * torch.arange(1, 7)).tolist()
    )


def pixels(svg):
    """The RGBA pixels of each embedded picture."""
    for data in re.findall(r"base64,([^\"]+)", svg):
        raw = base64.b64decode(data)
        width, height = struct.unpack(">II", raw[16:24])
        start = raw.index(b"IDAT")
        (size,) = struct.unpack(">I", raw[start - 4 : start])
        lines = bytearray(zlib.decompress(raw[start + 4 : start + 4 + size]))
        flat = torch.frombuffer(lines, dtype=torch.uint8).reshape(height, 1 + 4 * width)
        yield flat[:, 1:].reshape(height, width, 4)


def test_colours_grow_with_the_weight_and_masked_cells_are_clear():
    seen = look(arrays(), causal=True)
    (picture,) = pixels(seen.figure("map", layer=0, head=0).svg)
    weights = seen[0][0, 0].dense()
    lift = weights * torch.arange(1, 7)[:, None]
    seen_cells = torch.ones(6, 6).tril().bool()
    assert torch.equal(picture[..., 3] == 255, seen_cells)
    darkness = -picture[..., :3].float().sum(-1)[seen_cells]
    assert (darkness[lift[seen_cells].argsort()].diff() >= 0).all()
    assert len(darkness.unique()) > 10


def test_long_maps_are_pooled_and_say_so():
    seen = look(arrays(n=1030, causal_layers=1), causal=True)
    figure = seen.figure("map", head=1)
    assert any("mean of 3 x 3 cells" in text for text in texts(figure))
    weights = seen[0][0, 1].dense()
    cells = weights[300:303, 30:33]
    row = figure.rows[100]
    assert row[0] == "#300"
    assert row[11] == pytest.approx(float(cells.mean()), rel=1e-4)
    diagonal = weights[300:303, 300:303][torch.ones(3, 3).tril().bool()]
    assert row[101] == pytest.approx(float(diagonal.mean()), rel=1e-4)
    assert row[102] is None
    assert len([x for x in seen.figure("heads").svg.split("<image")]) == 5
    listed = texts(seen.figure("sent", query=1029))
    assert any("the 40 largest of 1030 weights" in text for text in listed)


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        ({"panel": "everything"}, FigureError, "there are heads, map, sent, received"),
        ({"scale": "log"}, FigureError, "there are lift and weight"),
        ({"layer": 7}, ShapeError, "there is no layer 7 here; there are 0 'layer 0', 1 'layer 1'"),
        ({"head": 4}, ShapeError, "head is 4; layer 0 has 0 to 3"),
        ({"query": -1}, ShapeError, "query is -1; layer 0 has 0 to 5"),
        ({"key": 6}, ShapeError, "key is 6; layer 0 has 0 to 5"),
    ],
)
def test_what_cannot_be_drawn_says_what_can(ask, error, words):
    with pytest.raises(error, match=words):
        look(arrays()).figure(**ask)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(FigureError, match=r"x.gif ends in .gif; figures are written as .svg"):
        look(arrays()).figure("map").save(tmp_path / "x.gif")


def test_png_is_the_drawing_at_twice_its_size(tmp_path):
    figure = look({**arrays(), "tokens": HOSTILE}, causal=True).figure("map")
    written = figure.save(tmp_path / "map.png").read_bytes()
    assert written[:8] == b"\x89PNG\r\n\x1a\n"
    root = ElementTree.fromstring(figure.svg)
    size = [int(root.get(name)) for name in ("width", "height")]
    assert struct.unpack(">2I", written[16:24]) == tuple(2 * side for side in size)
    wordless = re.sub("<text.*?</text>", "", figure.svg, flags=re.DOTALL)
    assert Figure(wordless, (), ()).png() != written


def test_png_without_fonts_or_its_package_says_what_to_do(monkeypatch):
    figure = look(arrays()).figure("map")
    monkeypatch.setattr("resvg_py.svg_to_bytes", lambda **how: b"no words")
    with pytest.raises(FigureError, match="fonts-dejavu-core"):
        figure.png()
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingPackageError, match=r"regard\[look\]"):
        figure.png()


def test_png_of_a_ramp_by_hand():
    shade = torch.tensor([[0.0, 0.5, 1.0, torch.nan]])
    (found,) = pixels(f'base64,{png(shade, ((0, 0, 0), (200, 100, 50)))}"')
    assert found[0].tolist()[:3] == [[0, 0, 0, 255], [100, 50, 25, 255], [200, 100, 50, 255]]
    assert found[0, 3, 3] == 0


def test_the_range_of_colours_is_that_of_the_page():
    assert [highest_lift(n) for n in (2, 8, 15, 256, 10**6)] == [3, 3, 4, 8, 8]


def test_figures_and_tables_from_the_command_line(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    source = tmp_path / "arrays.safetensors"
    safetensors.save_file(arrays(), source)
    cases = {
        "table.csv": [],
        "heads.svg": [],
        "map.svg": ["--panel", "map", "--at", "1,3"],
        "sent.csv": ["--panel", "sent", "--at", "1,3,4"],
    }
    for name, options in cases.items():
        assert main(["look", str(source), "--output", str(tmp_path / name), *options]) == 0
        assert f"wrote {tmp_path / name}" in capsys.readouterr().out
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 9
    assert "layer 1, head 3" in (tmp_path / "map.svg").read_text()
    assert (tmp_path / "heads.svg").read_text().count("<image") == 8
    sent = list(csv.DictReader((tmp_path / "sent.csv").read_text().splitlines()))
    weights = look(arrays())[1][0, 3, 4]
    assert [float(row["weight"]) for row in sent] == pytest.approx(weights.tolist())
    for options, words in (
        (["--output", "x.html", "--panel", "map"], "--panel is for .svg, .png, .csv"),
        (["--output", "x.svg", "--panel", "map", "--at", "1"], "two to four numbers"),
        (["--output", "x.svg", "--panel", "map", "--at", "9,0"], "there is no layer 9"),
    ):
        assert main(["look", str(source), *options]) == 1
        assert words in capsys.readouterr().err
