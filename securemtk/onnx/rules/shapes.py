"""Rules of operators that move, choose and join values: nothing is sent for them, but for an interpolation."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx.helper
import onnx.numpy_helper

from securemtk.onnx.building.builder import ABSENT, Draft
from securemtk.onnx.building.lookups import is_lookup, looked_up
from securemtk.onnx.building.registry import (
    LIMIT,
    Refused,
    Step,
    activation_input,
    constant_input,
    one_step,
    output_shape,
    reshaped,
    rule,
    sample_axis,
)
from securemtk.onnx.model import runtime
from securemtk.onnx.model.graph import Array, Graph, Node


@rule("GlobalAveragePool")
def global_average_pool(node: Node, graph: Graph) -> list[Step]:
    """Any number of spatial axes."""
    rank = graph.rank(activation_input(node, graph))
    return [one_step(node, graph, "mean", axes=tuple(graph.axis(i, rank) for i in range(2, rank)), keepdims=1)]


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Node, graph: Graph) -> list[Step]:
    """Any, as long as the batch stays the first axis; the shape may be computed from the input's shape."""
    if node.op_type == "Reshape" and node.input(1) in graph.activations:
        raise Refused("the shape must not be computed from the input's values", "use a constant shape")
    return [reshaped(node.name, activation_input(node, graph), node.outputs[0], output_shape(node, graph))]


@rule("Transpose")
def transpose(node: Node, graph: Graph) -> list[Step]:
    """Any order of the axes with the batch first."""
    rank = graph.rank(activation_input(node, graph))
    perm = tuple(graph.axis(int(x), rank) for x in node.attrs.get("perm", range(rank - 1, -1, -1)))
    perm = (0, *perm) if graph.whole else perm
    if perm[0] != 0:
        raise Refused(f"the batch must stay the first axis; got perm {perm}", "keep axis 0 in its place")
    return [one_step(node, graph, "transpose", perm=perm)]


@rule("Concat")
def concat(node: Node, graph: Graph) -> list[Step]:
    """Activations and constants, along any axis but the batch."""
    shape, draft = output_shape(node, graph), Draft(node, graph)
    axis = sample_axis(graph, int(node.attrs["axis"]), graph.rank(node.outputs[0]), "a concatenation")
    shared = draft.concat([x for x in node.inputs if x in graph.activations], axis)
    if all(x in graph.activations for x in node.inputs):
        return draft.made(shared)
    # Zeros in the places of the constants, then a sum.
    places: list[int] = []
    values = np.zeros((1, *shape))
    seen = 0
    for i, name in enumerate(node.inputs):
        if name in graph.activations:
            size = graph.shapes[name][axis - 1]
            places += range(seen, seen + size)
            seen += size
            continue
        value = constant_input(node, graph, i, f"input {i}")
        value = value[None] if graph.whole else value[:1]
        where = [slice(None)] * values.ndim
        where[axis] = slice(len(places), len(places) + value.shape[axis])
        values[tuple(where)] = value
        places += [ABSENT] * value.shape[axis]
    return draft.made(draft.affine(draft.take(shared, axis, places), shift=values))


@rule("Split")
def split(node: Node, graph: Graph) -> list[Step]:
    """Equal or given parts, along any axis but the batch."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    axis = sample_axis(graph, int(node.attrs.get("axis", 0)), graph.rank(source), "a split")
    size, n = graph.shapes[source][axis - 1], len(node.outputs)
    sizes = [int(x) for x in node.attrs.get("split", ())]
    if node.opset >= 13 and node.input(1):
        sizes = [int(x) for x in constant_input(node, graph, 1, "the sizes")]
    each = math.ceil(size / n)
    sizes = sizes or [min(each, size - i * each) for i in range(n)]
    starts = np.cumsum([0, *sizes])
    parts = [range(starts[i], starts[i + 1]) for i in range(n)]
    used = [x in graph.shapes for x in node.outputs]
    return draft.made(*(draft.take(source, axis, p) if u else "" for p, u in zip(parts, used, strict=True)))


def _ints(node: Node, graph: Graph, index: int, what: str) -> list[int]:
    """Return a constant list of integers, that input of a node."""
    return [int(x) for x in constant_input(node, graph, index, what).ravel()]


_FAR = 2**31 - 1


@rule("Slice")
def slice_(node: Node, graph: Graph) -> list[Step]:
    """Constant bounds and steps, also negative, as inputs or attributes; the batch only as a whole."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    rank = graph.rank(source)
    if node.opset < 10:
        starts, ends = ([int(x) for x in node.attrs[name]] for name in ("starts", "ends"))
        axes, steps = [int(x) for x in node.attrs.get("axes", range(len(starts)))], [1] * len(starts)
    else:
        starts, ends = _ints(node, graph, 1, "starts"), _ints(node, graph, 2, "ends")
        axes = _ints(node, graph, 3, "axes") if node.input(3) else list(range(len(starts)))
        steps = _ints(node, graph, 4, "steps") if node.input(4) else [1] * len(starts)
    value = source
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if not graph.axis(axis, rank) and (start, step) == (0, 1) and end >= _FAR:
            continue
        ours = sample_axis(graph, axis, rank, "a slice")
        value = draft.take(value, ours, range(*slice(start, end, step).indices(draft.shape(value)[ours - 1])))
    return draft.made(value)


