"""The lazy matrix as an object: what it says of itself, and its parts as monoids and masks."""

from __future__ import annotations

import base64
import copy
import pickle
import re
import zlib

import pytest
import torch
from laws import NORMALIZERS, Draw, Sizes

from regard import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    Dot,
    Dropout,
    FormError,
    Padding,
    Prefix,
    ShapeError,
    Softmax,
    Window,
    attention,
)
from regard.runs import Runs

CPU = torch.device("cpu")


def example(**parts):
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 4, 6, 8).unbind(0)
    return attention(query, key, **parts)


def test_repr_says_what_it_is():
    A = example(
        score=Dot(softcap=30.0),
        position=Alibi.of(4),
        mask=Causal() & ~Window(2, 0),
        normalizer=Softmax(0.0),
    )
    assert repr(A) == (
        "Attention(2, 4, 6, 6): Dot(softcap=30.0), Alibi(tensor(4)), Causal() & ~Window(2, 0), "
        "Softmax(sink=0.0); float32, lazy"
    )
    assert repr(A.mT) == repr(A) + ", transposed"


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Causal(2) | Prefix(3), "Causal(offset=2) | Prefix(3)"),
        ((Causal() | Prefix(3)) & Window(1, None), "(Causal() | Prefix(3)) & Window(1, None)"),
        (~(Causal() & Window(1, 1)), "~(Causal() & Window(1, 1))"),
    ],
)
def test_masks_read_as_they_are_written(mask, text):
    assert repr(mask) == text


def test_html_is_a_picture_of_the_first_heads():
    page = example(mask=Causal())._repr_html_()
    pictures = re.findall(r"base64,([^\"]+)", page)
    assert len(pictures) == 4  # the heads of the first batch entry
    data = base64.b64decode(pictures[0])
    assert data.startswith(b"\x89PNG")
    length = int.from_bytes(data[33:37])
    assert data[37:41] == b"IDAT"
    pixels = zlib.decompress(data[41 : 41 + length])
    assert len(pixels) == 6 * (1 + 3 * 6)
    assert "Attention(2, 4, 6, 6)" in page


def test_html_does_not_compute_what_takes_long():
    x = torch.zeros(1, 2**17, 1)
    assert "too large to draw unasked" in attention(x, x)._repr_html_()
    assert "empty" in attention(x[:, :0], x[:, :0])._repr_html_()


def test_explain_counts_visible_pairs():
    A = example(mask=Causal())
    told = A.explain(torch.randn(2, 4, 6, 3))
    assert told.form == "fused"
    assert told.pairs == 2 * 4 * 21
    assert told.pairs_in_all == 2 * 4 * 36
    assert told.flops == told.pairs * 2 * (8 + 3)
    assert "168 visible of 288" in str(told)
    assert "dense" in told.not_chosen
    per_sample = example(mask=Padding(torch.tensor([[True] * 6, [True] + [False] * 5])))
    assert per_sample.explain().pairs == 4 * (36 + 6)


def test_a_form_by_name_or_an_error():
    A, value = example(), torch.randn(2, 4, 6, 3)
    assert torch.allclose(A.matmul(value, form="dense"), A.matmul(value, form="tiled"), atol=1e-6)
    with pytest.raises(FormError, match=r"no form 'flash'.*\n.*\n.*tiled, dense"):
        A.matmul(value, form="flash")


def test_dense_refuses_what_would_fill_the_memory():
    x = torch.zeros(2**14, 1)
    with pytest.raises(ShapeError, match=r"268,435,456 weights \(1.0 GiB\).*A.topk\(8\).*limit="):
        attention(x, x).dense()


def test_heads_and_batch_entries_stay_lazy():
    bias = torch.randn(4, 6, 6)
    A = example(
        position=Alibi.of(4) + Bias(bias),
        mask=Causal() & Padding(torch.tensor([[True] * 6, [True] * 4 + [False] * 2])),
        normalizer=Softmax(torch.randn(4)),
        dropout=Dropout(0.3, seed=5),
    )
    whole = A.dense()
    for index in [
        0,
        (1, 2),
        (slice(None), 3),
        (slice(0, 1), slice(1, 3)),
        (-1, slice(None, None, 2)),
    ]:
        part = A[index]
        assert part.shape == whole[index].shape
        assert torch.allclose(part.dense(), whole[index], atol=1e-6)
        assert torch.allclose(part @ torch.ones(6, 1), whole[index].sum(-1, True), atol=1e-5)


