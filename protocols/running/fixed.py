"""What a prediction computes, in fixed point and in the clear: for tests and for checks before it. Never by a party.

The operators are those of the parties, run by one that holds every value whole: its peer's shares and the dealer's
masks are zeros. So what leaves the range of a comparison or a truncation, what a constant loses in its last place and
where a function stops being one comes out as it does under encryption, but for the unit in the last place that a
truncation there draws.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols import limits
from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, Request
from protocols.primitives import ring
from protocols.primitives.prg import Stream
from protocols.program.program import Layer, Program
from protocols.two_party import linear, operators
from protocols.two_party.party import Party
from protocols.two_party.value import Operator, Value, Weights
from protocols.two_party.weights import product_bits, share_weights

Arrays = Mapping[str, NDArray[np.floating]]


class _Nobody:
    """A wire to a peer whose share of everything is 0."""

    def exchange(self, kind: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)

    def send(self, kind: str, tensor: Tensor) -> None:
        pass

    def recv(self, kind: str, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape), dtype=torch.int64)


class _Zeros:
    """Correlations without masks: 0 = 0 * 0."""

    def take(self, request: Request) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(tuple(shape), dtype=torch.int64) for shape in correlation.part_shapes(request))


def _is_negative(party: Party, x: Tensor) -> Tensor:
    """Return bit k - 1 of x: what a comparison on k bits answers, right or not."""
    return (x >> (party.comparison_bits - 1)) & 1


def _is_below_zero(party: Party, x: Tensor) -> Tensor:
    """Return the sign of all 64 bits."""
    return (x < 0).long()


def _linear(party: Party, layer: Layer, weights: Weights, x: Value) -> Value:
    share = x.truncate_to_scale(party)
    request = linear.request_of(layer, share.shape)
    z = linear.product(request, share.reshape(request.shapes[0]), weights[layer.params[linear.MAPS[layer.op]]])
    bias = weights[layer.params["shift" if layer.op == "affine" else "bias"]]
    z = z + bias.reshape((1, -1, 1, 1) if layer.op == "conv2d" else bias.shape)
    return Value(z.reshape(share.shape[0], *layer.shape), product_bits(party, layer))


def _relu(party: Party, x: Tensor) -> Tensor:
    return x * (1 - operators.negative(party, x))


OPERATORS: dict[str, Operator] = (
    operators.OPERATORS | operators.maxima(_relu) | dict.fromkeys(("conv2d", "matmul", "affine"), _linear)
)


def run(
    program: Program,
    params: Arrays,
    inputs: Arrays,
    protocol: str = "fss",
    comparison_bits: int = limits.COMPARISON_BITS,
) -> dict[str, NDArray[np.float64]]:
    """Return every value of a program by name, as an encrypted prediction has it.

    Args:
        program: the network.
        params: name -> float array.
        inputs: name -> float array (n, *sample), within the range of inputs.
        protocol: "fss" or "crypten", whose comparisons take all 64 bits.
        comparison_bits: as in `Party`.

    Returns:
        Name -> float64 array (n, ...), with all the fraction bits that the value has when it is made.

    Raises:
        RangeError: a parameter or input is not finite or too large.
    """
    nothing = Stream(bytes(16))  # draws no secret: there is nobody to hide anything from
    party = Party(KEEPER, _Nobody(), _Zeros(), nothing, nothing, nothing)
    party.comparison_bits = comparison_bits
    party.is_negative = _is_negative if protocol == "fss" else _is_below_zero
    weights = share_weights(program, {k: np.asarray(v) for k, v in params.items()}, comparison_bits)
    values = {name: Value(ring.encode(inputs[name], what=f"input {name!r}")) for name in program.inputs}
    found = {name: _decoded(value) for name, value in values.items()}
    with torch.no_grad():
        for layer in program.layers:
            arguments = [values[name] for name in layer.inputs]
            values[layer.output] = OPERATORS[layer.op](party, layer, weights, *arguments)
            found[layer.output] = _decoded(values[layer.output])
    return found


def _decoded(value: Value) -> NDArray[np.float64]:
    return np.ldexp(value.share.numpy().astype(np.float64), -value.frac_bits)
