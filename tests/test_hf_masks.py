"""Masks of Hugging Face models as regard's: the same pairs, as structure, and what is refused."""

import pytest
import torch
from families import t
from transformers import masking_utils as hf

from regard.errors import RegardError
from regard.hf import masks
from regard.hf.masks import KNOWN, answers, structure
from regard.mask import compile_mask

CPU = torch.device("cpu")
BLOCKS = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1, 2, 2], [-1] * 11])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0] * 11])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3], [*range(11)]])
LEFT = torch.tensor([0, 3])


def remapped(rule, positions=POSITIONS):
    return hf.remap_positions_for_packed_sequence(rule, positions)


def packed(rule, positions=POSITIONS):
    return hf.and_masks(remapped(rule, positions), hf.packed_sequence_mask_function(DOCUMENTS))


def odd(batch, head, query, key):
    """No factory of transformers makes this."""
    return (query + key + batch) % 2 == 1


def one_pair_at_a_time(batch, head, query, key):
    """Index tensors would be read wrongly: only vmap gives one pair."""
    return torch.stack([query, key]).sum() % 3 == 0


RULES = {
    "causal": (hf.causal_mask_function, "Causal"),
    "bidirectional": (hf.bidirectional_mask_function, "every key"),
    "window": (hf.sliding_window_causal_mask_function(3), "Window"),
    "window of one": (hf.sliding_window_causal_mask_function(1), "Window"),
    "window wider than all": (hf.sliding_window_causal_mask_function(99), "Causal"),
    "both sides": (hf.sliding_window_bidirectional_mask_function(2), "Window(2, 2"),
    "chunks": (hf.chunked_causal_mask_function(3, LEFT), "Documents"),
    "padding": (hf.padding_mask_function(DOCUMENTS != 1), "Padding"),
    "packed": (packed(hf.causal_mask_function), "Causal"),
    "packed window": (packed(hf.sliding_window_causal_mask_function(2)), "Window"),
    "packed chunks": (packed(hf.chunked_causal_mask_function(2, LEFT * 0)), "Called"),
    "packed, steps of two": (packed(hf.causal_mask_function, 2 * POSITIONS), "Called"),
    "positions without documents": (remapped(hf.causal_mask_function), "Called"),
    "blocks": (
        hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(BLOCKS)), "Causal() | Documents(",
    ),
    "packed blocks": (
        hf.and_masks(
            hf.or_masks(remapped(hf.causal_mask_function), hf.blockwise_overlay(BLOCKS)),
            hf.packed_sequence_mask_function(DOCUMENTS),
        ),
        "Causal() | Documents(",
    ),
    "or all": (hf.or_masks(hf.bidirectional_mask_function, odd), "every key"),
    "unknown": (odd, "Called(odd)"),
    "causal and unknown": (hf.and_masks(hf.causal_mask_function, odd), "Causal"),
}  # fmt: skip
# rows, columns, first row, first column: a whole sequence, its continuation, one token, a cache
# that has dropped its first keys, a static cache that is longer than what it holds, few keys
GRIDS = [(11, 11, 0, 0), (3, 8, 5, 0), (1, 8, 7, 0), (3, 6, 5, 2), (4, 11, 2, 0), (9, 4, 2, 0)]
REAL = torch.tensor([[True] * 8, [False] * 2 + [True] * 6])


def visible(mask):
    batch, _, rows, columns = mask.shape
    keep = mask.runs(rows, columns, CPU).keep(slice(None), slice(None))
    return keep.expand(batch, 1, rows, columns)


def asked(function, sizes, **more):
    rows, columns, first_row, first_column = sizes
    return {
        "batch_size": 2, "q_length": rows, "kv_length": columns, "q_offset": first_row,
        "kv_offset": first_column, "mask_function": function, **more,
    }  # fmt: skip


@pytest.mark.parametrize("sizes", GRIDS)
@pytest.mark.parametrize("name", RULES)
def test_the_same_pairs_are_visible(name, sizes):
    function, _ = RULES[name]
    for real in (None, REAL):
        given = asked(function, sizes, attention_mask=real)
        expected = hf.sdpa_mask(**given, allow_is_causal_skip=False)
        assert torch.equal(visible(structure(**given)), expected.expand(2, 1, *sizes[:2]))


