"""CrypTen's own protocols over shares, for what of `protocol="crypten"` is CrypTen's: linear maps, signs and maxima.

Each operator is a function of (party, layer, weights, values), as `program.OPERATORS` describes it. Linear maps are
CrypTen's Beaver protocol on shared weights and inputs, comparisons its binary circuits. What differs from CrypTen
alone is the dealer, the randomness and the truncation (`door`), and that a linear layer's result stays at scale 2**2f
until somebody needs it truncated, so that the output gate can take part in that opening.

Cost: CrypTen's protocols are not declared; they are measured by layer (`runner`).
Security: semi-honest, one of two parties, trusted dealer.
Source: [Kno21]; what is replaced, docs/protocols.md#cryptens-protocols.
"""

from torch import Tensor

from protocols.crypten import door
from protocols.primitives import ring
from protocols.program.program import Layer
from protocols.two_party import operators
from protocols.two_party.party import Party
from protocols.two_party.value import Operator, Value, Weights
from protocols.two_party.weights import product_bits

# --- products -------------------------------------------------------------------------------------------------------


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


# --- comparisons ----------------------------------------------------------------------------------------------------


def is_negative(party: Party, share: Tensor) -> Tensor:
    """Return a sharing of [x < 0] as the integer 0 or 1: CrypTen's circuit, on all 64 bits."""
    bits: Tensor = door.mpc_tensor(share, 0)._ltz().share
    return bits


def relu(party: Party, share: Tensor) -> Tensor:
    """Return a sharing of max(x, 0): CrypTen's comparison and product."""
    result: Tensor = door.mpc_tensor(share).relu().share
    return result


OPERATORS: dict[str, Operator] = (
    operators.OPERATORS | operators.maxima(relu) | {f.__name__: f for f in (conv2d, matmul, affine)}
)
