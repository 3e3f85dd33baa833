"""CrypTen's own protocols over shares: `protocol="crypten"`.

Each operator of `program.OPERATORS` is a function of (party, layer, weights, values). Linear maps
are CrypTen's Beaver protocol on shared weights and inputs, comparisons its binary circuits,
the smooth functions its approximations. What differs from CrypTen alone is the dealer, the
randomness and the truncation (`engine`), and that a linear layer's result stays at scale 2**2f
until somebody needs it truncated, so that the output gate can take part in that opening.

Cost: CrypTen's protocols are not declared; they are measured by layer (`runner`).
Security: semi-honest, one of two parties, trusted dealer.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocols import engine, ring
from protocols.correlation import KEEPER, Request
from protocols.party import Party, truncate
from protocols.program import Layer, Program
from protocols.ring import FRAC_BITS


@dataclass
class Value:
    """A share and its scale; `at_scale` truncates in place, so that two users pay once."""

    share: Tensor
    frac_bits: int = FRAC_BITS

    def at_scale(self, party: Party) -> Tensor:
        """Return the share at scale 2**FRAC_BITS: 1 round if it has to be truncated."""
        if self.frac_bits != FRAC_BITS:
            self.share = truncate(party, self.share, self.frac_bits - FRAC_BITS)
            self.frac_bits = FRAC_BITS
        return self.share


Weights = Mapping[str, Tensor]


def share_weights(program: Program, params: Mapping[str, np.ndarray] | None) -> dict[str, Tensor]:
    """Share the keeper's parameters: encoded at the keeper, zero at the user; nothing is sent.

    Biases and shifts enter after a product, hence at scale 2**2f.

    Args:
        program: whose parameters.
        params: name -> float32 array at the keeper; None at the user.

    Raises:
        RangeError: a parameter is not finite or too large; the message names it.

    Security: every later use masks them with a fresh triple.
    """
    if params is None:
        return {name: torch.zeros(shape, dtype=torch.int64) for name, shape in program.params.items()}
    late = {name for layer in program.layers for role, name in layer.params.items() if role in ("bias", "shift")}
    bits = {name: 2 * FRAC_BITS if name in late else FRAC_BITS for name in program.params}
    return {name: ring.encode(params[name], bits[name], what=f"parameter {name!r}") for name in program.params}


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


# --- linear ---------------------------------------------------------------------------------------------------------


def conv2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """2-D convolution; 1 round."""
    padded = ring.pad2d(x.at_scale(party), layer.ints("pads"))
    z = engine.beaver(
        "conv2d",
        padded,
        weights[layer.params["weight"]],
        stride=layer.ints("stride"),
        dilation=layer.ints("dilation"),
        groups=int(layer.number("groups")),
    )
    return Value(z + weights[layer.params["bias"]].reshape(1, -1, 1, 1), 2 * FRAC_BITS)


def matmul(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Product with a (K, N) matrix on the right; 1 round."""
    z = engine.beaver("matmul", x.at_scale(party), weights[layer.params["weight"]])
    return Value(z + weights[layer.params["bias"]], 2 * FRAC_BITS)


