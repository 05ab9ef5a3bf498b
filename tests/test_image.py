"""Vision models: the grid of patches is found, and weights lie on the picture in their places."""

import pytest
import torch
from reader import Reader

from regard.look import image, look

HIGH, WIDE = 48, 80  # 3 x 5 patches of 16


@pytest.fixture(scope="module")
def vit():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=(HIGH, WIDE), patch_size=16,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    for parameter in model.parameters():
        parameter.data *= 5  # weights that differ
    pixels = torch.linspace(-2, 3, 3 * HIGH * WIDE).reshape(1, 3, HIGH, WIDE)
    return look(model, {"pixel_values": pixels})


def test_the_grid_comes_from_the_real_height_and_width(vit):
    found = vit.scene.image
    assert (found.rows, found.columns, found.prefix, found.length) == (3, 5, 1, 16)
    labels = vit.scene.tokens.labels
    assert labels[:3] == ("[CLS]", "0,0", "0,1")
    assert labels[-1] == "2,4"
    assert vit.scene.tokens.special == (True, *(False,) * 15)
    assert vit.scene.change == 0.0
    assert found.pixels.shape == (3, HIGH, WIDE)
    assert (found.pixels.min(), found.pixels.max()) == (0, 1)


class Config:
    patch_size = 16


class Model(torch.nn.Module):
    config = Config()


@pytest.mark.parametrize(
    ("shape", "length", "expected"),
    [
        ((1, 3, 48, 80), 15, (3, 5, 0)),
        ((2, 3, 48, 80), 20, (3, 5, 5)),  # [CLS] and four registers
        ((1, 1, 32, 32), 4, (2, 2, 0)),  # grey
        ((1, 3, 48, 80), 14, None),  # fewer tokens than patches
        ((1, 3, 48, 80), 99, None),  # patches do not explain so many
        ((1, 2, 32, 32), 4, None),  # two channels are no colours
        ((1, 3, 8, 8), 1, None),  # smaller than a patch
    ],
)
def test_patches_must_explain_the_tokens(shape, length, expected):
    found = image.of_inputs(Model(), torch.rand(shape), length)
    if expected is None:
        assert found is None
    else:
        assert (found.rows, found.columns, found.prefix) == expected
        assert len(found.labels()) == length
    assert image.of_inputs(torch.nn.Linear(1, 1), torch.rand(shape), length) is None


def test_the_picture_shows_bright_what_is_attended_to(browser, tmp_path, vit):
    page = Reader(browser, vit.save(tmp_path / "vit.html"))
    saved = tmp_path / "saved"
    saved.mkdir()
    page.save_into(saved)
    page.go("#layer=1&head=1&i=7&j=3")
    page.settles(layer=1, head=1, i=7)
    weights = vit[1][0, 1, 7]
    rows = page.saved("image", "csv")
    found = torch.tensor([[float(x) for x in row] for row in rows])
    torch.testing.assert_close(found, weights[1:].reshape(3, 5), rtol=1e-4, atol=1e-7)
    page.assert_quiet()
    # How dark each patch is drawn: in the middle of each, against the picture itself.
    dark = page.run(
        "const canvas = document.getElementById('image'), c = canvas.getContext('2d');"
        "return Array.from({length: 15}, (_, at) => {"
        " const x = (at % 5 + 0.5) * canvas.width / 5;"
        " const y = (Math.floor(at / 5) + 0.5) * canvas.height / 3;"
        " return c.getImageData(x, y, 1, 1).data[2]; })"
    )
    brightest = int(weights[1:].argmax())
    lift = (weights[1:] * 16).clamp(min=2**-4)
    faint = [at for at in range(15) if lift[at] <= 2**-3.5]
    assert all(dark[brightest] > dark[at] for at in faint)
    assert "Keys before the patches (1) have" in page.text("image-hint")
    assert "the tokens before the patches" in page.text("sent")


def test_clicking_a_patch_makes_it_the_query(browser, tmp_path, vit):
    webdriver = pytest.importorskip("selenium.webdriver")
    page = Reader(browser, vit.save(tmp_path / "vit.html"))
    page.go("#layer=0&head=0&i=1&j=1")
    page.settles(i=1)
    canvas = page.driver.find_element("id", "image")
    page.run("arguments[0].scrollIntoView({block: 'center'})", canvas)
    across = page.run("return arguments[0].offsetWidth", canvas) / 5
    actions = webdriver.ActionChains(page.driver)
    actions.move_to_element_with_offset(canvas, round(across), 0).click().perform()
    page.settles(i=1 + 5 + 3, pinned=True)  # row 1, column 3


def test_texts_have_no_picture(browser, sentence):
    page = Reader(browser, sentence[1])
    assert page.run("return document.getElementById('image-part').hidden")
