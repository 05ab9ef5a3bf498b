"""What one more token costs after t: recomputing, a KV cache, a recurrent state.

Draws the numbers of bench/RESULTS.md, which `python -m bench.recurrent` measures.
"""

from __future__ import annotations

from pathlib import Path

from examples import report
from examples.recurrence import pictures
from examples.recurrence.mixers import RESULTS

MEASURED = Path(__file__).parents[2] / "bench" / "RESULTS.md"
HEAD = "| after t tokens | way | one token, ms | kept, KiB |"


def measured(text: str) -> dict[str, list[tuple[float, float, float]]]:
    """For each way, (t, milliseconds, KiB)."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for line in text.split(HEAD, 1)[1].splitlines()[2:]:
        if not line.startswith("|"):
            break
        after, way, time, kept = (cell.strip() for cell in line.strip("|").split("|"))
        found.setdefault(way, []).append((float(after), float(time), float(kept)))
    return found


def main(given: list[str] | None = None) -> None:
    """Draw both panels."""
    options = report.parse(report.arguments(__doc__), given, RESULTS)
    pictures.decoding(measured(MEASURED.read_text()), options.out)


if __name__ == "__main__":
    main()
