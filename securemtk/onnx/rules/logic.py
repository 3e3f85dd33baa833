"""Rules of comparisons and of what is done with truth values, which are whole numbers: 0 and 1.

Numbers are compared as fixed point holds them, at 2**-16: a constant is rounded to it, and what comes from a product
may be one unit off.
"""

from securemtk.onnx.building.builder import Operand
from securemtk.onnx.building.operands import Formula, decidable
from securemtk.onnx.building.proofs import Proofs
from securemtk.onnx.building.registry import Refused, Step, one_step, rule
from securemtk.onnx.model.graph import Graph, Node

# Where x - y changes its truth, in units of 2**-16, and what it is below the first of these.
_TRUTHS = {
    "Greater": ((1,), 0),
    "GreaterOrEqual": ((0,), 0),
    "Less": ((0,), 1),
    "LessOrEqual": ((1,), 1),
    "Equal": ((0, 1), 0),
}


@rule(*_TRUTHS)
def comparison(node: Node, graph: Graph) -> list[Step]:
    """Activations and constants that broadcast, |x - y| below 2**15; numbers nearer than 2**-16 are equal."""
    formula = Formula(node, graph)
    x, y = (decidable(v) for v in formula.operands())
    knots, below = _TRUTHS[node.op_type]
    return formula.steps(formula.apply("indicator", formula.sub(x, y), knots=knots, below=below))


@rule("Not")
def negation(node: Node, graph: Graph) -> list[Step]:
    """Any shape."""
    return [one_step(node, graph, "scale", factor=-1, offset=1)]


@rule("And", "Or", "Xor")
def connective(node: Node, graph: Graph) -> list[Step]:
    """Activations and constants that broadcast."""
    formula = Formula(node, graph)
    x, y = formula.operands()
    if Proofs(graph).is_never(node.outputs[0]):
        return formula.steps(formula.scale(x if isinstance(x, str) else y, 0.0))
    if not isinstance(x, str):
        x, y = y, x
    return formula.steps(_connected(node.op_type, formula, x, y))


def _connected(op: str, formula: Formula, x: Operand, y: Operand) -> Operand:
    if op == "And":
        return formula.mul(x, y)
    twice = 2.0 if op == "Xor" else 1.0
    if not isinstance(y, str):
        return formula.linear(x, 1.0 - twice * y, y)
    return formula.sub(formula.add(x, y), formula.scale(formula.mul(x, y), twice))


@rule("IsNaN")
def is_nan(node: Node, graph: Graph) -> list[Step]:
    """Where the input is provably a number: false; of a softmax: true where a mask of -inf leaves nothing of a row."""
    return _never(node, graph, Proofs(graph).may_be_nan(node.input(0)), "no number")


@rule("IsInf")
def is_infinite(node: Node, graph: Graph) -> list[Step]:
    """Where the input is provably finite: false."""
    return _never(node, graph, Proofs(graph).may_be_infinite(node.input(0)), "infinite")


def _never(node: Node, graph: Graph, culprit: str, what: str) -> list[Step]:
    if culprit:
        reason = f"whether a number is {what} cannot be told in fixed point, and {culprit!r} may make it so"
        raise Refused(reason, "leave the question out, or keep what may be so from happening, as by Clip or Max")
    return [one_step(node, graph, "scale", factor=0, offset=0)]
