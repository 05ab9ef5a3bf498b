"""What a wrong input is told: the kind of error, what was given, and what would work."""

import re

import pytest
import torch

import regard
from regard import (
    Additive,
    Alibi,
    Bias,
    Bilinear,
    Causal,
    Cosine,
    Dense,
    DeviceError,
    Distance,
    Documents,
    Dot,
    Dropout,
    DtypeError,
    FormError,
    Padding,
    Prefix,
    RegardError,
    RowSum,
    ShapeError,
    Sigmoid,
    Softmax,
    Window,
    attention,
)

# Two batch entries, four heads on two key heads, five queries, six keys, width eight.
QUERY, KEY, VALUE = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 6, 8), torch.ones(2, 2, 6, 3)
MATRIX = attention(QUERY, KEY)
META = attention(QUERY.to("meta"), KEY.to("meta"))


def ones(*shape, **kind):
    return torch.ones(shape, **kind)


def check(kind, words, call):
    """`call` raises `kind`, and its message holds all of `words`."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


def make(**parts):
    return lambda: attention(QUERY, KEY, **parts)


OPERANDS = {
    "not a tensor": (DtypeError, ["query", "list"], lambda: attention([[1.0]], KEY)),
    "numpy": (DtypeError, ["key", "ndarray", "as_tensor"], lambda: attention(QUERY, KEY.numpy())),
    "integers": (DtypeError, ["int64", ".float()"], lambda: attention(QUERY.long(), KEY.long())),
    "complex": (DtypeError, ["complex64"], lambda: attention(QUERY.cfloat(), KEY.cfloat())),
    "two dtypes": (
        DtypeError,
        ["float64", "float32", ".to("],
        lambda: attention(QUERY.double(), KEY),
    ),
    "two devices": (DeviceError, ["meta", "cpu", ".to("], lambda: attention(QUERY, KEY.to("meta"))),
    "one axis": (ShapeError, ["(8,)", "length, width"], lambda: attention(ones(8), KEY)),
    "widths": (ShapeError, ["7", "8", "Bilinear"], lambda: attention(QUERY[..., :7], KEY)),
    "heads": (
        ShapeError,
        ["3 heads", "2", "multiple"],
        lambda: attention(QUERY[:, :3], KEY),
    ),
    "batches": (
        ShapeError,
        ["(3, 4, 5, 8)", "(2, 2, 6, 8)"],
        lambda: attention(ones(3, 4, 5, 8), KEY),
    ),
    "value length": (ShapeError, ["6", "(2, 2, 5, 3)"], lambda: MATRIX @ VALUE[:, :, :5]),
    "value heads": (ShapeError, ["3 heads", "2"], lambda: MATRIX @ ones(2, 3, 6, 3)),
    "value batch": (ShapeError, ["(3, 2, 6, 3)"], lambda: MATRIX @ ones(3, 2, 6, 3)),
    "value vector": (ShapeError, ["(6,)"], lambda: MATRIX @ ones(6)),
    "value dtype": (DtypeError, ["float64", "float32"], lambda: MATRIX @ VALUE.double()),
    "value integers": (DtypeError, ["int64", ".float()"], lambda: MATRIX @ VALUE.long()),
    "value device": (DeviceError, ["meta", "cpu"], lambda: MATRIX @ VALUE.to("meta")),
    "value not a tensor": (DtypeError, ["ndarray"], lambda: MATRIX @ VALUE.numpy()),
    "no numbers": (DeviceError, ["meta", "fake"], lambda: META @ VALUE.to("meta")),
    "no numbers, transposed": (DeviceError, ["meta"], lambda: META.mT @ QUERY.to("meta")),
    "no numbers, looked at": (DeviceError, ["meta"], META.received),
    "no numbers, masked": (
        DeviceError,
        ["meta", "runs"],
        lambda: attention(META.query, META.key, mask=Causal()) @ VALUE.to("meta"),
    ),
    "transpose length": (ShapeError, ["5", "(2, 2, 6, 3)"], lambda: MATRIX.mT @ VALUE),
    "transpose heads": (
        ShapeError,
        ["2 heads", "4"],
        lambda: MATRIX.mT @ ones(2, 2, 5, 3),
    ),
}
PARTS = {
    "score class": (DtypeError, ["score", "Dot(...)", "instance"], make(score=Dot)),
    "additive class": (DtypeError, ["score", "Additive(...)"], make(score=Additive)),
    "score name": (DtypeError, ["score", "'dot'"], make(score="dot")),
    "score absent": (DtypeError, ["score", "None"], make(score=None)),
    "score is a mask": (DtypeError, ["score", "Causal()"], make(score=Causal())),
    "position class": (DtypeError, ["position", "Alibi(...)"], make(position=Alibi)),
    "position tensor": (DtypeError, ["Bias("], make(position=ones(5, 6))),
    "position is a mask": (DtypeError, ["position", "Causal()"], make(position=Causal())),
    "mask class": (DtypeError, ["mask", "Causal(...)"], make(mask=Causal)),
    "mask bool": (DtypeError, ["mask", "True"], make(mask=True)),
    "mask float": (DtypeError, ["float32", ".bool()", "Bias("], make(mask=ones(5, 6))),
    "mask integers": (DtypeError, ["int64", ".bool()"], make(mask=ones(5, 6).long())),
    "mask shape": (
        ShapeError,
        ["(6, 5)", "5 rows", "6 columns"],
        make(mask=ones(6, 5).bool()),
    ),
    "mask heads": (ShapeError, ["(3,", "(2, 4)"], make(mask=Dense(ones(3, 5, 6).bool()))),
    "mask device": (
        DeviceError,
        ["meta", "cpu"],
        make(mask=Padding(ones(6, dtype=torch.bool, device="meta"))),
    ),
    "normalizer class": (DtypeError, ["normalizer", "Softmax(...)"], make(normalizer=Softmax)),
    "normalizer function": (DtypeError, ["normalizer"], make(normalizer=torch.softmax)),
    "normalizer absent": (DtypeError, ["normalizer", "None"], make(normalizer=None)),
    "other normalizer": (
        DtypeError,
        ["normalizer", "Softmax(...)"],
        lambda: MATRIX.with_normalizer(Softmax),
    ),
    "dropout number": (DtypeError, ["dropout", "Dropout", "0.1"], make(dropout=0.1)),
    "dropout class": (DtypeError, ["Dropout(...)"], make(dropout=Dropout)),
    "dropout module": (DtypeError, ["dropout"], make(dropout=torch.nn.Dropout(0.1))),
    "scale heads": (ShapeError, ["(3,)", "(2, 4)"], make(score=Dot(ones(3)))),
    "cosine heads": (ShapeError, ["(3,)", "(2, 4)"], make(score=Cosine(ones(3)))),
    "distance heads": (ShapeError, ["(3,)", "(2, 4)"], make(score=Distance(ones(3)))),
    "scale device": (DeviceError, ["Dot", "meta"], make(score=Dot(ones(4, device="meta")))),
    "additive width": (ShapeError, ["7", "8"], make(score=Additive(ones(7)))),
    "additive heads": (ShapeError, ["(3,", "(2, 4)"], make(score=Additive(ones(3, 8)))),
    "bilinear width": (ShapeError, ["7", "8"], make(score=Bilinear(ones(7, 8)))),
    "bilinear heads": (ShapeError, ["(3,", "(2, 4)"], make(score=Bilinear(ones(3, 8, 8)))),
    "slopes": (ShapeError, ["Alibi", "(3,)", "(2, 4)"], make(position=Alibi.of(3))),
    "bias": (ShapeError, ["(6, 5)", "5", "6"], make(position=Bias(ones(6, 5)))),
    "sink": (ShapeError, ["(3,)", "(2, 4)"], make(normalizer=Softmax(ones(3)))),
    "padding length": (ShapeError, ["(2, 5)", "6 keys"], make(mask=Padding(ones(2, 5).bool()))),
    "padding batch": (ShapeError, ["(3,", "(2, 4)"], make(mask=Padding(ones(3, 6).bool()))),
    "documents of keys": (
        ShapeError,
        ["(2, 5)", "6 keys", "key_ids"],
        make(mask=Documents(ones(2, 5).long())),
    ),
    "documents of rows": (
        ShapeError,
        ["(2, 4)", "5 rows"],
        make(mask=Documents(ones(2, 4).long(), ones(2, 6).long())),
    ),
    "prefix batch": (ShapeError, ["(3,", "(2, 4)"], make(mask=Prefix(ones(3).long()))),
    "nested": (
        ShapeError,
        ["(2, 5)", "6 keys"],
        make(mask=Causal() & ~(Window(1, 1) | Padding(ones(2, 5).bool()))),
    ),
}
ALONE = {
    "padding float": (DtypeError, ["float32", ".bool()"], lambda: Padding(ones(6))),
    "documents float": (DtypeError, ["float32", ".long()"], lambda: Documents(ones(6))),
    "prefix float": (DtypeError, ["float32"], lambda: Prefix(ones(2))),
    "lengths float": (DtypeError, ["float32"], lambda: Padding.of_lengths(ones(2), 6)),
    "dense float": (DtypeError, ["float32", "Bias("], lambda: Dense(ones(5, 6))),
    "bias bool": (DtypeError, ["bool"], lambda: Bias(ones(5, 6).bool())),
    "slopes list": (DtypeError, ["list"], lambda: Alibi([1.0])),
    "weight list": (DtypeError, ["list"], lambda: Additive([1.0])),
    "probability": (ValueError, ["[0, 1)", "1.5"], lambda: Dropout(1.5)),
    "probability one": (ValueError, ["[0, 1)", "1.0"], lambda: Dropout(1.0)),
    "probability nan": (ValueError, ["nan"], lambda: Dropout(float("nan"))),
    "seed": (ValueError, ["seed", "-1"], lambda: Dropout(0.1, seed=-1)),
    "softcap": (ValueError, ["softcap", "0.0"], lambda: Dot(softcap=0.0)),
    "activation": (ValueError, ["'elu'", "tanh"], lambda: Additive(ones(8), "elu")),
    "window": (ValueError, ["-1", "left", "at least 0"], lambda: Window(-1, 0)),
    "no heads": (ValueError, ["0"], lambda: Alibi.of(0)),
}
# Numbers that are no numbers of the right kind: told where they are given, not deep in a kernel.
PLAIN = {
    "scale": lambda: Dot(scale="a"),
    "offset": lambda: Causal("1"),
    "offset fraction": lambda: Causal(1.5),
    "window fraction": lambda: Window(1.5, 0),
    "window words": lambda: Window("a", 1),
    "prefix fraction": lambda: Prefix(1.5),
    "sink": lambda: Softmax(sink="a"),
    "sigmoid": lambda: Sigmoid("a"),
    "row sum": lambda: RowSum("a"),
    "probability": lambda: Dropout("a"),
    "seed": lambda: Dropout(0.1, seed=1.5),
    "slope": lambda: Additive(ones(8), "leaky_relu", "a"),
    "heads": lambda: Alibi.of(2.5),
    "topk": lambda: MATRIX.topk(2.5),
    "pool": lambda: MATRIX.pool(1.5),
    "distance": lambda: MATRIX.distance(offset=0.5),
    "statistics topk": lambda: MATRIX.statistics(topk=2.5),
    "statistics pool": lambda: MATRIX.statistics(pool="a"),
}
LOOKS = {
    "row": (IndexError, ["17", "5 rows"], lambda: MATRIX[..., 17, :]),
    "negative row": (IndexError, ["-6", "5 rows"], lambda: MATRIX[0, 0, -6]),
    "column": (IndexError, ["6", "6 columns"], lambda: MATRIX[..., 6]),
    "rows": (IndexError, ["9", "5 rows"], lambda: MATRIX[:, :, [0, 9]]),
    "head": (IndexError, ["4", "axis 1"], lambda: MATRIX[0, 4]),
    "batch": (IndexError, ["2", "axis 0"], lambda: MATRIX[2]),
    "too many": (IndexError, ["5 indices", "4 axes"], lambda: MATRIX[0, 0, 0, 0, 0]),
    "logits row": (IndexError, ["5", "5 rows"], lambda: MATRIX.logits(rows=5)),
    "logits column": (IndexError, ["9", "6 columns"], lambda: MATRIX.logits(columns=[0, 9])),
    "new axis": (RegardError, ["A[None]"], lambda: MATRIX[0, None]),
    "of tensors alone": (TypeError, ["A.dense()", "A @ x"], lambda: torch.softmax(MATRIX, -1)),
    "right factor": (ShapeError, ["5 rows", "(2, 2, 3, 6)"], lambda: VALUE.mT @ MATRIX),
    "fraction": (RegardError, ["0.5"], lambda: MATRIX[..., 0.5, :]),
    "short bool": (
        (RegardError, IndexError),
        ["5"],
        lambda: MATRIX[:, :, torch.tensor([True, False])],
    ),
    "limit": (
        ShapeError,
        ["240", "limit=10", "dense(limit=240)", "topk"],
        lambda: MATRIX.dense(limit=10),
    ),
    "topk": (ValueError, ["k", "at least 1", "0"], lambda: MATRIX.topk(0)),
    "pool": (ValueError, ["0"], lambda: MATRIX.pool(0)),
    "statistics topk": (ValueError, ["topk's k", "0"], lambda: MATRIX.statistics(topk=0)),
    "statistics pool": (ValueError, ["pool's size", "0"], lambda: MATRIX.statistics(pool=0)),
    "reduce": (ValueError, ["'sum'", "mean", "max"], lambda: MATRIX.pool(2, "sum")),
    "form": (FormError, ["'fast'", "tiled", "dense"], lambda: MATRIX.matmul(VALUE, form="fast")),
}
ALL = {
    f"{group}: {name}": case
    for group, cases in [("operand", OPERANDS), ("part", PARTS), ("alone", ALONE), ("look", LOOKS)]
    for name, case in cases.items()
}


@pytest.mark.parametrize(("kind", "words", "call"), ALL.values(), ids=ALL)
def test_error_names_what_was_given_and_what_would_work(kind, words, call):
    message = check(kind, words, call)
    assert len(message) < 500, "a message is read on a terminal"
    # Inner names of the library tell a user nothing.
    assert not re.search(r"Rule\(|Runs\(|Tiles\(|\b_[a-z]", message), message


@pytest.mark.parametrize("call", PLAIN.values(), ids=PLAIN)
def test_plain_argument_of_a_wrong_kind(call):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    # Raised by a check of the library: the words of Python or torch name inner calls instead.
    last = caught.traceback[-1].path
    assert any(last.is_relative_to(place) for place in regard.__path__)  # two, if editable
    assert not re.search(
        r"not supported between|unsupported operand|has no attribute|failed to "
        r"unpack|must be int, not",
        str(caught.value),
    )


@pytest.mark.parametrize(
    "score",
    [Dot(), Additive(ones(8)), lambda q, k, i, j: q @ k.mT],
    ids=["Dot", "Additive", "function"],
)
def test_second_derivatives_need_the_dense_form(score):
    query = QUERY.clone().requires_grad_()
    A = attention(query, KEY, score=score)

    def penalty(form):
        (slope,) = torch.autograd.grad(
            A.matmul(VALUE + torch.rand(1), form=form).square().sum(), query, create_graph=True
        )
        return torch.autograd.grad(slope.square().sum(), query)

    assert penalty("dense")[0].isfinite().all()
    check(FormError, ["dense"], lambda: penalty("tiled"))


def function(returned):
    return attention(QUERY, KEY, score=lambda *_: returned) @ VALUE


def test_a_function_that_returns_no_tile():
    check(DtypeError, ["tensor", "NoneType"], lambda: function(None))
    check(ShapeError, ["(2, 4, 5, 8)", "rows", "columns"], lambda: function(QUERY))
    check(ShapeError, ["()"], lambda: function(torch.tensor(1.0)))
    turn = {"score": lambda q, k, i, j: (q @ k.mT).cfloat()}
    check(DtypeError, ["complex64"], lambda: attention(QUERY[:, :2], KEY, **turn))


def test_what_a_function_raises_passes_through():
    def broken(query, key, i, j):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        attention(QUERY, KEY, score=broken) @ VALUE


def test_a_function_that_draws_random_numbers_is_refused():
    """What is recomputed for the gradient would not be what was computed."""
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 5, 2, dtype=torch.float64).unbind()

    def noisy(query, key, i, j):
        return torch.nn.functional.dropout(query @ key.mT, 0.5)

    def output(query):
        torch.manual_seed(0)
        return attention(query, key, score=noisy).matmul(value, form="tiled")

    check(FormError, ["random", "Dropout(p)"], lambda: output(query))


def test_a_function_that_writes_to_its_arguments_does_not_change_the_query():
    query = torch.randn(5, 2)
    before = query.clone()
    with pytest.raises(FormError, match="in place"):
        attention(query, query, score=lambda q, k, i, j: q.mul_(2) @ k.mT)
    assert torch.equal(query, before)


def test_and_between_masks_is_not_their_intersection():
    """`a and b` is b in Python: silently the wrong mask unless a mask has no truth value."""
    with pytest.raises(TypeError, match="&"):
        Causal() and Window(1, 1)


def test_every_error_is_caught_by_one_name():
    for kind in (ShapeError, DtypeError, DeviceError, FormError):
        assert issubclass(kind, RegardError)
    assert issubclass(DtypeError, TypeError)
    assert issubclass(ShapeError, ValueError)