@rule("Gather")
def gather(node: Node, graph: Graph) -> list[Step]:
    """A constant index of any rank, also negative, along any axis but the batch; or a secret index on a constant of \
V <= 16,384 rows, for about 2.8 sqrt(V) comparisons and V products at each place."""
    if is_lookup(node, graph):
        return looked_up(node, graph)
    source, draft = activation_input(node, graph), Draft(node, graph)
    axis = sample_axis(graph, int(node.attrs.get("axis", 0)), graph.rank(source), "an index")
    indices = _ints(node, graph, 1, "the index")
    n = graph.shapes[source][axis - 1]
    return draft.made(draft.reshape(draft.take(source, axis, [i % n for i in indices]), output_shape(node, graph)))


def _grid(source: str, graph: Graph) -> Array:
    """Return the number of each element in a sample, in ONNX's shape with a batch of 1."""
    shape = graph.shapes[source]
    return np.arange(math.prod(shape)).reshape(shape if graph.whole else (1, *shape))


def _moved(node: Node, graph: Graph, source: str, places: Array, fill: float = 0.0) -> list[Step]:
    draft = Draft(node, graph)
    return draft.made(draft.places(source, places if graph.whole else places[0], fill))


@rule("GatherElements")
def gather_elements(node: Node, graph: Graph) -> list[Step]:
    """A constant index, also negative, the same for all samples; along any axis but the batch."""
    source = activation_input(node, graph)
    output_shape(node, graph)
    axis = sample_axis(graph, int(node.attrs.get("axis", 0)), graph.rank(source), "an index") - graph.whole
    indices, grid = constant_input(node, graph, 1, "the index"), _grid(source, graph)
    part = grid[tuple(slice(None) if i == axis else slice(n) for i, n in enumerate(indices.shape))]
    return _moved(node, graph, source, np.take_along_axis(part, indices % grid.shape[axis], axis))


@rule("GatherND")
def gather_nd(node: Node, graph: Graph) -> list[Step]:
    """A constant index, also negative, the same for all samples; the batch must be a batch axis."""
    source = activation_input(node, graph)
    output_shape(node, graph)
    lead, grid = int(node.attrs.get("batch_dims", 0)), _grid(source, graph)
    if not lead and not graph.whole:
        raise Refused("an index must not run over the batch", "use batch_dims")
    indices = constant_input(node, graph, 1, "the index")
    chosen = [grid[(*b, *np.moveaxis(indices[b], -1, 0))] for b in np.ndindex(*grid.shape[:lead])]
    return _moved(node, graph, source, np.reshape(chosen, (*grid.shape[:lead], *np.shape(chosen)[1:])))


@rule("Expand")
def expand(node: Node, graph: Graph) -> list[Step]:
    """To a constant shape or one computed from shapes; new axes only in a model understood as a whole."""
    source, shape, draft = activation_input(node, graph), output_shape(node, graph), Draft(node, graph)
    old = graph.shapes[source]
    if len(old) < len(shape) and not graph.whole:
        raise Refused("the batch must stay the first axis", "add axes by Unsqueeze")
    return draft.made(draft.expand(draft.reshape(source, (*[1] * (len(shape) - len(old)), *old)), shape))


@rule("Tile")
def tile(node: Node, graph: Graph) -> list[Step]:
    """Constant repeats; the batch once."""
    value, draft = activation_input(node, graph), Draft(node, graph)
    for axis, n in enumerate(_ints(node, graph, 1, "repeats")):
        if n != 1:
            ours = sample_axis(graph, axis, graph.rank(node.input(0)), "a repetition")
            value = draft.take(value, ours, [*range(draft.shape(value)[ours - 1])] * n)
    return draft.made(value)


_PADDING: Mapping[str, Literal["reflect", "edge", "wrap"]] = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


