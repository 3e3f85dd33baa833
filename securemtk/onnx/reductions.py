"""Rules of reductions: sums, means, norms, products and extremes over axes, and places of extremes."""

from securemtk.onnx.graph import Graph, Node
from securemtk.onnx.registry import (
    Step,
    activation_input,
    constant_input,
    one_step,
    rule,
    sample_axis,
)


@rule("ReduceMean")
def reduce_mean(node: Node, graph: Graph) -> list[Step]:
    """Axes as attribute or as constant input, without the batch; keepdims."""
    rank = graph.rank(activation_input(node, graph))
    axes = tuple(int(x) for x in node.attrs.get("axes", ()))
    if node.opset >= 18 and node.input(1):
        axes = tuple(int(x) for x in constant_input(node, graph, 1, "axes").ravel())
    if not axes and node.attrs.get("noop_with_empty_axes", 0):
        return [one_step(node, graph, "identity")]
    axes = tuple(sorted({sample_axis(graph, x, rank, "a mean") for x in axes or range(rank)}))
    return [one_step(node, graph, "mean", axes=axes, keepdims=int(node.attrs.get("keepdims", 1)))]
