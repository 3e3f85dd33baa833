"""Functions of one variable as piecewise quadratics in fixed point: found once, at import; public.

`fit` walks over a domain and makes each piece as long as its error allows. Beyond the domain a function is the line
that its tail says. All coefficients are rounded to the integers that the parties use, the highest power first and
each lower one found anew after it, so that rounding adds next to nothing.

A result carries `frac_bits` fraction bits inside the ring, as many as leave room for its largest value, and is then
truncated to `keep_bits`.

A function whose argument may be of any size, as 1 / x, is found twice (`fit_wide`): of x and, for small x, of
x * 2**finer, with one row of knots. So its errors are relative to its value over more than 30 powers of two.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from protocols.limits import FRAC_BITS, LIMIT_BITS, WIDEST
from protocols.program.pieces import Pieces, WidePieces, turn_of

Floats = NDArray[np.float64]
Line = tuple[float, float]
Row = tuple[int, int, int]
_R = TypeVar("_R")
ULP = 2.0**-FRAC_BITS
# The largest knot of a function of positive numbers: negative ones down to -2**11 are still decided from there.
_TOP = WIDEST - 2.0**11
_SAMPLES = 65
_FINEST = 2


@dataclass(frozen=True)
class Function:
    """A function of one variable, and how well it is to be met.

    Args:
        exact: the function on arrays.
        low, high: the domain; both finite, |.| < 2**15.
        left, right: (c0, c1) of the line c0 + c1 x below and above the domain.
        absolute, relative: the largest error is absolute + relative |f(x)|.
        breaks: points where the function or its slope jumps; they become knots.
        keep_bits: fraction bits of the result.
        largest: bound of |f| wherever it is used; None for that of the domain and, where a tail rises, of WIDEST.
        finer: 0, or the power of two by which small arguments are looked up finer: then `low` is that of
            x * 2**finer, and `left` a tail of that; a function of both signs has the domain -high..high.
    """

    exact: Callable[[Floats], Floats]
    low: float
    high: float
    left: Line = (0.0, 0.0)
    right: Line = (0.0, 0.0)
    absolute: float = 2e-4
    relative: float = 0.0
    breaks: tuple[float, ...] = ()
    keep_bits: int = FRAC_BITS
    largest: float | None = None
    finer: int = 0

    @property
    def domain(self) -> tuple[float, float]:
        """Where the function is met within its error: smallest and largest argument (magnitude, if of both signs)."""
        return (self.low if self.low > 0 else 0.0) * 2.0**-self.finer if self.finer else self.low, self.high


@functools.cache
def fit(function: Function) -> Pieces:
    """Return the pieces of a function, as few as its error allows.

    Raises:
        ValueError: the domain is empty, or the error is below what the shortest pieces reach.
    """
    if not function.low < function.high:
        raise ValueError(f"a domain must not be empty; got {function.low}..{function.high}")
    frac_bits = _room(function)
    while True:
        pieces = _fit(function, frac_bits)
        excess = max(abs(c) for c in pieces[1]).bit_length() - 62
        if excess <= 0:
            return Pieces(*pieces, frac_bits)
        frac_bits -= excess


def _fit(function: Function, frac_bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    knots, rows = [function.low], [_line(function.left, frac_bits)]
    at = function.low
    for end in sorted({*(b for b in function.breaks if function.low < b < function.high), function.high}):
        while at < end:
            at, row = _longest(partial(_piece, function, frac_bits=frac_bits), at, end)
            rows.append(row)
            knots.append(at)
    rows.append(_line(function.right, frac_bits))
    return tuple(round(k / ULP) for k in knots), tuple(c for row in rows for c in row)


@functools.cache
def fit_wide(function: Function) -> WidePieces:
    """Return the pieces of a function with `finer`, of x and of x * 2**finer.

    Of x they count from `turn_of(finer)` on in magnitude, of x * 2**finer below that.

    Raises:
        ValueError: as `fit`.
    """
    turn, has_both_signs = turn_of(function.finer), function.low < 0
    if not function.finer or not (function.low <= turn < function.high):
        raise ValueError("a function of two scales must have a domain on both sides of where it turns")
    fine = replace(function, exact=lambda y: function.exact(y * 2.0**-function.finer))
    bits = _room_within(function, turn)
    fine_bits = _room_within(fine, function.breaks[-1] if has_both_signs else function.low)
    while True:
        knots, rows = _fit_wide(function, fine, (bits, fine_bits))
        excess = [max(abs(c) for pair in rows for c in pair[i]).bit_length() - 62 for i in (0, 1)]
        if max(excess) <= 0:
            break
        bits, fine_bits = bits - max(excess[0], 0), fine_bits - max(excess[1], 0)
    coarse, small = (tuple(c for pair in rows for c in pair[i]) for i in (0, 1))
    return WidePieces(knots, coarse, bits, small, fine_bits, function.finer)


def _fit_wide(
    function: Function, fine: Function, frac_bits: tuple[int, int]
) -> tuple[tuple[int, ...], list[tuple[Row, Row]]]:
    """Return the knots, and each piece's quadratics of x and of x * 2**finer; those that do not count are 0."""
    turn, has_both_signs, nothing = turn_of(function.finer), function.low < 0, (0, 0, 0)
    bits, fine_bits = frac_bits
    last = _line(function.right, bits)
    # A little beyond where the finer scale counts: both are rounded, each by itself.
    fine_end = turn * 2.0**function.finer + 1

    def row(low: float, high: float) -> tuple[Row, Row] | None:
        least = min(abs(low), abs(high))
        coarse: Row | None = nothing
        if least >= turn:
            coarse = last if low >= function.high else _piece(function, low, high, bits)
        small = nothing if coarse is not None and least >= fine_end else _piece(fine, low, high, fine_bits)
        return None if coarse is None or small is None else (coarse, small)

    at, knots, rows = function.low, [function.low], [(_line(function.left, bits), nothing)]
    if not has_both_signs:
        # Of what is far below the domain x * 2**finer can be anything: there x itself counts, and stays at the end, or
        # where it turns if the end is out of its range.
        at_turn = float(function.exact(np.array([turn]))[0])
        end = min(function.left[0], at_turn, key=abs)
        knots = [-turn / 8, function.low]
        rows = [(_line((end, 0.0), bits), nothing), (nothing, _line(function.left, fine_bits))]
    breaks = {*function.breaks, turn, *([-turn] if has_both_signs else []), function.high, fine_end}
    for end in sorted(b for b in breaks if b > function.low):
        while at < end:
            at, both = _longest(row, at, end)
            rows.append(both)
            knots.append(at)
    rows.append((last, nothing))
    return tuple(round(k / ULP) for k in knots), rows


