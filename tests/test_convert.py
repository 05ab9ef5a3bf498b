"""A convolution and the attention made of it are one function, gradients included."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from regard import FormError, PositionOnly, attention
from regard.convert import from_conv, to_conv
from regard.errors import DtypeError, ShapeError
from regard.grid import Grid
from regard.neighborhood import Neighborhood
from regard.nn.conv import ConvAttention, Geometry
from regard.position import Field, Gaussian, Shift

EPS = torch.finfo(torch.float64).eps
MODES = ("zeros", "replicate", "reflect", "circular")
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def made(axes, channels, out, kernel, seed=0, **more):
    torch.manual_seed(seed)
    return CONVS[axes](channels, out, kernel, **more).double()


def tokens(grid, heads):
    """Queries and keys of so many heads, which position alone tells apart."""
    return normal(heads, grid.rows, 0), normal(1, grid.columns, 0)


def everything(layer, x, upstream):
    """Output and gradients with respect to input, weight and bias."""
    x = x.clone().requires_grad_()
    output = layer(x)
    inputs = [x, *(p for p in (layer.weight, layer.bias) if p is not None)]
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def bounds(conv, x, upstream):
    """Running error bounds of all of these: (terms + 4) eps (sum of the terms' sizes).

    The convolution of absolute values sums the sizes, that of ones counts the terms (Higham 2002,
    eq. 3.5).
    """
    sizes, counts = copy.deepcopy(conv), copy.deepcopy(conv)
    for size, count in zip(sizes.parameters(), counts.parameters(), strict=True):
        size.data.abs_()
        count.data.fill_(1)
    sizes, ones = everything(sizes, x.abs(), upstream.abs()), torch.ones_like
    counts = everything(counts, ones(x), ones(upstream))
    return [(count + 4) * EPS * size for count, size in zip(counts, sizes, strict=True)]


KERNELS = [(axes, k) for axes in (1, 2) for k in (1, 2, 3, 5)] + [(2, (3, 2))]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("axes", "kernel"), KERNELS)
def test_attention_is_the_convolution_within_rounding(axes, kernel, mode):
    """Every stride, padding, dilation and number of groups; every other case has a bias."""
    x, tried = normal(2, 2, *(9, 10)[:axes]), 0
    for stride, padding, dilation, groups in itertools.product(
        (1, 2), (0, 1, 2, "same", "valid"), (1, 2), (1, 2)
    ):
        if padding == "same" and stride > 1:
            continue  # torch has no such convolution
        more = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        tried += 1
        conv = made(axes, 2, 4, kernel, bias=tried % 2 == 0, padding_mode=mode, **more)
        upstream = normal(*conv(x).shape, seed=1)
        found = everything(from_conv(conv), x, upstream)
        wanted = everything(conv, x, upstream)
        for one, other, bound in zip(found, wanted, bounds(conv, x, upstream), strict=True):
            assert one.shape == other.shape
            assert ((one - other).abs() <= bound).all(), more
    assert tried == 36


@pytest.mark.parametrize("heads", ["kernel", "min", "gaussian"])
@pytest.mark.parametrize("mode", MODES)
def test_volumes_without_a_batch(mode, heads):
    conv = made(3, 2, 4, (2, 3, 1), padding=(1, 1, 0), groups=2, padding_mode=mode)
    x = normal(2, 3, 4, 2)
    torch.testing.assert_close(from_conv(conv, heads=heads)(x), conv(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("heads", ["kernel", "min", "gaussian"])
def test_dtype_and_the_way_back(heads):
    conv = nn.Conv2d(1, 2, (3, 2), padding="same", dilation=(2, 1))
    layer = from_conv(conv, heads=heads)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    x = normal(2, 1, 5, 6).float()
    torch.testing.assert_close(layer(x), conv(x))
    if heads == "gaussian":
        with pytest.raises(FormError, match="is no convolution"):
            to_conv(layer)
        return
    back = to_conv(layer)
    assert (back.padding, back.dilation) == (conv.padding, conv.dilation)
    torch.testing.assert_close(back(x), conv(x))


def test_rows_show_which_pixels_an_output_reads():
    """Pixel (0, 0) of a padded 3 x 3 convolution: four taps are there, five rows are empty."""
    matrix = from_conv(nn.Conv2d(1, 1, 3, padding=1)).matrix((4, 5))
    rows = matrix[:, 0]
    assert rows.sum(-1).tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 1]
    assert [int(rows[h].argmax()) for h in (4, 5, 7, 8)] == [0, 1, 5, 6]
    assert torch.equal(matrix.dense(), matrix.matmul(torch.eye(20), form="convolutional"))


def test_shared_parameters_train_together():
    conv = made(2, 2, 3, 3, padding=1)
    layer = from_conv(conv, share=True)
    assert layer.weight is conv.weight
    assert from_conv(conv).weight is not conv.weight
    layer(normal(1, 2, 4, 4)).sum().backward()
    assert conv.weight.grad is not None
    with pytest.raises(ValueError, match="share=False"):
        from_conv(made(2, 1, 1, 3), heads="min", share=True)


@pytest.mark.parametrize("heads", ["kernel", "min", "gaussian"])
def test_what_is_frozen_stays_frozen(heads):
    conv = made(1, 2, 1, 3).requires_grad_(False)
    conv.bias.requires_grad_(True)
    layer = from_conv(conv, heads=heads)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"bias"}
    with torch.no_grad():
        parameters = list(from_conv(weight_norm(made(1, 2, 1, 3)), heads=heads).parameters())
    assert all(p.requires_grad for p in parameters)


@pytest.mark.parametrize("heads", ["kernel", "min", "gaussian"])
@pytest.mark.parametrize("mode", MODES)
def test_no_images_give_no_outputs(mode, heads):
    conv, x = made(2, 2, 3, 3, padding=1, padding_mode=mode), normal(0, 2, 5, 6)
    assert from_conv(conv, heads=heads)(x).shape == (0, 3, 5, 6)


def geometric(position, *, padding=((1, 1),), stride=1, dilation=1, mode="zeros"):
    """A layer on a line, of three heads."""
    geometry = Geometry((3,), (stride,), padding, (dilation,), mode)
    return ConvAttention(normal(2, 2, 3), None, position, geometry)


SHIFTS, TABLE = torch.arange(3)[:, None], normal(3, 3, seed=4)
LINE = Grid(3)
AGREE = {
    "shift": lambda: geometric(Shift(SHIFTS, LINE, "circular"), mode="circular", stride=2),
    "same": lambda: geometric(Shift(3 * SHIFTS, LINE), padding=((3, 3),), dilation=3),
    "field": lambda: geometric(Field(TABLE, LINE, first=0)),
    "one table for all": lambda: geometric(Field(TABLE[0], LINE, first=0)),
    "dilated field": lambda: geometric(Field(TABLE, LINE, 0, 2), padding=((4, 4),), dilation=2),
}
DISAGREE = {
    "uneven": (lambda: geometric(Shift(SHIFTS, LINE), padding=((2, 0),)), "differs from side"),
    "moved": (lambda: geometric(Shift(SHIFTS - 1, LINE)), "look elsewhere"),
    "fewer taps": (lambda: geometric(Shift(SHIFTS[:1], LINE)), "look elsewhere"),
    "mode": (lambda: geometric(Shift(SHIFTS, LINE, "circular")), "'circular' beyond the border"),
    "first": (lambda: geometric(Field(TABLE, LINE)), r"from \(-1,\) on"),
    "taps": (lambda: geometric(Field(TABLE[:, :2], LINE, first=0)), r"has taps \(2,\)"),
    "dilation": (lambda: geometric(Field(TABLE, LINE, 0, 2)), r"with dilation \(2,\)"),
}


@pytest.mark.parametrize("name", AGREE)
def test_the_way_back_of_layers_made_by_hand(name):
    layer, x = AGREE[name](), normal(2, 2, 9)
    torch.testing.assert_close(to_conv(layer)(x), layer(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", DISAGREE)
def test_a_layer_whose_heads_and_geometry_disagree_is_no_convolution(name):
    make, words = DISAGREE[name]
    with pytest.raises(FormError, match=words):
        to_conv(make())


# Borders: what stands for the pixels that are not there


def hard(grid):
    """One-hot heads in the limit, at the nine taps of a 3 x 3 kernel."""
    centre = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).double()
    return Gaussian.of(centre, grid, alpha=46.0)


@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_hard_heads_without_virtual_pixels_replicate_the_border(form):
    grid, x = Grid((5, 6)), normal(5, 6)
    matrix = attention(*tokens(grid, 9), score=PositionOnly(), position=hard(grid))
    found = matrix.matmul(x.reshape(-1, 1), form=form).reshape(9, 5, 6)
    padded = F.pad(x[None, None], (1, 1, 1, 1), "replicate")
    assert torch.equal(found, F.unfold(padded, 3).reshape(9, 5, 6))


def test_virtual_pixels_of_value_zero_pad_with_zeros():
    conv = made(2, 1, 1, 3, padding=1)
    x = normal(1, 1, 5, 6)
    found = from_conv(conv, heads="gaussian")(x)
    torch.testing.assert_close(found, conv(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", ["dense", "tiled", "convolutional"])
def test_soft_heads_are_a_convolution_over_one_of_ones(form):
    """softmax over the keys that exist = conv(x, w) / conv(1, w), w = exp(bias)."""
    grid, x = Grid((5, 6)), normal(1, 1, 5, 6)
    spot = Gaussian.of(torch.tensor([[0.3, -0.8]]).double(), grid, alpha=0.7)
    near = Neighborhood((5, 6), 3, border="cut")
    matrix = attention(*tokens(grid, 1), score=PositionOnly(), position=spot, mask=near)
    away = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).double() - spot.centre
    w = (-0.7 * away.square().sum(-1)).exp().reshape(1, 1, 3, 3)
    wanted = F.conv2d(x, w, padding=1) / F.conv2d(torch.ones_like(x), w, padding=1)
    found = matrix.matmul(x.reshape(1, 30, 1), form=form).reshape(1, 1, 5, 6)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("alpha", [2, 5, 10, 20, 30, 40, 46, 50])
def test_soft_becomes_hard_under_the_bound(alpha):
    """|error| <= 2 eps max|x| sum|W|, eps = 1 - theta^-2, theta = sum over m of e^(-alpha m^2)."""
    conv, x = made(2, 4, 5, 3, padding=1), normal(1, 4, 8, 8)
    error = (from_conv(conv, heads="gaussian", alpha=alpha)(x) - conv(x)).abs()
    theta = torch.exp(-alpha * torch.arange(-9.0, 10).double().square()).sum()
    weight = conv.weight.abs().sum((1, 2, 3))[:, None, None]
    off = -torch.expm1(-2 * torch.log1p(theta - 1))
    rounding = 40 * EPS * weight * x.abs().max()  # of 36 products, in either
    assert (error <= 2 * off * x.abs().max() * weight + rounding).all()
    if alpha < 20:  # the bound is not empty: what is off the centre shows
        assert error.max() > 0.01 * off
    if alpha >= 46:
        weights = from_conv(conv, heads="gaussian", alpha=alpha).matrix((8, 8)).dense()
        assert (weights.amax(-1) == 1).all()


# A model


@pytest.mark.parametrize("heads", ["kernel", "gaussian"])
def test_a_converted_network_has_the_same_logits_and_trains(heads):
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(45, 3),
    ).double()  # fmt: skip
    model = copy.deepcopy(cnn)
    model[0], model[2] = (from_conv(cnn[i], heads=heads) for i in (0, 2))
    x, labels = normal(6, 1, 8, 8), torch.arange(6) % 3
    assert (model(x) - cnn(x)).abs().max() <= 1e-10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


# Words


class Centred(nn.Conv1d):
    """Computes something else than its parameters say."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


ERRORS = {
    "transposed": (lambda: from_conv(nn.ConvTranspose2d(1, 1, 3)), DtypeError, r"A\.mT @ x"),
    "linear": (lambda: from_conv(nn.Linear(2, 2)), DtypeError, "not Linear"),
    "lazy": (lambda: from_conv(nn.LazyConv2d(1, 3)), ShapeError, "run it on an input"),
    "subclass": (lambda: from_conv(Centred(1, 1, 3)), TypeError, "Centred, a subclass"),
    "normed": (
        lambda: from_conv(weight_norm(nn.Conv1d(1, 1, 3)), share=True),
        TypeError,
        "cannot be shared",
    ),
    "dtype": (
        lambda: from_conv(nn.Conv1d(1, 1, 3))(torch.zeros(1, 1, 4).double()),
        DtypeError,
        "x has dtype torch.float64 but layer.weight has torch.float32",
    ),
    "heads": (lambda: from_conv(nn.Conv1d(1, 1, 3), heads="all"), ValueError, "'min'"),
    "small": (
        lambda: from_conv(nn.Conv1d(1, 1, 3, dilation=2))(torch.zeros(1, 1, 4)),
        ShapeError,
        r"reaches over \(5,\)",
    ),
    "channels": (
        lambda: from_conv(nn.Conv1d(2, 1, 3))(torch.zeros(1, 3, 4)),
        ShapeError,
        r"\[\*batch, 2",
    ),
    "back": (lambda: to_conv(nn.Conv1d(1, 1, 1)), DtypeError, "layer must be"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_would_work(name):
    call, kind, words = ERRORS[name]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("heads", ["kernel", "gaussian"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_gives_the_dtype_that_a_convolution_gives(kind, bias, heads):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 3, 3, padding=1, bias=bias), torch.randn(2, 2, 5, 6)
    if kind == torch.float64:  # which autocast leaves alone
        conv = conv.double()
    layer = from_conv(conv, heads=heads)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = layer(x.to(kind)), conv(x.to(kind))
    assert found.dtype == wanted.dtype
    # Both round inputs, weights, bias and sums to 8 bits: 18 products and a bias of size 1 / 4.
    eps = torch.finfo(wanted.dtype).eps
    size = F.conv2d(x.abs().double(), conv.weight.detach().abs().double(), padding=1) + 1
    assert ((found - wanted).abs().double() <= 4 * eps * size).all()
    if bias and kind != torch.float64:
        found.float().sum().backward()
        assert layer.bias.grad.dtype == torch.float32
        assert torch.equal(layer.bias.grad, torch.full((3,), 60.0))
