"""From steps in the model's words to operators of a program: functions of one variable become piecewise quadratics.

It comes last, because passes want to know what a step means: that a function is monotone, that a clip has two bounds.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from protocols import limits
from protocols.errors import IntegrityError, RangeError
from protocols.limits import FRAC_BITS, LIMIT_BITS
from protocols.program import functions
from protocols.program.pieces import Pieces, WidePieces
from protocols.program.program import Attribute
from securemtk.onnx.building.registry import Step

_F = 2.0**FRAC_BITS
# Values that comparisons decide stay below it.
_REACH = round(limits.WIDEST * _F)


def lower(steps: Sequence[Step]) -> list[Step]:
    """Return steps whose operators are those of `protocols.program.program.OPERATORS`.

    Raises:
        RangeError: the numbers of a step's attributes make no function that fixed point holds.
    """
    return [part for step in steps for part in _checked(step)]


def _checked(step: Step) -> list[Step]:
    try:
        if step.op == "exp":
            # Its square has twice the range that one function in the ring has, and a relative error.
            half = f"{step.output}/half"
            root = replace(step, op="exp_half", name=f"{step.name}/half", output=half)
            return [_lowered(root), replace(step, op="mul", inputs=(half, half))]
        return [_lowered(step)]
    except (ArithmeticError, TypeError, ValueError, IntegrityError):
        given = ", ".join(f"{k}={v}" for k, v in step.attrs.items())
        raise RangeError(f"layer {step.name!r} must be a function that fixed point holds; got {given}"[:300]) from None


def _lowered(step: Step) -> Step:
    if step.op == "clip":
        step = _without_far_bounds(step)
    if step.op in _WITH_ATTRIBUTES:
        return _spline(step, _WITH_ATTRIBUTES[step.op](step), FRAC_BITS)
    if step.op in functions.FUNCTIONS:
        function = functions.FUNCTIONS[step.op]
        return replace(_spline(step, functions.pieces(step.op), function.keep_bits), exact=function.exact)
    if step.op == "function":
        return _custom(step)
    if step.op == "affine" and set(step.params) == {"shift"}:
        return replace(step, op="shift", params={"addend": step.params["shift"]})
    return step


def _without_far_bounds(clip: Step) -> Step:
    """Return what is left of a clip without bounds that no value reaches which comparisons decide."""
    near = [abs(round(clip.number(x) * _F)) < _REACH for x in ("low", "high")]
    if not any(near):
        return replace(clip, op="reshape", attrs={"shape": clip.shape})
    if near == [True, False] and clip.number("low") == 0.0:
        return replace(clip, op="relu", attrs={})
    return clip


def _decidable(pieces: Pieces | WidePieces) -> Pieces | WidePieces:
    """Drop knots from which a value would be further than comparisons reach: no value passes them."""
    if isinstance(pieces, WidePieces):
        return pieces
    rows = [pieces.coefficients[i : i + 3] for i in range(0, len(pieces.coefficients), 3)]
    below = sum(k <= -_REACH for k in pieces.knots)
    kept = [k for k in pieces.knots if abs(k) < _REACH]
    rows = rows[below : below + len(kept) + 1]
    if rows[0][2]:
        return pieces
    # A function has one knot at least.
    return Pieces(tuple(kept or (0,)), tuple(c for row in (rows if kept else rows * 2) for c in row), pieces.frac_bits)


def _spline(step: Step, pieces: Pieces | WidePieces, keep_bits: int) -> Step:
    pieces = _decidable(pieces)
    if isinstance(pieces, WidePieces):
        return replace(step, op="wide_spline", attrs=asdict(pieces) | {"keep_bits": keep_bits})
    attrs: Mapping[str, Attribute] = {
        "knots": pieces.knots,
        "coefficients": pieces.coefficients,
        "frac_bits": pieces.frac_bits,
        "keep_bits": keep_bits,
    }
    return replace(step, op="spline", attrs=attrs)


# --- lines with knees: exact ----------------------------------------------------------------------------------------


def lines(knots: Sequence[float], *pieces: tuple[float, float]) -> Pieces:
    """Return a function of straight pieces (c0, c1); whole slopes, and whole constants, make it exact."""
    bits = FRAC_BITS
    if any(c1 != int(c1) for _, c1 in pieces):
        # As many as leave room for the largest value, since a slope's rounding counts |x| times.
        largest = max(abs(c0) + abs(c1) * limits.WIDEST for c0, c1 in pieces)
        bits = min(LIMIT_BITS - 1 - max(math.ceil(math.log2(largest)), 0), 3 * FRAC_BITS)
    if all(c1 == 0 and c0 == int(c0) for c0, c1 in pieces):
        bits = 0
    rows = [(round(c0 * 2.0**bits), round(c1 * 2.0 ** (bits - FRAC_BITS)), 0) for c0, c1 in pieces]
    return Pieces(tuple(round(k * _F) for k in knots), tuple(c for row in rows for c in row), bits)


def _clip(step: Step) -> Pieces:
    low, high = step.number("low"), step.number("high")
    if round(low * _F) >= round(high * _F):
        return lines((low,), (high, 0.0), (high, 0.0))
    return lines((low, high), (low, 0.0), (0.0, 1.0), (high, 0.0))


def _leaky_relu(step: Step) -> Pieces:
    return lines((0.0,), (0.0, step.number("slope")), (0.0, 1.0))


def _indicator(step: Step) -> Pieces:
    """1 from the first knot on, 0 from the second one on, and so on; a number without fraction."""
    knots = tuple(int(k) for k in step.ints("knots"))
    first = int(step.number("below"))
    rows = [((first + i) % 2, 0, 0) for i in range(len(knots) + 1)]
    return Pieces(knots, tuple(c for row in rows for c in row), 0)


_WITH_ATTRIBUTES: Mapping[str, Callable[[Step], Pieces]] = {
    "clip": _clip,
    "leaky_relu": _leaky_relu,
    # Truth of a comparison: attributes knots (at scale 2**f), below (0 or 1: the value before the first knot).
    "indicator": _indicator,
}


# --- functions that depend on attributes ----------------------------------------------------------------------------


def custom(name: str, *numbers: float) -> dict[str, Attribute]:
    """Return the attributes of a step "function": a name of `CUSTOM` and its numbers."""
    return {"name": name, **{f"n{i}": value for i, value in enumerate(numbers)}}


def straight(knots: Sequence[float], *pieces: tuple[float, float]) -> dict[str, Attribute]:
    """Return the attributes of a step "function" that is `lines`."""
    return custom("straight", *knots, *(c for piece in pieces for c in piece))


def _custom(step: Step) -> Step:
    numbers = tuple(step.number(f"n{i}") for i in range(len(step.attrs) - 1))
    if step.attrs["name"] == "straight":
        m = (len(numbers) - 2) // 3
        return _spline(step, lines(numbers[:m], *zip(numbers[m::2], numbers[m + 1 :: 2], strict=True)), FRAC_BITS)
    function = _made(str(step.attrs["name"]), numbers)
    return replace(_spline(step, functions.pieces_of(function), function.keep_bits), exact=function.exact)


@functools.cache
def _made(name: str, numbers: tuple[float, ...]) -> functions.Function:
    return functions.CUSTOM[name](*numbers)