def _room_within(function: Function, low: float) -> int:
    """Return the fraction bits that leave room for the values from `low` on, and for what a quadratic is made of."""
    x = np.geomspace(low, function.high, 4097)
    x = np.concatenate([-x, x]) if function.low < 0 else x
    largest = float(np.abs(function.exact(x)).max())
    return min(LIMIT_BITS - 1 - max(math.ceil(math.log2(largest)), 0), 3 * FRAC_BITS + 8)


def _room(function: Function) -> int:
    """Return the fraction bits that leave room for the largest value."""
    largest = function.largest
    if largest is None:
        x = np.linspace(function.low, function.high, 4097)
        tails = [abs(c0) + abs(c1) * WIDEST for c0, c1 in (function.left, function.right)]
        largest = max(float(np.abs(function.exact(x)).max()), *tails)
    return min(LIMIT_BITS - 1 - max(math.ceil(math.log2(largest)), 0), 3 * FRAC_BITS + 8)


def _line(line: Line, frac_bits: int) -> tuple[int, int, int]:
    return round(line[0] * 2.0**frac_bits), round(line[1] * 2.0 ** (frac_bits - FRAC_BITS)), 0


def _longest(piece: Callable[[float, float], _R | None], low: float, end: float) -> tuple[float, _R]:
    """Return the end and what `piece(low, high)` gives of the longest piece from `low` on that it accepts."""
    row = piece(low, end)
    if row is not None:
        return end, row
    good, bad = 0, round((end - low) / ULP)
    found: _R | None = None
    while bad - good > max(1, good // 256):
        middle = (good + bad) // 2
        row = piece(low, low + middle * ULP)
        if row is None:
            bad = middle
        else:
            good, found = middle, row
    if found is None or good < _FINEST:
        raise ValueError(f"the error asked for is too small near {low:g}")
    return low + good * ULP, found


def _piece(function: Function, low: float, high: float, frac_bits: int) -> Row | None:
    """Return the quadratic of one piece, or None where its error is too large."""
    middle, half = (low + high) / 2, (high - low) / 2
    x = middle + half * np.cos(np.pi * (np.arange(_SAMPLES) + 0.5) / _SAMPLES)
    wanted = function.exact(x)
    nodes = middle + half * np.cos(np.pi * (np.arange(3) + 0.5) / 3)
    c2 = _quantised(np.polyfit(nodes - middle, function.exact(nodes), 2)[0], frac_bits - 2 * FRAC_BITS)
    nodes = middle + half * np.cos(np.pi * (np.arange(2) + 0.5) / 2)
    rest = function.exact(nodes) - c2 * nodes**2
    c1 = _quantised((rest[0] - rest[1]) / (nodes[0] - nodes[1]), frac_bits - FRAC_BITS)
    rest = wanted - c2 * x**2 - c1 * x
    c0 = _quantised((rest.max() + rest.min()) / 2, frac_bits)
    error = np.abs(rest - c0)
    if (error > function.absolute + function.relative * np.abs(wanted)).any():
        return None
    return round(c0 * 2.0**frac_bits), round(c1 * 2.0 ** (frac_bits - FRAC_BITS)), round(c2 * 2.0 ** (frac_bits - 32))


def _quantised(value: float, bits: int) -> float:
    return float(round(value * 2.0**bits)) * 2.0**-bits


# --- what there is --------------------------------------------------------------------------------------------------


_erf: Callable[[Floats], Floats] = np.vectorize(math.erf, otypes=[np.float64])


def _softplus(x: Floats) -> Floats:
    return np.logaddexp(0.0, x)


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1.0 + np.tanh(x / 2))


