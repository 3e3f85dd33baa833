"""Rules of reductions: sums, means, norms, products and extremes over axes, and the places of extremes."""

import math
from collections.abc import Callable

import numpy as np

from protocols.program.program import Shape
from securemtk.onnx.building.builder import ABSENT, Draft, without
from securemtk.onnx.building.registry import Step, activation_input, constant_input, rule, sample_axis
from securemtk.onnx.model.graph import Graph, Node

Axes = tuple[int, ...]


def _reduced(node: Node, graph: Graph, make: Callable[[Draft, str, Axes], str], by_input: int = 18) -> list[Step]:
    """Return the steps that `make(draft, source, axes)` gives, which keeps the axes with size 1.

    Args:
        node, graph: what is translated.
        make: makes the value.
        by_input: the first opset in which axes are an input.
    """
    source, draft = activation_input(node, graph), Draft(node, graph)
    axes, rank = tuple(int(x) for x in node.attrs.get("axes", ())), graph.rank(source)
    if node.opset >= by_input and node.input(1):
        axes = tuple(int(x) for x in constant_input(node, graph, 1, "the axes").ravel())
    if not axes and node.attrs.get("noop_with_empty_axes", 0):
        if node.op_type in _NOOP:
            return draft.made(source)
        # The root of one square.
        return draft.made(draft.magnitude(source) if node.op_type == "ReduceL2" else make(draft, source, ()))
    ours = tuple(sorted({sample_axis(graph, x, rank, "a reduction") for x in axes or range(rank)}))
    value = make(draft, source, ours)
    if not _keeps(node):
        value = draft.reshape(value, without(graph.shapes[source], ours))
    return draft.made(value)


_NOOP = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp")


def _keeps(node: Node) -> bool:
    return bool(node.attrs.get("keepdims", 1))


@rule("ReduceSum")
def reduce_sum(node: Node, graph: Graph) -> list[Step]:
    """Axes as attribute or as constant input, without the batch; keepdims, noop_with_empty_axes."""
    return _reduced(
        node, graph, lambda draft, x, axes: draft.reduce("sum", x, axes, keepdims=_keeps(node)), by_input=13
    )


@rule("ReduceMean")
def reduce_mean(node: Node, graph: Graph) -> list[Step]:
    """As ReduceSum."""
    return _reduced(node, graph, lambda draft, x, axes: draft.reduce("mean", x, axes, keepdims=_keeps(node)))


@rule("ReduceMax")
def reduce_max(node: Node, graph: Graph) -> list[Step]:
    """As ReduceSum."""
    return _reduced(node, graph, Draft.largest)


@rule("ReduceMin")
def reduce_min(node: Node, graph: Graph) -> list[Step]:
    """As ReduceSum."""
    return _reduced(node, graph, _least)


def _least(draft: Draft, x: str, axes: Axes) -> str:
    return draft.scale(draft.largest(draft.scale(x, -1), axes), -1)


@rule("ReduceL1")
def reduce_l1(node: Node, graph: Graph) -> list[Step]:
    """As ReduceSum."""
    return _reduced(node, graph, lambda draft, x, axes: draft.reduce("sum", draft.magnitude(x), axes))


@rule("ReduceSumSquare")
def reduce_sum_square(node: Node, graph: Graph) -> list[Step]:
    """As ReduceSum."""
    return _reduced(node, graph, sum_square)


def sum_square(draft: Draft, x: str, axes: Axes) -> str:
    """Add the sum of squares over axes."""
    return draft.reduce("sum", draft.binary("mul", x, x), axes)


@rule("ReduceL2")
def reduce_l2(node: Node, graph: Graph) -> list[Step]:
    """As ReduceSum; values up to 2**11 in the mean (2**13 for up to 1024 of them), within 0.0003 of the norm."""
    return _reduced(node, graph, _root_of_squares)


def _root_of_squares(draft: Draft, x: str, axes: Axes) -> str:
    squares, smaller = small_squares(draft, x, axes)
    return draft.function(squares, "root", smaller)


def small_squares(draft: Draft, x: str, axes: Axes) -> tuple[str, float]:
    """Add the sum of (x / S)**2 over axes; return it and S, a power of two.

    S is such that sums of n squares fit for values that are 2**11 in the mean (2**13 for n up to 1024), and that
    values of 0.003 keep four of their bits each, whose errors cancel in the sum.
    """
    n = math.prod(draft.shape(x)[a - 1] for a in axes)
    half = math.ceil(math.log2(n) / 2)
    smaller = 2.0 ** min(6 + half, max(11, 4 + half))
    small = draft.scale(x, 1 / smaller)
    return draft.reduce("sum", draft.binary("mul", small, small), axes), smaller


@rule("ReduceLogSum")
def reduce_log_sum(node: Node, graph: Graph) -> list[Step]:
    """As ReduceSum; the sum from 2**-16 to 2**15, within 0.0003."""
    return _reduced(node, graph, lambda draft, x, axes: draft.function(draft.reduce("sum", x, axes), "log"))


@rule("ReduceLogSumExp")
def reduce_log_sum_exp(node: Node, graph: Graph) -> list[Step]:
    """As ReduceSum; by differences from the maximum."""
    return _reduced(node, graph, _log_sum_exp)


def _log_sum_exp(draft: Draft, x: str, axes: Axes) -> str:
    largest = draft.largest(x, axes)
    n = int(np.prod([draft.shape(x)[a - 1] for a in axes]))
    powers = draft.function(draft.binary("sub", x, largest), "exp_of_differences", n)
    return draft.binary("add", draft.function(draft.reduce("sum", powers, axes), "log_of_sum", n), largest)


