"""Two parties and a dealer, by function secret sharing: `protocol="fss"`.

Linear layers are `linear.apply`, comparisons `compare.relu` and `compare.max_of_pairs`, fused with the
truncation of what the linear layer left at scale 2**2f. Every other operator is that of
`operators`, made of the same comparisons and of Beaver products. No CrypTen is in it.

Security: semi-honest, one of two parties, trusted dealer; fixed-key AES as a random permutation.
Source: docs/protocols.md#model, docs/protocols.md#composition.
"""

from collections.abc import Mapping
from contextlib import nullcontext

from torch import Tensor

from protocols import limits
from protocols.dealing.correlation import KEEPER, Request
from protocols.limits import FRAC_BITS
from protocols.primitives import kernels, ring
from protocols.program.program import Layer, Program
from protocols.running.backend import Backend
from protocols.two_party import compare, linear, operators
from protocols.two_party import spline as piecewise
from protocols.two_party.party import Party
from protocols.two_party.value import Operator, Value, Weights
from protocols.two_party.weights import product_bits, share_weights


def masked_names(program: Program) -> list[str]:
    """Return the parameters that the keeper sends once, masked, as `linear` says."""
    names = [layer.params[linear.MAPS[layer.op]] for layer in program.layers if layer.op in linear.MAPS]
    return list(dict.fromkeys(names))


def finish(request: Request, part: tuple[Tensor, ...], masked: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Do the user's work on one correlation before the input is known."""
    if request.kind != "linear":
        return part
    return linear.prepare(request, part, masked[str(dict(request.options)["weight"])])


def _linear(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """A linear layer with the keeper's weights: 1 round."""
    weight = bias = None
    if party.rank == KEEPER:
        weight = weights[layer.params[linear.MAPS[layer.op]]]
        bias = weights[layer.params["shift" if layer.op == "affine" else "bias"]]
    return Value(linear.apply(party, layer, x.truncate_to_scale(party), weight, bias), product_bits(party, layer))


def _comparable(party: Party, x: Value, most: int = FRAC_BITS) -> tuple[Tensor, int]:
    """Return a share and the bits by which a comparison truncates it: none, or those of a product, `most` of them."""
    if FRAC_BITS <= x.frac_bits - FRAC_BITS <= most:
        return x.share, x.frac_bits - FRAC_BITS
    return x.truncate_to_scale(party), 0


def relu(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """max(x, 0), with the truncation: 2 rounds."""
    return Value(compare.relu(party, *_comparable(party, x, limits.most_cut(party.comparison_bits))))


def _largest(party: Party, columns: Tensor, bits: int) -> Value:
    """Maximum along the first axis, a tree of pairs, the first level with the truncation: 2 rounds a level."""
    while len(columns) > 1:
        columns = compare.max_of_pairs(party, columns, bits)
        bits = 0
    return Value(columns.squeeze(0), FRAC_BITS + bits)


def max_pool2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Maximum over windows: 2 rounds for each halving of a window."""
    share, bits = _comparable(party, x)
    padded = ring.pad2d(share, layer.ints("pads"), operators.lowest(party, FRAC_BITS + bits))
    return _largest(party, ring.windows(padded, layer.ints("kernel"), layer.ints("stride")), bits)


def max_(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Maximum over one axis, which stays with size 1: 2 rounds for each halving."""
    axis = int(layer.number("axis"))
    share, bits = _comparable(party, x)
    best = _largest(party, share.movedim(axis, 0), bits)
    return Value(best.share.unsqueeze(axis), best.frac_bits)


def spline(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Piecewise quadratic by one key: 2 rounds, 1 more where the result is truncated."""
    pieces = operators.pieces_of(layer)
    out = piecewise.evaluate(party, x.truncate_to_scale(party), pieces)
    return Value(out, pieces.frac_bits).truncate_to(party, int(layer.number("keep_bits")))


def wide_spline(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Piecewise quadratic of x or, where x is small, of x * 2**finer: 5 rounds, 4 where nothing is truncated before."""
    pieces = operators.wide_pieces_of(layer)
    coarse, fine = operators.two_scales(party, x, pieces.finer)
    high, turned, low = piecewise.evaluate_together(
        party, [(coarse, (pieces.coarse, pieces.turned)), (fine, (pieces.fine,))]
    )
    values = Value(high, pieces.frac_bits), Value(low, pieces.low_frac_bits)
    return operators.chosen(party, turned, *values, int(layer.number("keep_bits")))


OPERATORS: dict[str, Operator] = operators.OPERATORS | {
    "conv2d": _linear,
    "matmul": _linear,
    "affine": _linear,
    "relu": relu,
    "max_pool2d": max_pool2d,
    "max": max_,
    "spline": spline,
    "wide_spline": wide_spline,
}

BACKEND = Backend(
    operators=OPERATORS,
    is_negative=compare.is_negative,
    share_weights=share_weights,
    pack_weights=linear.pack_weights,
    masked_names=masked_names,
    finish=finish,
    warm=kernels.warm,
    acting=lambda party: nullcontext(),
)
