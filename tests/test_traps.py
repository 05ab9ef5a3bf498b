"""Traps: where numbers or gradients could be silently wrong, each with the case that shows it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from regard import (
    Causal,
    Cosine,
    Distance,
    Dot,
    FormError,
    Identity,
    Mask,
    Padding,
    PositionOnly,
    RowSum,
    ShapeError,
    Softmax,
    Window,
    attention,
)
from regard.form.tiles import Tiles
from regard.nn import Learnable, MultiHeadAttention
from regard.position import Alibi, Bias

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(
        dtype
    )


class Square(torch.autograd.Function):
    """An operation whose reading torch does not show to those who watch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, above):
        return 2 * ctx.saved_tensors[0] * above


def test_a_tensor_that_only_a_hidden_operation_reads_is_refused():
    weight = torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)
    query, key, value = normal(3, 5, 2).unbind()
    with pytest.raises(FormError, match=r"custom autograd.Function.*tensor.clone\(\)"):
        attention(query, key, score=lambda q, k, i, j: q @ k.mT * Square.apply(weight))

    def seen(q, k, i, j):
        return q @ k.mT * Square.apply(weight.clone())

    gradients = []
    for form in ("tiled", "dense"):
        output = attention(query, key, score=seen).matmul(value, form=form)
        gradients += torch.autograd.grad(output.sum(), weight)
    assert gradients[0] == pytest.approx(gradients[1])
    assert gradients[0] != 0


def test_a_tensor_that_is_read_only_for_later_tiles_is_refused(small_tiles):
    weight = torch.tensor(1.5, requires_grad=True)
    x = torch.randn(9, 2)
    A = attention(x, x, score=lambda q, k, i, j: q @ k.mT * weight if int(i[0]) else q @ k.mT)
    with pytest.raises(FormError, match="did not read for query 0"):
        A @ x


@pytest.mark.parametrize("score", [Dot(), Cosine(), Distance()], ids=repr)
def test_hidden_keys_change_nothing_however_large(score):
    """Keys beyond the padding, huge or NaN, against the same matrix without them."""
    query, key, value = normal(1, 2, 4, 3), normal(1, 2, 10, 3, seed=1), normal(1, 2, 10, 2, seed=2)
    shown = Padding(torch.arange(10) < 9)
    wanted = attention(query, key[:, :, :9], score=score)
    for poison in (1e8, torch.nan):
        spoilt = key.clone()
        spoilt[:, :, 9] = poison
        A = attention(query, spoilt, score=score, mask=shown)
        assert torch.allclose(A @ value, wanted @ value[:, :, :9], atol=1e-12)
        assert torch.allclose(A.dense()[..., :9], wanted.dense(), atol=1e-12)
        assert torch.allclose(A.logsumexp(), wanted.logsumexp(), atol=1e-12)
        assert torch.allclose(A.received()[..., :9], wanted.received(), atol=1e-12)
        assert torch.allclose(A[..., 3], wanted[..., 3], atol=1e-12)


def test_distances_far_from_the_origin_keep_their_digits():
    near = normal(6, 3, dtype=torch.float32)
    far = near + 4096.0
    one, other = (attention(x, x, score=Distance()).logits() for x in (near, far))
    shifted = far - 4096.0  # what rounding leaves of the vectors themselves
    exact = attention(shifted.double(), shifted.double(), score=Distance()).logits()
    assert torch.allclose(other.double(), exact, rtol=1e-6)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_looked_at_weights_of_half_precision_are_rounded_once(dtype):
    """Rows, columns, blocks and the whole, against float64: one rounding to the dtype."""
    query, key = (3 * normal(64, 64, seed=seed, dtype=dtype) for seed in (1, 2))
    A = attention(query, key, score=Dot(scale=1.0))
    exact = attention(query.double(), key.double(), score=Dot(scale=1.0)).dense()
    looks = {
        "dense": (A.dense(), exact),
        "row": (A[5], exact[5]),
        "column": (A[:, 7], exact[:, 7]),
        "block": (A[3:9, 10:20], exact[3:9, 10:20]),
        "product": (A @ torch.eye(64, dtype=dtype), exact),
    }
    for name, (looked, wanted) in looks.items():
        assert looked.dtype == dtype
        # logits are near 100: their float32 rounding moves a weight by about 100 eps of float32
        assert (looked.double() - wanted).abs().max() <= torch.finfo(dtype).eps + 1e-4, name