def affine(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Elementwise x * scale + shift; 1 round."""
    z = engine.beaver("mul", x.at_scale(party), weights[layer.params["scale"]])
    return Value(z + weights[layer.params["shift"]], 2 * FRAC_BITS)


def _at_one_scale(*xs: Value) -> tuple[list[Tensor], int]:
    """Return shares at the largest of their scales, and its fraction bits: local, since only sums follow."""
    bits = max(x.frac_bits for x in xs)
    return [x.share << (bits - x.frac_bits) for x in xs], bits


def add(party: Party, layer: Layer, weights: Weights, x: Value, y: Value) -> Value:
    """Sum; local."""
    (a, b), bits = _at_one_scale(x, y)
    return Value(a + b, bits)


def sub(party: Party, layer: Layer, weights: Weights, x: Value, y: Value) -> Value:
    """Difference; local."""
    (a, b), bits = _at_one_scale(x, y)
    return Value(a - b, bits)


def mul(party: Party, layer: Layer, weights: Weights, x: Value, y: Value) -> Value:
    """Elementwise product of two shared values; 1 round."""
    return Value(engine.beaver("mul", x.at_scale(party), y.at_scale(party)), 2 * FRAC_BITS)


def sum_(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Sum over public axes; local."""
    return Value(x.share.sum(layer.ints("axes"), keepdim=bool(layer.number("keepdims"))), x.frac_bits)


def sum_pool2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Sums over windows; local."""
    padded = ring.pad2d(x.share, layer.ints("pads"))
    return Value(ring.windows(padded, layer.ints("kernel"), layer.ints("stride")).sum(0), x.frac_bits)


def mean(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Mean over public axes; local, to be truncated."""
    axes = layer.ints("axes")
    share = x.at_scale(party)
    n = math.prod(share.shape[a] for a in axes)
    return _times_public(share.sum(axes, keepdim=bool(layer.number("keepdims"))), 1 / n)


def avg_pool2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Average pooling; local, to be truncated."""
    kernel, stride, pads = layer.ints("kernel"), layer.ints("stride"), layer.ints("pads")
    share = x.at_scale(party)
    total = ring.windows(ring.pad2d(share, pads), kernel, stride).sum(0)
    if layer.number("count_include_pad"):
        return _times_public(total, 1 / (kernel[0] * kernel[1]))
    ones = ring.pad2d(torch.ones((1, 1, *share.shape[2:]), dtype=torch.int64), pads)
    counts = ring.windows(ones, kernel, stride).sum(0)
    factors = ring.encode(1 / counts.double()).to(share.device)
    return Value(total * factors, 2 * FRAC_BITS)


def _times_public(share: Tensor, factor: float) -> Value:
    return Value(share * round(factor * 2**FRAC_BITS), 2 * FRAC_BITS)


# --- comparisons ----------------------------------------------------------------------------------------------------


def _relu(share: Tensor) -> Tensor:
    result: Tensor = engine.mpc_tensor(share).relu().share
    return result


def _public(party: Party, share: Tensor, value: float) -> Tensor:
    """Return the share plus a public constant."""
    return share + round(value * 2**FRAC_BITS) if party.rank == KEEPER else share


def relu(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """max(x, 0)."""
    return Value(_relu(x.at_scale(party)))


def leaky_relu(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """slope * x + (1 - slope) * relu(x)."""
    share, slope = x.at_scale(party), round(layer.number("slope") * 2**FRAC_BITS)
    return Value(slope * share + (2**FRAC_BITS - slope) * _relu(share), 2 * FRAC_BITS)


def clip(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """min(max(x, low), high), by low + relu(x - low) and high - relu(high - x); infinite bounds are skipped."""
    share = x.at_scale(party)
    low, high = layer.number("low"), layer.number("high")
    if low > -ring.CLIP_LIMIT:
        share = _public(party, _relu(_public(party, share, -low)), low)
    if high < ring.CLIP_LIMIT:
        share = _public(party, -_relu(_public(party, -share, high)), high)
    return Value(share)


def max_pool2d(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Maximum over windows: a tree of max(a, b) = b + relu(a - b), one CrypTen comparison a level."""
    kernel, stride, pads = layer.ints("kernel"), layer.ints("stride"), layer.ints("pads")
    share = x.at_scale(party)
    # Padding must never win: the public constant is the least value that comparisons allow.
    padded = ring.pad2d(share, pads, value=-(1 << ring.LOWEST_BITS) if party.rank == KEEPER else 0)
    columns = ring.windows(padded, kernel, stride)
    while len(columns) > 1:
        half = len(columns) // 2
        a, b, rest = columns[:half], columns[half : 2 * half], columns[2 * half :]
        columns = torch.cat([b + _relu(a - b), rest])
    return Value(columns.squeeze(0))


# --- CrypTen's approximations ---------------------------------------------------------------------------------------


def sigmoid(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """CrypTen's sigmoid (by reciprocal and exponential)."""
    return Value(engine.mpc_tensor(x.at_scale(party)).sigmoid().share)


def tanh(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """CrypTen's tanh (by sigmoid)."""
    return Value(engine.mpc_tensor(x.at_scale(party)).tanh().share)


def softmax(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """CrypTen's softmax (maximum, exponential, reciprocal)."""
    return Value(engine.mpc_tensor(x.at_scale(party)).softmax(int(layer.number("axis"))).share)


# --- shapes ---------------------------------------------------------------------------------------------------------


def reshape(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """New shape of each sample; local."""
    return Value(x.share.reshape(x.share.shape[0], *layer.ints("shape")), x.frac_bits)


def transpose(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    """Permuted axes; local."""
    return Value(x.share.permute(layer.ints("perm")), x.frac_bits)


def concat(party: Party, layer: Layer, weights: Weights, *xs: Value) -> Value:
    """Joined along an axis; local, where not only some are to be truncated."""
    same = len({x.frac_bits for x in xs}) == 1
    shares = [x.share if same else x.at_scale(party) for x in xs]
    return Value(torch.cat(shares, dim=int(layer.number("axis"))), xs[0].frac_bits)


Operator = Callable[..., Value]
OPERATORS: dict[str, Operator] = {
    f.__name__.rstrip("_"): f
    for f in (
        conv2d,
        matmul,
        affine,
        add,
        sub,
        mul,
        mean,
        avg_pool2d,
        sum_,
        sum_pool2d,
        relu,
        leaky_relu,
        clip,
        max_pool2d,
        sigmoid,
        tanh,
        softmax,
        reshape,
        transpose,
        concat,
    )
}
