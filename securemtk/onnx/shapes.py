"""Rules of operators that move, choose and join values: nothing is sent for them."""

import numpy as np

from securemtk.onnx.graph import Graph, Node
from securemtk.onnx.registry import (
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
    """Activations only, along any axis but the batch."""
    output_shape(node, graph)
    axis = sample_axis(graph, int(node.attrs["axis"]), graph.rank(node.outputs[0]), "a concatenation")
    if not all(x in graph.activations for x in node.inputs):
        raise Refused("a constant must not be joined to activations", "add it behind the model, or as an input")
    return [one_step(node, graph, "concat", tuple(node.inputs), axis=axis)]


@rule("Pad")
def pad(node: Node, graph: Graph) -> list[Step]:
    """By nothing, as torch writes it before AveragePool in old opsets."""
    pads = constant_input(node, graph, 1, "pads") if node.opset >= 11 else np.asarray(node.attrs["pads"])
    if pads.any():
        raise Refused("padding as a layer of its own is not supported", "give it to the convolution or pool behind it")
    return [one_step(node, graph, "identity")]
