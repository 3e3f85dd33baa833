"""The operators without secrecy, in float64: for tests and calibration. Never used by a party."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from protocols.program import Layer, Program

Weights = Mapping[str, Tensor]


def pad(x: Tensor, layer: Layer, value: float = 0.0) -> Tensor:
    """Pad the last two axes as the layer says."""
    top, left, bottom, right = layer.ints("pads")
    return F.pad(x, (left, right, top, bottom), value=value)


def conv2d(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """2-D convolution."""
    return F.conv2d(
        pad(x, layer),
        w[layer.params["weight"]],
        w[layer.params["bias"]],
        layer.ints("stride"),
        0,
        layer.ints("dilation"),
        int(layer.number("groups")),
    )


def avg_pool2d(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """Average pooling; padding counts if count_include_pad."""
    kernel, stride = layer.ints("kernel"), layer.ints("stride")
    total = F.avg_pool2d(pad(x, layer), kernel, stride, divisor_override=1)
    ones = torch.ones_like(x[:1, :1])
    counted = F.pad(ones, [0, 0, 0, 0]) if not layer.number("count_include_pad") else ones
    counts = F.avg_pool2d(
        pad(counted, layer, float(layer.number("count_include_pad"))), kernel, stride, divisor_override=1
    )
    return total / counts


def max_pool2d(layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """Maximum over windows."""
    return F.max_pool2d(pad(x, layer, -torch.inf), layer.ints("kernel"), layer.ints("stride"))


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "conv2d": conv2d,
    "avg_pool2d": avg_pool2d,
    "max_pool2d": max_pool2d,
    "matmul": lambda layer, w, x: x @ w[layer.params["weight"]] + w[layer.params["bias"]],
    "affine": lambda layer, w, x: x * w[layer.params["scale"]] + w[layer.params["shift"]],
    "add": lambda layer, w, x, y: x + y,
    "sub": lambda layer, w, x, y: x - y,
    "mul": lambda layer, w, x, y: x * y,
    "relu": lambda layer, w, x: x.clamp(min=0),
    "leaky_relu": lambda layer, w, x: F.leaky_relu(x, layer.number("slope")),
    "clip": lambda layer, w, x: x.clamp(layer.number("low"), layer.number("high")),
    "sigmoid": lambda layer, w, x: torch.sigmoid(x),
    "tanh": lambda layer, w, x: torch.tanh(x),
    "softmax": lambda layer, w, x: torch.softmax(x, int(layer.number("axis"))),
    "mean": lambda layer, w, x: x.mean(layer.ints("axes"), keepdim=bool(layer.number("keepdims"))),
    "reshape": lambda layer, w, x: x.reshape(x.shape[0], *layer.ints("shape")),
    "transpose": lambda layer, w, x: x.permute(layer.ints("perm")),
    "concat": lambda layer, w, *xs: torch.cat(xs, int(layer.number("axis"))),
}


def run(program: Program, params: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every value of the program by name, float64, batch first."""
    weights = {name: torch.as_tensor(value).double() for name, value in params.items()}
    values = {name: torch.as_tensor(x).double() for name, x in inputs.items()}
    for layer in program.layers:
        values[layer.output] = OPERATORS[layer.op](layer, weights, *(values[i] for i in layer.inputs))
    return {name: value.numpy() for name, value in values.items()}
