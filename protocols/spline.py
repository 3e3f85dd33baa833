"""Piecewise quadratic functions of a sharing by one comparison key each: every smooth function rests on this.

A value x is opened under a dealer's mask r as X = x + r. For each knot k_i the bit b_i = [x >= k_i] follows from the
public X - k_i and the mask, as `compare` says, and one and the same key answers for all knots: it shares 1{y < q} for
whatever public y it is asked. The bits are opened under masks beta_i of their own, c_i = b_i ^ beta_i. With p_i the
polynomial between k_i and k_{i+1}, D_i = p_i - p_{i-1} and dealer shares of r, r**2, beta_i, beta_i r, beta_i r**2,

    f(x) = p_0(x) + sum_i b_i D_i(x),        b_i = c_i + (1 - 2 c_i) beta_i,        x = X - r

is a linear function of shares with public coefficients, so that no product has to be opened.

Source: [Boy21] for the key and for asking it more than once (interval containment, section 4); the sum with the
products of beta and powers of r is "Sign of a value whose mask the dealer knows" of shared/design/protocols.md,
carried from one knot to many.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols import compare, correlation, dcf, fused, ring
from protocols.compare import key_shapes, width_of
from protocols.correlation import KEEPER, Dealing, Dealt, Kind, Request, Shape, share_for_keeper
from protocols.cost import Cost, costs
from protocols.errors import IntegrityError
from protocols.party import Party, open_many
from protocols.prg import Stream


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
    return 2.0 ** (ring.COMPARISON_BITS - 3 - ring.FRAC_BITS - finer)


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
        if not 1 <= self.finer <= 30 or round(turn_of(self.finer) * 2**ring.FRAC_BITS) not in self.knots:
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
    def turned(self) -> Pieces:
        """1 where x itself counts, 0 where x * 2**finer does: a whole number."""
        turn = round(turn_of(self.finer) * 2**ring.FRAC_BITS)
        least = -turn if -turn in self.knots else self.knots[0]
        edges = [self.knots[0] - 1, *self.knots]
        counts = [int(k >= turn or k < least) for k in edges]
        return Pieces(self.knots, tuple(c for one in counts for c in (one, 0, 0)), 0)


def request_of(shape: Sequence[int], pieces: Pieces, k: int = compare.BITS) -> Request:
    """Return the correlation that one evaluation on values of `shape`, compared on k bits, needs."""
    return Request("spline", (tuple(shape),), (("knots", len(pieces.knots)), ("degree", pieces.degree), ("k", k)))


def _sizes(request: Request) -> tuple[int, int, int]:
    """Return the number of values, of knots, and the degree."""
    options = dict(request.options)
    return int(np.prod(request.shapes[0])), int(options["knots"]), int(options["degree"])


def _shares(request: Request) -> list[Shape]:
    """Shapes of beta_i r**j for j up to the degree, and of r**2 where the degree is 2."""
    n, m, degree = _sizes(request)
    return [(m, n)] * (degree + 1) + [(n,)] * (degree == 2)


def _deal(request: Request, keeper: Stream, user: Stream, dealing: Dealing) -> Dealt:
    n, m, degree = _sizes(request)
    r = keeper.words((n,)) + user.words((n,))
    beta = compare.random_bits(keeper, user, (m, n))
    keys = compare.make_keys(r, torch.zeros_like(r), keeper, user, width_of(request))
    values = [beta]
    for _ in range(degree):
        values.append(values[-1] * r)
    if degree == 2:
        values.append(r * r)
    return [share_for_keeper(value, user) for value in values], keys


def _take(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A party's part: its share of r, its own bits, its seeds, the correction words, then the shares in order."""
    n, m, _ = _sizes(request)
    shapes = _shares(request)
    r = stream.words((n,))
    bits = stream.words(((m * n + 63) // 64,))
    seeds = torch.from_numpy(dcf.seeds(stream, n).view(np.int64))
    if rank == KEEPER:
        return (r, bits, seeds, *corrections[len(shapes) :], *corrections[: len(shapes)])
    return (r, bits, seeds, *corrections, *(stream.words(shape) for shape in shapes))


correlation.KINDS["spline"] = Kind(_deal, _take, _shares, lambda q: key_shapes(_sizes(q)[0], width_of(q)))


@costs(lambda n, knots: Cost(rounds=2, payload_bytes=16 * n + 2 * -(-n * knots // 8)))
def evaluate(party: Party, x: Tensor, pieces: Pieces) -> Tensor:
    """Return a sharing of f(x) for a piecewise quadratic f.

    Args:
        party: this party.
        x: share, int64 of any shape, at scale 2**f; |x| + |k_i| < 2**(k-1) for every knot.
        pieces: f; |f(x)| < 2**62 at its scale, unless the result is used modulo 2**64.

    Returns:
        Share of f(x), same shape, at scale 2**pieces.frac_bits; exact in the ring.

    Cost: 2 rounds; 8 bytes each way for each of n elements, and 1 bit each way for each element and knot.
    Security: both opened values are uniform: x under r, each bit under a mask of its own.
    """
    return evaluate_together(party, [(x, (pieces,))])[0]


# n: elements of all values together; bits: of elements and knots, each value's in whole bytes.
@costs(lambda n, bits: Cost(rounds=2, payload_bytes=16 * n + 2 * -(-bits // 8)))
def evaluate_together(party: Party, values: Sequence[tuple[Tensor, Sequence[Pieces]]]) -> list[Tensor]:
    """Return sharings of several functions of several values, in the rounds of one; see `evaluate`.

    Args:
        party: this party.
        values: shares at scale 2**f, each with the functions that are wanted of it, which have one row of knots.

    Returns:
        Shares of f(x) for each x and each f of it, in order.

    Cost: 2 rounds; 8 bytes each way for each element of a value, and 1 bit each way for each element and knot,
        whatever the number of functions.
    Security: as `evaluate`; functions of one value use one and the same opened bits, which are uniform.
    """
    requests = [_request_for(party, x, functions) for x, functions in values]
    parts = [party.correlations.take(request) for request in requests]
    sizes = [_sizes(request) for request in requests]
    if party.dry:
        compare.rehearse_many(party, [x.reshape(-1) for x, _ in values], [m * n for n, m, _ in sizes])
        return [torch.empty_like(x) for x, functions in values for _ in functions]
    opened = open_many(party, [x.reshape(-1) + part[0] for (x, _), part in zip(values, parts, strict=True)])
    masked = [X.numpy() for X in opened]
    packed = [
        _bit_shares(party, X, functions[0], part, size)
        for X, (_, functions), part, size in zip(masked, values, parts, sizes, strict=True)
    ]
    flat = np.concatenate(packed) if len(packed) > 1 else packed[0]
    bits = flat ^ party.wire.exchange("bits", torch.from_numpy(flat)).numpy()
    results, start = [], 0
    for X, (x, functions), part, (n, m, _) in zip(masked, values, parts, sizes, strict=True):
        width = -(-m * n // 8)
        c = np.unpackbits(bits[start : start + width], count=m * n).reshape(m, n)
        start += width
        r, _, _, _, _, *shares = (t.numpy() for t in part)
        for pieces in functions:
            out = fused.piecewise(c, X, pieces.table, r, shares, np.int64(party.rank == KEEPER))
            results.append(torch.from_numpy(out).reshape(x.shape))
    return results


def _request_for(party: Party, x: Tensor, functions: Sequence[Pieces]) -> Request:
    widest = max(functions, key=lambda f: f.degree)
    return request_of(x.shape, widest, party.comparison_bits)


def _bit_shares(
    party: Party, X: NDArray[np.int64], pieces: Pieces, part: tuple[Tensor, ...], size: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Return this party's shares (under xor) of the bits [x >= k] under their masks, packed."""
    n, m, _ = size
    _, bits, seeds, words, values = (t.numpy() for t in part[:5])
    share = np.unpackbits(bits.view(np.uint8), count=m * n).reshape(m, n)
    for i, knot in enumerate(pieces.knots):
        share[i] ^= compare.sign_shares(party, X - knot, seeds, words, values)
    return np.packbits(share)
