"""Rules of sliding windows: convolution and pools, 1-D ones as images of height 1."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from protocols.program import Attribute, Shape
from securemtk.onnx.graph import Array, Graph, Node
from securemtk.onnx.registry import (
    Refused,
    Step,
    activation_input,
    affine,
    constant_input,
    only_first_output,
    output_shape,
    reshaped,
    rule,
)

Pads = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Window:
    """A sliding window in two dimensions; a 1-D one has height 1."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: Pads


def _window(node: Node, graph: Graph, kernel: Shape) -> _Window:
    """Read the attributes that Conv and pools share; `kernel` has one entry for each spatial axis."""
    shape = _image(node, graph)
    n = len(shape) - 1
    if n not in (1, 2):
        raise Refused(f"it must be 1-D or 2-D; got {n}-D", "use 2-D layers")
    stride = tuple(int(x) for x in node.attrs.get("strides", (1,) * n))
    dilation = tuple(int(x) for x in node.attrs.get("dilations", (1,) * n))
    begin, end = _pads(node, shape[1:], kernel, stride, dilation)
    fill = 2 - n
    return _Window(
        kernel=_pair((1,) * fill + kernel),
        stride=_pair((1,) * fill + stride),
        dilation=_pair((1,) * fill + dilation),
        pads=(*_pair((0,) * fill + begin), *_pair((0,) * fill + end)),
    )


def _image(node: Node, graph: Graph) -> Shape:
    """Return channels and size of one image of the first input."""
    shape = graph.shapes[node.input(0)]
    return shape[1:] if graph.whole else shape


def _pair(values: Shape) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _pads(node: Node, size: Shape, kernel: Shape, stride: Shape, dilation: Shape) -> tuple[Shape, Shape]:
    """Return the padding before and behind each spatial axis."""
    n = len(size)
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = tuple(int(x) for x in node.attrs.get("pads", (0,) * (2 * n)))
        return pads[:n], pads[n:]
    if auto == "VALID":
        return (0,) * n, (0,) * n
    # SAME: as many outputs as strides fit, the odd column behind (SAME_UPPER) or before (SAME_LOWER).
    total = [
        max((math.ceil(s / t) - 1) * t + (k - 1) * d + 1 - s, 0)
        for s, k, t, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    less, more = tuple(x // 2 for x in total), tuple(x - x // 2 for x in total)
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def _in_2d(node: Node, graph: Graph, make: Callable[[str, str, Shape], list[Step]]) -> list[Step]:
    """Return the steps that `make(source, output, shape)` gives for images; 1-D samples become images of height 1."""
    source, output, shape = activation_input(node, graph), node.outputs[0], output_shape(node, graph)
    inner = graph.shapes[source]
    if len(_image(node, graph)) == 3:
        return make(source, output, shape)
    flat, high = f"{output}/lifted_in", f"{output}/lifted_out"
    return [
        reshaped(f"{node.name}/lift", source, flat, (*inner[:-1], 1, inner[-1])),
        *make(flat, high, (*shape[:-1], 1, shape[-1])),
        reshaped(f"{node.name}/drop", high, output, shape),
    ]


def _pool(node: Node, graph: Graph) -> tuple[_Window, Pads]:
    """Return a pool's window, padded behind until the last output fits (ceil_mode), and the padding it declares."""
    window = _window(node, graph, tuple(int(x) for x in node.attrs["kernel_shape"]))
    if window.dilation != (1, 1):
        raise Refused(f"a pool must not be dilated; got {window.dilation}", "use a pool without dilations")
    made = output_shape(node, graph)[-(len(_image(node, graph)) - 1) :]
    made = (1,) * (2 - len(made)) + made
    end = list(window.pads[2:])
    for i in range(2):
        start, k, t = window.pads[i], window.kernel[i], window.stride[i]
        size = _padded_size(node, graph, i, (0, 0, 0, 0))
        end[i] = max(end[i], (made[i] - 1) * t + k - size - start)
        if start >= k or (made[i] - 1) * t - start >= size:
            raise Refused("a window must not lie in the padding alone", "pad less than the kernel's size")
    return replace(window, pads=(*window.pads[:2], end[0], end[1])), window.pads


@rule("MaxPool")
def max_pool(node: Node, graph: Graph) -> list[Step]:
    """1-D and 2-D, any strides, pads, auto_pad and ceil_mode; no dilation, no indices."""
    only_first_output(node, graph)
    window, _ = _pool(node, graph)
    attrs: dict[str, Attribute] = {"kernel": window.kernel, "stride": window.stride, "pads": window.pads}

    def make(source: str, output: str, shape: Shape) -> list[Step]:
        return [Step("max_pool2d", node.name, (source,), output, shape, attrs=attrs)]

    return _in_2d(node, graph, make)


@rule("AveragePool")
def average_pool(node: Node, graph: Graph) -> list[Step]:
    """1-D and 2-D, any strides, pads, auto_pad, ceil_mode and count_include_pad; no dilation."""
    counted = int(node.attrs.get("count_include_pad", 0))
    window, declared = _pool(node, graph)
    attrs: dict[str, Attribute] = {
        "kernel": window.kernel,
        "stride": window.stride,
        "pads": window.pads,
        "count_include_pad": counted,
    }

    def make(source: str, output: str, shape: Shape) -> list[Step]:
        if not counted or window.pads == declared:
            return [Step("avg_pool2d", node.name, (source,), output, shape, attrs=attrs)]
        # `pads` is counted, what ceil_mode adds behind is not: divide by the whole window first, then correct.
        wide = f"{output}/whole_window"
        rows, columns = (
            _inside(
                shape[len(shape) - 2 + i], window.kernel[i], window.stride[i], _padded_size(node, graph, i, declared)
            )
            for i in range(2)
        )
        scale = math.prod(window.kernel) / np.outer(rows, columns).reshape(
            *[1] * (len(shape) - 1), len(rows), len(columns)
        )
        return [
            Step("avg_pool2d", node.name, (source,), wide, shape, attrs=attrs),
            affine(f"{node.name}/divisor", wide, output, shape, scale=scale),
        ]

    return _in_2d(node, graph, make)


def _padded_size(node: Node, graph: Graph, axis: int, pads: Pads) -> int:
    """Return the size of a spatial axis (0: height) with its declared padding."""
    size = _image(node, graph)[1:]
    return ((1,) * (2 - len(size)) + size)[axis] + pads[axis] + pads[axis + 2]


def _inside(n: int, kernel: int, stride: int, size: int) -> Array:
    """Return for each of n windows along an axis how many of its places lie within `size`."""
    starts = np.arange(n) * stride
    return np.minimum(starts + kernel, size) - starts


@rule("Conv")
def conv(node: Node, graph: Graph) -> list[Step]:
    """1-D and 2-D, constant weight, any groups, dilation, strides, pads and auto_pad."""
    weight = constant_input(node, graph, 1, "the weight")
    bias = {"bias": constant_input(node, graph, 2, "the bias")} if node.input(2) else {}
    window = _window(node, graph, tuple(weight.shape[2:]))
    params = {"weight": weight.reshape((*weight.shape[:2], *window.kernel)), **bias}
    attrs: dict[str, Attribute] = {
        "stride": window.stride,
        "pads": window.pads,
        "dilation": window.dilation,
        "groups": int(node.attrs.get("group", 1)),
    }

    def make(source: str, output: str, shape: Shape) -> list[Step]:
        return [Step("conv2d", node.name, (source,), output, shape, params, attrs)]

    return _in_2d(node, graph, make)
