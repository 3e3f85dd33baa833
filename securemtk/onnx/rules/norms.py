"""Rules of softmax and of normalisations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protocols.program.program import Shape
from securemtk.onnx.building.builder import ABSENT, Draft, Operand
from securemtk.onnx.building.registry import (
    Refused,
    Step,
    activation_input,
    affine,
    constant_input,
    fit,
    only_first_output,
    output_shape,
    reshaped,
    rule,
    sample_axis,
)
from securemtk.onnx.model.graph import Graph, Node
from securemtk.onnx.rules.reductions import Axes, small_squares


@rule("Softmax", "LogSoftmax")
def softmax(node: Node, graph: Graph) -> list[Step]:
    """Any axis but the batch; before opset 13 over all axes from `axis` on, as the standard says."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    shape, rank = output_shape(node, graph), graph.rank(source)
    axis = sample_axis(graph, int(node.attrs.get("axis", -1 if node.opset >= 13 else 1)), rank, node.op_type)
    flat = shape if node.opset >= 13 else (*shape[: axis - 1], math.prod(shape[axis - 1 :]))
    value = draft.reshape(source, flat)
    # With d = x - max(x): e**d / sum e**d, or d - log(sum e**d).
    n = flat[axis - 1]
    less = draft.binary("sub", value, draft.largest(value, (axis,)))
    powers = draft.function(less, "exp_of_differences", n)
    total = draft.reduce("sum", powers, (axis,))
    if node.op_type == "LogSoftmax":
        made = draft.binary("sub", less, draft.function(total, "log_of_sum", n))
    else:
        made = draft.binary("mul", powers, draft.function(total, "reciprocal_of_sum", n))
    return draft.made(draft.reshape(made, shape))


@rule("BatchNormalization")
def batch_normalization(node: Node, graph: Graph) -> list[Step]:
    """Folded into the layer before it where that is linear; statistics constant or, of a model understood as a \
whole, activations (variances below 2**15), as is the training mode."""
    draft = Draft(node, graph)
    weights = [draft.weight(i, "a statistic") for i in range(1, 5)]
    if _trains(node, graph):
        return _trained(node, graph, draft, weights)
    only_first_output(node, graph)
    if any(isinstance(x, str) for x in weights):
        return _by_statistics(node, graph, draft, weights)
    source, output, shape = activation_input(node, graph), node.outputs[0], output_shape(node, graph)
    gamma, beta, mean, variance = (constant_input(node, graph, i, "a statistic") for i in range(1, 5))
    scale = gamma / np.sqrt(variance + _epsilon(node))
    shift = beta - mean * scale
    if graph.rank(source) != 3 or graph.whole:
        form = (1,) * (1 + graph.whole) + (-1,) + (1,) * (graph.rank(source) - 2)
        return [affine(node.name, source, output, shape, scale=scale.reshape(form), shift=shift.reshape(form))]
    # As an image of height 1, so that it meets the lifted 1-D convolution before it.
    lifted, form = (shape[0], 1, shape[1]), (1, -1, 1, 1)
    return [
        reshaped(f"{node.name}/lift", source, f"{output}/lifted", lifted),
        affine(
            node.name,
            f"{output}/lifted",
            f"{output}/normal",
            lifted,
            scale=scale.reshape(form),
            shift=shift.reshape(form),
        ),
        reshaped(f"{node.name}/drop", f"{output}/normal", output, shape),
    ]


def _epsilon(node: Node) -> float:
    return float(node.attrs.get("epsilon", 1e-5))


def _trains(node: Node, graph: Graph) -> bool:
    """Return whether the batch's own statistics count; refuse that where the batch is no axis."""
    # Before opset 14 the outputs say it.
    trains = bool(node.attrs.get("training_mode", 0)) or (
        node.opset < 14 and any(x in graph.used for x in node.outputs[1:])
    )
    if trains and not graph.whole:
        raise Refused("batch statistics mix the samples of a batch", "export the model in evaluation mode")
    return trains


def _by_statistics(node: Node, graph: Graph, draft: Draft, weights: Sequence[Operand]) -> list[Step]:
    """(x - mean) * (scale / sqrt(variance + epsilon)) + shift, some of them activations."""
    source = activation_input(node, graph)
    form = _of_channels(draft.shape(source))
    scale, shift, mean, variance = (draft.shaped(x, form) for x in weights)
    away = draft.binary("sub", source, mean) if isinstance(mean, str) else draft.linear(source, None, -mean)
    factor: Operand
    if isinstance(variance, str):
        factor = draft.linear(inverse_root(draft, variance, _epsilon(node)), scale, None)
    else:
        root = 1 / np.sqrt(variance + _epsilon(node))
        factor = draft.linear(scale, root, None) if isinstance(scale, str) else scale * root
    return draft.made(draft.linear(away, factor, shift))


