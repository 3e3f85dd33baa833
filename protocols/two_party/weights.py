"""The parameters of a program as shares: which scale each has, and what each party begins with.

Source: docs/protocols.md#input-sharing.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from protocols import limits
from protocols.limits import FRAC_BITS
from protocols.primitives import ring
from protocols.program.program import Layer, Program
from protocols.two_party.party import Party


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


def product_bits(party: Party, layer: Layer) -> int:
    """Return the fraction bits of what a linear layer makes."""
    return FRAC_BITS + layer.bits_of_weight(party.comparison_bits)
