"""Operators made of products and comparisons, whatever the comparison is: the same in every protocol.

Each is a function of (party, layer, weights, values), as `program.OPERATORS` describes it. Products are those of
`beaver`, comparisons those of the party's protocol. A protocol that has a better way for an operator puts it in the
place of the one here.

Cost: of a product 1 round, of a comparison as the protocol has it; see each operator.
Security: that of products and comparisons; every opened value is under a mask that serves once.
Source: products, choices and functions of two scales, docs/protocols.md#products, docs/protocols.md#argmax and
docs/protocols.md#splines-of-two-scales.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from protocols import limits
from protocols.dealing.correlation import KEEPER
from protocols.errors import ProtocolAbort
from protocols.limits import FRAC_BITS
from protocols.primitives import ring
from protocols.program.pieces import Pieces, WidePieces
from protocols.program.program import Layer
from protocols.two_party import beaver, local_operators
from protocols.two_party.party import Party, truncate_many
from protocols.two_party.value import Operator, Value, Weights

# --- products -------------------------------------------------------------------------------------------------------


def _factors(party: Party, x: Value, y: Value) -> tuple[Value, Value]:
    """Truncate two factors so far that their product keeps at most `limits.MOST_FRAC_BITS` fraction bits."""
    most = limits.MOST_FRAC_BITS
    if x.frac_bits + y.frac_bits > most:
        x.truncate_to(party, most // 2)
        y.truncate_to(party, most - min(x.frac_bits, most // 2))
    return x, y


def mul(party: Party, layer: Layer, weights: Weights, x: Value, y: Value) -> Value:
    """Elementwise product of two shared values of one rank, which may broadcast; 1 round."""
    _factors(party, x, y)
    return Value(beaver.mul(party, x.share, y.share), x.frac_bits + y.frac_bits)


def dot(party: Party, layer: Layer, weights: Weights, x: Value, y: Value) -> Value:
    """Product of two shared matrices, one for each place of the leading axes; 1 round."""
    _factors(party, x, y)
    return Value(beaver.matmul(party, x.share, y.share), x.frac_bits + y.frac_bits)


# --- comparisons ----------------------------------------------------------------------------------------------------


def negative(party: Party, share: Tensor) -> Tensor:
    """Return a sharing of [x < 0] as the integer 0 or 1, by the comparison of this party's protocol."""
    if party.is_negative is None:
        raise ProtocolAbort("a party must know how its protocol compares; `runner.run` says so")
    return party.is_negative(party, share)


def lowest(party: Party, frac_bits: int) -> int:
    """Return this party's share of the least value that comparisons allow: padding that never wins a maximum."""
    return -(1 << (party.comparison_bits - 2 + frac_bits - FRAC_BITS)) if party.rank == KEEPER else 0


