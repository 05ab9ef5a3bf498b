"""What all pictures of the examples share; the colours are safe for colour-blind eyes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind eyes can tell apart, and a marker for each.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#882255", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = "osD^vP<>"

mpl.use("Agg")
mpl.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def save(figure: Any, folder: Path, name: str) -> None:
    """Write a PNG without the name and version of what drew it."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    plt.close(figure)
