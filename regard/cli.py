"""The command line: `regard look`, `regard explain`, `regard bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from regard.commands import bench, explain
from regard.errors import RegardError
from regard.look import Look
from regard.look.drawing import FIGURES
from regard.look.figure import PANELS
from regard.look.scene import Scene
from regard.look.sources import ARRAY_FILES, SourceError, of_file, of_text

_EXAMPLES = """examples:
  regard look "The animal didn't cross the street because it was too tired"
  regard look notes.txt --tokens 128
  regard look "Once upon a time" --model ./my-gpt2 --layers 0,5
  regard look arrays.safetensors --causal --output heads.html
  regard look "The cat sat" --output heads.csv
  regard look "The cat sat" --output map.svg --panel map --at 2,0
  regard look "The cat sat" --beside "The dog sat" --output difference.svg --at 2,0
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 after a message on stderr."""
    parser = argparse.ArgumentParser(
        prog="regard", description="Self-attention, looked at and measured."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_look(commands)
    explain.add(commands)
    bench.add(commands)
    options = parser.parse_args(argv)
    try:
        status: int = options.run(options)
        return status
    except (RegardError, OSError) as error:
        print(f"regard {options.command}: {error}", file=sys.stderr)
        return 1


def _add_look(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "look",
        help="write one HTML page that shows a model's attention",
        description="Write one HTML page, which needs no network, that shows the attention of a "
        "text in a model, or of arrays in a file.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "what",
        nargs="?",
        help="a text, a text file, or a .safetensors or .npz file with query and key",
    )
    command.add_argument("--file", type=Path, help="a text file, whatever its name looks like")
    command.add_argument(
        "--model", type=Path, help="a local Hugging Face model directory (default: MiniLM)"
    )
    command.add_argument(
        "--beside", metavar="WHAT", help="another text or file of as many tokens, to compare with"
    )
    command.add_argument(
        "--beside-model", type=Path, metavar="PATH", help="the model of the other run, if another"
    )
    for option, run in (("--label", "this run"), ("--beside-label", "the other run")):
        command.add_argument(option, default="", metavar="NAME", help=f"what {run} is called")
    command.add_argument("--tokens", type=_positive, metavar="N", help="only the first N tokens")
    command.add_argument(
        "--layers", type=_numbers, metavar="0,5", help="only these layers, counted from 0"
    )
    command.add_argument("--causal", action="store_true", help="arrays: no query sees a later key")
    command.add_argument(
        "--output",
        type=Path,
        default=Path("regard-look.html"),
        help="the page (default: %(default)s); .svg or .png for a figure, .csv for the table",
    )
    command.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=0,
        metavar="PORT",
        help="serve the page on this machine instead of writing it (any free port by default)",
    )
    command.add_argument(
        "--panel",
        choices=PANELS,
        help="for .svg, .png (default: heads, or with --beside difference) or .csv: which panel",
    )
    command.add_argument(
        "--at",
        type=_numbers,
        default=(0, 0),
        metavar="L,H,I,J",
        help="of a panel: layer, head, and for rows and columns query and key",
    )
    command.set_defaults(run=_look)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of layer numbers such as 0,5"
        ) from error


def _look(options: argparse.Namespace) -> int:
    seen = Look(_scene(options)).named(options.label)
    if options.beside is not None or options.beside_model is not None:
        other = Look(_scene(_other(options))).named(options.beside_label)
        seen = Look(seen.scene.placed_beside(other.scene))
    elif options.beside_label:
        raise SourceError("--beside-label names the run of --beside or --beside-model")
    if options.serve is not None:
        # From the first moment on: the address may be read, and Ctrl+C pressed, before `wait`.
        with suppress(KeyboardInterrupt), seen.serve(options.serve) as server:
            print("\n".join(_summary(seen)))
            print(f"serving on this machine alone, until Ctrl+C:\n  {server.url}", flush=True)
            server.wait()
        return 0
    if not options.output.parent.is_dir():
        raise SourceError(f"{options.output.parent} is not a directory; --output needs one")
    path = _write(seen, options).resolve()
    print("\n".join(_summary(seen)))
    if options.output.suffix in FIGURES:
        print(f"wrote {path}")
        return 0
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MB); open it in any browser:")
    print(f"  {path.as_uri()}")
    return 0


def _other(options: argparse.Namespace) -> argparse.Namespace:
    """The options of the run that is placed beside: what differs is its text or its model."""
    changed = {"model": options.beside_model or options.model}
    if options.beside is not None:
        changed |= {"what": options.beside, "file": None}
    return argparse.Namespace(**{**vars(options), **changed})


def _write(seen: Look, options: argparse.Namespace) -> Path:
    """The page, a figure or a table, by the output's ending."""
    output: Path = options.output
    if output.suffix not in FIGURES:
        if options.panel is not None:
            raise SourceError(f"--panel is for {', '.join(FIGURES)}, not for {output.name}")
        return seen.save(output)
    usual = None if seen.scene.beside is None else "difference"
    panel = options.panel or usual
    if output.suffix == ".csv" and panel is None:
        seen.table().csv(output)
        return output
    if not 2 <= len(options.at) <= 4:
        raise SourceError("--at takes two to four numbers: layer, head, query, key")
    layer, head, query, key = (*options.at, 0, 0)[:4]
    if options.at == (0, 0):  # the first layer there is, if only some were asked for
        layer = seen.captured[0].number
    return seen.figure(panel or "heads", layer=layer, head=head, query=query, key=key).save(output)


