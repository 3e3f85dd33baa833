"""CrypTen's own protocols over shares: `protocol="crypten"`.

Each operator of `program.OPERATORS` is a function of (party, layer, weights, values). Linear maps
are CrypTen's Beaver protocol on shared weights and inputs, comparisons its binary circuits,
every other function a sum over such comparisons (`spline`). What differs from CrypTen alone is the dealer, the
randomness and the truncation (`engine`), and that a linear layer's result stays at scale 2**2f
until somebody needs it truncated, so that the output gate can take part in that opening.

Cost: CrypTen's protocols are not declared; they are measured by layer (`runner`).
Security: semi-honest, one of two parties, trusted dealer.
Source: [Kno21]; what is replaced, docs/protocols.md#cryptens-protocols; products, choices and functions of two scales,
docs/protocols.md#products, docs/protocols.md#argmax and docs/protocols.md#splines-of-two-scales.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from protocols import limits
from protocols.crypten import door
from protocols.dealing.correlation import KEEPER, Request
from protocols.limits import FRAC_BITS
from protocols.primitives import ring
from protocols.program.pieces import Pieces, WidePieces
from protocols.program.program import Layer, Program
from protocols.two_party import local_operators
from protocols.two_party.party import Party, truncate_many
from protocols.two_party.value import Operator, Value, Weights


def share_weights(
    program: Program, params: Mapping[str, np.ndarray] | None, comparison_bits: int = limits.COMPARISON_BITS
) -> dict[str, Tensor]:
    """Share the keeper's parameters: encoded at the keeper, zero at the user; nothing is sent.

    Weights have the fraction bits that their layer says; biases and shifts enter behind a product, with FRAC_BITS more.

    Args:
        program: whose parameters.
        params: name -> float32 array at the keeper; None at the user.
        comparison_bits: as in `Party`.

    Raises:
        RangeError: a parameter is not finite or too large; the message names it.

    Security: every later use masks them with a fresh triple.
    """
    if params is None:
        return {name: torch.zeros(shape, dtype=torch.int64) for name, shape in program.params.items()}
    bits = parameter_bits(program, comparison_bits)
    return {name: ring.encode(params[name], bits[name], what=f"parameter {name!r}") for name in program.params}


def parameter_bits(program: Program, comparison_bits: int = limits.COMPARISON_BITS) -> dict[str, int]:
    """Return parameter -> its fraction bits."""
    bits = dict.fromkeys(program.params, FRAC_BITS)
    for layer in program.layers:
        for role, name in layer.params.items():
            if role != "addend":
                late = FRAC_BITS if role in ("bias", "shift") else 0
                bits[name] = layer.bits_of_weight(comparison_bits) + late
    return bits


is_negative = None


def pack_weights(program: Program, weights: Weights) -> None:
    """Prepare weights for their products: nothing to do here."""


def warm() -> None:
    """Load or compile what a prediction needs: nothing to do here."""


def masked_names(program: Program) -> list[str]:
    """Return the parameters that the keeper sends once, masked: none here."""
    return []


def finish(request: Request, part: tuple[Tensor, ...], masked: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Do the user's work on one correlation before the input is known: none here."""
    return part


# --- products -------------------------------------------------------------------------------------------------------


def product_bits(party: Party, layer: Layer) -> int:
    """Return the fraction bits of what a linear layer makes."""
    return FRAC_BITS + layer.bits_of_weight(party.comparison_bits)


def conv2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """2-D convolution, over the leading axes of a sample that has more than three; 1 round."""
    share = x.truncate_to_scale(party)
    images = share.reshape(-1, *share.shape[-3:])
    z = door.beaver(
        "conv2d",
        ring.pad2d(images, layer.ints("pads")),
        weights[layer.params["weight"]],
        stride=layer.ints("stride"),
        dilation=layer.ints("dilation"),
        groups=int(layer.number("groups")),
    )
    z = z + weights[layer.params["bias"]].reshape(1, -1, 1, 1)
    return Value(z.reshape(share.shape[0], *layer.shape), product_bits(party, layer))