@rule("ReduceProd")
def reduce_prod(node: Node, graph: Graph) -> list[Step]:
    """As ReduceSum; a tree of products."""
    return _reduced(node, graph, _product)


def _product(draft: Draft, x: str, axes: Axes) -> str:
    shape = tuple(1 if i in axes else n for i, n in enumerate(draft.shape(x), 1))
    value = draft.joined(x, axes)
    last = len(draft.shape(value))
    while (n := draft.shape(value)[-1]) > 1:
        half = n // 2
        pairs = draft.binary(
            "mul", draft.take(value, last, range(half)), draft.take(value, last, range(half, 2 * half))
        )
        value = draft.concat([pairs, draft.take(value, last, [n - 1])], last) if n % 2 else pairs
    return draft.reshape(value, shape)


@rule("ArgMax", "ArgMin")
def arg_max(node: Node, graph: Graph) -> list[Step]:
    """Any axis but the batch; keepdims, select_last_index."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    axis = sample_axis(graph, int(node.attrs.get("axis", 0)), graph.rank(source), node.op_type)
    value = source if node.op_type == "ArgMax" else draft.scale(source, -1)
    place = _place(draft, value, axis, last=int(node.attrs.get("select_last_index", 0)))
    if not _keeps(node):
        place = draft.reshape(place, without(draft.shape(place), (axis,)))
    return draft.made(place)


def _place(draft: Draft, value: str, axis: int, last: int = 0) -> str:
    shape = tuple(1 if i == axis else n for i, n in enumerate(draft.shape(value), 1))
    return draft.add("argmax", (value,), shape, axis=axis, last=last)


@rule("TopK")
def top_k(node: Node, graph: Graph) -> list[Step]:
    """Values and places, largest or smallest, sorted, along any axis but the batch; for k above 1 an ArgMax for each, \
of values below 2**13."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    k = int(constant_input(node, graph, 1, "k").item())
    axis = sample_axis(graph, int(node.attrs.get("axis", -1)), graph.rank(source), "TopK")
    sign = 1 if node.attrs.get("largest", 1) else -1
    value = source if sign == 1 else draft.scale(source, -1)
    wants_values, wants_places = (x in graph.used for x in (*node.outputs, "")[:2])
    if k == 1:
        best = [draft.largest(value, (axis,))] if wants_values else []
        places = [_place(draft, value, axis)] if wants_places else []
    else:
        best, places = _in_order(draft, value, axis, k)
    found = draft.concat(best, axis) if wants_values else ""
    if found and sign == -1:
        found = draft.scale(found, -1)
    return draft.made(found, draft.concat(places, axis) if wants_places else "")


# What takes a value out of a search for the largest.
_AWAY = 2.0**14


def _in_order(draft: Draft, value: str, axis: int, k: int) -> tuple[list[str], list[str]]:
    """Add the k largest along an axis and their places."""
    best, places = [], []
    for i in range(k):
        place = _place(draft, value, axis)
        hit = _hit(draft, place, draft.shape(value), axis)
        best.append(draft.reduce("sum", draft.binary("mul", value, hit), (axis,)))
        places.append(place)
        if i < k - 1:
            value = draft.binary("sub", value, draft.scale(hit, _AWAY))
    return best, places


def _hit(draft: Draft, place: str, shape: Shape, axis: int) -> str:
    """Add the truth of an axis's being at a place."""
    form = [1] * (len(shape) + 1)
    form[axis] = -1
    away = draft.affine(draft.expand(place, shape), shift=-np.arange(shape[axis - 1], dtype=np.float64).reshape(form))
    return draft.add("indicator", (away,), shape, knots=(0, 1), below=0)


@rule("Hardmax")
def hardmax(node: Node, graph: Graph) -> list[Step]:
    """Any axis but the batch; before opset 13 over all axes from `axis` on, as the standard says."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    shape, rank = graph.shapes[source], graph.rank(source)
    axis = sample_axis(graph, int(node.attrs.get("axis", -1 if node.opset >= 13 else 1)), rank, "Hardmax")
    value = source if node.opset >= 13 else draft.reshape(source, (*shape[: axis - 1], int(np.prod(shape[axis - 1 :]))))
    hit = _hit(draft, _place(draft, value, axis), draft.shape(value), axis)
    return draft.made(draft.reshape(hit, shape))


@rule("CumSum")
def cum_sum(node: Node, graph: Graph) -> list[Step]:
    """A constant axis, not the batch; exclusive, reverse."""
    value, draft = activation_input(node, graph), Draft(node, graph)
    axis = sample_axis(
        graph, int(constant_input(node, graph, 1, "the axis").item()), graph.rank(value), "a cumulative sum"
    )
    n, back = draft.shape(value)[axis - 1], bool(node.attrs.get("reverse", 0))

    def moved(x: str, by: int) -> str:
        places = [*range(by, n), *[ABSENT] * by] if back else [*[ABSENT] * by, *range(n - by)]
        return draft.take(x, axis, places)

    if node.attrs.get("exclusive", 0):
        value = moved(value, 1)
    by = 1
    # Sums of 2, 4, 8 ... neighbours: nothing is sent for them.
    while by < n:
        value, by = draft.binary("add", value, moved(value, by)), 2 * by
    return draft.made(value)
