"""Piecewise quadratic functions: exact in the ring, at the declared cost, uniform on the wire."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import combine, simulate, split

from protocols.errors import IntegrityError
from protocols.primitives.comparison_steps import _piecewise_loop
from protocols.primitives.loops import filled
from protocols.primitives.prg import Stream
from protocols.program.pieces import Pieces
from protocols.two_party import spline

words = st.integers(-(2**63) + 1, 2**63 - 1)
MOST = 2**30 - 2
points = st.one_of(st.sampled_from([0, 1, -1, MOST, -MOST]), st.integers(-MOST, MOST))


@st.composite
def pieces(draw):
    knots = sorted(draw(st.sets(points, min_size=1, max_size=6)))
    degree = draw(st.integers(0, 2))
    rows = [[draw(words) if j <= degree and (i or j < 2) else 0 for j in range(3)] for i in range(len(knots) + 1)]
    return Pieces(tuple(knots), tuple(c for row in rows for c in row), draw(st.integers(0, 62)))


def wrapped(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def expected(x: int, f: Pieces) -> int:
    i = sum(x >= knot for knot in f.knots)
    c0, c1, c2 = f.coefficients[3 * i : 3 * i + 3]
    return wrapped(c0 + c1 * x + c2 * x * x)


@settings(max_examples=80, deadline=None)
@given(f=pieces(), values=st.lists(points, min_size=1, max_size=20))
def test_every_piece_is_exact_at_its_declared_cost(f, values):
    values = values + [k + d for k in f.knots for d in (-1, 0, 1)]
    x = torch.tensor(values)
    shares = split(x)
    wires = [None, None]

    def program(party):
        wires[party.rank] = party.wire
        return spline.evaluate(party, shares[party.rank], f)

    got = combine(simulate([spline.request_of(x.shape, f)], program))
    assert got.tolist() == [expected(v, f) for v in values]
    cost = spline.evaluate.cost(len(values), len(f.knots))
    assert sum(wire.bytes for wire in wires) == cost.payload_bytes
    assert max(wire.clock for wire in wires) == cost.rounds


def sum_of_pieces(c, X, table, r, beta, beta_r, beta_r2, r2, is_keeper):
    """What `comparison_steps.piecewise` returns, knot by knot over whole arrays."""
    (a0, a1, a2), total = (np.full_like(X, v) for v in table[0]), np.zeros_like(X)
    for i in range(len(c)):
        A, B, C = table[i + 1]
        ci = c[i].astype(np.int64)
        a0, a1, a2 = a0 + ci * A, a1 + ci * B, a2 + ci * C
        D, slope = A + X * (B + X * C), B + 2 * X * C
        total += (1 - 2 * ci) * (beta[i] * D - beta_r[i] * slope + beta_r2[i] * C)
    return total + is_keeper * (a0 + X * (a1 + X * a2)) - r * (a1 + 2 * X * a2) + r2 * a2


@settings(max_examples=30, deadline=None)
@given(f=pieces(), seed=st.binary(min_size=16, max_size=16), n=st.integers(1, 9))
def test_the_compiled_sum_is_the_same_as_numpys(f, seed, n):
    stream, m = Stream(seed), len(f.knots)
    c = stream.integers(1, (m, n)).to(torch.uint8)
    X, r, r2 = (stream.words((n,)) for _ in range(3))
    powers = [stream.words((m, n)) for _ in range(3)]
    for is_keeper in (0, 1):
        given_arrays = [x.numpy() for x in (r, *powers, r2)]
        with np.errstate(over="ignore"):
            wanted = sum_of_pieces(c.numpy(), X.numpy(), f.table, *given_arrays, np.int64(is_keeper))
        got = filled(_piecewise_loop, (n,), c, X, f.table, r, *powers, r2, is_keeper)
        np.testing.assert_array_equal(got.numpy(), wanted)


def test_what_is_opened_is_uniform_whatever_the_value():
    f = Pieces((-65536, 0, 65536), (0, 0, 0, *([1, 1, 1] * 3)), 32)
    n = 4096
    for value in (0, 65536, -5 * 65536):
        shares = split(torch.full((n,), value))
        sent = {}

        def program(party, shares=shares, sent=sent):
            spline.evaluate(party, shares[party.rank], f)
            sent[party.rank] = {kind: t.numpy().tobytes() for kind, t in party.wire.sent}

        simulate([spline.request_of((n,), f)], program)
        for own in (
            *sent.values(),
            {k: bytes(a ^ b for a, b in zip(sent[0][k], sent[1][k], strict=True)) for k in ("bits",)},
        ):
            for kind, data in own.items():
                counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
                chi = ((counts - len(data) / 256) ** 2 / (len(data) / 256)).sum()
                assert chi < 400, (kind, value)
        # No two bits of one value tell whether it lies between two knots.
        opened = np.unpackbits(
            np.frombuffer(bytes(a ^ b for a, b in zip(sent[0]["bits"], sent[1]["bits"], strict=True)), np.uint8)
        )[: 3 * n].reshape(3, n)
        for i in range(3):
            assert abs((opened[i] ^ opened[i - 1]).mean() - 0.5) < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (((), (0, 0, 0), 0), "at least one"),
        (((1, 1), (0,) * 9, 0), "ascend"),
        (((1,), (0,) * 5, 0), "must have 6 coefficients"),
        (((1,), (0, 0, 1, 0, 0, 0), 0), "must be a line"),
        (((1,), (1 << 63, 0, 0, 0, 0, 0), 0), "64 bits"),
        (((1,), (0,) * 6, 63), "0 to 62"),
    ],
)
def test_what_is_no_piecewise_function_is_refused(arguments, rule):
    with pytest.raises(IntegrityError, match=rule):
        Pieces(*arguments)
