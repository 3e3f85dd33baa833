"""Operators that send nothing: they move, add, or scale by public numbers. The same in every protocol.

Each is a function of (party, layer, weights, values), as `program.OPERATORS` describes it. What they multiply by a
public fraction stays at a larger scale until somebody needs it truncated.

Cost: 0 rounds, 0 bytes; 1 round of `party.truncate` where an operand first has to lose fraction bits.
Security: nothing is sent.
Source: docs/protocols.md#local-operators.
"""

import math

import torch
from torch import Tensor

from protocols.dealing.correlation import KEEPER
from protocols.limits import FRAC_BITS, MOST_FRAC_BITS
from protocols.primitives import ring
from protocols.program.program import Layer
from protocols.two_party.party import Party
from protocols.two_party.value import Operator, Value, Weights, public

# A public factor in (1/2, 1] has so many bits where there is room for them, and at least so few: an error of 2**-10.
_FACTOR_BITS, _FEWEST_FACTOR_BITS = FRAC_BITS, 10


def _same_scale(party: Party, *xs: Value) -> tuple[list[Tensor], int]:
    """Return shares at the largest of their scales, which costs nothing up to that of a product."""
    bits = max(x.truncate_to(party, 2 * FRAC_BITS).frac_bits for x in xs)
    return [x.raised_to(bits) for x in xs], bits


def _added(share: Tensor, constant: int | Tensor, party: Party) -> Tensor:
    return share + constant if party.rank == KEEPER else share


def add(party: Party, layer: Layer, weights: Weights, x: Value, y: Value) -> Value:
    """Sum; operands of one rank broadcast."""
    (a, b), bits = _same_scale(party, x, y)
    return Value(a + b, bits)


def sub(party: Party, layer: Layer, weights: Weights, x: Value, y: Value) -> Value:
    """Difference; operands of one rank broadcast."""
    (a, b), bits = _same_scale(party, x, y)
    return Value(a - b, bits)


