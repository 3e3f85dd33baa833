"""Rules of products with a constant matrix."""

import math

import numpy as np

from protocols.program import Shape
from securemtk.onnx.graph import Array, Graph, Node
from securemtk.onnx.registry import (
    Refused,
    Step,
    activation_input,
    affine,
    constant_input,
    fit,
    output_shape,
    reshaped,
    rule,
    transposed,
)


@rule("Gemm")
def gemm(node: Node, graph: Graph) -> list[Step]:
    """All attributes; the second matrix constant, the third constant, an activation or absent."""
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    source, output, shape = activation_input(node, graph), node.outputs[0], output_shape(node, graph)
    if node.attrs.get("transA", 0) and not graph.whole:
        raise Refused("with transA the batch would be summed over", "transpose the constant, not the activation")
    before: list[Step] = []
    if node.attrs.get("transA", 0):
        turned = graph.shapes[source][::-1]
        before = [transposed(f"{node.name}/turn", source, f"{output}/turned", turned, (0, 2, 1))]
        source = f"{output}/turned"
    weight = alpha * constant_input(node, graph, 1, "the second matrix")
    weight = weight.T if node.attrs.get("transB", 0) else weight
    third = node.input(2)
    if third in graph.activations:
        product, addend = f"{output}/product", third
        steps = [*before, _matmul(node.name, source, product, shape, weight)]
        if graph.rank(third) != 2:
            raise Refused("the third matrix must have one row for each sample", "reshape it")
        if beta != 1.0:
            addend = f"{output}/addend"
            steps.append(affine(f"{node.name}/beta", third, addend, graph.shapes[third], scale=np.asarray(beta)))
        return [*steps, Step("add", f"{node.name}/add", (product, addend), output, shape)]
    if not third:
        return [*before, _matmul(node.name, source, output, shape, weight)]
    bias = fit(node, graph, constant_input(node, graph, 2, "the third matrix"), output)
    if math.prod(bias.shape[:-1]) == 1:
        row = beta * np.broadcast_to(bias.reshape(-1), shape[-1:])
        return [*before, _matmul(node.name, source, output, shape, weight, row)]
    product = f"{output}/product"
    return [
        *before,
        _matmul(node.name, source, product, shape, weight),
        affine(f"{node.name}/bias", product, output, shape, shift=beta * bias),
    ]


def _matmul(name: str, source: str, output: str, shape: Shape, weight: Array, bias: Array | None = None) -> Step:
    params = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return Step("matmul", name, (source,), output, shape, params)


@rule("MatMul")
def matmul(node: Node, graph: Graph) -> list[Step]:
    """An activation by a constant matrix or vector; a constant matrix by activations of rank 3 or more."""
    if all(x in graph.activations for x in node.inputs):
        raise Refused("a product of two activations is not supported", "one of the two must be constant")
    if node.inputs[0] in graph.activations:
        return _matmul_right(node, graph)
    return _matmul_left(node, graph)


def _matrix(constant: Array) -> Array:
    """Drop leading axes of 1 from a constant factor; refuse a batch of matrices."""
    if constant.ndim > 2 and math.prod(constant.shape[:-2]) != 1:
        raise Refused(f"the constant must be one matrix; got shape {constant.shape}", "apply the matrices one by one")
    return constant.reshape(constant.shape[-2:])


def _matmul_right(node: Node, graph: Graph) -> list[Step]:
    source, output, shape = activation_input(node, graph), node.outputs[0], output_shape(node, graph)
    constant = constant_input(node, graph, 1, "the second factor")
    if constant.ndim == 1:
        wide = f"{output}/column"
        step = _matmul(node.name, source, wide, (*shape, 1), constant[:, None])
        return [step, reshaped(f"{node.name}/drop", wide, output, shape)]
    weight = _matrix(constant)
    if len(shape) != len(graph.shapes[source]):
        raise Refused(f"a constant of shape {constant.shape} must not add axes to the activation", "reshape it")
    return [_matmul(node.name, source, output, shape, weight)]


def _matmul_left(node: Node, graph: Graph) -> list[Step]:
    source, output, shape = activation_input(node, graph, 1), node.outputs[0], output_shape(node, graph)
    constant = constant_input(node, graph, 0, "the first factor")
    inner = graph.shapes[source]
    if len(inner) < 2 or len(shape) != len(inner) - (constant.ndim == 1):
        raise Refused("a constant first factor must act on the axes of one sample", "put the activation first")
    weight = _matrix(np.atleast_2d(constant))
    rank = len(inner) + 1
    perm = (*range(rank - 2), rank - 1, rank - 2)
    # W x = (x' W')' on the last two axes.
    turned = (*inner[:-2], inner[-1], inner[-2])
    product = (*turned[:-1], weight.shape[0])
    steps = [
        Step("transpose", f"{node.name}/turn", (source,), f"{output}/turned", turned, attrs={"perm": perm}),
        _matmul(node.name, f"{output}/turned", f"{output}/product", product, weight.T),
    ]
    if constant.ndim == 1:
        return [*steps, reshaped(f"{node.name}/drop", f"{output}/product", output, shape)]
    back = Step("transpose", f"{node.name}/back", (f"{output}/product",), output, shape, attrs={"perm": perm})
    return [*steps, back]