@rule("Pad")
def pad(node: Node, graph: Graph) -> list[Step]:
    """All modes, with constant pads, also negative, not of the batch; the constant value is public."""
    value, draft = activation_input(node, graph), Draft(node, graph)
    rank, fill, mode = graph.rank(value), 0.0, node.attrs.get("mode", "constant")
    if node.opset < 11:
        pads, fill = [int(x) for x in node.attrs["pads"]], float(node.attrs.get("value", 0.0))
    else:
        pads = _ints(node, graph, 1, "pads")
        fill = float(constant_input(node, graph, 2, "the value").item()) if node.input(2) else 0.0
    axes = _ints(node, graph, 3, "axes") if node.input(3) else list(range(rank))
    if not abs(fill) < LIMIT:
        raise Refused(f"the value must be a number below {LIMIT:g}; got {fill}", "pad by a smaller number")
    for i, axis in enumerate(axes):
        before, after = pads[i], pads[i + len(axes)]
        if before or after:
            ours = sample_axis(graph, axis, rank, "padding")
            places = np.arange(draft.shape(value)[ours - 1])
            places = places[max(-before, 0) : len(places) - max(-after, 0)]
            wider = (max(before, 0), max(after, 0))
            if mode == "constant":
                places = np.pad(places, wider, constant_values=ABSENT)
            else:
                places = np.pad(places, wider, mode=_PADDING[mode])
            value = draft.take(value, ours, places.tolist(), fill)
    return draft.made(value)


