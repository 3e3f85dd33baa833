"""Rules of operators that work on each element, and of softmax."""

import math

import numpy as np

from protocols.program import Shape
from securemtk.onnx.graph import Array, Graph, Node
from securemtk.onnx.lower import custom
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
    reshaped,
    rule,
    sample_axis,
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


@rule("Pad")
def pad(node: Node, graph: Graph) -> list[Step]:
    """By nothing, as torch writes it before AveragePool in old opsets."""
    pads = constant_input(node, graph, 1, "pads") if node.opset >= 11 else np.asarray(node.attrs["pads"])
    if pads.any():
        raise Refused("padding as a layer of its own is not supported", "give it to the convolution or pool behind it")
    return [one_step(node, graph, "identity")]


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