def _gelu(x: Floats) -> Floats:
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2)))


def _gelu_tanh(x: Floats) -> Floats:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_UP: Line = (0.0, 1.0)
_ONE: Line = (1.0, 0.0)
_MINUS_ONE: Line = (-1.0, 0.0)

_SIMPLE: Mapping[str, Function] = {
    "sigmoid": Function(_sigmoid, -12, 12, right=_ONE, absolute=1e-4),
    "tanh": Function(np.tanh, -6, 6, left=_MINUS_ONE, right=_ONE, absolute=1e-4),
    "erf": Function(_erf, -3.5, 3.5, left=_MINUS_ONE, right=_ONE, absolute=1e-4),
    "softplus": Function(_softplus, -12, 12, right=_UP, absolute=1e-4),
    "gelu": Function(_gelu, -5, 5, right=_UP, absolute=1e-4),
    "gelu_tanh": Function(_gelu_tanh, -5, 5, right=_UP, absolute=1e-4),
    "silu": Function(lambda x: x * _sigmoid(x), -14, 14, right=_UP, absolute=1e-4),
    "mish": Function(lambda x: x * np.tanh(_softplus(x)), -14, 14, right=_UP, absolute=1e-4),
    # Half an exponential: e**x is its square, whose largest value a product still holds.
    "exp_half": Function(
        lambda x: np.exp(x / 2), -24, 20.5, right=(math.exp(10.25), 0.0), absolute=2e-5, relative=5e-5
    ),
    # Of numbers that are 0 at most, as behind the maximum of a softmax; their sum is still wanted exactly.
    "exp_negative": Function(np.exp, -14, 0, right=_ONE, absolute=3e-6, relative=2e-5, largest=1.0),
    "log": Function(
        np.log,
        2**-3,
        _TOP,
        left=(math.log(2**-19), 0.0),
        right=(math.log(_TOP), 0.0),
        absolute=3e-4,
        finer=16,
    ),
    "reciprocal_positive": Function(
        lambda x: 1 / x,
        2**-3,
        _TOP,
        left=(2.0**19, 0.0),
        right=(1 / _TOP, 0.0),
        absolute=0.0,
        relative=5e-4,
        keep_bits=24,
        finer=16,
    ),
    # Of both signs; of less than a unit in magnitude it stays where it is, and has the sign.
    "reciprocal": Function(
        lambda x: np.where(np.abs(x) < 2**-19, np.where(x < 0, -(2.0**19), 2.0**19), 1 / np.where(x == 0, 1.0, x)),
        -(2**14) + 1,
        2**14 - 1,
        left=(-(2.0**-14), 0.0),
        right=(2.0**-14, 0.0),
        absolute=0.0,
        relative=5e-4,
        breaks=(-(2.0**-3), 0.0, 2.0**-3),
        keep_bits=24,
        finer=16,
    ),
    "softsign": Function(
        lambda x: x / (1 + np.abs(x)),
        -(2**11),
        2**11,
        left=(-1 + 2.0**-12, 0.0),
        right=(1 - 2.0**-12, 0.0),
        absolute=1e-4,
        breaks=(0.0,),
    ),
    "hard_swish": Function(lambda x: x * (x + 3) / 6, -3, 3, right=_UP, absolute=1e-4),
    "rsqrt": Function(
        lambda x: x**-0.5,
        2**-8,
        _TOP,
        left=(2.0**14, 0.0),
        right=(_TOP**-0.5, 0.0),
        absolute=0.0,
        relative=3e-4,
        keep_bits=24,
        finer=20,
    ),
}


def _scaled_exp(alpha: float, scale: float) -> Function:
    """scale * (x for x > 0, alpha (e**x - 1) below): Elu, Selu."""
    low = -12.0
    return Function(
        lambda x: scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
        low,
        1.0,
        left=(-scale * alpha, 0.0),
        right=(0.0, scale),
        absolute=1e-4,
        breaks=(0.0,),
    )


