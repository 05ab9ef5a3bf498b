"""heads="min": few heads with finite scores that are a convolution, and when they are not."""

import copy

import pytest
import torch
from test_convert import made, normal
from torch import nn

from regard.convert import from_conv, to_conv
from regard.convert.conv import few_heads


def filters(*rows):
    return torch.tensor(rows, dtype=torch.float64)[None, None]


SOBEL, BOX = filters([1, 0, -1], [2, 0, -2], [1, 0, -1]), filters(*[[1, 1, 1]] * 3)
FILTERS = {
    "sobel": (SOBEL, 2),
    "laplacian": (filters([0, 1, 0], [1, -4, 1], [0, 1, 0]), 2),
    "gaussian": (filters([1, 2, 1], [2, 4, 2], [1, 2, 1]), 1),
    "minus a box": (-BOX[:, :, :2], 1),
    "sobel and box": (torch.cat([SOBEL, BOX]), 2),
    "nothing": (0 * BOX, 1),
}


def low_rank(rank, dtype=torch.float64):
    weight = normal(9, rank, seed=rank) @ normal(rank, 12, seed=3)
    return weight.mT.reshape(4, 3, 3, 3).to(dtype)


def holding(weight):
    """A convolution with this kernel, and how far the few heads' own is from it."""
    out, channels = weight.shape[:2]
    conv = nn.Conv2d(channels, out, 3, padding=1, dtype=weight.dtype)
    conv.weight.data = weight.clone()
    layer = from_conv(conv, heads="min")
    missed = (to_conv(layer).weight.detach() - weight).double().norm() / weight.double().norm()
    return conv, layer, float(missed) / torch.finfo(weight.dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 4, 6, None])
def test_few_heads_hold_the_kernel_in_its_dtype(rank, dtype):
    """Of some rank, or as torch begins; where they cannot, the heads are those of the taps."""
    torch.manual_seed(0)
    first = nn.Conv2d(32, 64, 3).weight.detach().to(dtype)
    conv, layer, missed = holding(first if rank is None else low_rank(rank, dtype))
    fine = torch.finfo(dtype).bits >= 32
    limit = 1 + 9 if fine else 1.5  # to_conv rounds a half once more
    assert missed <= limit
    few = {9} if rank is None else {rank, rank + 1}
    assert layer.num_heads in (few if fine else few | {9})
    x = normal(2, conv.in_channels, 8, 8).to(dtype)
    wanted = copy.deepcopy(conv).double()(x.double())
    error = (layer(x).double() - wanted).norm() / wanted.norm()
    assert error <= (limit + 1) * torch.finfo(dtype).eps  # and what heads see, rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_filter_of_one_sign_is_one_head_in_half_precision_too(dtype):
    _, layer, missed = holding(FILTERS["gaussian"][0].to(dtype))
    assert layer.num_heads == 1
    assert missed <= 1


@pytest.mark.parametrize("small", [1e-3, 2e-4, 1e-5])
def test_a_small_singular_value_is_a_head_of_its_own(small):
    """Of float32, with so many channels that out x in roundings would be more."""
    left, right = (torch.linalg.qr(normal(*shape))[0] for shape in ((9, 2), (64 * 32, 2)))
    weight = (left * torch.tensor([1.0, small])) @ right.mT
    _, layer, missed = holding(weight.mT.reshape(64, 32, 3, 3).float())
    assert layer.num_heads in (2, 3)
    assert missed <= 1 + 9


def test_a_kernel_that_is_not_finite_keeps_a_head_for_each_tap():
    conv = nn.Conv2d(1, 1, 3)
    conv.weight.data[0, 0, 0, 0] = torch.nan
    assert from_conv(conv, heads="min").num_heads == 9


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_is_one_head_or_two(name):
    weight, heads = FILTERS[name]
    conv = made(2, 1, len(weight), tuple(weight.shape[2:]), padding=1, bias=False)
    conv.weight.data.copy_(weight)
    layer, x = from_conv(conv, heads="min"), normal(1, 1, 7, 7)
    assert layer.num_heads == heads
    assert torch.isfinite(layer.position().table).all()
    assert (layer(x) - conv(x)).abs().max() <= 1e-13
    back = to_conv(layer)
    assert (back.weight - conv.weight).abs().max() <= 1e-14 * max(1, weight.abs().max())


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
@pytest.mark.parametrize("positive", [False, True])
def test_rank_plus_one_heads_or_rank_where_a_positive_vector_is_spanned(rank, positive):
    left, right = normal(9, rank, seed=rank), normal(rank, 6, seed=3)
    left = left - left.mean(0)  # orthogonal to the uniform vector, so that none is positive
    if positive:
        left[:, 0] = normal(9, seed=9).abs() + 1
    weight = (left @ right).mT.reshape(3, 2, 3, 3)
    scores, mix = few_heads(weight)
    assert len(scores) == (rank if positive else rank + 1)
    assert torch.isfinite(scores).all()
    rebuilt = torch.einsum("oih,ht->oit", mix, scores.softmax(-1)).reshape(weight.shape)
    assert (rebuilt - weight).abs().max() <= 1e-13 * weight.abs().max()


def test_a_full_kernel_keeps_a_head_for_each_tap():
    layer = from_conv(made(2, 3, 4, 3), heads="min")
    assert (layer.num_heads, layer.matrix((5, 5)).shape) == (9, (9, 9, 25))