def maxima(relu: Callable[[Party, Tensor], Tensor]) -> dict[str, Operator]:
    """Return the operators that a ReLU makes, by name: itself, and maxima as trees of max(a, b) = b + relu(a - b).

    Args:
        relu: party, share of values of 16 fraction bits -> share of their positive part.
    """

    def largest(party: Party, columns: Tensor) -> Tensor:
        while len(columns) > 1:
            half = len(columns) // 2
            a, b, rest = columns[:half], columns[half : 2 * half], columns[2 * half :]
            columns = torch.cat([b + relu(party, a - b), rest])
        return columns.squeeze(0)

    def positive(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
        return Value(relu(party, x.truncate_to_scale(party)))

    def max_pool2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
        padded = ring.pad2d(x.truncate_to_scale(party), layer.ints("pads"), lowest(party, FRAC_BITS))
        return Value(largest(party, ring.windows(padded, layer.ints("kernel"), layer.ints("stride"))))

    def max_(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
        axis = int(layer.number("axis"))
        return Value(largest(party, x.truncate_to_scale(party).movedim(axis, 0)).unsqueeze(axis))

    return {"relu": positive, "max_pool2d": max_pool2d, "max": max_}


def argmax(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Place of the maximum along one axis, which stays with size 1: a tree of choices between neighbours."""
    axis, last = int(layer.number("axis")), bool(layer.number("last"))
    best = x.truncate_to_scale(party).movedim(axis, 0)
    place = torch.arange(len(best), device=best.device).reshape(-1, *[1] * (best.dim() - 1)) * (party.rank == KEEPER)
    both = torch.stack([best, place.expand(best.shape)])
    while both.shape[1] > 1:
        half = both.shape[1] // 2
        a, b, rest = both[:, 0 : 2 * half : 2], both[:, 1 : 2 * half : 2], both[:, 2 * half :]
        difference = a - b
        # Among equals the first one wins, or the last: it loses only to a strictly larger one.
        loses = negative(party, -difference[0] if last else difference[0])
        chosen = beaver.mul(party, loses.unsqueeze(0), -difference if not last else difference)
        both = torch.cat([(a if not last else b) + chosen, rest], 1)
    return Value(both[1].squeeze(0).unsqueeze(axis), 0)


# --- piecewise quadratics -------------------------------------------------------------------------------------------

# Made once: a prediction must not wait for the tables of its functions.
_pieces, _wide_pieces = functools.lru_cache(1024)(Pieces), functools.lru_cache(1024)(WidePieces)


def pieces_of(layer: Layer) -> Pieces:
    """Return the function of a layer."""
    return _pieces(layer.ints("knots"), layer.ints("coefficients"), int(layer.number("frac_bits")))


def spline(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Piecewise quadratic: all bits [x >= k] in one comparison, then at most three products in two rounds."""
    pieces = pieces_of(layer)
    (total,) = _piecewise(party, x.truncate_to_scale(party), (pieces,))
    return Value(total, pieces.frac_bits).truncate_to(party, int(layer.number("keep_bits")))


def _piecewise(party: Party, share: Tensor, functions: Sequence[Pieces]) -> list[Tensor]:
    """Return functions of one row of knots at a sharing, at the scale of each."""
    pieces = functions[0]
    first = party.rank == KEEPER
    knots = torch.tensor(pieces.knots, device=share.device).reshape(-1, *[1] * share.dim())
    below = negative(party, share.unsqueeze(0) - (knots if first else torch.zeros_like(knots)))
    bits = (1 - below) if first else -below
    return [_sum_of_pieces(party, share, bits, function) for function in functions]


def _sum_of_pieces(party: Party, share: Tensor, bits: Tensor, pieces: Pieces) -> Tensor:
    first, rows = party.rank == KEEPER, torch.from_numpy(pieces.table)
    # Each coefficient of x**j is p_0's plus the sum of the steps whose knots lie at or below x.
    sums = [(bits * rows[1:, j].reshape(-1, *[1] * share.dim()).to(share.device)).sum(0) for j in range(3)]
    c0, c1, c2 = (s + int(rows[0, j]) if first else s for j, s in enumerate(sums))
    total = c0
    if pieces.degree:
        total = total + beaver.mul(party, c1, share)
    if pieces.degree == 2:
        total = total + beaver.mul(party, c2, beaver.mul(party, share, share))
    return total


def wide_pieces_of(layer: Layer) -> WidePieces:
    """Return the function of a layer of two scales."""
    return _wide_pieces(
        layer.ints("knots"),
        layer.ints("coefficients"),
        int(layer.number("frac_bits")),
        layer.ints("low_coefficients"),
        int(layer.number("low_frac_bits")),
        int(layer.number("finer")),
    )


def two_scales(party: Party, x: Value, finer: int) -> tuple[Tensor, Tensor]:
    """Return shares of x and of x * 2**finer at scale 2**f; 1 round where something has to be truncated."""
    parts = []
    for bits in (FRAC_BITS, FRAC_BITS + finer):
        parts.append((x.raised_to(bits), max(x.frac_bits - bits, 0)))
    coarse, fine = truncate_many(party, parts)
    return coarse, fine


def chosen(party: Party, turned: Tensor, coarse: Value, fine: Value, keep_bits: int) -> Value:
    """Return fine + turned (coarse - fine) at scale 2**keep_bits: 2 rounds, 1 where nothing has to be truncated."""
    values = [(v.raised_to(keep_bits), max(v.frac_bits - keep_bits, 0)) for v in (coarse, fine)]
    high, low = truncate_many(party, values)
    return Value(low + beaver.mul(party, turned, high - low), keep_bits)


def wide_spline(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Piecewise quadratic of x or, where x is small, of x * 2**finer: both are computed, and one is chosen."""
    pieces = wide_pieces_of(layer)
    coarse, fine = two_scales(party, x, pieces.finer)
    high, turned = _piecewise(party, coarse, (pieces.coarse, pieces.turned))
    (low,) = _piecewise(party, fine, (pieces.fine,))
    values = Value(high, pieces.frac_bits), Value(low, pieces.low_frac_bits)
    return chosen(party, turned, *values, int(layer.number("keep_bits")))


OPERATORS: dict[str, Operator] = local_operators.OPERATORS | {
    f.__name__.rstrip("_"): f for f in (mul, dot, argmax, spline, wide_spline)
}
