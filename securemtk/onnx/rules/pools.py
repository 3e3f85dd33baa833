"""Rules of pools: the maximum, the mean or a norm over windows.

With three axes the depth goes first, which leaves fewer places to the rest. The taps of a dilated axis are laid side by
side before, which costs nothing.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from protocols.program.program import Attribute
from securemtk.onnx.building.builder import ABSENT, Draft
from securemtk.onnx.building.lower import custom, straight
from securemtk.onnx.building.registry import Refused, Step, activation_input, rule
from securemtk.onnx.building.windows import Axis, Chain, n_spatial, numbers, window
from securemtk.onnx.model.graph import Array, Graph, Node

Pair = tuple[Axis, Axis]


def _pool_axes(node: Node, graph: Graph) -> tuple[Axis, ...]:
    return window(node, graph, numbers(node, "kernel_shape", n_spatial(node, graph)))


def _global_axes(node: Node, graph: Graph) -> tuple[Axis, ...]:
    """Return one window over each axis."""
    sizes = graph.shapes[activation_input(node, graph)][-n_spatial(node, graph) :]
    return tuple(Axis(size, 1, size) for size in sizes)


def _inside(axis: Axis, before: int = 0, after: int = 0) -> Array:
    """Return which taps of each window lie in the input, or so many places around it, bool (made, kernel)."""
    taps: Array = axis.taps()
    inside: Array = (taps >= -before) & (taps < axis.size + after)
    return inside


def _over(chain: Chain, axes: tuple[Axis, ...], pool: Callable[[Chain, Pair], None]) -> None:
    """Pool (..., C, *sizes) to (..., C, *made) by pools over its last two axes."""
    lead, sizes = chain.shape[: -len(axes)], chain.shape[-len(axes) :]
    if len(axes) == 1:
        chain.reshape(*lead, 1, *sizes)
        axes = (Axis(1, 1), *axes)
    elif len(axes) == 3 and not axes[0].is_trivial():
        place = math.prod(sizes[1:])
        chain.reshape(*lead, sizes[0], place)
        pool(chain, (axes[0], Axis(place, place)))
        chain.reshape(*lead, axes[0].made, *sizes[1:])
    pair = axes[-2], axes[-1]
    if not all(x.is_trivial() for x in pair):
        pool(chain, pair)
    chain.reshape(*lead, *(x.made for x in axes[-len(sizes) :]))


def _undilated(chain: Chain, pair: Pair, places: Callable[[Axis], Array]) -> Pair:
    """Lay the taps of dilated windows side by side, at the `places` of an axis."""
    rows, columns = pair
    if rows.kernel > 1 < rows.dilation:
        chain.take(-2, places(rows))
        rows = rows.gathered()
    if columns.kernel > 1 < columns.dilation:
        chain.take(-1, places(columns))
        columns = columns.gathered()
    return rows, columns


def _emit(chain: Chain, op: str, pair: Pair, **more: int) -> None:
    """Add a pool over the last two axes, padded as far as windows reach."""
    rows, columns = pair
    attrs: dict[str, Attribute] = {
        "kernel": (rows.kernel, columns.kernel),
        "stride": (rows.stride, columns.stride),
        "pads": (rows.before, columns.before, rows.reach(), columns.reach()),
        **more,
    }
    chain.then(op, (*chain.shape[:-2], rows.made, columns.made), attrs=attrs, main=True)


@rule("MaxPool")
def max_pool(node: Node, graph: Graph) -> list[Step]:
    """1-D to 3-D, any strides, pads, auto_pad, dilations and ceil_mode; places only of a model understood as a whole, \