def matmul(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Product with a (K, N) matrix on the right; 1 round."""
    z = door.beaver("matmul", x.truncate_to_scale(party), weights[layer.params["weight"]])
    return Value(z + weights[layer.params["bias"]], product_bits(party, layer))


def affine(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Elementwise x * scale + shift; 1 round."""
    z = door.beaver("mul", x.truncate_to_scale(party), weights[layer.params["scale"]])
    return Value(z + weights[layer.params["shift"]], product_bits(party, layer))


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
    return Value(door.beaver("mul", x.share, y.share), x.frac_bits + y.frac_bits)


def dot(party: Party, layer: Layer, weights: Weights, x: Value, y: Value) -> Value:
    """Product of two shared matrices, one for each place of the leading axes; 1 round."""
    _factors(party, x, y)
    return Value(door.beaver("matmul", x.share, y.share), x.frac_bits + y.frac_bits)


# --- comparisons ----------------------------------------------------------------------------------------------------


def negative(party: Party, share: Tensor) -> Tensor:
    """Return a sharing of [x < 0] as the integer 0 or 1, by the comparison of this party's protocol."""
    bits: Tensor = door.mpc_tensor(share, 0)._ltz().share
    return bits


def _relu(share: Tensor) -> Tensor:
    result: Tensor = door.mpc_tensor(share).relu().share
    return result


def relu(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """max(x, 0)."""
    return Value(_relu(x.truncate_to_scale(party)))


def largest(party: Party, columns: Tensor) -> Tensor:
    """Return the maximum along the first axis: a tree of max(a, b) = b + relu(a - b), one comparison a level."""
    while len(columns) > 1:
        half = len(columns) // 2
        a, b, rest = columns[:half], columns[half : 2 * half], columns[2 * half :]
        columns = torch.cat([b + _relu(a - b), rest])
    return columns.squeeze(0)


def lowest(party: Party, frac_bits: int) -> int:
    """Return this party's share of the least value that comparisons allow: padding that never wins a maximum."""
    return -(1 << (party.comparison_bits - 2 + frac_bits - FRAC_BITS)) if party.rank == KEEPER else 0


def max_pool2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Maximum over windows."""
    padded = ring.pad2d(x.truncate_to_scale(party), layer.ints("pads"), lowest(party, FRAC_BITS))
    return Value(largest(party, ring.windows(padded, layer.ints("kernel"), layer.ints("stride"))))


def max_(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Maximum over one axis, which stays with size 1."""
    axis = int(layer.number("axis"))
    return Value(largest(party, x.truncate_to_scale(party).movedim(axis, 0)).unsqueeze(axis))


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
        chosen = door.beaver("mul", loses.unsqueeze(0), -difference if not last else difference)
        both = torch.cat([(a if not last else b) + chosen, rest], 1)
    return Value(both[1].squeeze(0).unsqueeze(axis), 0)


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
        total = total + door.beaver("mul", c1, share)
    if pieces.degree == 2:
        total = total + door.beaver("mul", c2, door.beaver("mul", share, share))
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
    return Value(low + door.beaver("mul", turned, high - low), keep_bits)


def wide_spline(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Piecewise quadratic of x or, where x is small, of x * 2**finer: both are computed, and one is chosen."""
    pieces = wide_pieces_of(layer)
    coarse, fine = two_scales(party, x, pieces.finer)
    high, turned = _piecewise(party, coarse, (pieces.coarse, pieces.turned))
    (low,) = _piecewise(party, fine, (pieces.fine,))
    values = Value(high, pieces.frac_bits), Value(low, pieces.low_frac_bits)
    return chosen(party, turned, *values, int(layer.number("keep_bits")))


OPERATORS: dict[str, Operator] = local_operators.OPERATORS | {
    f.__name__.rstrip("_"): f
    for f in (conv2d, matmul, affine, mul, dot, relu, max_pool2d, max_, argmax, spline, wide_spline)
}
