"""Rules of convolutions and transposed convolutions.

With a constant weight they are the program's convolution of images; with one that is computed, or an input, each
window's places are laid side by side, which costs nothing, and multiplied as matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from protocols.program.program import Shape
from securemtk.onnx.building.builder import ABSENT, Draft, Operand
from securemtk.onnx.building.registry import Step, activation_input, output_shape, reshaped, rule
from securemtk.onnx.building.windows import Axis, Chain, n_spatial, numbers, window
from securemtk.onnx.model.graph import Array, Graph, Node


@rule("Conv")
def conv(node: Node, graph: Graph) -> list[Step]:
    """1-D to 3-D, any groups, dilations, strides, pads and auto_pad; weight and bias constant or, of a model \
understood as a whole, activations."""
    weight, bias = _weights(node, graph)
    axes = window(node, graph, _kernel(weight, graph))
    groups = int(node.attrs.get("group", 1))
    if isinstance(weight, str):
        draft = Draft(node, graph)
        taps = [np.where((axis.taps() >= 0) & (axis.taps() < axis.size), axis.taps(), ABSENT) for axis in axes]
        return _by_windows(node, graph, draft, draft.reshape(weight, _matrices(graph.shapes[weight], groups)), taps)
    chain = Chain(node, graph)
    _convolve(chain, axes, weight, None if isinstance(bias, str) else bias, groups)
    return _biased(chain, graph, bias)


def _weights(node: Node, graph: Graph) -> tuple[Operand, Operand | None]:
    draft = Draft(node, graph)
    return draft.weight(1, "the weight"), draft.weight(2, "the bias") if node.input(2) else None


def _kernel(weight: Operand, graph: Graph) -> Shape:
    return graph.shapes[weight][2:] if isinstance(weight, str) else weight.shape[2:]


def _biased(chain: Chain, graph: Graph, bias: Operand | None) -> list[Step]:
    """Return the steps of a chain, with a bias behind them that is no constant."""
    if isinstance(bias, str):
        shape = output_shape(chain.node, graph)
        chain.reshape(*shape)
        form, made = (1, shape[1], *[1] * len(shape[2:])), f"{chain.node.outputs[0]}/bias"
        chain.beside(reshaped(f"{chain.node.name}/bias", bias, made, form))
        chain.then("add", shape, others=(made,))
    return chain.end(graph)


def _matrices(weight: Shape, groups: int) -> Shape:
    """Return the shape (1, groups, C_out / groups, taps) of a weight (C_out, C / groups, *kernel)."""
    return (1, groups, weight[0] // groups, math.prod(weight[1:]))


def _by_windows(node: Node, graph: Graph, draft: Draft, weight: str, taps: Sequence[Array]) -> list[Step]:
    """Multiply each window's places by a weight (1, groups, C_out / groups, C / groups * taps) that is no constant.

    Args:
        node, graph: what is translated: its input is (N, C, *sizes).
        draft: with the weight.
        weight: its value.
        taps: of each axis the place that each tap of each window reads, or `ABSENT`: int64 (made, kernel).
    """
    value, made = activation_input(node, graph), output_shape(node, graph)
    _, groups, _, rows = draft.shape(weight)
    apart = draft.reshape(draft.windows(value, taps), (made[0], groups, rows, math.prod(made[2:])))
    product = draft.dot(weight, apart)
    bias = draft.weight(2, "the bias") if node.input(2) else None
    form = (1, made[1], *[1] * len(taps))
    return draft.made(
        draft.linear(draft.reshape(product, made), None, None if bias is None else draft.shaped(bias, form))
    )


def _convolve(chain: Chain, axes: tuple[Axis, ...], weight: Array, bias: Array | None, groups: int) -> None:
    """Convolve (..., C, *sizes) with a weight (C_out, C / groups, *kernel) to (..., C_out, *made)."""
    n = len(axes)
    axes = tuple(_cut(chain, i - n, axis) for i, axis in enumerate(axes))
    lead = chain.shape[: -n - 1]
    made = tuple(axis.made for axis in axes)
    if n == 1:
        axes = (Axis(1, 1), *axes)
        weight = weight[:, :, None]
        chain.reshape(*chain.shape[:-1], 1, chain.shape[-1])
    if n == 3:
        weight = weight.reshape(len(weight), -1, *weight.shape[3:])
        _depth_to_channels(chain, axes[0])
    rows, columns = axes[-2:]
    chain.then(
        "conv2d",
        (*chain.shape[:-3], len(weight), rows.made, columns.made),
        {"weight": weight} if bias is None else {"weight": weight, "bias": bias},
        {
            "stride": (rows.stride, columns.stride),
            "pads": (rows.before, columns.before, rows.after, columns.after),
            "dilation": (rows.dilation, columns.dilation),
            "groups": groups,
        },
        main=True,
    )
    if n == 3:
        first = len(lead)
        chain.transpose(*range(first), first + 1, first, first + 2, first + 3)
    chain.reshape(*lead, len(weight), *made)


def _cut(chain: Chain, place: int, axis: Axis) -> Axis:
    """Cut off what an axis, at this place of the shape, has as padding of less than 0."""
    if axis.before >= 0 and axis.after >= 0:
        return axis
    kept = np.arange(max(0, -axis.before), axis.size + min(0, axis.after))
    if not len(kept):
        # Nothing of the axis is seen: zeros take its place.
        chain.take(place, np.array([-1]))
        return replace(axis, size=1, before=0, after=axis.before + axis.size + axis.after - 1)
    chain.take(place, kept)
    return replace(axis, size=len(kept), before=max(0, axis.before), after=max(0, axis.after))


def _depth_to_channels(chain: Chain, depth: Axis) -> None:
    """Turn (..., C, D, H, W) into images (..., D', C * kd, H, W): the taps along the depth are channels."""
    *lead, channels, _, height, width = chain.shape
    chain.take(-3, depth.taps())
    chain.reshape(*lead, channels, depth.made, depth.kernel, height, width)
    first = len(lead)
    chain.transpose(*range(first), first + 1, first, *range(first + 2, first + 5))
    chain.reshape(*lead, depth.made, channels * depth.kernel, height, width)


@rule("ConvTranspose")
def conv_transpose(node: Node, graph: Graph) -> list[Step]:
    """1-D to 3-D, any groups, dilations, strides, pads, auto_pad, output_padding and output_shape; weight and bias as \
of Conv."""
    weight, bias = _weights(node, graph)
    groups = int(node.attrs.get("group", 1))
    n = n_spatial(node, graph)
    made, kernel = output_shape(node, graph)[-n:], _kernel(weight, graph)
    begins = _begins(node, graph, kernel)
    strides, dilations = numbers(node, "strides", n), numbers(node, "dilations", n)
    sizes = graph.shapes[activation_input(node, graph)][-n:]
    phases = [_Phases(*each) for each in zip(sizes, made, kernel, strides, dilations, begins, strict=True)]
    if isinstance(weight, str):
        draft = Draft(node, graph)
        # Of one group: (C_in, C_out, taps) -> (C_out, C_in, taps).
        channels, each, *_ = graph.shapes[weight]
        apart = draft.reshape(weight, (groups, channels // groups, each, math.prod(kernel)))
        turned = draft.transpose(apart, (0, 1, 3, 2, 4))
        rows = draft.reshape(turned, _matrices((groups * each, channels // groups, *kernel), groups))
        return _by_windows(node, graph, draft, rows, [x.taps() for x in phases])
    chain = Chain(node, graph)
    # Of one group: (C_in, C_out, *kernel) -> (C_out, C_in, *kernel).
    split = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
    wide = _by_phase(split.reshape(-1, *split.shape[2:]), phases)
    known = None if bias is None or isinstance(bias, str) else np.repeat(bias, math.prod(strides))
    _convolve(chain, tuple(x.window() for x in phases), wide, known, groups)
    _interleave(chain, strides)
    for i, axis in enumerate(phases):
        chain.take(i - n, axis.kept())
    return _biased(chain, graph, bias)


class _Phases:
    """One axis of a transposed convolution as convolutions of the input itself, one for each remainder of the stride.

    Tap k spreads place i to place s * i + d * k. So place s * q + p is made of the taps with d * k = s * j + p, which
    read places q - j: a convolution of stride 1 for each phase p. All phases are channels of one convolution over the
    input, against one over an input with s - 1 zeros between its places that is never more products, s times fewer
    along each axis where the stride divides the kernel, and sends no zeros. A kernel as long as the stride has one
    tap for each phase: a product for each place.
    """

    def __init__(self, size: int, made: int, kernel: int, stride: int, dilation: int, begin: int) -> None:
        self._size, self._made, self._stride, self._begin = size, made, stride, begin
        self.kernel, self.stride, self._dilation = kernel, stride, dilation
        places = np.arange(kernel) * dilation
        self.phase, self._lag = places % stride, places // stride
        self._step = math.gcd(*self._lag.tolist()) or 1
        self._first = begin // stride
        self.tap = (self._lag.max() - self._lag) // self._step

    def window(self) -> Axis:
        """Return the window of the convolution whose channels are the phases."""
        last, most = -(-(self._begin + self._made) // self._stride), int(self._lag.max())
        return Axis(
            self._size,
            last - self._first,
            most // self._step + 1,
            dilation=self._step,
            before=most - self._first,
            after=last - self._size,
        )

    def taps(self) -> Array:
        """Return the place of the input that each tap adds to each place of the result, or `ABSENT`."""
        spread = np.arange(self._made)[:, None] + self._begin - np.arange(self.kernel) * self._dilation
        places, rest = np.divmod(spread, self.stride)
        return np.where((rest == 0) & (places >= 0) & (places < self._size), places, ABSENT)

    def kept(self) -> Array:
        """Return the places of the interleaved phases that are the result."""
        return np.arange(self._made) + self._begin - self._first * self._stride


def _by_phase(weight: Array, axes: list[_Phases]) -> Array:
    """Spread a weight (C_out, C_in, *kernel) over phases: (C_out * phases, C_in, *taps)."""
    strides, taps = (tuple(x.stride for x in axes), tuple(int(x.tap.max()) + 1 for x in axes))
    wide = np.zeros((weight.shape[0], *strides, weight.shape[1], *taps))
    for k in np.ndindex(*weight.shape[2:]):
        phase = tuple(x.phase[i] for x, i in zip(axes, k, strict=True))
        tap = tuple(x.tap[i] for x, i in zip(axes, k, strict=True))
        wide[(slice(None), *phase, slice(None), *tap)] = weight[(slice(None), slice(None), *k)]
    return wide.reshape(-1, weight.shape[1], *taps)


def _interleave(chain: Chain, strides: Shape) -> None:
    """Turn (..., C * phases, *sizes) into (..., C, *(size * stride))."""
    n = len(strides)
    *lead, channels = chain.shape[:-n]
    sizes = chain.shape[-n:]
    if math.prod(strides) == 1:
        return
    first = len(lead) + 1
    chain.reshape(*lead, channels // math.prod(strides), *strides, *sizes)
    chain.transpose(*range(first), *(i for j in range(n) for i in (first + n + j, first + j)))
    chain.reshape(*chain.shape[:first], *(size * stride for size, stride in zip(sizes, strides, strict=True)))


def _begins(node: Node, graph: Graph, kernel: Shape) -> Shape:
    """Return how many places are cut off before each axis of the result, as onnxruntime finds them."""
    n = len(kernel)
    auto = node.attrs.get("auto_pad", "NOTSET")
    if not node.attrs.get("output_shape") and auto not in ("SAME_UPPER", "SAME_LOWER"):
        return numbers(node, "pads", 2 * n, 0)[:n] if auto in ("NOTSET", "") else (0,) * n
    sizes, made = graph.shapes[node.input(0)][-n:], output_shape(node, graph)[-n:]
    wanted = made if node.attrs.get("output_shape") else sizes
    strides, dilations = numbers(node, "strides", n), numbers(node, "dilations", n)
    more = numbers(node, "output_padding", n, 0)
    begins = []
    for i in range(n):
        size = wanted[i] if wanted is made else sizes[i] * strides[i]
        total = max(0, (sizes[i] - 1) * strides[i] + more[i] + (kernel[i] - 1) * dilations[i] + 1 - size)
        begins.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
    return tuple(begins)