of values above -2**13 where windows reach into padding."""
    axes = _pool_axes(node, graph)
    if not all(_inside(x).any(1).all() for x in axes):
        # Such a window has no maximum: onnxruntime gives the least float32 there.
        raise Refused("a window must not lie in the padding alone", "pad less than the kernel's size")
    if any(x in graph.used for x in node.outputs[1:]):
        return _with_places(node, graph, axes)
    chain = Chain(node, graph)
    _over(chain, axes, _maximum)
    return chain.end(graph)


# What padding holds where the place of a maximum is wanted.
_LOWEST = -(2.0**13)


def _with_places(node: Node, graph: Graph, axes: tuple[Axis, ...]) -> list[Step]:
    """Maxima of windows laid side by side, and where in the whole input they are."""
    if not graph.whole:
        raise Refused("places count through all samples of a batch", "fix all sizes of the inputs")
    source, draft = activation_input(node, graph), Draft(node, graph)
    apart = draft.windows(source, [np.where(_inside(x), x.taps(), ABSENT) for x in axes], _LOWEST)
    lead, made = draft.shape(source)[:2], tuple(x.made for x in axes)
    apart = draft.reshape(apart, (*lead, math.prod(x.kernel for x in axes), *made))
    best, tap = draft.largest(apart, (3,)), draft.add("argmax", (apart,), (*lead, 1, *made), axis=3, last=0)
    sizes = [x.size for x in axes]
    order = sizes if not node.attrs.get("storage_order", 0) else sizes[::-1]
    steps = [math.prod(order[i + 1 :]) for i in range(len(order))]
    steps = steps if order is sizes else steps[::-1]
    first = np.arange(math.prod(lead)).reshape(*lead, *[1] * len(axes)) * math.prod(sizes)
    for i, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        starts = np.arange(axis.made) * axis.stride - axis.before
        first = first + (starts * step).reshape(-1, *[1] * (len(axes) - 1 - i))
    shift = first.reshape(1, *lead, *made).astype(np.float64)
    place = draft.affine(draft.reshape(_spread(draft, tap, axes, steps), (*lead, *made)), shift=shift)
    return draft.made(draft.reshape(best, (*lead, *made)) if node.outputs[0] in graph.used else "", place)


def _spread(draft: Draft, tap: str, axes: tuple[Axis, ...], steps: list[int]) -> str:
    """Turn the number of a tap into how far its place lies behind the window's first: a line for each row of taps."""
    offsets = np.zeros(())
    for axis, step in zip(axes, steps, strict=True):
        offsets = offsets[..., None] + np.arange(axis.kernel) * axis.dilation * step
    row, slope = axes[-1].kernel, axes[-1].dilation * steps[-1]
    starts = np.arange(0, offsets.size, row)
    lines = [(float(offsets.ravel()[k] - slope * k), float(slope)) for k in starts]
    if len(lines) == 1:
        return draft.scale(tap, slope)
    return draft.add("function", (tap,), draft.shape(tap), **straight([k - 0.5 for k in starts[1:].tolist()], *lines))


@rule("GlobalMaxPool")
def global_max_pool(node: Node, graph: Graph) -> list[Step]:
    """1-D to 3-D."""
    chain = Chain(node, graph)
    _over(chain, _global_axes(node, graph), _maximum)
    return chain.end(graph)


def _maximum(chain: Chain, pair: Pair) -> None:
    _emit(chain, "max_pool2d", _undilated(chain, pair, _own_places))


def _own_places(axis: Axis) -> Array:
    """Return the places of all taps; one outside the input reads what another of its window does."""
    taps, inside = axis.taps(), _inside(axis)
    first = np.take_along_axis(taps, inside.argmax(1)[:, None], 1)
    return np.where(inside, taps, first)


@rule("AveragePool")
def average_pool(node: Node, graph: Graph) -> list[Step]:
    """1-D to 3-D, any strides, pads, auto_pad, dilations, ceil_mode and count_include_pad."""
    counted = bool(node.attrs.get("count_include_pad", 0))
    axes = _pool_axes(node, graph)
    chain = Chain(node, graph)
    if len(axes) == 3 and all(_counts(x, counted=counted).min() == x.kernel for x in axes):
        # One factor behind both sums: each has its own bits of fraction.
        _over(chain, axes, _sum)
        chain.then("scale", chain.shape, attrs={"factor": 1 / math.prod(x.kernel for x in axes), "offset": 0})
    else:
        _over(chain, axes, lambda chain, pair: _average(chain, pair, counted=counted))
    return chain.end(graph)


