"""Topics of papers from who cites whom: additive attention along the edges of a graph.

GATv2: b_i = sum_j A_ij W x_j, where A is the softmax of w . leaky_relu(W' x_i + W x_j) over the
papers j that i cites or is cited by, and i itself: score `Additive`, mask `Graph`, nothing else.
Cora, public split: 140 of 2,708 papers have labels to learn from. Two layers, 8 heads of width 8
and one head of the 7 classes; 200 epochs of Adam at rate 0.005, weight decay 0.0005, dropout 0.7 on
inputs and weights; of all epochs the one with the best accuracy on the 500 papers for validation.

Brody, Alon, Yahav 2022, arXiv:2105.14491, eq. 7; settings as in DGL's example of GATv2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from examples.tasks.task import Job, Task
from regard import Additive, Attention, Dropout
from regard.graph import Graph
from regard.nn import Learnable

DROP = 0.7
WHERE = "cora.npz: Planetoid's ind.cora.* (github.com/kimiyoung/planetoid) as x, y, edge_index and \
train_idx, val_idx, test_idx"
PUBLISHED = (
    ("nearest class mean of the words, no graph", "59.7", "computed on these files"),
    ("same, words averaged twice over neighbours", "77.3", "computed on these files"),
    (
        "MLP without the graph",
        "55.1",
        "GAT paper, arXiv:1710.10903, table 2 (recalled, not read again)",
    ),
    ("Planetoid", "75.7", "same"),
    ("GCN", "81.5", "same"),
    ("GAT, 8 heads of width 8", "83.0 ± 0.7", "the paper's, in github.com/PetarV-/GAT, issue 19"),
    ("GAT in DGL, 300 epochs", "84.0", "github.com/dmlc/dgl, examples/pytorch/gat"),
    ("GATv2 in DGL, 200 epochs", "82.1", "github.com/dmlc/dgl, examples/pytorch/gatv2"),
)
FOUND = (
    "At the level of DGL's GATv2, which has the same settings but takes the last epoch; 1.2 below "
    "the GAT paper's mean of 100 runs. Single models here lie between 80.6 and 83.7, so that three "
    "of them do not tell these apart."
)


@dataclass(frozen=True)
class Papers:
    """Words [n, words] whose rows sum to 1, topics [n], links [2, E], and the split."""

    words: Tensor
    topics: Tensor
    links: Tensor
    parts: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def read(path: Path | None) -> Papers:
        """Read the graph; a ring of noise, of which nothing is learned, without a path."""
        if path is None:
            ring = torch.stack([torch.arange(40), torch.arange(1, 41) % 40])
            parts = torch.arange(40).chunk(3)
            noise = torch.rand(40, 30, generator=torch.Generator().manual_seed(0))
            return Papers(noise, torch.arange(40) % 7, torch.cat([ring, ring.flip(0)], 1), parts)
        with np.load(path) as held:
            names = ("x", "y", "edge_index", "train_idx", "val_idx", "test_idx")
            x, y, links, *parts = (torch.from_numpy(held[name]) for name in names)
        words = F.normalize(x.float(), p=1, dim=1)
        return Papers(words, y.long(), links.long(), tuple(part.long() for part in parts))


class GraphAttention(nn.Module):
    """GATv2: x [n, width] -> [n, heads head_width], and the lazy matrix [heads, n, n]."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_query = nn.Linear(width, heads * head_width)
        self.to_key = nn.Linear(width, heads * head_width)
        self.score = Learnable(Additive.of(heads, head_width, "leaky_relu"))
        for weight in (self.to_query.weight, self.to_key.weight, *self.score.parameters()):
            nn.init.xavier_normal_(weight, gain=nn.init.calculate_gain("relu"))

    def forward(self, x: Tensor, mask: Graph) -> tuple[Tensor, Attention]:
        x = F.dropout(x, DROP, self.training)
        query, key = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for project in (self.to_query, self.to_key)
        )
        drop = Dropout(DROP) if self.training else None
        A = regard.attention(query, key, score=self.score(), mask=mask, dropout=drop)
        return (A @ key).transpose(-3, -2).flatten(-2), A


class Model(nn.Module):
    """Words of all papers to logits of their topics, [n, topics]."""

    def __init__(self, words: int, topics: int, links: Tensor) -> None:
        super().__init__()
        self.mask = Graph(links, loops=True)
        self.layers = nn.ModuleList([GraphAttention(words, 8, 8), GraphAttention(8 * 8, 1, topics)])

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.layers[0](x, self.mask)
        logits, _ = self.layers[1](F.elu(hidden), self.mask)
        return logits


def learn(job: Job) -> list[float]:
    """Train on the papers with labels; test where validation was best."""
    papers = Papers.read(job.data)
    torch.manual_seed(job.seed)
    model = Model(papers.words.shape[1], 7, papers.links)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005, weight_decay=5e-4)
    known, *asked = papers.parts
    best = [-1.0, 0.0]
    with job.bar(2 if job.quick else 200) as bar:
        for _ in range(bar.total):
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(papers.words)[known], papers.topics[known]).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                right = (model(papers.words).argmax(-1) == papers.topics).double()
            found = [100 * float(right[part].mean()) for part in asked]
            if found[0] > best[0]:
                best = found
                job.save(model)
            bar.update()
    return best[::-1]


TASK = Task(
    "cora",
    __doc__,
    WHERE,
    "GATv2 in regard, 200 epochs",
    learn,
    ("test accuracy in %", "validation accuracy in %"),
    PUBLISHED,
    FOUND,
    seeds=3,
)
main = TASK.main

if __name__ == "__main__":
    main(None)
