"""Piecewise quadratic functions of a sharing by one comparison key each: every smooth function rests on this.

A value x is opened under a dealer's mask r as X = x + r. For each knot k_i the bit b_i = [x >= k_i] follows from the
public X - k_i and the mask, as `compare` says, and one and the same key answers for all knots: it shares 1{y < q} for
whatever public y it is asked. The bits are opened under masks beta_i of their own, c_i = b_i ^ beta_i. With p_i the
polynomial between k_i and k_{i+1}, D_i = p_i - p_{i-1} and dealer shares of r, r**2, beta_i, beta_i r, beta_i r**2,

    f(x) = p_0(x) + sum_i b_i D_i(x),        b_i = c_i + (1 - 2 c_i) beta_i,        x = X - r

is a linear function of shares with public coefficients, so that no product has to be opened.

Source: [Boy21] for the key and for asking it more than once (interval containment, section 4); the sum with the
products of beta and powers of r is ours, docs/protocols.md#splines.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protocols import limits
from protocols.cost import Cost, costs
from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, Dealing, Dealt, Kind, Request, Shape, share_for_keeper
from protocols.errors import UnsupportedError
from protocols.primitives import comparison_steps, dcf
from protocols.primitives.prg import Stream
from protocols.program.pieces import Pieces
from protocols.two_party import compare
from protocols.two_party.compare import key_shapes, width_of
from protocols.two_party.party import Party, open_many


def request_of(shape: Sequence[int], pieces: Pieces, k: int = limits.COMPARISON_BITS) -> Request:
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


def _part_shapes(request: Request) -> list[Shape]:
    n, m, _ = _sizes(request)
    keys = key_shapes(n, width_of(request))
    return [(n,), ((m * n + 63) // 64,), (dcf.padded(n), 2), *keys, *_shares(request)]


correlation.KINDS["spline"] = Kind(
    _deal, _take, _shares, lambda q: key_shapes(_sizes(q)[0], width_of(q)), part=_part_shapes
)


@costs(lambda n, knots: Cost(rounds=2, payload_bytes=16 * n + 2 * -(-n * knots // 8)))
def evaluate(party: Party, x: Tensor, pieces: Pieces) -> Tensor:
    """Return a sharing of f(x) for a piecewise quadratic f.

    Args:
        party: this party.
        x: share, int64 of any shape, at scale 2**f; |x| + |k_i| < 2**(k-1) for every knot.
        pieces: f; |f(x)| < 2**62 at its scale, unless the result is used modulo 2**64.

    Returns:
        Share of f(x), same shape, at scale 2**pieces.frac_bits; exact in the ring.

    Raises:
        UnsupportedError: a knot is 2**(k-1) or more in magnitude.

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
    opened = open_many(party, [x.reshape(-1) + part[0] for (x, _), part in zip(values, parts, strict=True)])
    shares = [
        _bit_shares(party, X, functions[0], part) for X, (_, functions), part in zip(opened, values, parts, strict=True)
    ]
    results = []
    for X, c, (x, functions), part in zip(opened, compare.open_bits(party, shares), values, parts, strict=True):
        r, _, _, _, _, *powers = part
        for pieces in functions:
            out = comparison_steps.piecewise(c, X, pieces.table, r, powers, party.rank == KEEPER)
            results.append(out.reshape(x.shape))
    return results


def _request_for(party: Party, x: Tensor, functions: Sequence[Pieces]) -> Request:
    widest = max(functions, key=lambda f: f.degree)
    if party.comparison_bits < widest.fewest_bits:
        raise UnsupportedError(
            f"a function with knots that far apart must be compared on {widest.fewest_bits} bits or more; "
            f"got {party.comparison_bits}"
        )
    return request_of(x.shape, widest, party.comparison_bits)


def _bit_shares(party: Party, X: Tensor, pieces: Pieces, part: tuple[Tensor, ...]) -> Tensor:
    """Return this party's shares (under xor) of the bits [x >= k] under their masks, uint8 (m, n)."""
    _, bits, *key = part[:5]
    shares = compare.sign_shares(party, X, pieces.knots, key)
    shares ^= comparison_steps.unpack_bits(bits.view(torch.uint8), shares.shape)
    return shares
