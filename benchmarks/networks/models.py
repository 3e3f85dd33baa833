"""The networks on which securemtk and its peers are measured: one description, built by every runner.

Weights are drawn with He scaling from numpy's PCG64, seed 0, in layer order; inputs are standard normal, seed 1. Needs
numpy alone, so that every peer's environment can import it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Conv:
    """3x3 convolution with a bias, stride 1, padding 1."""

    n_in: int
    n_out: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape (C_out, C_in, 3, 3)."""
        return (self.n_out, self.n_in, 3, 3)


@dataclass(frozen=True)
class Dense:
    """Fully connected layer with a bias, y = x w^T + b."""

    n_in: int
    n_out: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape (n_out, n_in)."""
        return (self.n_out, self.n_in)


# Layers without parameters; "pool" is 2x2 max-pooling with stride 2.
RELU, POOL, FLATTEN = "relu", "pool", "flatten"
Layer = Conv | Dense | str


@dataclass(frozen=True)
class Network:
    """A chain of layers.

    Args:
        input_shape: of one sample.
        layers: `Conv`, `Dense`, "relu", "pool" or "flatten".
    """

    input_shape: tuple[int, ...]
    layers: tuple[Layer, ...]

    def weights(self) -> list[tuple[Floats, Floats]]:
        """Return (weight, bias) of each layer that has them, in order; the same on every call."""
        rng = np.random.default_rng(0)
        drawn = []
        for layer in self.layers:
            if isinstance(layer, Conv | Dense):
                shape = layer.weight_shape
                weight = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
                bias = rng.standard_normal(shape[0]) * 0.1
                drawn.append((weight.astype(np.float32), bias.astype(np.float32)))
        return drawn

    def inputs(self, batch: int) -> Floats:
        """Return a batch of inputs, float32 (batch, *input_shape); the same on every call."""
        return np.random.default_rng(1).standard_normal((batch, *self.input_shape)).astype(np.float32)


def _vgg16() -> Network:
    layers: list[Layer] = []
    n_in = 3
    for n_out, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [Conv(n_in, n_out), RELU]
            n_in = n_out
        layers.append(POOL)
    return Network((3, 32, 32), (*layers, FLATTEN, Dense(512, 512), RELU, Dense(512, 10)))


NETWORKS = {
    "mlp": Network((784,), (Dense(784, 128), RELU, Dense(128, 128), RELU, Dense(128, 10))),
    "cnn": Network(
        (3, 32, 32),
        (
            *(Conv(3, 16), RELU, POOL, Conv(16, 32), RELU, POOL),
            *(FLATTEN, Dense(2048, 64), RELU, Dense(64, 10)),
        ),
    ),
    "vgg16": _vgg16(),
    # For tests of the benchmarks themselves.
    "tiny": Network((1, 8, 8), (Conv(1, 4), RELU, POOL, FLATTEN, Dense(64, 10))),
}


# --- one forward pass for every kind of tensor ----------------------------------------------------------------------


@dataclass(frozen=True)
class Ops:
    """The layers on one kind of tensor.

    Args:
        conv, dense: functions of (x, weight, bias).
        relu, pool: functions of x.
    """

    conv: Callable[[Any, Any, Any], Any]
    dense: Callable[[Any, Any, Any], Any]
    relu: Callable[[Any], Any]
    pool: Callable[[Any], Any]


def forward(network: Network, weights: Any, x: Any, ops: Ops) -> Any:
    """Run a network.

    Args:
        network: its layers.
        weights: as `Network.weights` returns them, of the tensors that `ops` takes.
        x: (batch, *input_shape).
        ops: the layers.
    """
    remaining = iter(weights)
    for layer in network.layers:
        if isinstance(layer, Conv):
            x = ops.conv(x, *next(remaining))
        elif isinstance(layer, Dense):
            x = ops.dense(x, *next(remaining))
        elif layer == RELU:
            x = ops.relu(x)
        elif layer == POOL:
            x = ops.pool(x)
        else:
            x = x.reshape(x.shape[0], -1)
    return x


def _conv(x: Floats, weight: Floats, bias: Floats) -> Floats:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    out: Floats = np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3))) + bias
    return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


def _pool(x: Floats) -> Floats:
    n, c, h, w = x.shape
    out: Floats = x.reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))
    return out


NUMPY = Ops(_conv, lambda x, weight, bias: x @ weight.T + bias, lambda x: np.maximum(x, 0), _pool)


def float_scores(network: Network, x: Floats) -> Floats:
    """Return what the network computes in float32: what every runner's scores are compared with."""
    scores: Floats = forward(network, network.weights(), x, NUMPY)
    return scores
