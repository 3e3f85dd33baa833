"""Rules of operators that work on each element."""

import math

import numpy as np

from securemtk.onnx.graph import Array, Graph, Node
from securemtk.onnx.registry import (
    LIMIT,
    Refused,
    Step,
    activation_input,
    affine,
    constant_input,
    fit,
    one_step,
    only_first_output,
    output_shape,
    rule,
)


@rule("Relu")
def relu(node: Node, graph: Graph) -> list[Step]:
    """Any shape."""
    return [one_step(node, graph, "relu")]


@rule("Sigmoid")
def sigmoid(node: Node, graph: Graph) -> list[Step]:
    """Any shape."""
    return [one_step(node, graph, "sigmoid")]


@rule("Tanh")
def tanh(node: Node, graph: Graph) -> list[Step]:
    """Any shape."""
    return [one_step(node, graph, "tanh")]


@rule("LeakyRelu")
def leaky_relu(node: Node, graph: Graph) -> list[Step]:
    """Any slope; the slope is public."""
    return [one_step(node, graph, "leaky_relu", slope=float(node.attrs.get("alpha", 0.01)))]


@rule("Clip")
def clip(node: Node, graph: Graph) -> list[Step]:
    """Bounds as attributes or as constant inputs, either may be absent (then 2**30); the bounds are public."""
    low, high = _bound(node, graph, 1, "min", -1.0), _bound(node, graph, 2, "max", 1.0)
    if low is None and high is None:
        return [one_step(node, graph, "identity")]
    if low == 0.0 and high is None:
        return [one_step(node, graph, "relu")]
    low, high = -LIMIT if low is None else low, LIMIT if high is None else high
    if low > high:
        raise Refused(f"its lower bound must not exceed its upper; got {low} and {high}", "mend the bounds")
    return [one_step(node, graph, "clip", low=low, high=high)]


def _bound(node: Node, graph: Graph, index: int, name: str, sign: float) -> float | None:
    """Return a bound of Clip, None when it is absent or beyond every number that fixed point holds."""
    value = sign * math.inf
    if node.opset < 11:
        value = float(node.attrs.get(name, value))
    elif node.input(index):
        value = float(constant_input(node, graph, index, f"its bound {name!r}").item())
    if math.isnan(value) or sign * value <= -LIMIT:
        raise Refused(f"its bound {name!r} must leave values that fixed point holds; got {value}", "mend the bound")
    return value if abs(value) < LIMIT else None


@rule("Identity", "Dropout", "Cast")
def identity(node: Node, graph: Graph) -> list[Step]:
    """Nothing happens: Dropout outside training, Cast between float32 and float64."""
    only_first_output(node, graph)
    if node.op_type == "Dropout" and node.input(2) and constant_input(node, graph, 2, "training_mode").any():
        raise Refused("Dropout in training mode draws random numbers", "export the model in evaluation mode")
    step = one_step(node, graph, "identity")
    if node.op_type == "Cast" and graph.dtypes[step.output] not in ("float32", "float64"):
        raise Refused(f"a cast to {graph.dtypes[step.output]} rounds", "keep every activation in float32")
    return [step]


@rule("Add", "Sub", "Mul")
def arithmetic(node: Node, graph: Graph) -> list[Step]:
    """With a constant that broadcasts to the activation, or of two activations of one rank that broadcast."""
    op = node.op_type.lower()
    if all(x in graph.activations for x in node.inputs):
        _same_rank(node, graph)
        return [one_step(node, graph, op, (activation_input(node, graph, 0), activation_input(node, graph, 1)))]
    source, other = _activation_and_constant(node, graph)
    if op == "mul":
        scale, shift = other, None
    elif op == "add":
        scale, shift = None, other
    else:
        scale, shift = (None, -other) if node.inputs[0] == source else (-np.ones(()), other)
    return [affine(node.name, source, node.outputs[0], output_shape(node, graph), scale=scale, shift=shift)]


@rule("Div")
def div(node: Node, graph: Graph) -> list[Step]:
    """By a constant that broadcasts to the activation and has no zero."""
    divisor = fit(node, graph, constant_input(node, graph, 1, "the divisor"), activation_input(node, graph))
    if not divisor.all():
        raise Refused("the divisor must not hold a zero", "mend the constant")
    source, shape = activation_input(node, graph), output_shape(node, graph)
    return [affine(node.name, source, node.outputs[0], shape, scale=1.0 / divisor)]


def _same_rank(node: Node, graph: Graph) -> None:
    shapes = [graph.shapes[x] for x in node.inputs]
    if len({len(s) for s in shapes}) > 1:
        # With another rank the batch of one would meet an axis of the other.
        raise Refused(f"two activations must have the same rank; got samples {shapes}", "reshape one of them")


def _activation_and_constant(node: Node, graph: Graph) -> tuple[str, Array]:
    index = 0 if node.inputs[0] in graph.activations else 1
    source = activation_input(node, graph, index)
    return source, fit(node, graph, constant_input(node, graph, 1 - index, "the other operand"), source)
