"""Rules of functions of each element."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from protocols.limits import FRAC_BITS, WIDEST
from protocols.program.program import Attribute
from securemtk.onnx.building.builder import Draft
from securemtk.onnx.building.lookups import only_looked_up
from securemtk.onnx.building.lower import custom, straight
from securemtk.onnx.building.operands import Formula, decidable, is_integral
from securemtk.onnx.building.registry import LIMIT, Refused, Step, activation_input, constant_input, one_step, rule
from securemtk.onnx.model.graph import Graph, Node

_UNIT = 2.0**-FRAC_BITS


def _plain(op_type: str, op: str, what: str, **attrs: Attribute) -> None:
    """Register an operator that is one step, the same for every node."""

    def function(node: Node, graph: Graph) -> list[Step]:
        return [replace(one_step(node, graph, op), attrs=attrs)]

    function.__doc__ = what
    rule(op_type)(function)


def _function(node: Node, graph: Graph, attrs: Mapping[str, Attribute]) -> Step:
    return replace(one_step(node, graph, "function"), attrs=attrs)


_EVERYWHERE = "Any shape; within 0.0001 everywhere."
_plain("Identity", "identity", "Nothing happens.")
_plain("Relu", "relu", "Any shape.")
_plain("Neg", "scale", "Any shape.", factor=-1, offset=0)
_plain("Abs", "function", "Any shape; exact.", **straight((0.0,), (0.0, -1.0), (0.0, 1.0)))
_plain("Sign", "function", "Any shape; exact.", **straight((0.0, _UNIT), (-1.0, 0.0), (0.0, 0.0), (1.0, 0.0)))
_plain("Sigmoid", "sigmoid", _EVERYWHERE)
_plain("Tanh", "tanh", _EVERYWHERE)
_plain("Erf", "erf", _EVERYWHERE)
_plain("Softplus", "softplus", _EVERYWHERE)
_plain("Mish", "mish", _EVERYWHERE)
_plain("HardSwish", "hard_swish", "Any shape; within 0.0001 everywhere.")
_plain("Softsign", "softsign", "Any shape; within 0.0003 everywhere.")
_plain("Exp", "exp", "Of -24 to 20.5, within 0.00004 + 0.0002 e**x; nearly 0 below, e**20.5 above.")
_plain("Log", "log", "Of a unit of fixed point to 30,720, within 0.0003; beyond as at the end.")
_plain("Sqrt", "sqrt", "Of 0 to 30,720, within 0.0003 sqrt(x).")
_plain("Reciprocal", "reciprocal", "Of a unit to 16,383 in magnitude, of both signs, within 0.0005 / |x|.")


@rule("LeakyRelu")
def leaky_relu(node: Node, graph: Graph) -> list[Step]:
    """Any slope; the slope is public."""
    return [one_step(node, graph, "leaky_relu", slope=float(node.attrs.get("alpha", 0.01)))]


@rule("Clip")
def clip(node: Node, graph: Graph) -> list[Step]:
    """Bounds as attributes or as inputs, either may be absent; constant bounds are public, others are activations."""
    if any(node.input(i) in graph.activations for i in (1, 2)):
        return _clip_by_values(node, graph)
    low, high = _bound(node, graph, 1, "min", -1.0), _bound(node, graph, 2, "max", 1.0)
    if low is None and high is None:
        return [one_step(node, graph, "identity")]
    if low == 0.0 and high is None:
        return [one_step(node, graph, "relu")]
    low, high = -LIMIT if low is None else low, LIMIT if high is None else high
    if low > high:
        raise Refused(f"its lower bound must not exceed its upper; got {low} and {high}", "mend the bounds")
    return [one_step(node, graph, "clip", low=low, high=high)]


def _clip_by_values(node: Node, graph: Graph) -> list[Step]:
    formula = Formula(node, graph)
    x = formula.operand(0)
    if node.input(1):
        x = formula.largest(x, decidable(formula.operand(1)))
    if node.input(2):
        x = formula.smallest(x, decidable(formula.operand(2)))
    return formula.steps(x)


def _bound(node: Node, graph: Graph, index: int, name: str, sign: float) -> float | None:
    """Return a bound of Clip, None when it is absent or beyond every number that a comparison decides."""
    value = sign * math.inf
    if node.opset < 11:
        value = float(node.attrs.get(name, value))
    elif node.input(index):
        value = float(constant_input(node, graph, index, f"its bound {name!r}").item())
    if math.isnan(value) or sign * value <= -LIMIT:
        raise Refused(f"its bound {name!r} must leave values that fixed point holds; got {value}", "mend the bound")
    return value if abs(value) < WIDEST else None


@rule("HardSigmoid")
def hard_sigmoid(node: Node, graph: Graph) -> list[Step]:
    """Any alpha and beta; both are public. Exact."""
    alpha, beta = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
    if not alpha:
        return [one_step(node, graph, "scale", factor=0, offset=min(max(beta, 0.0), 1.0))]
    return [_function(node, graph, slope_between(alpha, beta))]


def slope_between(alpha: float, beta: float) -> dict[str, Attribute]:
    """Return the attributes of a step for min(max(alpha x + beta, 0), 1), alpha not 0."""
    below, above = (0.0, 1.0) if alpha > 0 else (1.0, 0.0)
    return straight(((below - beta) / alpha, (above - beta) / alpha), (below, 0.0), (beta, alpha), (above, 0.0))


@rule("ThresholdedRelu")
def thresholded_relu(node: Node, graph: Graph) -> list[Step]:
    """Any alpha; it is public. Exact."""
    knot = _behind(float(node.attrs.get("alpha", 1.0)))
    return [_function(node, graph, straight((knot,), (0.0, 0.0), (0.0, 1.0)))]


@rule("Shrink")
def shrink(node: Node, graph: Graph) -> list[Step]:
    """Any bias and any lambd of 0 at least; both are public. Exact."""
    bias, lambd = float(node.attrs.get("bias", 0.0)), float(node.attrs.get("lambd", 0.5))
    if lambd < 0:
        raise Refused(f"lambd must not be negative; got {lambd}", "mend the attribute")
    # -lambd itself belongs to the middle, the first number above lambd no more.
    knots = (_UNIT - _behind(lambd), _behind(lambd))
    return [_function(node, graph, straight(knots, (bias, 1.0), (0.0, 0.0), (-bias, 1.0)))]


def _behind(value: float) -> float:
    """Return the first number of fixed point above a value."""
    return (math.floor(value / _UNIT) + 1) * _UNIT


@rule("Elu", "Selu")
def elu(node: Node, graph: Graph) -> list[Step]:
    """Any alpha and gamma; both are public. Within 0.0001 everywhere."""
    alpha, scale = float(node.attrs.get("alpha", 1.0)), 1.0
    if node.op_type == "Selu":
        alpha = float(node.attrs.get("alpha", 1.67326319217681884765625))
        scale = float(node.attrs.get("gamma", 1.05070102214813232421875))
    return [_function(node, graph, custom("scaled_exp", alpha, scale))]


@rule("Celu")
def celu(node: Node, graph: Graph) -> list[Step]:
    """Any alpha of 0.01 to 16; it is public. Within 0.0001 everywhere."""
    alpha = float(node.attrs.get("alpha", 1.0))
    if not 0.01 <= alpha <= 16:
        raise Refused(f"alpha must lie in 0.01..16; got {alpha}", "mend the attribute")
    return [_function(node, graph, custom("celu", alpha))]


@rule("Gelu")
def gelu(node: Node, graph: Graph) -> list[Step]:
    """Both approximations; within 0.0001 everywhere."""
    return [one_step(node, graph, "gelu_tanh" if node.attrs.get("approximate") == "tanh" else "gelu")]


@rule("Swish")
def swish(node: Node, graph: Graph) -> list[Step]:
    """Any alpha of 1/8 to 64 in magnitude, or 0; it is public. Within 0.0001 everywhere."""
    alpha = float(node.attrs.get("alpha", 1.0))
    if alpha == 1.0:
        return [one_step(node, graph, "silu")]
    if not alpha:
        return [one_step(node, graph, "scale", factor=0.5, offset=0)]
    if not 1 / 8 <= abs(alpha) <= 64:
        raise Refused(f"alpha must lie in 1/8..64 in magnitude; got {alpha}", "mend the attribute")
    return [_function(node, graph, custom("swish", alpha))]


@rule("Dropout")
def dropout(node: Node, graph: Graph) -> list[Step]:
    """Nothing happens, and the mask says so; in training mode with a ratio of 0 only."""
    source, draft = activation_input(node, graph), Draft(node, graph)
    trains = node.input(2) and constant_input(node, graph, 2, "training_mode").any()
    ratio = constant_input(node, graph, 1, "the ratio").item() if node.input(1) else 0.5
    if trains and ratio:
        raise Refused("Dropout in training mode draws random numbers", "export the model in evaluation mode")
    mask = any(x in graph.used for x in node.outputs[1:])
    return draft.made(source, draft.scale(source, 0.0, 1.0) if mask else "")


@rule("Cast", "CastLike")
def cast(node: Node, graph: Graph) -> list[Step]:
    """Between floats, from bool or integers to anything, from floats to bool, and to integers what is whole anyway or \
only says places in a constant table (Gather), which must be whole then."""
    source, target = activation_input(node, graph), np.dtype(graph.dtypes[node.outputs[0]])
    if target.kind == "b" and graph.dtypes[source] != "bool":
        return [one_step(node, graph, "indicator", knots=(0, 1), below=1)]
    if target.kind not in "biuf":
        raise Refused("a cast to texts is not computed", "end the model at the numbers")
    whole = is_integral(source, graph) or only_looked_up(node.outputs[0], graph)
    if target.kind in "iu" and not whole:
        raise Refused(f"a cast to {target} rounds", "keep the value in float32")
    return [one_step(node, graph, "identity")]


@rule("Floor", "Ceil", "Round")
def rounding(node: Node, graph: Graph) -> list[Step]:
    """Nothing happens, of what is whole by construction; others are refused."""
    if not is_integral(activation_input(node, graph), graph):
        raise Refused("rounding is not supported", "leave it out, or round the outputs after the prediction")
    return [one_step(node, graph, "identity")]
