"""Rules of softmax and of normalisations."""

import math

import numpy as np

from protocols.program import Shape
from securemtk.onnx.graph import Graph, Node
from securemtk.onnx.lower import custom
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
    sample_axis,
)


@rule("Softmax", "LogSoftmax")
def softmax(node: Node, graph: Graph) -> list[Step]:
    """Any axis but the batch; before opset 13 over all axes from `axis` on, as the standard says."""
    source, output, shape = activation_input(node, graph), node.outputs[0], output_shape(node, graph)
    rank = graph.rank(output)
    axis = sample_axis(graph, int(node.attrs.get("axis", -1 if node.opset >= 13 else 1)), rank, node.op_type)
    log = node.op_type == "LogSoftmax"
    if node.opset >= 13 or axis == len(shape):
        return softmax_steps(node.name, source, output, shape, axis, log=log)
    flat = (*shape[: axis - 1], math.prod(shape[axis - 1 :]))
    return [
        reshaped(f"{node.name}/flatten", source, f"{output}/flat", flat),
        *softmax_steps(node.name, f"{output}/flat", f"{output}/soft", flat, axis, log=log),
        reshaped(f"{node.name}/restore", f"{output}/soft", output, shape),
    ]


def softmax_steps(name: str, source: str, output: str, shape: Shape, axis: int, *, log: bool = False) -> list[Step]:
    """Return steps for the softmax, or its logarithm, of x: with d = x - max(x), e**d / sum e**d or d - log(sum e**d).

    Args:
        name, source, output: of the node and its values.
        shape: of one sample.
        axis: ours, the batch at 0.
        log: whether the logarithm is wanted.
    """
    n = shape[axis - 1]
    row = (*shape[: axis - 1], 1, *shape[axis:])
    largest, less, powers, total, last = (f"{output}/{x}" for x in ("max", "less", "exp", "sum", "of_sum"))
    steps = [
        Step("max", f"{name}/max", (source,), largest, row, attrs={"axis": axis}),
        Step("sub", f"{name}/less", (source, largest), less, shape),
        Step("function", f"{name}/exp", (less,), powers, shape, attrs=custom("exp_of_differences", n)),
        Step("sum", f"{name}/sum", (powers,), total, row, attrs={"axes": (axis,), "keepdims": 1}),
    ]
    of_sum = custom("log_of_sum" if log else "reciprocal_of_sum", n)
    steps.append(Step("function", f"{name}/of_sum", (total,), last, row, attrs=of_sum))
    both = (less, last) if log else (powers, last)
    return [*steps, Step("sub" if log else "mul", name, both, output, shape)]


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
