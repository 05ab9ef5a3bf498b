"""The mask of attention along the edges of a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard import errors
from regard.mask import Mask
from regard.runs import Runs


@dataclass(frozen=True, repr=False, eq=False)
class Graph(Mask):
    """Node i attends to node j iff there is an edge from j to i, or i = j where `loops`.

    edges: integers [2, E], sources j in edges[0] and targets i in edges[1], as PyTorch Geometric's
    edge_index; an undirected graph lists each edge both ways. What is there twice counts once.
    loops: every node also attends to itself, as in graph attention networks
    Veličković et al. 2018, arXiv:1710.10903, eq. 3 (attention along edges); with
    `Additive.of(heads, width, activation="leaky_relu")` it is GATv2, Brody et al. 2022,
    arXiv:2105.14491, eq. 7. A node without edges gives 0.
    Cost: E numbers of memory. Compiled kernels collect the keys that 64 rows see, and compute the
    pairs of these: neighbours in the graph should have near numbers.
    Raises DtypeError and ShapeError where `edges` are not that, or reach beyond the matrix.

    >>> mask = Graph(torch.tensor([[0, 1, 2], [1, 2, 2]]), loops=True)
    >>> mask.runs(3, 3, torch.device("cpu")).keep(slice(0, 3), slice(0, 3)).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """

    edges: Tensor
    loops: bool = False

    def __post_init__(self) -> None:
        errors.check_integers("Graph's edges", self.edges)
        if self.edges.dim() != 2 or self.edges.shape[0] != 2:
            transposed = self.edges.dim() == 2 and self.edges.shape[1] == 2
            hint = " Yours looks transposed: use edges.mT." if transposed else ""
            raise errors.ShapeError(
                f"Graph's edges have shape {errors.show(self.edges.shape)}; they must be [2, E], "
                f"sources and targets.{hint}"
            )

    def check(self, rows: int, columns: int) -> None:
        if self.loops and rows != columns:
            raise errors.ShapeError(
                f"Graph(loops=True) needs as many queries as keys; the matrix has {rows} rows and "
                f"{columns} columns. Without loops the edges may join two sets of nodes."
            )

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        source, target = self.edges.to(device).long()
        for what, node, count in (("source", source, columns), ("target", target, rows)):
            outside = node[(node < 0) | (node >= count)]
            if outside.numel():
                raise errors.ShapeError(
                    f"Graph has an edge whose {what} is node {int(outside[0])}; the matrix has "
                    f"{count} {'keys' if what == 'source' else 'queries'}, counted from 0."
                )
        pairs = target * columns + source
        if self.loops:
            nodes = torch.arange(rows, device=device)
            pairs = torch.cat([pairs, nodes * columns + nodes])
        pairs = pairs.unique()
        counts = torch.bincount(pairs // max(columns, 1), minlength=rows)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        start = (pairs % max(columns, 1)).int()
        runs = Runs((), rows, columns, offsets, start, start + 1)
        return runs | runs  # joins neighbours
