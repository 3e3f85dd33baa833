"""What rules are made of: the registry, a step, a refusal, and the few questions that every rule asks.

A rule turns one ONNX node into layers of a `Program`, or says why not. Its docstring is its row in docs/onnx.md. It may
rely on this: onnxruntime has accepted the node, its attributes are valid, and every activation among its inputs has a
floating type and the batch as its first axis.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from protocols.limits import FRAC_BITS, LIMIT_BITS
from protocols.program.program import Attribute, Shape
from securemtk.onnx.model.graph import Array, Graph, Node

# A bias enters behind a product, at twice the fraction bits: what it can hold, every parameter may hold. An absent
# bound of a clip is written as a bound of this size, because JSON has no infinity.
LIMIT = 2.0 ** (LIMIT_BITS - 2 * FRAC_BITS)


class Refused(Exception):
    """A rule cannot translate a node."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class Step:
    """A layer in the making: as `protocols.program.program.Layer`, with float64 parameter values in place of names.

    `op` may also be "identity": the output is another name of the input. `exact` is the function of one variable that a
    piecewise one approximates; None where it is what it says. A scale, shift or bias that is left out is
    neutral (ones or zeros) by the model's structure, which passes may use, because structure is public.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    output: str
    shape: Shape
    params: Mapping[str, Array] = field(default_factory=dict)
    attrs: Mapping[str, Attribute] = field(default_factory=dict)
    exact: Callable[[Array], Array] | None = field(default=None, repr=False, compare=False)

    def ints(self, name: str) -> tuple[int, ...]:
        """Return an attribute that is a tuple of integers."""
        value = self.attrs[name]
        return value if isinstance(value, tuple) else (int(value),)

    def number(self, name: str) -> float:
        """Return an attribute that is a number."""
        value = self.attrs[name]
        return 0.0 if isinstance(value, tuple) else float(value)


def param(step: Step, role: str) -> Array:
    """Return a parameter of a step, in its neutral form when it is left out."""
    if role in step.params:
        return step.params[role]
    if role == "bias":
        return np.zeros(step.params["weight"].shape[0 if step.op == "conv2d" else 1])
    form = (1,) * (len(step.shape) + 1)
    return np.ones(form) if role == "scale" else np.zeros(form)


Rule = Callable[[Node, Graph], list[Step]]
RULES: dict[str, Rule] = {}


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ONNX operators of the default domain."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


def activation_input(node: Node, graph: Graph, index: int = 0) -> str:
    """Return the name of an input that depends on the model's input; refuse a constant."""
    name = node.input(index)
    if name not in graph.shapes:
        raise Refused(f"input {index} must be computed from the model's input; it is constant", "swap its inputs")
    return name


def constant_input(node: Node, graph: Graph, index: int, what: str) -> Array:
    """Return a constant input in float64 where it is floating."""
    name = node.input(index)
    if name in graph.activations:
        raise Refused(f"{what} must be constant; it is computed from the input", "put a constant in its place")
    if name not in graph.constants:
        raise Refused(f"{what} must not depend on the batch size", "export again with constants in its place")
    value = graph.constants[name]
    if value.dtype.kind not in "biuf":
        raise Refused(f"{what} must hold numbers; got an array of {value.dtype}", "put numbers in its place")
    return value.astype(np.float64) if value.dtype.kind == "f" else value


def only_first_output(node: Node, graph: Graph) -> None:
    """Refuse a node whose further outputs are used."""
    if any(x in graph.used for x in node.outputs[1:]):
        raise Refused("only its first output is supported", "do not use the others")


def output_shape(node: Node, graph: Graph) -> Shape:
    """Return the shape of one sample of the first output; refuse when that has no batch of samples."""
    name = node.outputs[0]
    if name not in graph.shapes and (graph.whole or name not in graph.seen):
        raise Refused("its result cannot be found out", "use operators of the ONNX standard")
    if name not in graph.shapes:
        reason = f"the batch must stay the first axis; with 2 samples the result has shape {graph.seen[name]}"
        raise Refused(reason, "keep the batch as the first axis of every activation")
    return graph.shapes[name]


def one_step(node: Node, graph: Graph, op: str, inputs: tuple[str, ...] = (), **attrs: Attribute) -> Step:
    """Return the one step of a node that works on its first input and makes its first output."""
    return Step(
        op,
        node.name,
        inputs or (activation_input(node, graph),),
        node.outputs[0],
        output_shape(node, graph),
        attrs=attrs,
    )


def reshaped(name: str, source: str, output: str, shape: Shape) -> Step:
    """Return a step that gives each sample a new shape."""
    return Step("reshape", name, (source,), output, shape, attrs={"shape": shape})


def affine(
    name: str, source: str, output: str, shape: Shape, *, scale: Array | None = None, shift: Array | None = None
) -> Step:
    """Return x * scale + shift; both have the activation's rank, or are scalars, or are left out."""
    params = {
        k: v.reshape((1,) * (len(shape) + 1)) if v.ndim == 0 else v
        for k, v in (("scale", scale), ("shift", shift))
        if v is not None
    }
    return Step("affine", name, (source,), output, shape, params)


def sample_axis(graph: Graph, axis: int, rank: int, what: str) -> int:
    """Return our axis for one of a value with `rank` axes in the model; refuse the batch."""
    found = graph.axis(axis, rank)
    if found == 0:
        raise Refused(f"{what} must not run over the batch", "choose another axis")
    return found


def fit(node: Node, graph: Graph, constant: Array, source: str) -> Array:
    """Give a constant the activation's rank, batch axis 1; refuse when it would widen the activation."""
    shape = (1, *graph.shapes[source])
    if constant.ndim > len(shape):
        raise Refused(f"a constant of shape {constant.shape} must not add axes to samples {shape[1:]}", "reshape it")
    if constant.ndim == 0:
        return constant
    padded = constant.reshape((1,) * (len(shape) - constant.ndim) + constant.shape)
    if padded.shape[0] > 1 and (padded == padded[:1]).all():
        padded = padded[:1]
    if any(have not in (1, want) for have, want in zip(padded.shape, shape, strict=True)):
        reason = f"a constant of shape {constant.shape} must not widen samples of shape {shape[1:]}"
        raise Refused(reason, "the constant must be the same for all samples and broadcast to the activation")
    return padded
