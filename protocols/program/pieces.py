"""Piecewise polynomials of fixed point, on one scale and on two: what a spline evaluates."""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocols import limits
from protocols.errors import IntegrityError


@dataclass(frozen=True)
class Pieces:
    """A piecewise quadratic function in fixed point; public.

    Args:
        knots: k_1 < ... < k_m at scale 2**f, at least one.
        coefficients: (m + 1) times (c0, c1, c2), where c_j multiplies x**j and the sum is at scale 2**frac_bits: c_j
            itself is at scale 2**(frac_bits - j f). The first piece is a line: its c2 is 0.
        frac_bits: fraction bits of the result.
    """

    knots: tuple[int, ...]
    coefficients: tuple[int, ...]
    frac_bits: int

    def __post_init__(self) -> None:
        m = len(self.knots)
        if not m or list(self.knots) != sorted(set(self.knots)):
            raise IntegrityError("the knots of a piecewise function must be at least one, and ascend")
        if len(self.coefficients) != 3 * (m + 1):
            raise IntegrityError(
                f"a function of {m} knots must have {3 * (m + 1)} coefficients; got {len(self.coefficients)}"
            )
        if self.coefficients[2]:
            raise IntegrityError("the first piece of a function must be a line")
        if max(map(abs, self.coefficients)) >= 1 << 63 or not 0 <= self.frac_bits <= 62:
            raise IntegrityError("a function's coefficients must be of 64 bits, its fraction bits 0 to 62")

    @functools.cached_property
    def degree(self) -> int:
        """The largest power of x that occurs, 0 to 2."""
        return max((i % 3 for i, c in enumerate(self.coefficients) if c), default=0)

    @functools.cached_property
    def fewest_bits(self) -> int:
        """The fewest bits k of comparisons that decide between 0 and every knot: |k_i| < 2**(k-1)."""
        return max(abs(self.knots[0]), abs(self.knots[-1])).bit_length() + 1

    @functools.cached_property
    def table(self) -> NDArray[np.int64]:
        """Return p_0 and the steps D_i as rows of (c0, c1, c2), int64 (m + 1, 3), mod 2**64."""
        rows = np.array(self.coefficients, dtype=object).reshape(-1, 3)
        steps = np.concatenate([rows[:1], rows[1:] - rows[:-1]])
        wrapped = (steps + (1 << 63)) % (1 << 64) - (1 << 63)
        return wrapped.astype(np.int64)


# The attributes of a layer that is a `WidePieces`, in the order of its fields.
WIDE_ATTRIBUTES = ("knots", "coefficients", "frac_bits", "low_coefficients", "low_frac_bits", "finer")


def turn_of(finer: int) -> float:
    """Return the magnitude from which on a value itself counts, and below which the value times 2**finer does.

    That is where this becomes a quarter of what comparisons on 32 bits decide, or half of it between two signs.
    """
    return 2.0 ** (limits.COMPARISON_BITS - 3 - limits.FRAC_BITS - finer)


@dataclass(frozen=True)
class WidePieces:
    """A piecewise quadratic function of x and, for small x, of x * 2**finer, with one row of knots; public.

    Args:
        knots: as of `Pieces`, turn_of(finer) among them; of a function of both signs also -turn_of(finer), of others
            the first one is where negative numbers are too far off for x * 2**finer to be decided.
        coefficients, frac_bits: of x, as of `Pieces`; they count from turn_of(finer) on, and below the first knot or
            -turn_of(finer).
        low_coefficients, low_frac_bits: of x * 2**finer; they count between.
        finer: 1 to 30.
    """

    knots: tuple[int, ...]
    coefficients: tuple[int, ...]
    frac_bits: int
    low_coefficients: tuple[int, ...]
    low_frac_bits: int
    finer: int

    def __post_init__(self) -> None:
        if not 1 <= self.finer <= 30 or round(turn_of(self.finer) * 2**limits.FRAC_BITS) not in self.knots:
            raise IntegrityError("a function of two scales must turn from one to the other at one of its knots")
        _ = self.coarse, self.fine, self.turned

    @functools.cached_property
    def coarse(self) -> Pieces:
        """The function of x."""
        return Pieces(self.knots, self.coefficients, self.frac_bits)

    @functools.cached_property
    def fine(self) -> Pieces:
        """The function of x * 2**finer."""
        return Pieces(self.knots, self.low_coefficients, self.low_frac_bits)

    @functools.cached_property
    def fewest_bits(self) -> int:
        """The fewest bits of comparisons that it is right on: those that the choice between its scales is made for."""
        return max(limits.COMPARISON_BITS, self.coarse.fewest_bits)

    @functools.cached_property
    def turned(self) -> Pieces:
        """1 where x itself counts, 0 where x * 2**finer does: a whole number."""
        turn = round(turn_of(self.finer) * 2**limits.FRAC_BITS)
        least = -turn if -turn in self.knots else self.knots[0]
        edges = [self.knots[0] - 1, *self.knots]
        counts = [int(k >= turn or k < least) for k in edges]
        return Pieces(self.knots, tuple(c for one in counts for c in (one, 0, 0)), 0)