def test_padding_is_about_keys_where_there_are_more_queries():
    function = hf.padding_mask_function(REAL[:, :4])
    given = asked(function, (9, 4, 0, 0))
    expected = hf.sdpa_mask(**given, allow_is_causal_skip=False)
    assert "Padding" in repr(structure(**given))
    assert torch.equal(visible(structure(**given)), expected.expand(2, 1, 9, 4))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_arrives_as_structure(name):
    function, words = RULES[name]
    told = repr(structure(**asked(function, GRIDS[0])))
    assert words in told
    assert ("Called" in told) == ("Called" in words or "unknown" in name)


def test_all_factories_of_this_version_are_known():
    assert sorted(KNOWN.values()) == sorted(name for name, _, _ in masks.samples())


def test_a_function_for_single_pairs_is_asked_one_pair_at_a_time():
    given = asked(one_pair_at_a_time, GRIDS[1], use_vmap=True)
    expected = hf.sdpa_mask(**given, allow_is_causal_skip=False)
    assert torch.equal(visible(structure(**given)), expected)


def test_an_unknown_function_is_asked_in_blocks_of_rows(monkeypatch):
    sizes = (11, 11, 0, 0)
    whole = visible(structure(**asked(odd, sizes)))
    monkeypatch.setattr(masks, "BLOCK_PAIRS", 70)  # 3 rows of 2 x 11 pairs
    asked_for = []
    monkeypatch.setattr(
        masks, "answers", lambda f, grid, vmap: asked_for.append(grid.rows) or answers(f, grid)
    )
    assert torch.equal(visible(structure(**asked(odd, sizes))), whole)
    assert asked_for == [3, 3, 3, 2]


def inclusive(sliding_window):
    return lambda b, h, query, key: key >= query - sliding_window


def renamed(window):
    return lambda b, h, query, key: key > query - window


@pytest.mark.parametrize("later", [inclusive, renamed])
def test_a_factory_that_a_later_version_changes_is_asked_instead(monkeypatch, later):
    """A bound moves, or the closure has other names: the old translation must not be used."""
    with monkeypatch.context() as patch:
        patch.setattr(hf, "sliding_window_overlay", later)
        masks.learn()
        assert "sliding_window_overlay" not in KNOWN.values()
        given = asked(hf.and_masks(hf.causal_mask_function, later(3)), GRIDS[0])
        mask = structure(**given)
    masks.learn()
    assert "Called" in repr(mask)
    expected = hf.sdpa_mask(**given, allow_is_causal_skip=False)
    assert torch.equal(visible(mask), expected.expand(2, 1, 11, 11))


def test_masks_of_long_sequences_stay_small():
    length = 50_000  # as a tensor of bool: 2.5 GB
    positions = torch.arange(length) % 1000
    config = t.MistralConfig(sliding_window=64, attn_implementation="regard")
    for make in (hf.create_causal_mask, hf.create_sliding_window_causal_mask):
        mask = make(config, torch.empty(1, length, 0), None, None, position_ids=positions[None])
        runs = compile_mask(mask, length, length, CPU)
        assert runs.start.numel() == length  # one run for each row
        assert runs.counts().max() == (1000 if make is hf.create_causal_mask else 64)


def test_a_model_that_computes_with_its_mask_is_told():
    mask = structure(**asked(hf.causal_mask_function, GRIDS[0]))
    with pytest.raises(AttributeError, match=r"Causal\(\), not a tensor, and has no 'expand'"):
        mask.expand(2, 1, 11, 11)
    with pytest.raises(AttributeError, match="eager"):
        mask[:, :, :, :4]
    assert mask.shape == (2, 1, 11, 11)
    with pytest.raises(RegardError, match="11 queries and 11 keys, but its layer attends from 3"):
        mask.check(3, 11)
    with pytest.raises(RegardError, match="by spiral, which regard does not know"):
        structure(**asked(hf.causal_mask_function, GRIDS[0], spiral=1))
