"""How the curves of accuracy over data are measured: runs that resume, tests, ceilings, mixers."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples draw: pip install 'regard[examples]'")
pytest.importorskip("sklearn", reason="it brings the digits: pip install 'regard[examples]'")
sys.path.append(str(Path(__file__).parent.parent))  # last: an installed regard is tested

from examples import report
from examples.convolution import crossover, curves, mixers
from regard.nn import GatedAttention


def options_of(folder):
    return argparse.Namespace(redraw=False, resume=False, jobs=1, out=folder)


def test_a_run_that_was_interrupted_goes_on_where_it_was(tmp_path):
    done, written = [], 0
    partial = tmp_path / "squares.partial.jsonl"

    def work(job):
        # Whenever a run is killed, all that its page needs is in the file.
        assert partial.read_text().count("\n") == len(done) - written
        if job == stop:
            raise KeyboardInterrupt
        done.append(job)
        return {"square": [job**2]}

    stop = 3
    with pytest.raises(KeyboardInterrupt):
        report.run(work, range(5), "squares", options_of(tmp_path))
    partial.write_text(partial.read_text() + '["3", {"squ')  # a line that was being written
    stop = None
    found = report.run(work, range(5), "squares", options_of(tmp_path))
    assert done == [0, 1, 2, 3, 4]
    assert found == [{"square": [n**2]} for n in range(5)]
    assert json.loads((tmp_path / "squares.json").read_text())[1] == found
    # More jobs repeat none of these; once the page is written, a run begins anew.
    report.run(work, range(7), "squares", options_of(tmp_path))
    assert done == [*range(7)]
    report.write(tmp_path, "squares", "a page")
    assert not partial.exists()
    written = len(done)
    report.run(work, range(2), "squares", options_of(tmp_path))
    assert done == [*range(7), 0, 1]
    so_far = report.run(work, range(3), "squares", options_of(tmp_path), so_far=True)
    assert so_far == [{"square": [0]}, {"square": [1]}, None]
    assert done == [*range(7), 0, 1]
    report.write(tmp_path, "squares", "half a page", so_far=True)
    assert partial.exists()


def test_chance_is_the_share_of_signs():
    assert curves.chance([1.0] * 8) == 2 / 2**8
    assert curves.chance([1.0, -1.0]) == 1.0
    # 3 + 1 - 2 = 2: sums of at least that size are +-6, +-4, +-2 of +-6, +-4, +-2, 0.
    assert curves.chance([3.0, 1.0, -2.0]) == 6 / 8


def test_slopes_are_those_of_lines():
    made = {
        "a": [{0: 5.0, 1: 1.0}, {0: 4.0, 1: 3.0, 7: 9.0}, {1: 5.0, 0: 3.0}],
        "b": [{0: 1.0, 1: 1.0}] * 3,
    }
    assert curves.slopes(made, "a", "b", (10, 100, 1000)) == pytest.approx([-1.0, 2.0])
    assert curves.gap(made, "a", "b", 1) == [3.0, 2.0]
    assert curves.crossover(made, "a", "b", (10, 100, 1000)) == "none up to n = 1,000"
    assert curves.crossover(made, "b", "a", (10, 100, 1000)) == "already at n = 10, the smallest"


@pytest.mark.parametrize("kinds", [2, 3, 4])
def test_no_sum_is_right_about_more_far_pairs_than_the_ceiling(kinds):
    """All orders of all sums that small integers make."""
    same = torch.eye(kinds, dtype=torch.bool)
    weight = torch.where(same, 0.5 / kinds, 0.5 / (kinds * (kinds - 1)))
    best = 0.0
    for x, y in itertools.product(itertools.product(range(kinds), repeat=kinds), repeat=2):
        sums = torch.tensor(x)[:, None] + torch.tensor(y)
        levels = torch.arange(-1, 2 * kinds)[:, None, None]
        best = max(best, float((weight * ((sums > levels) == same)).sum((-2, -1)).max()))
    assert 100 * best == pytest.approx(crossover.CEILING)


def glyphs(model, at, kinds):
    """The logits of images of two glyphs without noise."""
    grid = crossover.Glyphs().size.grid
    tokens = torch.zeros(1, grid.rows, mixers.PATCH**2, dtype=torch.float64)
    for place, kind in zip(at, kinds, strict=True):
        tokens[0, place] = crossover.GLYPHS[kind].double()
    return model(crossover.from_patches(tokens, grid, (mixers.PATCH, mixers.PATCH)))


@pytest.mark.parametrize("arm", mixers.ARMS)
@pytest.mark.parametrize("at", [(0, 35), (7, 10), (7, 8), (0, 2)])
def test_a_convolutions_logit_is_a_sum_over_far_glyphs_and_attentions_is_none(arm, at):
    torch.manual_seed(0)
    model = mixers.Network(crossover.Glyphs().size, mixers.ARMS[arm]).double()
    a, b, c, d = (glyphs(model, at, kinds) for kinds in ((0, 1), (2, 3), (0, 3), (2, 1)))
    off = (a + b - c - d).abs().max()
    far = max(abs(at[0] // 6 - at[1] // 6), abs(at[0] % 6 - at[1] % 6)) > 2
    assert (off < 1e-12) == (arm == "convolution" and far)


def test_glyphs_are_what_their_labels_say():
    data = crossover.Glyphs(50, 5, 400).data(40, seed=3)
    images, same = data.training
    assert images.shape == (40, 1, 12, 12)
    again = crossover.Glyphs(50, 5, 400).data(10, seed=3)
    assert torch.equal(again.training[0], images[:10])  # nested sets
    images, same = data.test
    near, far = data.groups[crossover.NEAR], data.groups[crossover.FAR]
    assert torch.equal(near, ~far)
    for image, one, apart in zip(images, same, far, strict=True):
        tokens = mixers.to_patches((image > 0.5).float(), (2, 2))[0]
        places = tokens.any(-1).nonzero()[:, 0]
        first, second = (tokens[place] for place in places)
        assert torch.equal(first, second) == bool(one)
        down, across = (places[1] // 6 - places[0] // 6), (places[1] % 6 - places[0] % 6)
        assert (max(abs(int(down)), abs(int(across))) > 2) == bool(apart)


def test_networks_have_as_many_parameters_within_five_percent():
    size = mixers.Size(8, 10, 2)  # of the digits
    networks = [mixers.Network(size, arm) for arm in mixers.ARMS.values()]
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    mean = sum(counts) / len(counts)
    assert all(abs(count - mean) < 0.05 * mean for count in counts), counts


def test_gated_heads_begin_where_a_convolutions_taps_are():
    torch.manual_seed(0)
    model = mixers.Network(mixers.Size(8, 10, 2), mixers.ARMS["attention from a convolution"])
    gated = [block.mixer for block in model.blocks]
    assert all(isinstance(mixer, GatedAttention) for mixer in gated)
    for mixer in gated:  # by position alone, and sharp
        mixer.gate.data.fill_(torch.inf)
        mixer.local.position.sharpness.data.fill_(46**0.5)
    images = torch.randn(3, 1, 8, 8)
    for block in mixers.fields(model, images):
        seen = torch.tensor(block)
        assert torch.equal(seen[:, :2], torch.cartesian_prod(*2 * [torch.arange(-1.0, 2.0)]))
        assert (seen[:, 2] < 1e-3).all()
        assert (seen[:, 4] == 1).all()