def shift(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Add the keeper's parameter."""
    bits = max(x.frac_bits, FRAC_BITS)
    share = x.raised_to(FRAC_BITS)
    addend = weights[layer.params["addend"]] << (bits - FRAC_BITS)
    return Value(share + addend, bits)


def _times(party: Party, x: Value, factor: float | Tensor) -> Value:
    """Multiply by public numbers whose largest lies in (1/2, 1]: with 16 bits, or with 10 rather than truncate x."""
    bits = min(_FACTOR_BITS, MOST_FRAC_BITS - x.frac_bits)
    if bits < _FEWEST_FACTOR_BITS:
        x, bits = x.truncate_to(party, MOST_FRAC_BITS - _FACTOR_BITS), _FACTOR_BITS
    if isinstance(factor, Tensor):
        return Value(x.share * ring.encode(factor, bits).to(x.share.device), x.frac_bits + bits)
    return Value(x.share * public(factor, bits), x.frac_bits + bits)


def scale(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """x * factor + offset with public numbers; exact for whole factors and for 2**-k, which is another scale.

    Of any other factor a power of two is taken out in the same way, so that small ones keep their bits.
    """
    factor, offset = layer.number("factor"), layer.number("offset")
    if factor == int(factor):
        bits = x.frac_bits if offset == int(offset) else max(x.frac_bits, FRAC_BITS)
        return Value(_added(x.raised_to(bits) * int(factor), public(offset, bits), party), bits)
    mantissa, exponent = math.frexp(factor)
    if abs(mantissa) == 0.5:
        # 2**(exponent - 1), the sign apart.
        finer = max(x.frac_bits + 1 - exponent, FRAC_BITS)
        scaled = Value(x.raised_to(finer + exponent - 1) * (1 if factor > 0 else -1), finer)
    else:
        x.truncate_to(party, MOST_FRAC_BITS - FRAC_BITS)
        whole = max(exponent, 0)
        if whole:
            scaled = Value(x.share * public(factor, FRAC_BITS), x.frac_bits + FRAC_BITS)
        else:
            scaled = _times(party, Value(x.share, x.frac_bits - exponent), mantissa)
    if offset:
        # Beside a sum there is no room for more.
        scaled = scaled.truncate_to(party, MOST_FRAC_BITS)
        scaled.share = _added(scaled.share, public(offset, scaled.frac_bits), party)
    return scaled


def sum_(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Sum over public axes."""
    return Value(x.share.sum(layer.ints("axes"), keepdim=bool(layer.number("keepdims"))), x.frac_bits)


def mean(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Mean over public axes; exact where their size is a power of two, else within 2**-10 of the value, mostly 2**-16.

    1 / n is 2**-a times a factor in (1/2, 1], and 2**-a another scale: however many values, the factor keeps its bits.
    """
    axes = layer.ints("axes")
    n = math.prod(x.share.shape[a] for a in axes)
    total = x.truncate_to(party, MOST_FRAC_BITS - FRAC_BITS).share.sum(axes, keepdim=bool(layer.number("keepdims")))
    return _divided(party, Value(total, x.frac_bits), n)


def _divided(party: Party, x: Value, n: int) -> Value:
    log = n.bit_length() - 1
    scaled = Value(x.share, x.frac_bits + log)
    return scaled if n == 1 << log else _times(party, scaled, 2.0**log / n)


def deviation(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """(n x - sum of x) / 2**a: exact, so that no offset of the values is in the way of their differences."""
    axes = layer.ints("axes")
    n = math.prod(x.share.shape[a] for a in axes)
    log = n.bit_length() - 1
    share = x.truncate_to(party, min(2 * FRAC_BITS, MOST_FRAC_BITS - log)).share
    # Modulo 2**64: that n x alone may wrap around does no harm.
    return Value(share * n - share.sum(axes, keepdim=True), x.frac_bits + log)


def sum_pool2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Sums over windows."""
    padded = ring.pad2d(x.share, layer.ints("pads"))
    return Value(ring.windows(padded, layer.ints("kernel"), layer.ints("stride")).sum(0), x.frac_bits)


def avg_pool2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Average pooling; as exact as `mean`."""
    kernel, stride, pads = layer.ints("kernel"), layer.ints("stride"), layer.ints("pads")
    share, bits = x.truncate_to(party, MOST_FRAC_BITS - FRAC_BITS).share, x.frac_bits
    total = Value(ring.windows(ring.pad2d(share, pads), kernel, stride).sum(0), bits)
    if layer.number("count_include_pad"):
        return _divided(party, total, math.prod(kernel))
    ones = ring.pad2d(torch.ones(share.shape[-2:], dtype=torch.int64), pads)
    counts = ring.windows(ones, kernel, stride).sum(0).double().clamp(min=1)
    log = int(counts.max()).bit_length() - 1
    return _times(party, Value(total.share, bits + log), 2.0**log / counts)


def reshape(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """New shape of each sample."""
    return Value(x.share.reshape(x.share.shape[0], *layer.ints("shape")), x.frac_bits)


def transpose(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Permuted axes."""
    return Value(x.share.permute(layer.ints("perm")), x.frac_bits)


def concat(party: Party, layer: Layer, weights: Weights, *xs: Value) -> Value:
    """Joined along an axis."""
    shares, bits = _same_scale(party, *xs)
    return Value(torch.cat(shares, dim=int(layer.number("axis"))), bits)


def take(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Chosen places of one axis, in any order and number; -1 stands for a public number."""
    axis, fill = int(layer.number("axis")), layer.number("fill")
    indices = torch.tensor(layer.ints("indices"), dtype=torch.int64)
    bits = x.frac_bits if fill == int(fill) else max(x.frac_bits, FRAC_BITS)
    share = x.raised_to(bits)
    out = share.index_select(axis, indices.clamp(min=0).to(share.device))
    if bool((indices < 0).any()):
        form = [1] * out.dim()
        form[axis] = -1
        absent = (indices < 0).reshape(form).to(share.device)
        out = torch.where(absent, torch.tensor(public(fill, bits) if party.rank == KEEPER else 0), out)
    return Value(out, bits)


def expand(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Axes of one repeated; the rank stays."""
    return Value(x.share.expand(x.share.shape[0], *layer.ints("shape")), x.frac_bits)


OPERATORS: dict[str, Operator] = {
    f.__name__.rstrip("_"): f
    for f in (
        *(add, sub, shift, scale, sum_, mean, deviation, sum_pool2d, avg_pool2d),
        *(reshape, transpose, concat, take, expand),
    )
}
