"""Two parties and a dealer, by function secret sharing: `protocol="fss"`.

Linear layers are `linear.apply`, comparisons `compare.relu` and `compare.max_of_pairs`, fused with the
truncation of what the linear layer left at scale 2**2f. Every other operator is that of `stock`,
that is CrypTen's, on the same shares.

Security: semi-honest, one of two parties, trusted dealer; fixed-key AES as a random permutation.
"""

from collections.abc import Mapping

from torch import Tensor

from protocols import compare, kernels, linear, ring, stock
from protocols.correlation import KEEPER, Request
from protocols.party import Party
from protocols.program import Layer, Program
from protocols.ring import FRAC_BITS
from protocols.stock import Operator, Value, Weights

share_weights = stock.share_weights
is_negative = compare.is_negative
pack_weights = linear.pack_weights
warm = kernels.warm


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
    if party.rank == KEEPER and not party.dry:
        weight = weights[layer.params[linear.MAPS[layer.op]]]
        bias = weights[layer.params["shift" if layer.op == "affine" else "bias"]]
    return Value(linear.apply(party, layer, x.at_scale(party), weight, bias), 2 * FRAC_BITS)


def _shift(party: Party, x: Value, by: float) -> Value:
    """Add a public constant."""
    constant = round(by * 2**x.frac_bits)
    return Value(x.share + constant, x.frac_bits) if party.rank == KEEPER else x


def relu(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """max(x, 0), with the truncation: 2 rounds."""
    return Value(compare.relu(party, x.share, x.frac_bits - FRAC_BITS))


def leaky_relu(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """slope * x + (1 - slope) * relu(x): 2 rounds, 3 where x has to be truncated."""
    share, slope = x.at_scale(party), round(layer.number("slope") * 2**FRAC_BITS)
    positive = compare.relu(party, share, 0)
    return Value(slope * share + (2**FRAC_BITS - slope) * positive, 2 * FRAC_BITS)


def clip(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """min(max(x, low), high), by low + relu(x - low) and high - relu(high - x): 2 rounds for each finite bound."""
    low, high = layer.number("low"), layer.number("high")
    if low > -ring.CLIP_LIMIT:
        above = _shift(party, x, -low)
        x = _shift(party, Value(compare.relu(party, above.share, above.frac_bits - FRAC_BITS)), low)
    if high < ring.CLIP_LIMIT:
        below = _shift(party, Value(-x.share, x.frac_bits), high)
        rest = Value(compare.relu(party, below.share, below.frac_bits - FRAC_BITS))
        x = _shift(party, Value(-rest.share), high)
    return x


def max_pool2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Maximum over windows, a tree of pairs, the first level with the truncation: 2 rounds a level."""
    bits = x.frac_bits - FRAC_BITS
    lowest = -(1 << (ring.LOWEST_BITS + bits)) if party.rank == KEEPER else 0
    columns = ring.windows(ring.pad2d(x.share, layer.ints("pads"), lowest), layer.ints("kernel"), layer.ints("stride"))
    while len(columns) > 1:
        columns = compare.max_of_pairs(party, columns, bits)
        bits = 0
    return Value(columns.squeeze(0), FRAC_BITS + bits)


OPERATORS: dict[str, Operator] = stock.OPERATORS | {
    "conv2d": _linear,
    "matmul": _linear,
    "affine": _linear,
    "relu": relu,
    "leaky_relu": leaky_relu,
    "clip": clip,
    "max_pool2d": max_pool2d,
}
