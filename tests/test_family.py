"""The family of recurrences: the loop of each paper, the dense matrix, and chunks are one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard import Alibi, Causal, Features, Identity, PositionOnly, Rotary, RowSum, attention
from regard.feature_map import elu_plus_one, identity
from regard.form import chunks, scan
from regard.form.recurrent import recur

EPS = torch.finfo(torch.float64).eps
N, D, E = 100, 12, 5


@pytest.fixture(params=[1, 16, 64, N, None], ids=lambda size: f"C={size}" if size else "in C++")
def chunk(request, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", request.param or 64)
    if request.param:
        monkeypatch.setattr(scan, "KERNELS", None)
    monkeypatch.setattr(chunks, "PIECE_NUMBERS", 2000)  # several pieces


# Each makes S_t from S_(t-1), one token at a time, as its paper writes it.


def decayed(k, v, g, beta, more):
    """Linear attention, RetNet (one g), Mamba-2 (one for each token), GLA (for each channel)."""
    return lambda S, t: kept(S, g, t) + torch.outer(k[t], v[t])


def delta(k, v, g, beta, more):
    """DeltaNet; after a decay Gated DeltaNet and KDA: k_t is bound to v_t by a step of beta."""

    def token(S, t):
        S = kept(S, g, t)
        return S + beta[t] * torch.outer(k[t], v[t] - S.mT @ k[t])

    return token


def erased(k, v, g, beta, more):
    """GDN-2, Comba: what is read after the decay is not what is written."""

    def token(S, t):
        S = kept(S, g, t)
        return S + torch.outer(more[1][t], S.mT @ more[0][t]) + torch.outer(k[t], v[t])

    return token


def rwkv7(k, v, g, beta, more):
    """S (diag(w) - kappa^T (a kappa)) + v^T k: the erasing reads the state before its decay."""

    def token(S, t):
        return kept(S, g, t) + torch.outer(more[1][t], S.mT @ more[0][t]) + torch.outer(k[t], v[t])

    return token


def kept(S, g, t):
    return S if g is None else g.exp()[t if g.shape[0] > 1 else 0, :, None] * S


FAMILY = {
    "linear attention": (decayed, None, None),
    "RetNet": (decayed, (1, 1), None),
    "Mamba-2": (decayed, (N, 1), None),
    "GLA": (decayed, (N, D), None),
    "GLA, strong": (decayed, "strong", None),
    "DeltaNet": (delta, None, "beta"),
    "Gated DeltaNet": (delta, (N, 1), "beta"),
    "KDA": (delta, (N, D), "beta"),
    "KDA, strong": (delta, "strong", "beta"),
    "Comba": (erased, (N, 1), "erase"),
    "GDN-2": (erased, (N, D), "erase"),
    "RWKV-7": (rwkv7, (N, D), "before decay"),
}


class Member:
    """The tensors of one recurrence, its loop and its score."""

    def __init__(self, name, dtype=torch.float64):
        make, decay, erases = FAMILY[name]
        draw = torch.Generator().manual_seed(7)
        normal = [torch.randn(N, w, generator=draw, dtype=torch.float64) for w in (D, D, E)]
        self.q, k, self.v = normal
        self.k = F.normalize(k, dim=-1)
        self.g = self.beta = self.more = None
        uniform = torch.rand(N, D, generator=draw, dtype=torch.float64)
        if decay == "strong":  # e^-20 for most channels of a token, now and then nothing is left
            self.g = torch.where(uniform < 0.6, -20.0, -0.01).double()
            self.g[N // 3], self.g[N // 2, 0] = -torch.inf, -torch.inf
        elif decay is not None:
            self.g = -0.6 * uniform[: decay[0], : decay[1]]
        gate = torch.rand(N, D, generator=draw, dtype=torch.float64)
        if erases == "beta":
            self.beta = gate[:, :1]
        elif erases is not None:
            self.more = (gate * self.k, -self.k)
        self.make, self.undecayed = make, erases == "before decay"
        for field in ("q", "k", "v", "g", "beta"):
            given = getattr(self, field)
            setattr(self, field, given if given is None else given.to(dtype))
        self.more = self.more and tuple(x.to(dtype) for x in self.more)

    def leaves(self):
        """The tensors again, as leaves."""
        for field in ("q", "k", "v", "g", "beta"):
            given = getattr(self, field)
            setattr(self, field, given if given is None else given.clone().requires_grad_())
        self.more = self.more and tuple(x.clone().requires_grad_() for x in self.more)
        given = (self.q, self.k, self.v, self.g, self.beta, *(self.more or ()))
        return [x for x in given if x is not None]

    def matrix(self, part=slice(None)):
        g, beta = (_of(x, part) for x in (self.g, self.beta))
        erase = self.more and tuple(x[part] for x in self.more)
        if self.undecayed:
            erase = (erase[0] / g.exp(), erase[1])
        score = Features(identity, log_decay=g, beta=beta, erase=erase)
        mask = Causal()
        return attention(self.q[part], self.k[part], score=score, mask=mask, normalizer=Identity())

    def loop(self, S=None):
        token = self.make(self.k, self.v, self.g, self.beta, self.more)
        S = self.q.new_zeros(D, E) if S is None else S
        outputs = []
        for t in range(N):
            S = token(S, t)
            outputs.append(S.mT @ self.q[t])
        return torch.stack(outputs), S


def _of(x, part):
    return x if x is None or x.shape[-2] == 1 else x[part]


@pytest.mark.parametrize("name", FAMILY)
def test_matrix_loop_and_chunks_are_one(name, chunk):
    """The bound of a sum of N products of D-channel dots; and 1e-12 of the largest output."""
    one = Member(name)
    wanted, final = one.loop()
    A = one.matrix()
    weights = A.dense()
    bound = 4 * (N + D) * EPS * (weights.abs() @ one.v.abs()) + 1e-14 * wanted.abs().max()
    assert (bound <= 1e-12 * wanted.abs().max()).all()
    assert ((weights @ one.v - wanted).abs() <= bound).all()
    found, state = recur(A, one.v)
    assert ((found - wanted).abs() <= bound).all()
    assert float((state - final).abs().max()) <= 1e-13 * float(final.abs().max())
    tiled = A.matmul(one.v, form="tiled")
    assert ((tiled - wanted).abs() <= bound).all()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("at", [0, 1, 37, 64, N - 1])
def test_a_sequence_splits_anywhere(name, at):
    """The state after the first part begins the second."""
    one = Member(name)
    whole, final = recur(one.matrix(), one.v)
    first, state = recur(one.matrix(slice(0, at)), one.v[:at])
    second, state = recur(one.matrix(slice(at, N)), one.v[at:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
def test_gradients_of_chunks_are_those_of_the_loop(name, chunk):
    found = []
    for loop in (True, False):
        one = Member(name)
        leaves = one.leaves()
        start = torch.linspace(-1, 1, D * E, dtype=torch.float64).reshape(D, E).requires_grad_()
        output, last = one.loop(start) if loop else recur(one.matrix(), one.v, start)
        loss = (output * torch.linspace(0, 1, N * E).reshape(N, E)).sum() + last.square().sum()
        found.append(torch.autograd.grad(loss, [start, *leaves]))
    for wanted, got in zip(*found, strict=True):
        assert torch.isfinite(wanted).all()
        assert float((wanted - got).abs().max()) <= 1e-12 * (float(wanted.abs().max()) or 1.0)


@pytest.mark.parametrize("name", FAMILY)
def test_float32_is_within_2e_5(name, chunk):
    wanted, _ = Member(name).loop()
    low = Member(name, torch.float32)
    found, _ = recur(low.matrix(), low.v)
    assert float((found - wanted).norm() / wanted.norm()) <= 2e-5


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-10])
def test_row_sum_is_a_column_of_ones_and_the_ratio(eps):
    """eps = 1e-6 in fast-transformers, 1e-10 in flash-linear-attention."""
    one = Member("linear attention", torch.float32)
    parts = {"score": Features(elu_plus_one), "mask": Causal()}
    A = attention(one.q, one.k, normalizer=RowSum(eps), **parts)
    q, k = elu_plus_one(one.q), elu_plus_one(one.k)
    S = (k[:, :, None] * one.v[:, None, :]).cumsum(0)
    ratio = torch.einsum("nd,nde->ne", q, S) / ((q * k.cumsum(0)).sum(-1, keepdim=True) + eps)
    torch.testing.assert_close(A @ one.v, ratio, rtol=1e-6, atol=1e-6)
    sums = attention(one.q, one.k, normalizer=Identity(), **parts)
    ones = torch.cat([one.v, torch.ones(N, 1)], -1)
    both = sums @ ones
    torch.testing.assert_close(A @ one.v, both[:, :-1] / (both[:, -1:] + eps))


# Identities between sections of the theory.


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_alibi_on_linear_scores_is_retention():
    """exp(log s - m d) = s e^(-m d): softmax of the log of a score with ALiBi, and a decay."""
    one, slopes = Member("linear attention"), torch.tensor([0.3, 0.05], dtype=torch.float64)
    q, k = (x.expand(2, N, D) for x in (one.q, one.k))

    def log_score(query, key, i, j):
        return (elu_plus_one(query) @ elu_plus_one(key).mT).log()

    with_alibi = attention(q, k, score=log_score, position=Alibi(slopes), mask=Causal())
    score = Features(elu_plus_one, log_decay=-slopes[:, None, None])
    retention = attention(q, k, score=score, mask=Causal(), normalizer=RowSum())
    close(retention.matmul(one.v, form="recurrent"), with_alibi.matmul(one.v, form="dense"))


def test_alibi_alone_is_a_moving_average():
    """S <- e^-m S + v, z <- e^-m z + 1; and a quotient of two convolutions."""
    v, slope = Member("linear attention").v, torch.tensor(0.2, dtype=torch.float64)
    nothing = v.new_zeros(N, 1)
    A = attention(nothing, nothing, score=PositionOnly(), position=Alibi(slope), mask=Causal())
    found = A.matmul(v, form="recurrent")
    S, z, outputs = v.new_zeros(E), 0.0, []
    for t in range(N):
        S, z = (-slope).exp() * S + v[t], (-slope).exp() * z + 1
        outputs.append(S / z)
    close(found, torch.stack(outputs))
    powers = (-slope * torch.arange(N - 1, -1, -1)).exp()
    conv = [
        torch.nn.functional.conv1d(
            torch.nn.functional.pad(x.mT[:, None], (N - 1, 0)), powers[None, None]
        )
        for x in (v, torch.ones_like(v))
    ]
    close(found, (conv[0] / conv[1])[:, 0].mT)
    close(found, A.matmul(v, form="dense"))


def test_rotary_turns_before_the_state():
    one = Member("linear attention")
    rotary = Rotary.of(D)
    parts = {"score": Features(identity), "mask": Causal(), "normalizer": Identity()}
    A = attention(one.q, one.k, position=rotary, **parts)
    at = torch.arange(N)
    turned = attention(rotary.on_query(one.q, at), rotary.on_key(one.k, at), **parts)
    close(A.matmul(one.v, form="recurrent"), turned.matmul(one.v, form="dense"))


def product(one, **parts):
    score = Features(identity, **parts)
    return recur(attention(one.q, one.k, score=score, mask=Causal(), normalizer=Identity()), one.v)[
        0
    ]


def test_members_contain_each_other():
    one = Member("KDA")
    g, beta, ones = one.g[:, :1], one.beta, torch.ones(N, D, dtype=torch.float64)
    zeros = torch.zeros(N, 1, dtype=torch.float64)
    close(product(one, log_decay=zeros, beta=beta), product(one, beta=beta))
    close(product(one, log_decay=g * ones, beta=beta), product(one, log_decay=g, beta=beta))
    # GDN-2 with erase and write gates both beta is KDA: values and reads are multiplied by it.
    gated = Member("KDA")
    gated.v = beta * gated.v
    erase = (beta * one.k, -one.k)
    close(product(gated, log_decay=one.g, erase=erase), product(one, log_decay=one.g, beta=beta))
    close(product(one, beta=0.0), torch.zeros(N, E, dtype=torch.float64))


def test_the_delta_rule_replaces_what_was_bound_to_a_key():
    """Linear attention returns v1 + v2 for a key written twice, the delta rule v2."""
    k = torch.eye(4, dtype=torch.float64)[[1, 2, 1]]
    v = torch.tensor([[1.0], [5.0], [20.0]], dtype=torch.float64)
    parts = {"mask": Causal(), "normalizer": Identity()}
    sums = attention(k, k, score=Features(identity), **parts) @ v
    last = attention(k, k, score=Features(identity, beta=1.0), **parts) @ v
    assert sums.flatten().tolist() == [1, 5, 21]
    assert last.flatten().tolist() == [1, 5, 20]
