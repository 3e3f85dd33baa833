"""Piecewise functions: within their stated error everywhere, also in the ring, and right beyond their domains."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from both_parties import secure
from simulate import combine, simulate, split

from protocols.limits import FRAC_BITS
from protocols.primitives import ring
from protocols.program import functions
from protocols.program.functions import CUSTOM, FUNCTIONS, ULP, Function
from protocols.program.pieces import Pieces, turn_of
from protocols.program.program import Layer, Program
from protocols.two_party import spline


def in_the_ring(pieces: Pieces, x: np.ndarray) -> np.ndarray:
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


SIMPLE = [name for name, function in FUNCTIONS.items() if not function.finer]
WIDE = {name: function for name, function in FUNCTIONS.items() if function.finer} | {
    "power 1.5": CUSTOM["power"](1.5),
    # Whose domain ends below where the finer scale does.
    "power 1.7": CUSTOM["power"](1.7),
    "power 4.5": CUSTOM["power"](4.5),
    "power -1.5": CUSTOM["power"](-1.5),
    "power 0.3": CUSTOM["power"](0.3),
    "inverse root / 512": CUSTOM["inverse_root"](2.0**-9),
    "root * 64": CUSTOM["root"](64.0),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_a_function_stays_within_its_error_in_the_ring(name):
    function = FUNCTIONS[name]
    x = grid(function)
    exact = function.exact(x)
    got = in_the_ring(functions.pieces(name), x)
    # Between the points that a fit looks at, the error can be a little larger.
    assert (np.abs(got - exact) <= 1.05 * (function.absolute + function.relative * np.abs(exact))).all()


def of_two_scales(function: Function, x: np.ndarray, protocol: str = "fss") -> np.ndarray:
    """Return what both parties make of x, which has 32 fraction bits: the square of what they are given."""
    attrs = asdict(functions.fit_wide(function)) | {"keep_bits": function.keep_bits}
    layers = [
        Layer("mul", "square", ("x", "x"), "z", (1,)),
        Layer("wide_spline", "f", ("z",), "y", (1,), attrs=attrs),
    ]
    program = Program({"x": (1,)}, ("y",), tuple(layers), {})
    return secure(protocol, program, {}, {"x": np.sqrt(x).reshape(-1, 1)})[0]["y"].ravel()


@pytest.mark.parametrize("protocol", ["fss", "crypten"])
@pytest.mark.parametrize("name", WIDE)
def test_a_function_of_two_scales_is_right_over_thirty_powers_of_two(name, protocol):
    function = WIDE[name]
    # What an argument of 32 fraction bits can be: its square root has 16.
    roots = np.unique(np.rint(np.geomspace(2.0**-8, 2.0**7.4, 900) * 2**16)) * 2.0**-16
    x = roots**2
    low, high = function.domain
    x = x[(x > max(low, 2.0**-16)) & (x < min(high, 2.0**15 - 2))]
    exact = function.exact(x)
    got = of_two_scales(function, x, protocol)
    # A unit of the result, the errors of the pieces, and what one unit of an argument at its scale makes.
    unit = np.where(x < turn_of(function.finer), 2.0 ** -(16 + function.finer), 2.0**-16)
    slope = np.abs(function.exact(x + unit) - exact)
    bound = 1.1 * (function.absolute + function.relative * np.abs(exact)) + slope + 3 * ULP
    assert (np.abs(got - exact) <= bound).all()


def test_a_reciprocal_of_two_scales_has_the_sign_of_its_argument():
    attrs = asdict(functions.fit_wide(FUNCTIONS["reciprocal"])) | {"keep_bits": 24}
    layer = Layer("wide_spline", "f", ("x",), "y", (1,), attrs=attrs)
    x = np.array([[0.001], [-0.001], [-0.3], [7.0], [-9000.0], [16000.0]])
    got = secure("fss", Program({"x": (1,)}, ("y",), (layer,), {}), {}, {"x": x})[0]["y"]
    rounded = np.rint(x * 2**16) / 2**16
    np.testing.assert_allclose(got, 1 / rounded, rtol=1e-3, atol=2 * ULP)


@pytest.mark.parametrize("name", SIMPLE)
def test_tails_are_the_lines_that_they_should_be(name):
    function = FUNCTIONS[name]
    for sign, line, end in ((-1, function.left, function.low), (1, function.right, function.high)):
        x = np.array([end + sign * d for d in (ULP, 1.0, 1000.0) if abs(end + sign * d) < 16000])
        expected = line[0] + line[1] * x
        np.testing.assert_allclose(in_the_ring(functions.pieces(name), x), expected, rtol=1e-6, atol=2 * ULP)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "erf", "softplus", "gelu", "gelu_tanh", "silu", "mish"])
def test_a_function_hardly_jumps_where_its_domain_ends(name):
    function = FUNCTIONS[name]
    ends = np.array([function.low, function.high])
    tails = np.array([function.left[0] + function.left[1] * ends[0], function.right[0] + function.right[1] * ends[1]])
    assert np.abs(function.exact(ends) - tails).max() < 1e-4


def test_steep_functions_keep_their_coefficients_within_64_bits():
    pieces = functions.pieces("exp_half")
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
    assert torch.from_numpy(first.table).dtype == torch.int64
