"""The operators without secrecy, in float64: for tests and calibration. Never used by a party."""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from protocols.limits import FRAC_BITS
from protocols.program.pieces import WIDE_ATTRIBUTES, Pieces, WidePieces
from protocols.program.program import Layer, Program

Weights = Mapping[str, Tensor]


def pad(x: Tensor, layer: Layer, value: float = 0.0) -> Tensor:
    """Pad the last two axes as the layer says."""
    top, left, bottom, right = layer.ints("pads")
    return F.pad(x, (left, right, top, bottom), value=value)


def conv2d(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """2-D convolution."""
    z = F.conv2d(
        pad(x.reshape(-1, *x.shape[-3:]), layer),
        w[layer.params["weight"]],
        w[layer.params["bias"]],
        layer.ints("stride"),
        0,
        layer.ints("dilation"),
        int(layer.number("groups")),
    )
    return z.reshape(x.shape[0], *layer.shape)


def avg_pool2d(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """Average pooling; padding counts if count_include_pad."""
    kernel, stride = layer.ints("kernel"), layer.ints("stride")
    ones = pad(torch.ones((1, *x.shape[-2:]), dtype=x.dtype), layer, layer.number("count_include_pad"))
    return sum_pool2d(layer, w, x) / F.avg_pool2d(ones, kernel, stride, divisor_override=1)


def sum_pool2d(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """Sums over windows."""
    images = pad(x.reshape(-1, *x.shape[-3:]), layer)
    total = F.avg_pool2d(images, layer.ints("kernel"), layer.ints("stride"), divisor_override=1)
    return total.reshape(x.shape[0], *layer.shape)


def max_pool2d(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """Maximum over windows."""
    images = pad(x.reshape(-1, *x.shape[-3:]), layer, -torch.inf)
    return F.max_pool2d(images, layer.ints("kernel"), layer.ints("stride")).reshape(x.shape[0], *layer.shape)


def spline(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """Piecewise quadratic, in the fixed-point coefficients that the parties use."""
    return pieces_at(Pieces(layer.ints("knots"), layer.ints("coefficients"), int(layer.number("frac_bits"))), x)


def pieces_at(pieces: Pieces, x: Tensor) -> Tensor:
    """Return a piecewise quadratic's values."""
    knots = torch.tensor(pieces.knots).double() * 2.0**-FRAC_BITS
    bits = torch.arange(3).double() * FRAC_BITS - pieces.frac_bits
    rows = torch.tensor(pieces.coefficients).double().reshape(-1, 3) * 2.0**bits
    # The parties compare what is rounded to their scale.
    at = torch.bucketize((x * 2.0**FRAC_BITS).round() * 2.0**-FRAC_BITS, knots, right=True)
    c0, c1, c2 = (rows[:, j][at] for j in range(3))
    return c0 + x * (c1 + x * c2)


def wide_spline(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """Piecewise quadratic of two scales."""
    pieces = WidePieces(*(layer.attrs[name] for name in WIDE_ATTRIBUTES))  # type: ignore[arg-type]
    fine = pieces_at(pieces.fine, x * 2.0**pieces.finer)
    return torch.where(pieces_at(pieces.turned, x) > 0, pieces_at(pieces.coarse, x), fine)


def take(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """Chosen places of one axis; -1 stands for a public number."""
    axis, indices = int(layer.number("axis")), torch.tensor(layer.ints("indices"), dtype=torch.int64)
    out = x.index_select(axis, indices.clamp(min=0))
    return out.index_fill(axis, (indices < 0).nonzero().reshape(-1), layer.number("fill"))


def deviation(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """Distance from the mean over axes, times n / 2**floor(log2 n)."""
    axes = layer.ints("axes")
    n = math.prod(x.shape[a] for a in axes)
    return (x - x.mean(axes, keepdim=True)) * (n / 2.0 ** (n.bit_length() - 1))


def argmax(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """Place of the maximum; attribute `last` says which of equals."""
    axis = int(layer.number("axis"))
    if layer.number("last"):
        return x.shape[axis] - 1 - x.flip(axis).argmax(axis, keepdim=True).double()
    return x.argmax(axis, keepdim=True).double()


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "conv2d": conv2d,
    "avg_pool2d": avg_pool2d,
    "max_pool2d": max_pool2d,
    "matmul": lambda layer, w, x: x @ w[layer.params["weight"]] + w[layer.params["bias"]],
    "affine": lambda layer, w, x: x * w[layer.params["scale"]] + w[layer.params["shift"]],
    "add": lambda layer, w, x, y: x + y,
    "sub": lambda layer, w, x, y: x - y,
    "mul": lambda layer, w, x, y: x * y,
    "shift": lambda layer, w, x: x + w[layer.params["addend"]],
    "scale": lambda layer, w, x: x * layer.number("factor") + layer.number("offset"),
    "dot": lambda layer, w, x, y: x @ y,
    "spline": spline,
    "wide_spline": wide_spline,
    "max": lambda layer, w, x: x.amax(int(layer.number("axis")), keepdim=True),
    "argmax": argmax,
    "take": take,
    "expand": lambda layer, w, x: x.expand(x.shape[0], *layer.ints("shape")),
    "relu": lambda layer, w, x: x.clamp(min=0),
    "mean": lambda layer, w, x: x.mean(layer.ints("axes"), keepdim=bool(layer.number("keepdims"))),
    "deviation": deviation,
    "sum_pool2d": sum_pool2d,
    "sum": lambda layer, w, x: x.sum(layer.ints("axes"), keepdim=bool(layer.number("keepdims"))),
    "reshape": lambda layer, w, x: x.reshape(x.shape[0], *layer.ints("shape")),
    "transpose": lambda layer, w, x: x.permute(layer.ints("perm")),
    "concat": lambda layer, w, *xs: torch.cat(xs, int(layer.number("axis"))),
}


def parts(
    program: Program, batch: Mapping[str, NDArray[np.floating]], elements: int
) -> Iterator[Mapping[str, NDArray[np.floating]]]:
    """Give a batch in parts of which all values together are at most so many elements, but one sample at least."""
    size = max(1, elements // max(sum(math.prod(layer.shape) for layer in program.layers), 1))
    for begin in range(0, len(next(iter(batch.values()))), size):
        yield {name: x[begin : begin + size] for name, x in batch.items()}


def run(program: Program, params: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every value of the program by name, float64, batch first."""
    weights = {name: torch.as_tensor(value).double() for name, value in params.items()}
    values = {name: torch.as_tensor(x).double() for name, x in inputs.items()}
    for layer in program.layers:
        values[layer.output] = OPERATORS[layer.op](layer, weights, *(values[i] for i in layer.inputs))
    return {name: value.numpy() for name, value in values.items()}
