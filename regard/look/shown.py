"""Tables and figures, of what was looked at and of what was recorded alike."""

from __future__ import annotations

from abc import ABC, abstractmethod

from regard.look.drawing import Figure
from regard.look.figure import figure_of
from regard.look.scene import Scene
from regard.look.spot import spot_of
from regard.look.statistics import Table, table_of


class Shown(ABC):
    """Something that has a scene to show."""

    @abstractmethod
    def shown(self) -> Scene:
        """The scene that tables and figures are of."""

    def table(self) -> Table:
        """One row per layer and head: entropy, distance, weight on sinks, kind and its score.

        Cost: one pass over each matrix, in O(n) memory.
        """
        return table_of(self.shown())

    def figure(
        self,
        panel: str = "map",
        *,
        layer: int | str = 0,
        head: int = 0,
        query: int = 0,
        key: int = 0,
        scale: str = "lift",
        beside: Shown | None = None,
    ) -> Figure:
        """One panel of the page, drawn without a browser: an SVG with a colour bar, and a CSV.

        panel: "heads", every head; "map", one head; "sent", one row; "received", one column;
            "difference", one head of two runs, and the difference of their weights
        layer: its number or its module's name
        scale: "lift", weight times the number of visible keys, in logs; or "weight"
        beside: for "difference": the other run, if this one was not made with one
        Raises FigureError for another panel or scale, or for a difference of one run; ShapeError
        for what is out of range, or for runs of other shapes.

        >>> import torch
        >>> from regard import look
        >>> seen = look({"query": torch.zeros(2, 5, 8), "key": torch.zeros(2, 5, 8)})
        >>> seen.figure("sent", head=1, query=3).csv().splitlines()[:2]
        ['key,token,weight,lift', '0,#0,0.20000000298023224,1.0']
        """
        scene = self.shown()
        if beside is not None:
            scene = scene.placed_beside(beside.shown())
        return figure_of(scene, panel, spot_of(scene, layer, head, query, key), scale)
