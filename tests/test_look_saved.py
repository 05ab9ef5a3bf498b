"""Files that `A.save` wrote, looked at."""

import pytest
import torch

import regard
from regard.look import SourceError, look


@pytest.fixture
def saved(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    torch.manual_seed(0)
    path = tmp_path / "matrix.safetensors"

    def write(*shape, **parts):
        matrix = regard.attention(torch.randn(*shape), torch.randn(*shape), **parts)
        matrix.save(path)
        return matrix, path

    return write


@pytest.mark.parametrize("shape", [(6, 4), (2, 6, 4), (3, 2, 6, 4)])
def test_a_saved_matrix_is_looked_at_with_its_parts(saved, shape):
    position = regard.Alibi.of(2) if len(shape) > 2 else None
    matrix, path = saved(*shape, mask=regard.Causal() & regard.Window(3, 0), position=position)
    seen = look(path)
    expected = matrix.dense().reshape(-1, shape[-3] if len(shape) > 2 else 1, 6, 6)[:1]
    torch.testing.assert_close(seen[0].dense(), expected)
    assert ("batch of 3" in " ".join(seen.scene.notes)) == (len(shape) == 4)
    assert seen.scene.title == "matrix.safetensors"
    assert seen.html


def test_what_does_not_go_with_a_saved_matrix(saved, tmp_path):
    _, path = saved(2, 6, 4)
    for options in ({"causal": True}, {"limit": 3}):
        with pytest.raises(SourceError, match="looked at as it was saved"):
            look(path, **options)
    part = tmp_path / "part.safetensors"
    regard.Alibi.of(2).save(part)
    with pytest.raises(SourceError, match=r"a part; A\.save\(path\) writes a matrix"):
        look(part)
