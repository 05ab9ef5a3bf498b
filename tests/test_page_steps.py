"""The worked output step by step: each step shows what it adds, with the model's own numbers."""

import pytest
import torch
from reader import Reader
from torch import nn

from regard import Additive
from regard.look import capture, look
from regard.nn import SelfAttention

LABELS = "return [...document.querySelectorAll('#steps button')].map((x) => x.ariaLabel)"


@pytest.fixture
def page(browser, sentence):
    page = Reader(browser, sentence[1])
    page.go("#layer=2&head=0&i=12&j=9")
    page.settles(i=12, j=9)
    return page


def heads_shown(page):
    """Titles of the table's columns that are not for later."""
    return page.run(
        "return [...document.querySelectorAll('#worked thead th')]"
        ".filter((x) => getComputedStyle(x).visibility === 'visible')"
        ".map((x) => x.firstChild.textContent)"
    )


def test_steps_by_keys_show_one_column_after_another(page):
    whole = heads_shown(page)
    assert whole[:5] == ["key j", "aⱼ", "kⱼ", "αⱼ = q · kⱼ", "× 0.177"]
    assert whole[-2:] == ["α′ⱼ vⱼ", "W^o α′ⱼ vⱼ"]
    seen = []
    for step in (1, 2, 4, 5, 8, 9, 10, 11, 12, 13):  # neither rotary, position nor mask here
        page.press("n")
        page.settles(step=step)
        shown = heads_shown(page)
        assert shown[: len(seen)] == seen
        seen = shown
        assert page.text("step-words")
        hidden = page.run("return document.querySelectorAll('#worked .later').length")
        assert (hidden == 0) == (step == 13)
    assert seen == whole
    page.press("n")
    page.settles(step=0)
    page.press("b")
    page.settles(step=13)
    page.until(lambda: page.driver.current_url.endswith("&step=13"))
    page.assert_quiet()


def test_the_check_is_hidden_until_its_step(page):
    for step, shown in ((10, "hidden"), (11, "visible")):
        page.go(f"#layer=2&head=0&i=12&j=9&step={step}")
        page.settles(step=step)
        kind = page.run("return getComputedStyle(document.getElementById('check')).visibility")
        assert kind == shown


def test_the_steps_say_what_is_true_of_the_layer(page):
    page.go("#layer=2&head=0&i=12&j=9&step=5")
    page.settles(step=5)
    assert "Times 0.177, which is 1/√32" in page.text("step-words")
    page.go("#layer=2&head=0&i=12&j=9&step=2")
    page.settles(step=2)
    made = "found equal: q by “query”, k by “key”, v by “value”."
    assert page.text("step-words").endswith(made)
    page.go("#layer=2&head=0&i=12&j=9&step=13")
    page.settles(step=13)
    assert "12 × 32 = 384 numbers" in page.text("step-words")
    assert "head 11" in page.text("worked")
    labels = page.run(
        "return [...document.querySelectorAll('#steps button')].map((x) => x.ariaLabel)"
    )
    assert labels[1] == "Step 1: inputs"


def test_layers_have_the_steps_they_need(browser, tmp_path):
    torch.manual_seed(0)
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    mask[3, 1] = 0.5

    class Biased(nn.Module):
        def forward(self, query, key, value):
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    seen = look(Biased().eval(), tuple(torch.randn(3, 1, 1, 6, 8)))
    page = Reader(browser, seen.save(tmp_path / "biased.html"))
    labels = page.run(
        "return [...document.querySelectorAll('#steps button')].map((x) => x.ariaLabel)"
    )
    numbers = [int(label.split()[1].rstrip(":")) for label in labels if label.startswith("Step ")
               and label != "Step back, key b"]  # fmt: skip
    assert numbers == [1, 2, *range(4, 13)]  # one head: none beside it
    layer = SelfAttention(8, 2, score=Additive.of(2, 4))
    seen = look(layer.eval(), torch.randn(1, 5, 8))
    page = Reader(browser, seen.save(tmp_path / "additive.html"))
    page.go("#step=6&i=1&j=1")
    page.settles(step=6)
    assert "Here the score is Additive" in page.text("step-words")
    page.assert_quiet()


def test_what_a_module_was_given_and_which_layers_made_q_k_v():
    class Own(nn.Module):
        def __init__(self, turn):
            super().__init__()
            self.ask, self.answer, self.give = (nn.Linear(12, 12) for _ in range(3))
            self.turn = turn

        def forward(self, x):
            heads = [
                f(x).unflatten(-1, (3, 4)).transpose(1, 2)
                for f in (self.ask, self.answer, self.give)
            ]
            heads[0] = heads[0] * self.turn
            mixed = nn.functional.scaled_dot_product_attention(*heads)
            return mixed.transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    x = torch.randn(2, 7, 12)
    for turn, names in ((1.0, ("ask", "answer", "give")), (1.01, ("", "answer", "give"))):
        model = Own(turn).eval()
        with torch.no_grad(), capture(model) as calls:
            model(x)
        assert calls[0].made_by == names
        assert torch.equal(calls[0].inputs, x)
        assert torch.equal(calls[0].item(1).inputs, x[1:])


def test_the_page_shows_the_inputs_it_was_given(page, sentence):
    given = sentence[0].captured[2].inputs[0, 12]
    label = page.run("return document.querySelector('#worked .strip').ariaLabel")
    assert label.startswith("a: 384 numbers up to ")
    said = float(label.split()[-1].replace("\u2212", "-"))
    assert said == pytest.approx(float(given.abs().max()), rel=1e-3)