def test_large_logits_of_half_precision_stay_finite():
    x = 60 * normal(16, 64, dtype=torch.float16)
    A = attention(x, x, score=Dot(scale=1.0))
    for looked in (A @ x, A.dense(), A[3], A[:, 3]):
        assert looked.isfinite().all()


def test_nan_in_a_query_reaches_the_keys_that_its_row_sees():
    query, key = normal(5, 2), normal(5, 2, seed=1)
    query[0] = torch.nan
    A = attention(query, key, mask=Causal())
    received = A.received()
    assert received[0].isnan()
    clean = attention(query[1:], key, mask=Causal(offset=1)).received()
    assert torch.allclose(received[1:], clean[1:], atol=1e-12)
    assert (A @ key)[0].isnan().all()
    assert (attention(query, key, mask=~Window(None, None)) @ key == 0).all()


@pytest.mark.parametrize("normalizer", [RowSum(), Softmax(), Softmax(0.5), Identity()], ids=repr)
def test_gradients_of_columns(normalizer):
    """A column's gradient goes through the statistics of all rows."""
    query, key = (normal(7, 3, seed=seed).abs().requires_grad_() for seed in (1, 2))
    A = attention(query, key, normalizer=normalizer, mask=Causal(offset=2))
    loss = normal(7, 2, seed=3)
    wanted = torch.autograd.grad((A.dense()[:, 1:3] * loss).sum(), [query, key])
    found = torch.autograd.grad((A[:, 1:3] * loss).sum(), [query, key])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_a_graph_of_the_gradient_is_allowed_and_its_gradient_refused():
    query = normal(5, 2).requires_grad_()
    A = attention(query, query.detach())
    (slope,) = torch.autograd.grad((A @ query.detach()).sum(), query, create_graph=True)
    (wanted,) = torch.autograd.grad(A.matmul(query.detach(), form="dense").sum(), query)
    assert torch.allclose(slope, wanted, atol=1e-12)
    with pytest.raises(FormError, match="form='dense'"):
        slope.square().sum().backward()


def test_a_mask_of_keys_alone_costs_what_padding_costs():
    keep = torch.rand(1, 1, 1, 64) < 0.5
    x = torch.randn(1, 1, 2**14, 1)
    A = attention(x, torch.randn(1, 1, 64, 1), mask=keep)
    assert A.runs.start.numel() <= 32 * 2**14
    assert torch.equal(A.runs.keep(slice(5, 6), slice(0, 64)), keep)


def test_narrow_masks_have_narrow_tiles():
    x = torch.zeros(1, 4096, 8)
    assert Tiles.of(attention(x, x)).side == 1024
    assert Tiles.of(attention(x, x, mask=Causal())).side == 1024
    assert Tiles.of(attention(x, x, mask=Causal() & Window(256, 0))).side == 256


def test_indices_of_other_libraries_and_wrong_head_counts():
    x = torch.randn(2, 5, 3)
    A = attention(x, x)
    assert torch.equal(A[np.int64(1), np.int64(2)], A[1, 2])
    assert A.topk(np.int64(2)).values.shape == (2, 5, 2)
    with pytest.raises(ShapeError, match="0 heads"):
        attention(torch.randn(0, 5, 3), x)
    with pytest.raises(ShapeError, match="returned shape"):
        attention(x, x, score=lambda q, k, i, j: (q @ k.mT)[None, None].expand(4, 1, -1, -1, -1))


def test_layers_do_not_share_the_tensors_of_a_part():
    alibi = Alibi.of(4)
    one, other = Learnable(alibi), Learnable(alibi)
    one.slopes.zero_()
    assert torch.equal(other().slopes, Alibi.of(4).slopes)
    assert torch.equal(alibi.slopes, Alibi.of(4).slopes)
    with pytest.raises(ShapeError, match="batch_first=True"):
        MultiHeadAttention(8, 2)(torch.randn(3, 5, 7, 8))
    with pytest.raises(ValueError, match="probability"):
        MultiHeadAttention(8, 2, dropout=1.0)