def _counts(axis: Axis, *, counted: bool) -> Array:
    """Return what each window is divided by, int64 (made,); one in the padding alone is 0, as in onnxruntime."""
    counts: Array = _inside(axis, *((axis.before, axis.after) if counted else ())).sum(1)
    return counts.clip(min=1)


def _average(chain: Chain, pair: Pair, *, counted: bool) -> None:
    if any(x.kernel > 1 < x.dilation for x in pair):
        _dilated_average(chain, pair, counted=counted)
    elif counted and any(x.reach() > max(x.after, 0) for x in pair):
        # What is declared counts, what ceil_mode adds behind does not.
        rows, columns = pair
        chain.take(-2, np.arange(-rows.before, rows.size + rows.after))
        chain.take(-1, np.arange(-columns.before, columns.size + columns.after))
        _emit(chain, "avg_pool2d", (_padded(rows), _padded(columns)), count_include_pad=0)
    else:
        _emit(chain, "avg_pool2d", pair, count_include_pad=int(counted))


def _padded(axis: Axis) -> Axis:
    """Return the axis after its padding has become part of the input."""
    return replace(axis, size=axis.size + axis.before + axis.after, before=0, after=0)


def _dilated_average(chain: Chain, pair: Pair, *, counted: bool) -> None:
    """Average over whole windows, with zeros as padding, and correct those that have less to count."""
    counts = np.outer(*(_counts(x, counted=counted) for x in pair))
    size = math.prod(x.kernel for x in pair)
    rows, columns = _undilated(chain, pair, Axis.taps)
    _emit(chain, "avg_pool2d", (rows, columns), count_include_pad=1)
    if (counts != size).any():
        form = (1,) * (len(chain.shape) - 1)
        chain.then("affine", chain.shape, {"scale": (size / counts).reshape(*form, *counts.shape)})


def _sum(chain: Chain, pair: Pair) -> None:
    _emit(chain, "sum_pool2d", _undilated(chain, pair, Axis.taps))


@rule("LpPool")
def lp_pool(node: Node, graph: Graph) -> list[Step]:
    """1-D to 3-D, p 1 to 4 (3 and 4: sums of powers up to 2**14), any strides, pads, auto_pad, dilations and \
ceil_mode."""
    return _norm(node, graph, _pool_axes(node, graph))


@rule("GlobalLpPool")
def global_lp_pool(node: Node, graph: Graph) -> list[Step]:
    """1-D to 3-D, p as of LpPool."""
    return _norm(node, graph, _global_axes(node, graph))


def _norm(node: Node, graph: Graph, axes: tuple[Axis, ...]) -> list[Step]:
    p = int(node.attrs.get("p", 2))
    if not 1 <= p <= _LARGEST_P:
        raise Refused(f"p must be 1 to {_LARGEST_P}; got {p}", "use p 2")
    chain = Chain(node, graph)
    source, shape = chain.value, chain.shape
    if p % 2:
        # |x| = 2 max(x, 0) - x.
        chain.then("relu", shape)
        chain.then("scale", shape, attrs={"factor": 2, "offset": 0})
        chain.then("sub", shape, others=(source,))
        source = chain.value
    if p > 1:
        chain.then("mul", shape, others=(source,))
    if p > _SQUARE:
        # x**3 or, of the square with itself, x**4.
        chain.then("mul", shape, others=(source if p % 2 else chain.value,))
    _over(chain, axes, _sum)
    if p == _SQUARE:
        chain.then("sqrt", chain.shape)
    elif p > _SQUARE:
        chain.then("function", chain.shape, attrs=custom("power", 1 / p))
    return chain.end(graph)


_SQUARE, _LARGEST_P = 2, 4