def _scene(options: argparse.Namespace) -> Scene:
    path, text = _input(options)
    if path is not None and path.suffix in ARRAY_FILES:
        if options.model is not None:
            raise SourceError(f"{path.name} holds arrays, for which no --model runs")
        return of_file(path, causal=options.causal, limit=options.tokens, layers=options.layers)
    if options.causal:
        raise SourceError("--causal is for arrays; of a model, its own masks are read")
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} is not a text in UTF-8: {error}") from error
    assert text is not None
    _quieten()
    scene = of_text(text, model=options.model, limit=options.tokens, layers=options.layers)
    return scene if path is None else replace(scene, sources=(*scene.sources, str(path)))


def _input(options: argparse.Namespace) -> tuple[Path | None, str | None]:
    """The one thing to look at: (path, None) or (None, text)."""
    if (options.what is None) == (options.file is None):
        raise SourceError("give one thing to look at: a text, a file, or --file PATH")
    if options.file is not None:
        if not options.file.is_file():
            raise SourceError(f"{options.file} is not a file")
        return options.file, None
    path = Path(options.what)
    # Words with a space are a text even if a file has that name; --file says otherwise.
    looks_like_path = " " not in options.what.strip() and (path.suffix or os.sep in options.what)
    if path.suffix in ARRAY_FILES or looks_like_path or (options.what.strip() and path.is_file()):
        if path.is_dir():
            raise SourceError(f"{path} is a directory; for a model: --model {path} with a text")
        if not path.is_file():
            raise SourceError(f"there is no file {path}; a text with a space in it is read as text")
        return path, None
    return None, options.what


def _quieten() -> None:
    """No hub, and no progress bar between the lines that are printed here."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from transformers.utils import logging
    except ImportError:
        return  # of_text says which package is missing
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _summary(seen: Look) -> list[str]:
    scene, first = seen.scene, seen.captured[0]
    shown = len(scene.tokens.labels) or first.key.shape[2]
    lines = [
        f"{scene.title}: {len(seen.captured)} layers, {first.query.shape[1]} heads, "
        f"{shown} of {scene.tokens.total} tokens"
    ]
    routes = ", ".join(sorted({call.route for call in seen.captured}))
    if scene.change is None:
        lines.append("no model ran: these are the arrays of a file")
    elif scene.change == 0:
        lines.append(f"output bit-identical with and without the capture (route: {routes})")
    else:
        lines.append(f"output changed by at most {scene.change:.1e} under the capture")
    lines.extend(scene.notes)
    return lines
