"""Rules of operators that compute with several values, which broadcast as in numpy."""

import numpy as np

from securemtk.onnx.building.builder import Draft, Operand
from securemtk.onnx.building.operands import Formula, decidable, finite
from securemtk.onnx.building.proofs import Proofs
from securemtk.onnx.building.registry import Refused, Step, constant_input, fit, output_shape, rule
from securemtk.onnx.model.graph import Array, Graph, Node


@rule("Add", "Sub")
def addition(node: Node, graph: Graph) -> list[Step]:
    """Activations and constants that broadcast; as a mask a constant may be of any size, or -inf (below)."""
    formula = Formula(node, graph)
    x, y = (finite(v) for v in formula.operands())
    return formula.steps(formula.add(x, y) if node.op_type == "Add" else formula.sub(x, y))


@rule("Mul")
def multiplication(node: Node, graph: Graph) -> list[Step]:
    """Activations and constants that broadcast; as a mask's factor a number may be of any size (below)."""
    formula = Formula(node, graph)
    x, y = (finite(v) for v in formula.operands())
    return formula.steps(formula.mul(x, y))


@rule("Div")
def division(node: Node, graph: Graph) -> list[Step]:
    """By a constant without zeros, or by an activation of a unit of fixed point to 16,383 in magnitude (1 / x within \
0.0005 / |x|)."""
    formula = Formula(node, graph)
    if np.dtype(graph.dtypes[node.outputs[0]]).kind != "f":
        raise Refused("a division of integers rounds", "cast its operands to float32")
    x, y = formula.operands()
    if isinstance(y, str):
        inverse = formula.apply("reciprocal", y)
        # 1 / x is how a reciprocal is written: that the number is 1 says nothing about weights.
        written = not isinstance(x, str) and x.size == 1 and x.item() == 1.0
        return formula.steps(inverse if written else formula.mul(x, inverse))
    if not y.all():
        raise Refused("the divisor must not hold a zero", "mend the constant")
    return formula.steps(formula.mul(x, 1.0 / y))


@rule("Sum", "Mean")
def total(node: Node, graph: Graph) -> list[Step]:
    """Any number of activations and constants that broadcast."""
    formula = Formula(node, graph)
    x = formula.all_by(formula.add, formula.operands())
    n = len(node.inputs)
    return formula.steps(formula.scale(x, 1.0 / n) if node.op_type == "Mean" and n > 1 else x)


@rule("Max", "Min")
def extreme(node: Node, graph: Graph) -> list[Step]:
    """Any number of activations and constants that broadcast; differences below 2**15, larger constants are 2**14."""
    formula = Formula(node, graph)
    op = formula.largest if node.op_type == "Max" else formula.smallest
    return formula.steps(formula.all_by(op, [decidable(x) for x in formula.operands()]))


@rule("Where")
def where(node: Node, graph: Graph) -> list[Step]:
    """Condition and both branches activations or constants that broadcast; in masks constants of any size (below)."""
    formula = Formula(node, graph)
    if node.input(2) in graph.activations and Proofs(graph).is_never(node.input(0)):
        return formula.steps(formula.operand(2))
    op = _extreme_of(node, graph)
    if op:
        x, y = (decidable(formula.operand(i)) for i in (1, 2))
        return formula.steps((formula.largest if op == "Max" else formula.smallest)(x, y))
    condition, x, y = (finite(v) for v in formula.operands())
    return formula.steps(_chosen(formula, condition, x, y))


def _extreme_of(node: Node, graph: Graph) -> str:
    """Return "Max" or "Min" where a choice between two values by which is larger is that, "" elsewhere."""
    makers = {x: n for n in graph.nodes for x in n.outputs}
    asked = makers.get(node.input(0))
    while asked is not None and asked.op_type == "Cast":
        asked = makers.get(asked.input(0))
    if (
        asked is None
        or asked.op_type not in _ORDERS
        or {*asked.inputs} != {*node.inputs[1:]}
        or len({*asked.inputs}) < 2
    ):
        return ""
    first_if_less = asked.op_type.startswith("Less") == (asked.input(0) == node.input(1))
    return "Min" if first_if_less else "Max"


_ORDERS = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")


def _chosen(formula: Formula, condition: Operand, x: Operand, y: Operand) -> Operand:
    if isinstance(condition, str) or (isinstance(x, str) and isinstance(y, str)):
        return formula.add(y, formula.mul(condition, formula.sub(x, y)))
    yes, no = condition, 1.0 - condition
    if isinstance(x, str):
        return formula.linear(x, yes, no * np.asarray(y))
    return formula.linear(y, no, yes * np.asarray(x))


@rule("PRelu")
def prelu(node: Node, graph: Graph) -> list[Step]:
    """Slopes constant or an activation, of any shape that broadcasts."""
    formula = Formula(node, graph)
    x, slope = formula.operands()
    positive = formula.relu(x)
    return formula.steps(formula.add(positive, formula.mul(slope, formula.sub(x, positive))))


_ROOTS = {0.5: "sqrt", -0.5: "rsqrt"}
_MOST = 64


@rule("Pow")
def power(node: Node, graph: Graph) -> list[Step]:
    """Constant exponents of -64 to 64, which are public, elements of each apart from others (that are not whole: of \
2**-19 up, results to 2**20, within 0.0005 |y|); or the base one positive constant (domain of `Exp`)."""
    if node.inputs[0] not in graph.activations:
        formula = Formula(node, graph)
        return formula.steps(_exponential(node, graph, formula))
    shape, draft = output_shape(node, graph), Draft(node, graph)
    given = constant_input(node, graph, 1, "the exponent").astype(np.float64)
    exponents = np.broadcast_to(fit(node, graph, given, node.outputs[0]), (1, *shape)).ravel()
    old, distinct = graph.shapes[node.inputs[0]], np.unique(exponents)
    base = draft.expand(draft.reshape(node.inputs[0], (*[1] * (len(shape) - len(old)), *old)), shape)
    if len(distinct) == 1:
        return draft.made(_power(draft, base, distinct.item()))
    flat = draft.reshape(base, (exponents.size,))
    places = [np.flatnonzero(exponents == e) for e in distinct]
    parts = [_power(draft, draft.take(flat, 1, p.tolist()), e.item()) for p, e in zip(places, distinct, strict=True)]
    order = np.argsort(np.concatenate(places))
    return draft.made(draft.reshape(draft.take(draft.concat(parts, 1), 1, order.tolist()), shape))


def _power(draft: Draft, base: str, exponent: float) -> str:
    """Add base**exponent."""
    if exponent in _ROOTS:
        return draft.function(base, _ROOTS[exponent])
    if not abs(exponent) <= _MOST:
        raise Refused(f"an exponent must lie in {-_MOST}..{_MOST}; got {exponent}", "write it as exp and log")
    if exponent != int(exponent):
        return draft.function(base, "power", exponent)
    if not exponent:
        return draft.scale(base, 0.0, 1.0)
    return draft.whole_power(draft.function(base, "reciprocal") if exponent < 0 else base, abs(int(exponent)))


def _exponential(node: Node, graph: Graph, formula: Formula) -> Operand:
    base: Array = constant_input(node, graph, 0, "the base").astype(np.float64)
    if base.size != 1 or base.item() <= 0:
        raise Refused("a constant base must be one positive number", "write it as exp and log")
    exponent = formula.operand(1)
    scale = np.full((1,) * (len(formula.result_shape) + 1), np.log(base.item()))
    return formula.apply("exp", formula.linear(exponent, scale, None))
