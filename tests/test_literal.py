"""Parts as text: what is read, and what is refused without being run."""

import pytest
import torch

from regard import Dropout, Mask, Normalizer, Position, Score
from regard.literal import LiteralError, example, names, of_kind, part


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        (Mask, "Causal() & Window(256, 0)", "Causal() & Window(256, 0)"),
        (Mask, " ~(Causal(offset=-1) | Prefix(3))", "~(Causal(offset=-1) | Prefix(3))"),
        (Mask, "Documents([0, 0, 1])", "Documents(tensor(3))"),
        (Mask, "Neighborhood((4, 4), 3, causal=(True, False))", None),
        (Position, "Alibi.of(8) + Bias([[0.0, -1.0]])", "Alibi(tensor(8)) + Bias(tensor(1, 2))"),
        (Position, "Rotary.of(64, scaling=Yarn(4.0, 8192))", None),
        (Position, "Shift([[0, 1]], Grid((2, 3)))", None),
        (Score, "Dot(scale=-0.5, softcap=50.0)", "Dot(scale=-0.5, softcap=50.0)"),
        (Score, "Additive.of(2, 4, 'relu')", None),
        (Score, "Features(softmax, log_decay=-0.1)", "Features(map=softmax, log_decay=-0.1)"),
        (Normalizer, "Softmax(sink=0.0)", "Softmax(sink=0.0)"),
        (Dropout, "Dropout(0.1, seed=3)", "Dropout(0.1, seed=3)"),
    ],
)
def test_parts_are_read(kind, text, shown):
    found = part(text, kind)
    assert isinstance(found, kind)
    assert shown is None or repr(found) == shown


def test_lists_are_tensors_of_their_own_dtype():
    assert torch.equal(part("Padding([True, False])", Mask).keep, torch.tensor([True, False]))
    assert part("Alibi([0.5, 0.25])", Position).slopes.dtype == torch.float32


@pytest.mark.parametrize("kind", [Score, Position, Mask, Normalizer, Dropout])
def test_examples_are_examples(kind):
    assert isinstance(part(example(kind).strip("'"), kind), kind)


def test_every_public_part_has_a_name():
    import regard

    for name in regard.__all__:
        item = getattr(regard, name)
        if isinstance(item, type) and issubclass(
            item, (Mask, Score, Position, Normalizer, Dropout)
        ):
            abstract = item in (Mask, Score, Position, Normalizer)
            assert abstract or names()[name] is item, name
    assert {"Alibi", "T5", "Fire", "Gaussian", "Rotary"} <= set(of_kind(Position))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Alibbi.of(8)", "'Alibbi' is no part of regard; did you mean Alibi?"),
        ("Zzzzzz()", "there are: Additive, Affine, Alibi"),
        ("Alibi", "names a class; write an instance: Alibi(...)"),
        ("Alibi.off(8)", "Alibi is not made by .off; write Alibi.of(...)"),
        ("Causal()", "'Causal()' is no position; one is 'Alibi.of(8)'. There are: Alibi, Bias"),
        ("Alibi.of(0)", "'Alibi.of(0)': Alibi.of's num_heads must be at least 1"),
        ("Alibi.of(8) + Causal()", "'Alibi.of(8) + Causal()': unsupported operand"),
        ("Alibi(3)", "'Alibi(3)': Alibi's slopes must be a torch.Tensor"),
        ("Alibi([0.5, 'a'])", "[0.5, 'a']\": "),
        ("Alibi.of(", "is not an expression such as 'Alibi.of(8)'"),
        ("", "is not an expression such as 'Alibi.of(8)'"),
        ("(" * 5000, "is not an expression"),
        ("__import__('os').system('true')", "cannot be called"),
        ("open('x')", "'open' is no part of regard"),
        ("Alibi.__class__", "is not allowed here"),
        ("Alibi.of.__globals__", "is not allowed here"),
        ("(lambda: 1)()", "cannot be called; parts can"),
        ("[x for x in (1, 2)]", "is not allowed here"),
        ("Alibi.of(*[8])", "is not allowed here"),
        ("Alibi.of(**{'num_heads': 8})", "is not allowed here"),
        ("Alibi.of(2 ** 3)", "'2 ** 3' is not allowed here"),
        ("Alibi.of(f'{1}')", "is not allowed here"),
        ("Alibi.by_distance(1)", "Alibi is not made by .by_distance"),
        ("identity(1)", "cannot be called; parts can"),
        ("softmax.of(1)", "softmax is not made by .of; write softmax(...)"),
        ("1", "'1' is no position"),
    ],
)  # fmt: skip
def test_everything_else_is_refused(text, words):
    with pytest.raises(LiteralError) as told:
        part(text, Position)
    assert words in str(told.value)
