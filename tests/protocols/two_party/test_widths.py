"""Comparisons of every width k: right for every number of bits that may be cut, and refused for any other."""

import numpy as np
import pytest
import torch
from both_parties import CASES, PROTOCOLS, secure, single
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import combine, dealt_shares, simulate, split

from protocols import limits
from protocols.dealing.correlation import KINDS, correction_shapes
from protocols.errors import UnsupportedError
from protocols.program import functions, plain
from protocols.program.pieces import Pieces
from protocols.program.program import Layer, Program
from protocols.running import fixed, ranges, runner
from protocols.two_party import compare, spline
from protocols.two_party.party import Party

WIDTHS = range(limits.FEWEST_COMPARISON_BITS, limits.MOST_COMPARISON_BITS + 1)
RNG = np.random.default_rng(0)


@st.composite
def cuts_and_values(draw):
    """A width, bits that a ReLU may cut there, and values z that are compared as z >> cut, often next to a bound."""
    k = draw(st.integers(WIDTHS[0], WIDTHS[-1]))
    cut = draw(st.one_of(st.just(0), st.integers(limits.FEWEST_CUT_BITS, limits.most_cut(k))))
    most = 2 ** (k - 1) - 2
    t = st.one_of(st.sampled_from([0, 1, -1, most, -most]), st.integers(-most, most))
    pairs = draw(st.lists(st.tuples(t, st.integers(0, 2**cut - 1)), min_size=1, max_size=20))
    # A truncation is right below 2**62.
    return k, cut, [z for z in ((a << cut) + b for a, b in pairs) if abs(z) < 2**62] or [0]


@settings(max_examples=80, deadline=None)
@given(cuts_and_values())
def test_a_relu_of_any_width_and_cut_is_that_of_the_floor_or_one_above(drawn):
    k, cut, values = drawn
    z = torch.tensor(values)
    shares = split(z)

    def program(party):
        party.comparison_bits = k
        return compare.relu(party, shares[party.rank], cut)

    got = combine(simulate([compare.request_of("sign", z.shape, cut, k)], program))
    floor = z >> cut
    above = floor + 1 if cut else floor
    assert bool(((got == floor.clamp(min=0)) | (got == above.clamp(min=0))).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(WIDTHS[0], WIDTHS[-1]), st.sampled_from([0, 16]), st.integers(2, 7), st.data())
def test_maxima_of_any_width_are_those_of_the_floors_or_one_above(k, cut, width, data):
    most = 2 ** (k - 2) - 1
    t = st.one_of(st.sampled_from([0, most, -most]), st.integers(-most, most))
    z = torch.tensor(data.draw(st.lists(t, min_size=width, max_size=width))).reshape(width, 1) << cut
    shares = split(z)

    def program(party):
        party.comparison_bits = k
        return compare.max_of_pairs(party, shares[party.rank], cut)

    got = combine(simulate([compare.request_of("pairs", z.shape, cut, k)], program))
    half, floor = width // 2, z >> cut
    error = got - torch.cat([torch.maximum(floor[:half], floor[half : 2 * half]), floor[2 * half :]])
    assert bool(((error == 0) | (error == (1 if cut else 0))).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(WIDTHS[0], WIDTHS[-1]), st.data())
def test_pieces_of_any_width_are_exact(k, data):
    reach = 2 ** (k - 2) - 1
    point = st.one_of(st.sampled_from([0, reach, -reach]), st.integers(-reach, reach))
    knots = tuple(sorted(data.draw(st.sets(point, min_size=1, max_size=4))))
    jumps = data.draw(st.lists(st.integers(-9, 9), min_size=len(knots) + 1, max_size=len(knots) + 1))
    pieces = Pieces(knots, tuple(c for jump in jumps for c in (jump, 0, 0)), 0)
    x = torch.tensor(data.draw(st.lists(point, min_size=1, max_size=9)))
    shares = split(x)

    def program(party):
        party.comparison_bits = k
        return spline.evaluate(party, shares[party.rank], pieces)

    got = combine(simulate([spline.request_of(x.shape, pieces, k)], program))
    assert got.tolist() == [jumps[sum(knot <= value for knot in knots)] for value in x.tolist()]


@pytest.mark.parametrize("k", WIDTHS)
def test_what_would_be_compared_outside_the_ring_is_refused_by_everybody(k):
    for kind, most in (("sign", limits.most_cut(k)), ("pairs", limits.FEWEST_CUT_BITS)):
        assert most + k <= limits.RING_BITS
        correction_shapes(compare.request_of(kind, (2, 3), most, k), 0)
        for bits in (1, limits.FEWEST_CUT_BITS - 1, most + 1):
            request = compare.request_of(kind, (2, 3), bits, k)
            # The dealer, and a party that expands its part.
            for refused in (lambda r=request: dealt_shares([r]), lambda r=request: KINDS[r.kind].to_keeper(r)):
                with pytest.raises(UnsupportedError, match="truncates by 0 or 16 to"):
                    refused()

    def too_far(party: Party):
        party.comparison_bits = k
        return compare.relu(party, torch.zeros(2, dtype=torch.int64), limits.most_cut(k) + 1)

    with pytest.raises(UnsupportedError, match="truncates by 0 or 16 to"):
        simulate([], too_far)


