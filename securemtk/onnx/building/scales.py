"""How many fraction bits the keeper's weights have, so that small ones keep their digits.

A weight is a whole number of steps of 2**-b, b = 16 unless it needs more. What needs more is a row or column of a
matrix (a channel of a convolution, an element of an affine layer) whose largest weight is only a few steps: a scaler
of a feature in the thousands, a sum over a page, a unit conversion. A whole layer has one b, which is public; so that
weights tell as little as may be, b is 16 wherever that is enough and else a multiple of 4, or what there is room for.

Room: a product has 16 + b fraction bits and must stay below 2**62 for every input that a prediction takes (2**14).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocols import limits
from protocols.limits import FEWEST_WEIGHT_BITS, MOST_WEIGHT_BITS
from protocols.program.program import Layer
from securemtk.onnx.building.registry import Step, param
from securemtk.onnx.model.graph import Array

# The largest weight of each row and column keeps so many bits; K products for each element of the result, whose errors
# add up at random, need log2(K) / 2 fewer, up to `_SHARED`.
_KEPT, _SHARED = 12, 4
# b comes in steps of this.
_STEP = 4
# Smaller weights change no answer: times the largest input they are less than the result's last place.
_LEAST = 2.0 ** -(14 + limits.FRAC_BITS + 1)
# A row or column whose largest weight is further off than this is named by `check`.
MOST_ERROR = 2.0**-7


def weight_bits(step: Step) -> int:
    """Return the fraction bits of a step's weight or scale; `FEWEST_WEIGHT_BITS` for a step that has none."""
    role = "scale" if step.op == "affine" else "weight"
    weight = param(step, role) if step.op in ("affine", "conv2d", "matmul") else np.zeros(0)
    sizes = _sizes(step.op, weight)
    sizes = sizes[(sizes >= _LEAST) & np.isfinite(sizes)]
    if not sizes.size:
        return FEWEST_WEIGHT_BITS
    fan_in = {"matmul": len(weight), "conv2d": math.prod(weight.shape[1:])}.get(step.op, 1)
    kept = _KEPT - min(_SHARED, int(math.log2(fan_in) / 2))
    wanted = kept - math.frexp(float(sizes.min()))[1] + 1
    if wanted <= FEWEST_WEIGHT_BITS:
        return FEWEST_WEIGHT_BITS
    wanted = -(-wanted // _STEP) * _STEP
    return max(min(wanted, _room(step, weight), MOST_WEIGHT_BITS), FEWEST_WEIGHT_BITS)


def _sizes(op: str, weight: Array) -> NDArray[np.float64]:
    """Return the largest magnitude of each row and column, of each element of an affine layer; those of zeros are 0."""
    weight = np.abs(np.asarray(weight, dtype=np.float64))
    if op == "matmul":
        return np.concatenate([weight.max(0), weight.max(1)])
    if op == "conv2d":
        return np.concatenate([weight.max((1, 2, 3)), weight.max((0, 2, 3))])
    return weight.ravel()


def _room(step: Step, weight: Array) -> int:
    """Return the fraction bits for which no input below 2**14 makes a result that a truncation does not take."""
    weight = np.abs(np.asarray(weight, dtype=np.float64))
    axes = {"matmul": (0,), "conv2d": (1, 2, 3)}.get(step.op, ())
    shift = np.abs(param(step, "shift" if step.op == "affine" else "bias"))
    largest = float(weight.sum(axes).max()) * limits.input_limit() + float(shift.max(initial=0.0))
    return limits.LIMIT_BITS - limits.FRAC_BITS - math.ceil(math.log2(largest)) if math.isfinite(largest) else 0


@dataclass(frozen=True)
class LossyConstant:
    """A parameter of which some rows, columns or elements are too small for the fraction bits that it has.

    Args:
        layer: the layer's name.
        role: "weight", "scale", "bias", "shift" or "addend".
        count: how many of them.
        of: among how many that are not 0.
        error: the largest relative error of the largest weight in one of them: 1 for what becomes 0.
        frac_bits: the parameter's fraction bits.
    """

    layer: str
    role: str
    count: int
    of: int
    error: float
    frac_bits: int


def lossy(layer: Layer, role: str, value: Array, frac_bits: int) -> Iterator[LossyConstant]:
    """Give what of a parameter fixed point holds with an error of more than `MOST_ERROR`."""
    op = layer.op if role == "weight" else "affine"
    sizes = _sizes(op, value)
    # In an addend or bias, what is nothing beside the largest one is nothing.
    least = 0.0 if role in ("weight", "scale") else float(sizes.max(initial=0.0)) * MOST_ERROR
    sizes = sizes[sizes > least]
    if not sizes.size:
        return
    errors = np.abs(np.rint(sizes * 2.0**frac_bits) * 2.0**-frac_bits / sizes - 1)
    if (errors > MOST_ERROR).any():
        count = int((errors > MOST_ERROR).sum())
        yield LossyConstant(layer.name, role, count, sizes.size, float(errors.max()), frac_bits)
