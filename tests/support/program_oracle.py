"""A `Program` run in float64 with numpy alone, as `OPERATORS` documents it: written apart from the executor."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from protocols.program.program import Layer, Program

Array = NDArray[np.float64]


def _windows(x: Array, kernel: tuple, stride: tuple, dilation: tuple = (1, 1)) -> Array:
    """(..., h, w) -> (..., h', w', kh, kw)."""
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
    view = sliding_window_view(x, reach, axis=(-2, -1))[..., :: stride[0], :: stride[1], :, :]
    return view[..., :: dilation[0], :: dilation[1]]


def _pad(x: Array, pads: tuple, value: float) -> Array:
    top, left, bottom, right = pads
    return np.pad(x, (*[(0, 0)] * (x.ndim - 2), (top, bottom), (left, right)), constant_values=value)


def _conv2d(a: Mapping, x: Array, weight: Array, bias: Array) -> Array:
    lead, x = x.shape[:-3], x.reshape(-1, *x.shape[-3:])
    windows = _windows(_pad(x, a["pads"], 0.0), weight.shape[2:], a["stride"], a["dilation"])
    n, c, h, w, kh, kw = windows.shape
    groups = a["groups"]
    windows = windows.reshape(n, groups, c // groups, h, w, kh, kw)
    kernels = weight.reshape(groups, -1, *weight.shape[1:])
    y = np.einsum("ngchwij,gocij->ngohw", windows, kernels, optimize=True)
    return (y.reshape(n, -1, h, w) + bias.reshape(1, -1, 1, 1)).reshape(*lead, -1, h, w)


def _avg_pool2d(a: Mapping, x: Array) -> Array:
    total = _windows(_pad(x, a["pads"], 0.0), a["kernel"], a["stride"]).sum((-1, -2))
    ones = _pad(np.ones_like(x), a["pads"], float(a["count_include_pad"]))
    return total / _windows(ones, a["kernel"], a["stride"]).sum((-1, -2))


def _spline(a: Mapping, x: Array) -> Array:
    knots, rows = np.array(a["knots"]) / 2**16, np.array(a["coefficients"], dtype=float).reshape(-1, 3)
    rows = rows / 2.0 ** (a["frac_bits"] - 16 * np.arange(3))
    at = np.searchsorted(knots, np.rint(x * 2**16) / 2**16, side="right")
    return (rows[at] * np.stack([np.ones_like(x), x, x * x], -1)).sum(-1)


def _wide_spline(a: Mapping, x: Array) -> Array:
    at = np.rint(x * 2**16)
    turn = round(2.0 ** (13 - a["finer"]) * 2**16)
    least = -turn if -turn in a["knots"] else a["knots"][0]
    fine = {"knots": a["knots"], "coefficients": a["low_coefficients"], "frac_bits": a["low_frac_bits"]}
    return np.where((at >= turn) | (at < least), _spline(a, x), _spline(fine, x * 2.0 ** a["finer"]))


def _deviation(a: Mapping, x: Array) -> Array:
    n = int(np.prod([x.shape[i] for i in a["axes"]]))
    return (n * x - x.sum(a["axes"], keepdims=True)) / 2 ** int(np.floor(np.log2(n)))


def _take(a: Mapping, x: Array) -> Array:
    parts = [np.full_like(x.take([0], a["axis"]), a["fill"]) if i < 0 else x.take([i], a["axis"]) for i in a["indices"]]
    return np.concatenate(parts, a["axis"])


def _argmax(a: Mapping, x: Array) -> Array:
    best = x == x.max(a["axis"], keepdims=True)
    places = np.arange(x.shape[a["axis"]]).reshape([-1 if i == a["axis"] else 1 for i in range(x.ndim)])
    if a["last"]:
        return np.where(best, places, -1).max(a["axis"], keepdims=True).astype(float)
    return np.where(best, places, x.shape[a["axis"]]).min(a["axis"], keepdims=True).astype(float)


OPERATORS: dict[str, Callable[..., Array]] = {
    "conv2d": _conv2d,
    "matmul": lambda a, x, weight, bias: x @ weight + bias,
    "affine": lambda a, x, scale, shift: x * scale + shift,
    "add": lambda a, x, y: x + y,
    "sub": lambda a, x, y: x - y,
    "mul": lambda a, x, y: x * y,
    "relu": lambda a, x: np.maximum(x, 0.0),
    "shift": lambda a, x, addend: x + addend,
    "scale": lambda a, x: x * a["factor"] + a["offset"],
    "dot": lambda a, x, y: np.einsum("...ij,...jk->...ik", x, y),
    "spline": _spline,
    "wide_spline": _wide_spline,
    "deviation": _deviation,
    "max": lambda a, x: x.max(a["axis"], keepdims=True),
    "argmax": _argmax,
    "take": _take,
    "expand": lambda a, x: np.broadcast_to(x, (len(x), *a["shape"])),
    "max_pool2d": lambda a, x: _windows(_pad(x, a["pads"], -np.inf), a["kernel"], a["stride"]).max((-1, -2)),
    "avg_pool2d": _avg_pool2d,
    "mean": lambda a, x: x.mean(a["axes"], keepdims=bool(a["keepdims"])),
    "sum_pool2d": lambda a, x: _windows(_pad(x, a["pads"], 0.0), a["kernel"], a["stride"]).sum((-1, -2)),
    "sum": lambda a, x: x.sum(a["axes"], keepdims=bool(a["keepdims"])),
    "reshape": lambda a, x: x.reshape(len(x), *a["shape"]),
    "transpose": lambda a, x: x.transpose(a["perm"]),
    "concat": lambda a, *xs: np.concatenate(xs, a["axis"]),
}
ROLES = {"conv2d": ("weight", "bias"), "matmul": ("weight", "bias"), "affine": ("scale", "shift"), "shift": ("addend",)}


def run(program: Program, params: Mapping[str, NDArray], inputs: Mapping[str, NDArray]) -> dict[str, Array]:
    """Return the outputs of a program; every value must have the shape that the program says."""
    program.validate()
    assert {name: value.shape for name, value in params.items()} == dict(program.params)
    assert all(value.dtype == np.float32 for value in params.values())
    values = {name: np.asarray(x, dtype=np.float64) for name, x in inputs.items()}
    for layer in program.layers:
        values[layer.output] = _apply(layer, params, values)
    return {name: values[name] for name in program.outputs}


def _apply(layer: Layer, params: Mapping[str, NDArray], values: Mapping[str, Array]) -> Array:
    arguments = [values[name] for name in layer.inputs]
    weights = [params[layer.params[role]].astype(np.float64) for role in ROLES.get(layer.op, ())]
    if layer.op == "affine":
        assert all(w.ndim == arguments[0].ndim and w.shape[0] == 1 for w in weights)
    result = OPERATORS[layer.op](layer.attrs, *arguments, *weights)
    assert result.shape == (len(arguments[0]), *layer.shape), (layer, result.shape)
    return result