def _trained(node: Node, graph: Graph, draft: Draft, weights: Sequence[Operand]) -> list[Step]:
    """By statistics of the batch, and what becomes of the running ones."""
    if node.opset < 14 and any(x in graph.used for x in node.outputs[3:]):
        raise Refused("of its outputs the first three are supported", "do not use the others")
    source = activation_input(node, graph)
    form = _of_channels(draft.shape(source))
    scale, shift, *running = (draft.shaped(x, form) for x in weights)
    axes = tuple(i for i, n in enumerate(form, 1) if i != 2)
    normal = _normal(draft, source, axes, _epsilon(node))
    momentum, values = float(node.attrs.get("momentum", 0.9)), [draft.linear(normal.value, scale, shift)]
    mean = draft.reduce("mean", source, axes) if any(x in graph.used for x in node.outputs[1:2]) else ""
    found = ((mean, 1.0), (normal.small_variance, normal.to_variance))
    for name, old, (new, times) in zip(node.outputs[1:3], running, found, strict=False):
        part = draft.scale(new, (1 - momentum) * times) if name in graph.used else ""
        if part and isinstance(old, str):
            part = draft.binary("add", part, draft.scale(old, momentum))
        elif part:
            part = draft.affine(part, shift=momentum * np.asarray(old))
        values.append(draft.reshape(part, (form[1],)) if part else "")
    return draft.made(*values)


def _of_channels(shape: Shape) -> Shape:
    """Return the shape in which one number for each channel broadcasts to (N, C, ...)."""
    return (1, shape[1], *[1] * len(shape[2:]))


# --- statistics of the sample itself --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Normal:
    """(x - mean) / sqrt(variance + epsilon); what the mean, the variance and 1 / the root are made of."""

    value: str
    small_variance: str
    to_variance: float
    small_root: str
    to_root: float


def _normal(draft: Draft, x: str, axes: Axes, epsilon: float, *, centred: bool = True) -> _Normal:
    """Add (x - mean) / sqrt(variance + epsilon) over axes; not centred, x / sqrt(mean square + epsilon).

    With u = c (x - mean), exact and c public, its squares divided by S**2 and their sum w, the result is
    u sqrt(n) / S / sqrt(w + epsilon n (c / S)**2): what is looked up has no constant that could err.
    """
    if epsilon < 0:
        raise Refused(f"epsilon must not be negative; got {epsilon}", "mend the attribute")
    n = math.prod(draft.shape(x)[a - 1] for a in axes)
    c = n / 2.0 ** (n.bit_length() - 1) if centred else 1.0
    away = draft.deviation(x, axes) if centred else x
    squares, smaller = small_squares(draft, away, axes)
    offset = epsilon * n * (c / smaller) ** 2
    root = inverse_root(draft, squares, offset, math.sqrt(n) / smaller)
    return _Normal(draft.binary("mul", away, root), squares, (smaller / c) ** 2 / n, root, c)


def inverse_root(draft: Draft, x: str, epsilon: float, times: float = 1.0) -> str:
    """Add times / sqrt(x + epsilon) for x + epsilon from 2**-28 up to 2**15."""
    if epsilon < 0:
        raise Refused(f"epsilon must not be negative; got {epsilon}", "mend the attribute")
    shifted = draft.scale(x, 1.0, epsilon) if epsilon else x
    return draft.function(shifted, "inverse_root", times)


def _scaled(draft: Draft, x: str, axis: int) -> str:
    """Multiply by the scale, input 1, one number for each place of an axis, and add the shift behind it."""
    form = [1] * len(draft.shape(x))
    form[axis - 1] = draft.shape(x)[axis - 1]
    scale, shift = (draft.shaped(draft.weight(i, "scale and shift"), form) for i in (1, 2))
    return draft.linear(x, scale, shift)


def _spatial(graph: Graph, rank: int) -> Axes:
    return tuple(graph.axis(i, rank) for i in range(2, rank))


