"""Attention by loops over i and j, in float64 NumPy: what the library is compared with.

Written from the formulas alone. Arrays are [batch, heads, n, d] and [batch, key heads, m, d]; a
lane is one (batch, head). A case is made of plain functions: score(q, k, lane), bias(lane, i, j),
keep(lane, i, j) and a normalizer(logits of one row, lane) that sees the visible logits only.
"""

import math

import numpy as np


def at_lane(numbers, lane, dims=0):
    """The entry of `numbers` [*batch, heads, *dims] (or what broadcasts to it) for one lane."""
    numbers = np.asarray(numbers, dtype=np.float64)
    axes = numbers.shape[: numbers.ndim - dims]
    own = lane[len(lane) - len(axes) :]
    return numbers[tuple(0 if size == 1 else at for at, size in zip(own, axes, strict=True))]


# Scores: q and k are single vectors.


def dot(scale=None, softcap=None):
    def score(q, k, lane):
        s = sum(a * b for a, b in zip(q, k, strict=True))
        s = s * (len(q) ** -0.5 if scale is None else at_lane(scale, lane))
        return s if softcap is None else softcap * math.tanh(s / softcap)

    return score


def bilinear(weight, scale=1.0):
    def score(q, k, lane):
        w = at_lane(weight, lane, dims=2)
        s = sum(q[a] * w[a, b] * k[b] for a in range(len(q)) for b in range(len(k)))
        return s * at_lane(scale, lane)

    return score


def cosine(scale=1.0):
    def score(q, k, lane):
        lengths = math.sqrt(sum(a * a for a in q)) * math.sqrt(sum(b * b for b in k))
        product = sum(a * b for a, b in zip(q, k, strict=True))
        return at_lane(scale, lane) * product / lengths if lengths else 0.0

    return score


def distance(scale=1.0):
    def score(q, k, lane):
        return -at_lane(scale, lane) * sum((a - b) ** 2 for a, b in zip(q, k, strict=True))

    return score


ACTIVATIONS = {
    "tanh": lambda x, slope: math.tanh(x),
    "leaky_relu": lambda x, slope: x if x > 0 else slope * x,
    "relu": lambda x, slope: max(x, 0.0),
    "gelu": lambda x, slope: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "sigmoid": lambda x, slope: 1 / (1 + math.exp(-x)),
}


def additive(weight, activation="tanh", slope=0.2):
    def score(q, k, lane):
        w = at_lane(weight, lane, dims=1)
        act = ACTIVATIONS[activation]
        return sum(c * act(a + b, slope) for c, a, b in zip(w, q, k, strict=True))

    return score


def position_only():
    return lambda q, k, lane: 0.0


# Biases.


def no_bias(lane, i, j):
    return 0.0


def alibi(slopes, offset=0):
    return lambda lane, i, j: -at_lane(slopes, lane) * abs(i + offset - j)


def explicit(bias):
    """Bias [*batch, heads, n, m] or what broadcasts to it."""

    def read(lane, i, j):
        table = at_lane(bias, lane, dims=2)
        return table[i % table.shape[0], j % table.shape[1]]

    return read


def both(one, other):
    return lambda lane, i, j: one(lane, i, j) + other(lane, i, j)


# Masks, as predicates.


def everything(lane, i, j):
    return True


def causal(offset=0):
    return lambda lane, i, j: j <= i + offset


def window(left, right, offset=0):
    def keep(lane, i, j):
        step = j - (i + offset)
        return (left is None or -left <= step) and (right is None or step <= right)

    return keep


def documents(ids, key_ids=None):
    """Ids [batch, n] and [batch, m]."""
    key_ids = ids if key_ids is None else key_ids
    return lambda lane, i, j: ids[lane[0]][i] == key_ids[lane[0]][j]


def prefix(length):
    """A number, or [batch]."""
    return lambda lane, i, j: j < (length if isinstance(length, int) else length[lane[0]])


def padding(keep):
    """Bool [batch, m]."""
    return lambda lane, i, j: bool(keep[lane[0]][j])


def stored(keep):
    """Bool [*batch, heads, n, m] or what broadcasts to it."""
    return lambda lane, i, j: bool(explicit(keep)(lane, i, j))


# Normalizers: the logits of one row's visible keys -> their weights.