@rule("DepthToSpace")
def depth_to_space(node: Node, graph: Graph) -> list[Step]:
    """Both modes."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    (*lead, c, h, w), b = graph.shapes[source], int(node.attrs["blocksize"])
    n = len(lead) + 1
    if node.attrs.get("mode", "DCR") == "DCR":
        parts, order = (b, b, c // b**2, h, w), (2, 3, 0, 4, 1)
    else:
        parts, order = (c // b**2, b, b, h, w), (0, 3, 1, 4, 2)
    apart = draft.transpose(draft.reshape(source, (*lead, *parts)), (*range(n), *(n + i for i in order)))
    return draft.made(draft.reshape(apart, (*lead, c // b**2, h * b, w * b)))


@rule("SpaceToDepth")
def space_to_depth(node: Node, graph: Graph) -> list[Step]:
    """Any block size, both modes."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    (*lead, c, h, w), b = graph.shapes[source], int(node.attrs["blocksize"])
    n = len(lead) + 1
    apart = draft.reshape(source, (*lead, c, h // b, b, w // b, b))
    order = (2, 4, 0, 1, 3) if node.attrs.get("mode", "DCR") == "DCR" else (0, 2, 4, 1, 3)
    turned = draft.transpose(apart, (*range(n), *(n + i for i in order)))
    return draft.made(draft.reshape(turned, (*lead, c * b**2, h // b, w // b)))


@rule("Trilu")
def trilu(node: Node, graph: Graph) -> list[Step]:
    """A constant diagonal; the batch must not be an axis of the matrices."""
    source = activation_input(node, graph)
    grid = _grid(source, graph)
    if grid.ndim < 3 and not graph.whole:
        raise Refused("the batch must not be an axis of the matrices", "give each sample its matrix")
    k = int(constant_input(node, graph, 1, "the diagonal").item()) if node.input(1) else 0
    part = np.triu if node.attrs.get("upper", 1) else np.tril
    return _moved(node, graph, source, part(grid - ABSENT, k) + ABSENT)


# Of the matrix that resizes one axis.
_MOST_WEIGHTS = 1 << 26

# --- resizing -------------------------------------------------------------------------------------------------------


@rule("Resize", "Upsample")
def resize(node: Node, graph: Graph) -> list[Step]:
    """`nearest`, `linear` and `cubic` with all their attributes, not of the batch; all but `nearest` are a product \
with a constant matrix for each axis."""
    source, shape, draft = activation_input(node, graph), output_shape(node, graph), Draft(node, graph)
    rank = graph.rank(source)
    scales, roi, kept = _scales(node, graph, rank), _roi(node, graph, rank), _kept_aspect(node, graph, rank)
    value = source
    for axis in range(0 if graph.whole else 1, rank):
        ours = graph.axis(axis, rank)
        old, new = draft.shape(value)[ours - 1], shape[ours - 1]
        if (old, scales.get(axis, 1.0)) == (new, 1.0) and axis not in roi and axis not in kept:
            continue
        if (old + 1) * max(old, new) > _MOST_WEIGHTS:
            raise Refused(f"an axis of {old} resized to {new} must have at most {_MOST_WEIGHTS} weights", "resize less")
        weights = _weights_along(node, old, new, scales.get(axis), roi.get(axis), kept.get(axis))
        value = _along(draft, value, ours, weights, nearest=node.attrs.get("mode", "nearest") == "nearest")
    return draft.made(value)


def _along(draft: Draft, value: str, axis: int, weights: Array, *, nearest: bool) -> str:
    """Apply a map of one axis, (in + 1, out): the last row is what comes of zeros."""
    weight, bias = weights[:-1] - weights[-1], weights[-1]
    if nearest:
        fill = float(bias.max(initial=0.0, where=~weight.any(0))) or float(bias.min(initial=0.0))
        places = np.where(weight.any(0), weight.argmax(0), ABSENT)
        return draft.take(value, axis, places.tolist(), fill)
    turned, back = draft.to_last(value, axis)
    return draft.transpose(draft.matmul(turned, weight, bias if bias.any() else None), back)


def _axes(node: Node, rank: int) -> list[int]:
    return [int(x) % rank for x in node.attrs.get("axes", range(rank))]


def _scales(node: Node, graph: Graph, rank: int) -> dict[int, float]:
    """Return axis -> scale, empty where sizes say it."""
    index = 1 if node.op_type == "Upsample" or node.opset < 11 else 2
    if not node.input(index) or not constant_input(node, graph, index, "scales").size:
        return {}
    return dict(zip(_axes(node, rank), constant_input(node, graph, index, "scales").tolist(), strict=True))


def _kept_aspect(node: Node, graph: Graph, rank: int) -> dict[int, tuple[int, int, int]]:
    """Return axis -> (size asked for, size and size asked for of the axis whose scale is that of all)."""
    choose = {"not_larger": min, "not_smaller": max}.get(node.attrs.get("keep_aspect_ratio_policy", "stretch"))
    if choose is None or not node.input(3):
        return {}
    axes, sizes = _axes(node, rank), _ints(node, graph, 3, "sizes")
    old = [graph.shapes[node.input(0)][graph.axis(a, rank) - 1] for a in axes]
    n, new = choose(zip(old, sizes, strict=True), key=lambda pair: pair[1] / pair[0])
    return {axis: (size, n, new) for axis, size in zip(axes, sizes, strict=True)}


def _roi(node: Node, graph: Graph, rank: int) -> dict[int, tuple[float, float]]:
    """Return axis -> (start, end) of the region of interest, for those that are not the whole."""
    if node.attrs.get("coordinate_transformation_mode") != "tf_crop_and_resize":
        return {}
    axes, roi = _axes(node, rank), constant_input(node, graph, 1, "the region").tolist()
    found = {a: (roi[i], roi[i + len(axes)]) for i, a in enumerate(axes)}
    return {a: x for a, x in found.items() if x != (0.0, 1.0)}


def _weights_along(
    node: Node,
    old: int,
    new: int,
    scale: float | None,
    roi: tuple[float, float] | None,
    kept: tuple[int, int, int] | None,
) -> Array:
    """Return what onnxruntime makes of unit vectors and of zeros, (old + 1, new): how one axis is resized."""
    attrs = tuple(sorted((k, v) for k, v in node.attrs.items() if k not in ("axes", "keep_aspect_ratio_policy")))
    if kept is None:
        return _resized_units(node.op_type, node.opset, attrs, old, new, scale, roi)
    # Another axis decides the scale: it is there, too, without anything that changes along it.
    policy = (("axes", (2, 3)), ("keep_aspect_ratio_policy", node.attrs["keep_aspect_ratio_policy"]))
    return _resized_units(node.op_type, node.opset, attrs + policy, old, kept[0], None, None, kept[1:])


@functools.lru_cache(maxsize=64)
def _resized_units(
    op_type: str,
    opset: int,
    attrs: Sequence[tuple[str, Any]],
    old: int,
    new: int,
    scale: float | None,
    roi: tuple[float, float] | None,
    beside: tuple[int, int] | None = None,
) -> Array:
    values: list[tuple[str, Array]] = []
    if op_type == "Upsample" or opset < 11:
        values = [("scales", np.array([1.0, scale], np.float32))]
    else:
        region = roi or (0.0, 1.0)
        values = [("roi", np.array([0.0, region[0], 1.0, region[1]] if beside is None else [], np.float32))]
        by_size = scale is None
        values.append(("scales", np.array([] if by_size else [1.0, scale], np.float32)))
        if by_size:
            values.append(("sizes", np.array([old + 1, new] if beside is None else [new, beside[1]], np.int64)))
    node = onnx.helper.make_node(op_type, ["x", *(name for name, _ in values)], ["y"], **dict(attrs))
    units = np.concatenate([np.eye(old), np.zeros((1, old))]).astype(np.float32)
    if beside is not None:
        units = np.repeat(units[None, ..., None], beside[0], -1)
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, units.shape)
    graph = onnx.helper.make_graph(
        [node],
        "resize",
        [x],
        [onnx.ValueInfoProto(name="y")],
        [onnx.numpy_helper.from_array(value, name) for name, value in values],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=runtime.IR_VERSION
    )
    try:
        made: Array = runtime.start(runtime.runnable(model).SerializeToString()).run(None, {"x": units})[0]
    except runtime.ERRORS as error:
        raise Refused(f"onnxruntime cannot resize one axis so: {runtime.reason(error)}", "use another mode") from None
    return (made if beside is None else made[0, :, :, 0]).astype(np.float64)
