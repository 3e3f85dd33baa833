"""Piecewise functions: within their stated error everywhere, also in the ring, and right beyond their domains."""

import numpy as np
import pytest
import torch
from simulate import combine, simulate, split

from protocols import functions, ring, spline
from protocols.functions import FUNCTIONS, ULP, Function
from protocols.ring import FRAC_BITS


def in_the_ring(pieces: spline.Pieces, x: np.ndarray) -> np.ndarray:
    points = ring.encode(x)
    shares = split(points)
    out = combine(
        simulate([spline.request_of(points.shape, pieces)], lambda p: spline.evaluate(p, shares[p.rank], pieces))
    )
    return out.numpy().astype(float) * 2.0**-pieces.frac_bits


def grid(function: Function) -> np.ndarray:
    x = np.linspace(function.low, function.high, 4001)
    if function.low > 0:
        x = np.concatenate([x, np.geomspace(function.low, function.high, 4001)])
    # On whole units in the last place, for that is what the parties have; the end belongs to the tail.
    return np.unique(np.floor(x / ULP) * ULP)[1:-1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_stays_within_its_error_in_the_ring(name):
    function = FUNCTIONS[name]
    x = grid(function)
    exact = function.exact(x)
    got = in_the_ring(functions.pieces(name), x)
    # Between the points that a fit looks at, the error can be a little larger.
    assert (np.abs(got - exact) <= 1.05 * (function.absolute + function.relative * np.abs(exact))).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tails_are_the_lines_that_they_should_be(name):
    function = FUNCTIONS[name]
    for sign, line, end in ((-1, function.left, function.low), (1, function.right, function.high)):
        x = np.array([end + sign * d for d in (ULP, 1.0, 1000.0) if abs(end + sign * d) < 16000])
        expected = line[0] + line[1] * x
        np.testing.assert_allclose(in_the_ring(functions.pieces(name), x), expected, rtol=1e-6, atol=2 * ULP)


@pytest.mark.parametrize(
    "name", ["sigmoid", "tanh", "erf", "softplus", "gelu", "gelu_tanh", "silu", "mish", "log", "sqrt"]
)
def test_a_function_hardly_jumps_where_its_domain_ends(name):
    function = FUNCTIONS[name]
    ends = np.array([function.low, function.high])
    tails = np.array([function.left[0] + function.left[1] * ends[0], function.right[0] + function.right[1] * ends[1]])
    assert np.abs(function.exact(ends) - tails).max() < 1e-4


def test_steep_functions_keep_their_coefficients_within_64_bits():
    pieces = functions.pieces("exp")
    assert max(map(abs, pieces.coefficients)) < 2**62
    assert pieces.frac_bits < 56


def test_a_jump_becomes_a_knot():
    step = Function(lambda x: np.where(x < 0.25, -1.0, 1.0), -1, 1, (-1.0, 0.0), (1.0, 0.0), 1e-6, breaks=(0.25,))
    pieces = functions.fit(step)
    assert round(0.25 * 2**FRAC_BITS) in pieces.knots
    np.testing.assert_allclose(in_the_ring(pieces, np.array([0.25 - ULP, 0.25])), [-1, 1], atol=1e-6)


def test_what_cannot_be_met_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        functions.fit(Function(np.exp, 1, 1))
    with pytest.raises(ValueError, match="too small near"):
        functions.fit(Function(lambda x: np.sin(1e6 * x), 0, 1, absolute=1e-6))


def test_a_function_is_the_same_whenever_it_is_fitted():
    functions.pieces.cache_clear()
    first = functions.pieces("gelu")
    functions.pieces.cache_clear()
    assert functions.pieces("gelu") == first
    assert torch.from_numpy(first.table()).dtype == torch.int64