def softmax(sink=None):
    def weights(row, lane):
        terms = row + ([] if sink is None else [float(at_lane(sink, lane))])
        top = max(terms, default=0.0)
        total = sum(math.exp(x - top) for x in terms)
        return [math.exp(x - top) / total for x in row]

    return weights


def sigmoid(bias=0.0):
    return lambda row, lane: [1 / (1 + math.exp(-(x + bias))) for x in row]


def relu(mean=False):
    return lambda row, lane: [max(x, 0.0) / (len(row) if mean else 1) for x in row]


def row_sum(eps=0.0):
    def weights(row, lane):
        total = sum(row) + eps
        return [x / total if total else 0.0 for x in row]

    return weights


def identity():
    return lambda row, lane: row


# The matrix and its looks.


def logits(query, key, score, bias=no_bias, keep=everything):
    """[batch, heads, n, m]; -inf where a key is not visible."""
    batch, heads, n, _ = query.shape
    key_heads, m = key.shape[1:3]
    found = np.full((batch, heads, n, m), -np.inf)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                for j in range(m):
                    if keep((b, h), i, j):
                        k = key[b, h // (heads // key_heads), j]
                        found[b, h, i, j] = score(query[b, h, i], k, (b, h)) + bias((b, h), i, j)
    return found


def over_rows(function, numbers):
    """function(row, lane, i) of every row of `numbers` [batch, heads, n, m]."""
    batch, heads, n, _ = numbers.shape
    rows = [
        [[function(numbers[b, h, i], (b, h), i) for i in range(n)] for h in range(heads)]
        for b in range(batch)
    ]
    return np.array(rows, dtype=np.float64)


def weights(found, normalizer):
    """From logits [batch, heads, n, m]; a pair with logit -inf has weight 0."""

    def one(row, lane, i):
        visible = [j for j in range(len(row)) if row[j] > -math.inf]
        result = np.zeros(len(row))
        result[visible] = normalizer([float(row[j]) for j in visible], lane)
        return result

    return over_rows(one, found).reshape(found.shape)


def product(given, value):
    """sum_j weight_ij value_j, query head h with value head h // group."""
    batch, heads, n, m = given.shape
    group = heads // value.shape[1]
    output = np.zeros((batch, heads, n, value.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                for j in range(m):
                    output[b, h, i] += given[b, h, i, j] * value[b, h // group, j]
    return output


def transposed_product(given, x):
    """sum_i weight_ij x_i, [batch, heads, m, e]."""
    batch, heads, n, m = given.shape
    output = np.zeros((batch, heads, m, x.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                for j in range(m):
                    output[b, h, j] += given[b, h, i, j] * x[b, h, i]
    return output


def logsumexp(found, sink=None):
    def one(row, lane, i):
        terms = [x for x in row if x > -math.inf]
        terms += [] if sink is None else [float(at_lane(sink, lane))]
        if not terms:
            return -math.inf
        return max(terms) + math.log(sum(math.exp(x - max(terms)) for x in terms))

    return over_rows(one, found)


def shares(row):
    """|w_j| / sum_j |w_j| of one row; all 0 where the row has no weight."""
    total = sum(abs(w) for w in row)
    return [abs(w) / total if total else 0.0 for w in row]


def entropy(given):
    return over_rows(lambda row, lane, i: -sum(p * math.log(p) for p in shares(row) if p), given)


def mean_distance(given, offset=0):
    def one(row, lane, i):
        return sum(p * abs(i + offset - j) for j, p in enumerate(shares(row)))

    return over_rows(one, given)


def received(given):
    return given.sum(axis=2)


def topk(given, found, k):
    """The k largest weights of the visible keys of each row, then zeros: [batch, heads, n, k]."""

    def one(row, lane, i):
        seen = [w for w, x in zip(row, found[(*lane, i)], strict=True) if x > -math.inf]
        return (sorted(seen, reverse=True) + [0.0] * k)[:k]

    return over_rows(one, given)


def pool(given, size, reduce):
    """Cells of size x size pairs, smaller at the edges; a hidden pair counts as weight 0."""
    batch, heads, n, m = given.shape
    cells = np.zeros((batch, heads, -(-n // size), -(-m // size)))
    for b, h, r, c in np.ndindex(cells.shape):
        pairs = [
            given[b, h, i, j]
            for i in range(r * size, min((r + 1) * size, n))
            for j in range(c * size, min((c + 1) * size, m))
        ]
        cells[b, h, r, c] = max(pairs) if reduce == "max" else sum(pairs) / len(pairs)
    return cells
