"""What a position part says of what does not fit: the kind of error, and its numbers."""

import pytest
import torch

from regard import Alibi, Bias, attention
from regard.errors import DtypeError, ShapeError
from regard.position import (
    T5,
    Cope,
    Fire,
    Kerple,
    LongRope,
    Ntk,
    Relative,
    Rotary,
    Shaw,
    TransformerXL,
    Yarn,
    sinusoid,
)

QUERY = torch.zeros(1, 2, 5, 4)


def on(position):
    return lambda: attention(QUERY, QUERY, position=position())


ERRORS = {
    "rotary, odd": (lambda: Rotary.of(7), ShapeError, ["7"]),
    "rotary, odd part": (lambda: Rotary.of(8, fraction=0.375), ShapeError, ["0.375", "8", "3"]),
    "rotary, axes": (lambda: Rotary.axial(6, torch.zeros(5, 2)), ShapeError, ["2 coord", "of 4"]),
    "rotary, wide": (on(lambda: Rotary.of(8)), ShapeError, ["width 4", "4 pairs"]),
    "rotary, few": (
        on(lambda: Rotary.of(4, positions=torch.arange(3))),
        ShapeError,
        ["3 tokens", "5 keys"],
    ),
    "rotary, offset": (
        on(lambda: Rotary.of(4, positions=torch.arange(6), offset=2)),
        ShapeError,
        ["6 tokens", "2 to 6"],
    ),
    "rotary, bool": (
        lambda: Rotary.of(4, positions=torch.ones(5, dtype=torch.bool)),
        DtypeError,
        ["bool"],
    ),
    "rotary, list": (lambda: Rotary.of(4, positions=[0, 1]), DtypeError, ["list"]),
    "rotary, shape": (lambda: Rotary.of(4, positions=torch.zeros(2, 5)), ShapeError, ["(2, 5)"]),
    "rotary, no coordinates": (on(lambda: Rotary(((1.0,), (0.5,)))), ShapeError, ["2 coordinates"]),
    "rotary, layout": (lambda: Rotary.of(4, layout="thirds"), ValueError, ["'thirds'"]),
    "relative, short": (lambda: Relative(torch.zeros(2, 2), 3), ShapeError, ["2 ent", "-3", "4"]),
    "relative, heads": (on(lambda: Relative(torch.zeros(3, 8), 3)), ShapeError, ["3", "2"]),
    "shaw, short": (lambda: Shaw(torch.zeros(2, 4), 3), ShapeError, ["2 ent", "-3", "4"]),
    "shaw, short values": (
        lambda: Shaw(torch.zeros(4, 4), 3, torch.zeros(3, 4)),
        ShapeError,
        ["3 ent", "-3", "4"],
    ),
    "shaw, width": (on(lambda: Shaw(torch.zeros(3, 6), 1)), ShapeError, ["width 6", "width 4"]),
    "shaw, heads": (on(lambda: Shaw(torch.zeros(3, 3, 4), 1)), ShapeError, ["3", "2"]),
    "t5, odd": (lambda: T5(torch.zeros(1, 7)), ShapeError, ["7 buckets", "4"]),
    "t5, few": (lambda: T5(torch.zeros(1, 2)), ShapeError, ["2 buckets", "4"]),
    "t5, one": (lambda: T5(torch.zeros(1, 1), bidirectional=False), ShapeError, ["1 buckets", "2"]),
    "t5, distance": (lambda: T5(torch.zeros(1, 32), max_distance=8), ValueError, ["9", "8"]),
    "t5, heads": (on(lambda: T5(torch.zeros(3, 8))), ShapeError, ["3", "2"]),
    "alibi, heads": (on(lambda: Alibi.of(3)), ShapeError, ["3", "2"]),
    "kerple, heads": (on(lambda: Kerple.of(3)), ShapeError, ["3", "2"]),
    "kerple, kind": (
        lambda: Kerple(torch.ones(1), torch.ones(1), "square"),
        ValueError,
        ["'square'"],
    ),
    "fire, heads": (on(lambda: Fire.of(3)), ShapeError, ["3", "2"]),
    "fire, network": (
        lambda: Fire(torch.ones(4), torch.ones(5), torch.ones(2, 4), torch.ones(2), *torch.ones(2)),
        ShapeError,
        ["4, 5"],
    ),
    "fire, output": (
        lambda: Fire(torch.ones(4), torch.ones(4), torch.ones(2, 4), torch.ones(3), *torch.ones(2)),
        ShapeError,
        ["2", "3"],
    ),
    "xl, width": (on(lambda: TransformerXL.of(2, 6, 8)), ShapeError, ["width 6", "width 4"]),
    "xl, heads": (on(lambda: TransformerXL.of(3, 4, 8)), ShapeError, ["3", "2"]),
    "xl, odd": (lambda: TransformerXL.of(2, 4, 7), ShapeError, ["7 columns"]),
    "cope, width": (on(lambda: Cope.of(6, 3)), ShapeError, ["width 6", "width 4"]),
    "cope, heads": (on(lambda: Cope(torch.zeros(3, 3, 4))), ShapeError, ["3", "2"]),
    "bias": (on(lambda: Bias(torch.zeros(5, 6))), ShapeError, ["(5, 6)", "(5, 5)"]),
    "longrope": (
        lambda: Rotary.of(8, scaling=LongRope((1.0,) * 3, (1.0,) * 4, 9, 10)),
        ShapeError,
        ["3 short", "4 pairs", "8"],
    ),
    "ntk": (lambda: Rotary.of(2, scaling=Ntk(2.0)), ShapeError, ["4", "2"]),
    "yarn, order": (lambda: Yarn(2.0, 100, fast=1.0, slow=2.0), ValueError, ["1.0", "2.0"]),
    "yarn, ramp": (lambda: Yarn(2.0, 100, ramp="turns"), ValueError, ["'turns'"]),
    "sinusoid": (lambda: sinusoid(torch.arange(3), 4, layout="pairs"), ValueError, ["'pairs'"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_numbers(name):
    call, kind, parts = ERRORS[name]
    with pytest.raises(kind) as raised:
        call()
    for said in parts:
        assert said in str(raised.value)