def test_position_only_reads_no_vectors():
    x = torch.full((4, 2), torch.nan)
    A = attention(x, x, score=PositionOnly())
    assert torch.equal(A @ torch.ones(4, 1), torch.ones(4, 1))


def test_a_negative_view_is_read_as_the_numbers_it_stands_for():
    """torch keeps some views as their opposite and a bit; their memory holds other numbers."""
    query, key, value = (torch._neg_view(x) for x in torch.randn(3, 2, 5, 8).unbind(0))
    for matrix in (
        attention(query, key),
        attention(query, key, position=Bias(torch._neg_view(torch.randn(5, 5)))),
        attention(query, key, normalizer=Softmax(sink=torch._neg_view(torch.randn(2)))),
    ):
        assert torch.allclose(matrix @ value, matrix.matmul(value, form="dense"), atol=1e-6)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("make", [Padding, lambda keep: Causal() & ~Padding(keep)])
def test_a_mask_that_is_written_to_is_another_mask(make, inference):
    """Its runs are kept from matrix to matrix; writes to inference tensors are silent."""
    with torch.inference_mode(inference):
        keep, x = torch.tensor([True, False, True]), normal(3, 2)
        mask = make(keep)
        before = attention(x, x, mask=mask)
        assert (before.runs is attention(x, x, mask=mask).runs) is not inference
        keep.logical_not_()
        after, fresh = (attention(x, x, mask=m).dense() for m in (mask, make(keep.clone())))
        assert torch.equal(after, fresh)
        assert not torch.equal(after, before.dense())


@pytest.mark.parametrize(
    "mask",
    [Causal(-9) | Window(1, 0), Padding(torch.tensor([True, False, True]))],
    ids=["rule", "tensor"],
)
def test_a_mask_first_used_in_inference_mode_may_be_trained_with(mask):
    x = normal(3, 2)
    with torch.inference_mode():
        expected = attention(x, x, mask=mask) @ x
    output = attention(x.requires_grad_(), x, mask=mask) @ x
    assert torch.autograd.grad(output.sum(), x)[0].isfinite().all()
    torch.testing.assert_close(output.detach(), expected.clone())


@dataclass(frozen=True, eq=False, repr=False)
class Own(Mask):
    """A mask that equals no other, as one that holds a function does."""

    offset: int

    def runs(self, rows, columns, device):
        return Causal(self.offset).runs(rows, columns, device)


@pytest.mark.parametrize("make", [Own, lambda offset: Causal() & ~Own(offset)])
def test_runs_of_a_mask_that_equals_no_other_live_as_long_as_it(make):
    from regard.runs import _of_living, _of_rule

    before, mask = len(_of_living), make(-2)
    kept = _of_rule.cache_info().currsize
    x = normal(3, 2)
    assert attention(x, x, mask=mask).runs is attention(x, x, mask=mask).runs
    assert len(_of_living) > before
    del mask
    assert len(_of_living) == before
    assert _of_rule.cache_info().currsize - kept <= 1  # Causal()


def test_forward_mode_is_refused_and_not_dropped():
    query, key = normal(4, 2), normal(5, 2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        for mask in (None, Causal(1)):
            A = attention(dual, key, mask=mask)
            with pytest.raises(FormError, match=r"form='dense'"):
                A @ key
            tangent = forward_ad.unpack_dual(A.matmul(key, form="dense")).tangent
            assert tangent.abs().max() > 0


def test_runs_live_as_long_as_their_mask():
    from regard.runs import _of_living

    before, mask = len(_of_living), Causal() & Padding(torch.ones(3, dtype=torch.bool))
    assert attention(normal(3, 2), normal(3, 2), mask=mask).runs is not None
    assert len(_of_living) == before + 2
    copied = copy.deepcopy(mask)
    copied.other.keep[1] = False
    assert attention(normal(3, 2), normal(3, 2), mask=copied).runs.counts().tolist() == [1, 1, 2]
    del mask, copied
    assert len(_of_living) == before