# --- programs -------------------------------------------------------------------------------------------------------


def two_factors() -> tuple[Program, dict]:
    """relu(0.7 (0.3 x)): a public factor leaves 32 bits to cut."""
    layers = (
        Layer("scale", "a", ("x0",), "a", (4,), attrs={"factor": 0.3, "offset": 0.0}),
        Layer("scale", "b", ("a",), "b", (4,), attrs={"factor": 0.7, "offset": 0.0}),
        Layer("relu", "y", ("b",), "y", (4,)),
    )
    program = Program({"x0": (4,)}, ("y",), layers, {})
    program.validate()
    return program, {}


@pytest.mark.parametrize("k", WIDTHS)
def test_a_relu_behind_two_factors_has_the_right_sign_at_every_width(k):
    program, params = two_factors()
    # At scale 2**48, a truncation is right below 2**14.
    largest = min(limits.input_limit(k) / 2, 2.0**13)
    x = {"x0": np.array([[largest, -largest, 1.0, -1.0], [0.0, 0.5, -0.5, largest / 3]], np.float32)}
    expected = plain.run(program, params, x)["y"]
    got, *_ = secure("fss", program, params, x, comparison_bits=k)
    found = fixed.run(program, params, x, "fss", k)["y"]
    for answer in (got["y"], found):
        np.testing.assert_allclose(answer, expected, rtol=2.0**-9, atol=2.0**-14)


def told(program: Program, params: dict, x: dict, k: int) -> bool:
    """Return whether values of this size, or the program at all, are refused for comparisons on k bits."""
    try:
        ranges.require_width(program, "fss", k)
    except UnsupportedError:
        with pytest.raises(UnsupportedError, match="or more"):
            runner.requests(runner.Plan(program, "fss", 1, False, k))
        return True
    return max((row.share for row in ranges.measure(program, params, [x], k)), default=0.0) >= 1


CASES_BY_NAME = {f"{op}-{i}": (op, case) for op, cases in CASES.items() for i, case in enumerate(cases)}


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_every_operator_is_right_at_every_width_or_says_so(name):
    program, params = single(*CASES_BY_NAME[name])
    for k in WIDTHS:
        for part in (4, 256):
            size = limits.input_limit(k) / part
            x = {n: (RNG.uniform(-1, 1, (2, *s)) * size).astype(np.float32) for n, s in program.inputs.items()}
            if name.startswith("wide_spline"):
                x = {n: np.abs(v) + np.float32(2.0**-6) for n, v in x.items()}
            if told(program, params, x, k):
                continue
            expected = plain.run(program, params, x)["y"]
            got = fixed.run(program, params, x, "fss", k)["y"].reshape(expected.shape)
            assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max() + 2.0**-10, (k, part)


@pytest.mark.parametrize("k", [20, 31, 32, 33, 36, 40])
@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_two_parties_answer_as_one_that_holds_everything_at_every_width(name, k):
    program, params = single(*CASES_BY_NAME[name])
    size = min(limits.input_limit(k) / 4, 3.0)
    x = {n: (RNG.uniform(-1, 1, (2, *s)) * size).astype(np.float32) for n, s in program.inputs.items()}
    if name.startswith("wide_spline"):
        x = {n: np.abs(v) + np.float32(2.0**-6) for n, v in x.items()}
    if not told(program, params, x, k):
        got = secure("fss", program, params, x, comparison_bits=k)[0]["y"]
        found = fixed.run(program, params, x, "fss", k)["y"].reshape(got.shape)
        assert np.abs(got - found).max() <= 0.01 * np.abs(found).max() + 2.0**-10


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_function_whose_knots_lie_beyond_a_width_is_refused_where_comparisons_have_one(protocol):
    program, params = single("wide_spline", CASES["wide_spline"][0])
    x = {"x0": np.full((1, 33), 2.0, np.float32)}
    if protocol == "fss":
        with pytest.raises(
            UnsupportedError, match="comparison_bits must be 32 or more for the functions 'wide_spline'"
        ):
            ranges.require_width(program, protocol, 31)
        assert all(row.headroom < 0 for row in ranges.measure(program, params, [x], 31) if row.step == "comparison")
        with pytest.raises(UnsupportedError, match="must be compared on 32 bits or more; got 31"):
            secure(protocol, program, params, x, comparison_bits=31)
    else:
        ranges.require_width(program, protocol, 31)
        got = secure(protocol, program, params, x, comparison_bits=31)[0]["y"]
        np.testing.assert_allclose(got, np.sqrt(2.0), atol=1e-2)
    ranges.require_width(program, protocol, 32)


def test_every_function_tells_the_fewest_bits_that_decide_its_knots():
    assert Pieces((0,), (0,) * 6, 0).fewest_bits == 1
    assert Pieces((-(2**30), 1), (0,) * 9, 0).fewest_bits == 32
    assert Pieces((0, 2**30 - 1), (0,) * 9, 0).fewest_bits == 31
    assert functions.pieces("sqrt").fewest_bits == 32