def test_grouped_heads_are_picked_with_their_key_head():
    query, key = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4)
    A = attention(query, key)
    for index in [(0, 5), (slice(None), slice(2, 5)), (1,)]:
        assert torch.allclose(A[index].dense(), A.dense()[index], atol=1e-6)
    assert A[1].key.shape == (3, 5, 4)  # whole groups stay shared


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_merge_of_two_halves_is_the_whole(normalizer):
    """The monoid: any split of a row's keys, merged, is the row; neutral changes nothing."""
    draw = Draw(0, torch.float64)
    sizes = Sizes(1, 2, 2, 5, 8, 4, 3)
    part = NORMALIZERS[normalizer](draw, sizes)
    logits, value = draw.normal(2, 5, 8).detach() * 3, draw.normal(2, 8, 3).detach()
    logits[:, 1, :] = -torch.inf
    logits[:, 2, :4] = -torch.inf

    def after(*ranges):
        state = part.neutral((2, 5), torch.zeros(2, 5, 3, dtype=torch.float64), torch.float64)
        for columns in ranges:
            state = part.absorb(state, logits[..., columns], value[:, columns], None)
        return state

    whole = part.whole(logits) @ value
    left, right = after(slice(0, 4)), after(slice(4, 6), slice(6, 8))
    for state in (after(slice(0, 8)), part.merge(left, right), part.merge(right, left)):
        output, row = part.finish(state)
        assert torch.allclose(output, whole, rtol=1e-12, atol=1e-12)
        assert torch.allclose(part.weights(logits, row), part.whole(logits), atol=1e-12)
    output, _ = part.finish(part.merge(after(), after(slice(0, 8))))
    assert torch.allclose(output, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", [Alibi.of(2), Alibi.of(2, offset=3)], ids=repr)
def test_shift_invariant_positions_are(position):
    assert position.shift_invariant
    assert position.toeplitz
    i, j = torch.arange(5), torch.arange(7)
    query, key = torch.zeros(2, 5, 1), torch.zeros(2, 7, 1)
    one, other = (position.on_score(query, key, i + by, j + by) for by in (0, 11))
    assert torch.equal(one, other)


def test_a_million_rows_of_a_mask_are_megabytes():
    runs = (Causal() & Window(256, 0)).runs(1_000_000, 1_000_000, CPU)
    numbers = sum(x.numel() * x.element_size() for x in (runs.offsets, runs.start, runs.stop))
    assert numbers <= 16_000_008
    assert int(runs.counts().sum()) == sum(range(1, 257)) + 257 * (1_000_000 - 256)


def test_runs_are_short_sorted_and_apart():
    ids = torch.tensor([0, 1, 1, 0, 2, 2, 0])
    mask = (Documents(ids) & Causal()) | Dense(torch.eye(7, dtype=torch.bool).roll(1, 0))
    runs = mask.runs(7, 7, CPU)
    for row in range(7):
        edges = slice(int(runs.offsets[row]), int(runs.offsets[row + 1]))
        start, stop = runs.start[edges], runs.stop[edges]
        assert (start < stop).all()
        assert (start[1:] > stop[:-1]).all()
    again = Runs.dense(runs.keep(slice(0, 7), slice(0, 7)))
    assert torch.equal(again.start, runs.start)
    assert torch.equal(again.stop, runs.stop)


def test_full_and_empty_tiles_are_known_without_looking_at_pairs():
    runs = Causal().runs(16, 16, CPU)
    spans = runs.spans(slice(8, 12), 4)
    assert [(span.columns.start, span.full) for span in spans] == [(0, True), (4, True), (8, False)]
    assert (~Causal()).runs(16, 16, CPU).spans(slice(12, 16), 4)[0].columns == slice(12, 16)
    assert (Causal() & ~Causal()).runs(16, 16, CPU).spans(slice(0, 16), 4) == []


def test_parts_and_matrices_can_be_copied_and_sent():
    A = example(position=Alibi.of(4), mask=Causal() & Window(2, 0), dropout=Dropout(0.5, seed=1))
    for twin in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert repr(twin) == repr(A)
        assert torch.equal(twin.dense(), A.dense())


def test_compiled_functions_give_the_same_numbers():
    """Products in graphs, which break wherever the matrix is looked at."""

    def look(x, value):
        A = attention(2 * x, x, mask=Causal(), position=Alibi.of(4), normalizer=Softmax(0.0))
        return A @ value, A.entropy(), A[..., 1, :] + 1, A.mT @ value

    x, value = torch.randn(2, 2, 4, 6, 8, dtype=torch.float64).unbind(0)
    compiled = torch.compile(look, backend="eager")(x, value)
    for one, other in zip(compiled, look(x, value), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_the_seed_of_dropout_comes_from_torch():
    torch.manual_seed(9)
    first = Dropout(0.1)
    torch.manual_seed(9)
    assert Dropout(0.1) == first
    assert Dropout(0.1) != first


def test_an_axis_in_front_and_tensors_of_several():
    lengths = Padding.of_lengths(torch.tensor([6, 4]), 6)
    A = example(position=Alibi.of(4), mask=lengths & Causal(), dropout=Dropout(0.5, seed=1))
    assert A[1][None].shape == (1, 4, 6, 6)
    assert torch.equal(A[1][None].dense(), A.dense()[1:])
    assert torch.equal(A[None, 1, :, 2], A.dense()[None, 1, :, 2])
    assert torch.equal(torch.cat([A[0][None], A[1][None].cpu()]), A.dense())
    assert torch.equal(torch.stack([A[0], A[1]], dim=1), A.dense().transpose(0, 1))
    assert torch.equal(torch.cat(tensors=[A, A], dim=0), torch.cat([A.dense()] * 2))
    with pytest.raises(ShapeError, match=re.escape("add it to query and key")):
        example(score=lambda query, key, i, j: query @ key.mT)[None]


def test_another_device_takes_every_tensor():
    A = example(position=Alibi.of(4) + Bias(torch.zeros(6, 6)), mask=Documents(torch.arange(6)))
    there = A.to("meta")
    assert there.device == there.rule.tensors()[0].device == torch.device("meta")
    assert all(x.device == there.device for x in there.mask.tensors())
    assert torch.equal(A.to("cpu").dense(), A.dense())