@rule("InstanceNormalization")
def instance_normalization(node: Node, graph: Graph) -> list[Step]:
    """Scale and shift constant or, of a model understood as a whole, activations; any offset, deviations of \
2**11 in the mean (2**13 for up to 1024 values), within 0.0005 of the value."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    rank = graph.rank(source)
    normal = _normal(draft, source, _spatial(graph, rank), _epsilon(node))
    return draft.made(_scaled(draft, normal.value, graph.axis(1, rank)))


@rule("GroupNormalization")
def group_normalization(node: Node, graph: Graph) -> list[Step]:
    """As InstanceNormalization; scale and shift of groups (opset 18) or of channels (21)."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    shape, axis = graph.shapes[source], graph.axis(1, graph.rank(source))
    lead, channels, size = shape[: axis - 1], shape[axis - 1], shape[axis:]
    groups = int(node.attrs["num_groups"])
    apart = draft.reshape(source, (*lead, groups, channels // groups, *size))
    normal = _normal(draft, apart, tuple(range(axis + 1, axis + 2 + len(size))), _epsilon(node)).value
    if node.opset < 21:
        return draft.made(draft.reshape(_scaled(draft, normal, axis), shape))
    return draft.made(_scaled(draft, draft.reshape(normal, shape), axis))


@rule("LayerNormalization", "RMSNormalization")
def layer_normalization(node: Node, graph: Graph) -> list[Step]:
    """Any axis but the batch on, all outputs; scale and shift, variances and differences as of \
InstanceNormalization."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    rank = graph.rank(source)
    axis = sample_axis(graph, int(node.attrs.get("axis", -1)), rank, node.op_type)
    shape = graph.shapes[source]
    axes = tuple(range(axis, len(shape) + 1))
    normal = _normal(draft, source, axes, _epsilon(node), centred=node.op_type == "LayerNormalization")
    scale, shift = _of_elements(node, graph, draft, 1), _of_elements(node, graph, draft, 2)
    mean = draft.reduce("mean", source, axes) if node.outputs[1:2] and node.outputs[1] in graph.used else ""
    root = draft.scale(normal.small_root, normal.to_root) if node.outputs[2:] and node.outputs[2] in graph.used else ""
    return draft.made(draft.linear(normal.value, scale, shift), mean, root)


def _of_elements(node: Node, graph: Graph, draft: Draft, index: int) -> Operand | None:
    """Return scale or shift, which broadcasts to the activation; None when it is absent."""
    if not node.input(index):
        return None
    value, source = draft.weight(index, "scale and shift"), node.input(0)
    if not isinstance(value, str):
        return fit(node, graph, value, source)
    return draft.reshape(value, (*[1] * (graph.rank(source) - graph.rank(value)), *draft.shape(value)))


@rule("MeanVarianceNormalization")
def mean_variance_normalization(node: Node, graph: Graph) -> list[Step]:
    """Any axes but the batch; deviations as of InstanceNormalization."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    axes = node.attrs.get("axes", (0, 2, 3))
    ours = tuple(sorted({sample_axis(graph, int(x), graph.rank(source), "a mean") for x in axes}))
    return draft.made(_normal(draft, source, ours, 0.0).value)


@rule("LpNormalization")
def lp_normalization(node: Node, graph: Graph) -> list[Step]:
    """p 1 or 2, any axis but the batch; values as of `ReduceL2`, sums of magnitudes up to 30,720."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    axis = (sample_axis(graph, int(node.attrs.get("axis", -1)), graph.rank(source), "a norm"),)
    if int(node.attrs.get("p", 2)) == 1:
        total = draft.reduce("sum", draft.magnitude(source), axis)
        return draft.made(draft.binary("mul", source, draft.function(total, "reciprocal_positive")))
    squares, smaller = small_squares(draft, source, axis)
    return draft.made(draft.binary("mul", source, inverse_root(draft, squares, 0.0, 1 / smaller)))


@rule("LRN")
def local_response_normalization(node: Node, graph: Graph) -> list[Step]:
    """All attributes, bias above 0; sums of squares up to 2**14."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    axis, size = graph.axis(1, graph.rank(source)), int(node.attrs["size"])
    alpha, beta, bias = (float(node.attrs.get(k, v)) for k, v in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    if bias <= 0:
        raise Refused(f"its bias must be above 0; got {bias}", "mend the bias")
    n, square = graph.shapes[source][axis - 1], draft.binary("mul", source, source)
    places = np.arange(n)
    total = square
    for by in range(-((size - 1) // 2), size - (size - 1) // 2):
        if by:
            at = places + by
            near = draft.take(square, axis, np.where((at < 0) | (at >= n), ABSENT, at).tolist())
            total = draft.binary("add", total, near)
    return draft.made(draft.binary("mul", source, draft.function(total, "power_of_sum", alpha / size, bias, -beta)))
