"""Rules of softmax and of normalisations."""

import math

import numpy as np

from securemtk.onnx.draft import ABSENT, Draft
from securemtk.onnx.graph import Graph, Node
from securemtk.onnx.reductions import Axes, sum_square
from securemtk.onnx.registry import (
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
    """Outside training, with constant statistics; folded into the layer before it where that is linear."""
    only_first_output(node, graph)
    if node.attrs.get("training_mode", 0):
        raise Refused("batch statistics mix the samples of a batch", "export the model in evaluation mode")
    source, output, shape = activation_input(node, graph), node.outputs[0], output_shape(node, graph)
    gamma, beta, mean, variance = (constant_input(node, graph, i, "a statistic") for i in range(1, 5))
    scale = gamma / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
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


# --- statistics of the sample itself --------------------------------------------------------------------------------

# Differences from a mean are squared this many times smaller, so that squares fit: up to 2048, in place of 128.
_SMALLER = 16
# A variance is looked up this many times larger: so many more of its fraction bits count, and 2**12 is the largest.
_FINER = 8


def _normal(draft: Draft, x: str, axes: Axes, epsilon: float, *, centred: bool = True) -> str:
    """Add (x - mean) / sqrt(variance + epsilon) over axes; not centred, x / sqrt(mean square + epsilon)."""
    away = draft.binary("sub", x, draft.reduce("mean", x, axes)) if centred else x
    small = draft.scale(away, 1 / _SMALLER)
    variance = draft.reduce("mean", draft.binary("mul", small, small), axes)
    return draft.binary("mul", away, inverse_root(draft, variance, epsilon, _SMALLER**2))


def inverse_root(draft: Draft, x: str, epsilon: float, times: int = 1) -> str:
    """Add 1 / sqrt(times x + epsilon) for 0 <= times x <= 2**12."""
    if epsilon < 0:
        raise Refused(f"epsilon must not be negative; got {epsilon}", "mend the attribute")
    return draft.function(draft.scale(x, times * _FINER), "rsqrt", epsilon, _FINER)


def _scaled(node: Node, graph: Graph, draft: Draft, x: str, axis: int) -> str:
    """Multiply by the constant scale, input 1, one number for each place of an axis, and add the shift behind it."""
    form = [1] * (len(draft.shape(x)) + 1)
    form[axis] = -1
    scale, shift = (constant_input(node, graph, i, "scale and shift").reshape(form) for i in (1, 2))
    return draft.affine(x, scale=scale, shift=shift)


def _spatial(graph: Graph, rank: int) -> Axes:
    return tuple(graph.axis(i, rank) for i in range(2, rank))


@rule("InstanceNormalization")
def instance_normalization(node: Node, graph: Graph) -> list[Step]:
    """Constant scale and shift; variances up to 2**12, differences from the mean up to 2**11."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    rank = graph.rank(source)
    normal = _normal(draft, source, _spatial(graph, rank), float(node.attrs.get("epsilon", 1e-5)))
    return draft.made(_scaled(node, graph, draft, normal, graph.axis(1, rank)))


@rule("GroupNormalization")
def group_normalization(node: Node, graph: Graph) -> list[Step]:
    """Constant scale and shift, of groups (opset 18) or of channels (21); variances up to 2**12, \
differences from the mean up to 2**11."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    shape, axis = graph.shapes[source], graph.axis(1, graph.rank(source))
    lead, channels, size = shape[: axis - 1], shape[axis - 1], shape[axis:]
    groups = int(node.attrs["num_groups"])
    apart = draft.reshape(source, (*lead, groups, channels // groups, *size))
    normal = _normal(draft, apart, tuple(range(axis + 1, axis + 2 + len(size))), float(node.attrs.get("epsilon", 1e-5)))
    if node.opset < 21:
        return draft.made(draft.reshape(_scaled(node, graph, draft, normal, axis), shape))
    return draft.made(_scaled(node, graph, draft, draft.reshape(normal, shape), axis))


@rule("LayerNormalization", "RMSNormalization")
def layer_normalization(node: Node, graph: Graph) -> list[Step]:
    """Any axis but the batch on; constant scale and shift; no mean or deviation as outputs; \
variances up to 2**12, differences from the mean up to 2**11."""
    only_first_output(node, graph)
    source, draft = activation_input(node, graph), Draft(node, graph)
    rank = graph.rank(source)
    axis = sample_axis(graph, int(node.attrs.get("axis", -1)), rank, node.op_type)
    centred, epsilon = node.op_type == "LayerNormalization", float(node.attrs.get("epsilon", 1e-5))
    shape = graph.shapes[source]
    normal = _normal(draft, source, tuple(range(axis, len(shape) + 1)), epsilon, centred=centred)
    scale = fit(node, graph, constant_input(node, graph, 1, "the scale"), source)
    shift = fit(node, graph, constant_input(node, graph, 2, "the shift"), source) if node.input(2) else None
    return draft.made(draft.affine(normal, scale=scale, shift=shift))


@rule("MeanVarianceNormalization")
def mean_variance_normalization(node: Node, graph: Graph) -> list[Step]:
    """Any axes but the batch; variances from 2**-13 to 2**12."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    axes = node.attrs.get("axes", (0, 2, 3))
    ours = tuple(sorted({sample_axis(graph, int(x), graph.rank(source), "a mean") for x in axes}))
    return draft.made(_normal(draft, source, ours, 0.0))


@rule("LpNormalization")
def lp_normalization(node: Node, graph: Graph) -> list[Step]:
    """p 1 or 2, any axis but the batch; sums of squares from 2**-13 to 2**12, of magnitudes from 2**-4 to 2**11."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    axis = (sample_axis(graph, int(node.attrs.get("axis", -1)), graph.rank(source), "a norm"),)
    if int(node.attrs.get("p", 2)) == 1:
        total = draft.reduce("sum", draft.magnitude(source), axis)
        return draft.made(draft.binary("mul", source, draft.function(total, "reciprocal_positive")))
    return draft.made(draft.binary("mul", source, inverse_root(draft, sum_square(draft, source, axis), 0.0)))


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
