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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols import compare, correlation, dcf, fused
from protocols.compare import key_shapes, width_of
from protocols.correlation import KEEPER, Dealing, Dealt, Kind, Request, Shape, share_for_keeper
from protocols.cost import Cost, costs
from protocols.errors import IntegrityError
from protocols.party import Party
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

    @property
    def degree(self) -> int:
        """The largest power of x that occurs, 0 to 2."""
        return max((i % 3 for i, c in enumerate(self.coefficients) if c), default=0)

    def table(self) -> NDArray[np.int64]:
        """Return p_0 and the steps D_i as rows of (c0, c1, c2), int64 (m + 1, 3), mod 2**64."""
        rows = np.array(self.coefficients, dtype=object).reshape(-1, 3)
        steps = np.concatenate([rows[:1], rows[1:] - rows[:-1]])
        wrapped = (steps + (1 << 63)) % (1 << 64) - (1 << 63)
        return wrapped.astype(np.int64)


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
    request = request_of(x.shape, pieces, party.comparison_bits)
    part = party.correlations.take(request)
    n, m, _ = _sizes(request)
    if party.dry:
        compare.rehearse(party, x.reshape(-1), m * n)
        return torch.empty_like(x)
    r, bits, seeds, words, values, *shares = (t.numpy() for t in part)
    masked = x.reshape(-1) + part[0]
    X = (masked + party.wire.exchange("open", masked)).numpy()
    share = np.unpackbits(bits.view(np.uint8), count=m * n).reshape(m, n)
    for i, knot in enumerate(pieces.knots):
        share[i] ^= compare.sign_shares(party, X - knot, seeds, words, values)
    packed = np.packbits(share)
    opened = packed ^ party.wire.exchange("bits", torch.from_numpy(packed)).numpy()
    c = np.unpackbits(opened, count=m * n).reshape(m, n)
    out = fused.piecewise(c, X, pieces.table(), r, shares, np.int64(party.rank == KEEPER))
    return torch.from_numpy(out).reshape(x.shape)