def _celu(alpha: float) -> Function:
    return Function(
        lambda x: np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(np.minimum(x, 0) / alpha)),
        -12.0 * alpha,
        1.0,
        left=(-alpha, 0.0),
        right=_UP,
        absolute=1e-4,
        breaks=(0.0,),
    )


def _swish(alpha: float) -> Function:
    """x * sigmoid(alpha x), alpha not 0."""
    end = 14 / abs(alpha)
    left, right = ((0.0, 0.0), _UP) if alpha > 0 else (_UP, (0.0, 0.0))
    return Function(lambda x: x * _sigmoid(alpha * x), -end, end, left=left, right=right, absolute=1e-4)


def _exp_of_differences(n: int) -> Function:
    """e**x of numbers that are 0 at most, with room for the sum of n of them: untruncated until it is summed."""
    return replace(_SIMPLE["exp_negative"], largest=float(n), keep_bits=62)


def _reciprocal_of_sum(n: int) -> Function:
    """1 / x for 1 <= x <= n."""
    high = float(max(n, 2))
    return Function(
        lambda x: 1 / x, 1.0, high, left=_ONE, right=(1 / high, 0.0), absolute=1e-5, relative=1e-4, keep_bits=24
    )


def _log_of_sum(n: int) -> Function:
    """log x for 1 <= x <= n."""
    high = float(max(n, 2))
    return Function(np.log, 1.0, high, right=(math.log(high), 0.0), absolute=1e-4)


def _inverse_root(times: float) -> Function:
    """times / sqrt(x) for x of 2**-28 up to 2**15; what is smaller counts as 2**-28."""
    return Function(
        lambda x: times * x**-0.5,
        2.0**-8,
        _TOP,
        left=(times * 2.0**14, 0.0),
        right=(times * _TOP**-0.5, 0.0),
        absolute=0.0,
        relative=5e-4,
        keep_bits=24,
        finer=20,
    )


def _root(times: float = 1.0) -> Function:
    """times * sqrt(x) for 0 <= x < 2**15."""
    return Function(
        lambda x: times * np.sqrt(x),
        2.0**-8,
        _TOP,
        left=(0.0, times * 2.0**-6),
        right=(times * _TOP**0.5, 0.0),
        absolute=0.0,
        relative=3e-4,
        keep_bits=24 if times < 2**8 else FRAC_BITS,
        finer=20,
    )


def _power_of_sum(alpha: float, bias: float, exponent: float) -> Function:
    """(bias + alpha x)**exponent for 0 <= x <= 2**14, bias above 0."""
    high = 2.0**14
    return Function(
        lambda x: (bias + alpha * x) ** exponent,
        0.0,
        high,
        left=(bias**exponent, 0.0),
        right=((bias + alpha * high) ** exponent, 0.0),
        absolute=1e-6,
        relative=2e-4,
        keep_bits=24,
    )


def _power(exponent: float) -> Function:
    """x**exponent of 2**-19 up, as far as it is 2**20 at most; below that a line to 0, or constant."""
    finer, high, low = 16, _TOP, 2.0**-3
    if exponent > 4 / 3:
        high = 2.0 ** (20 / exponent)
    smallest = max(low * 2.0**-finer, 2.0 ** (20 / exponent) if exponent < -1 else 0.0)
    return Function(
        lambda x: np.maximum(x, smallest) ** exponent,
        low,
        high,
        left=(0.0, smallest**exponent / low) if exponent > 0 else (smallest**exponent, 0.0),
        right=(high**exponent, 0.0),
        absolute=1e-6,
        relative=5e-4,
        keep_bits=24,
        finer=finer,
    )


FUNCTIONS: Mapping[str, Function] = {**_SIMPLE, "sqrt": _root()}
# Functions with public numbers of their own.
CUSTOM: Mapping[str, Callable[..., Function]] = {
    "scaled_exp": _scaled_exp,
    "celu": _celu,
    "swish": _swish,
    "exp_of_differences": lambda n: _exp_of_differences(int(n)),
    "reciprocal_of_sum": lambda n: _reciprocal_of_sum(int(n)),
    "log_of_sum": lambda n: _log_of_sum(int(n)),
    "inverse_root": _inverse_root,
    "root": _root,
    "power_of_sum": _power_of_sum,
    "power": _power,
}


def pieces_of(function: Function) -> Pieces | WidePieces:
    """Return the pieces of a function, at two scales where it says so."""
    return fit_wide(function) if function.finer else fit(function)


@functools.cache
def pieces(name: str) -> Pieces | WidePieces:
    """Return the pieces of a function of `FUNCTIONS`."""
    return pieces_of(FUNCTIONS[name])
