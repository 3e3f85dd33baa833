"""What several nodes mean together: a graph's nodes as they are translated, before any rule."""

from collections.abc import Mapping
from dataclasses import dataclass

from securemtk.onnx.building.builder import Draft
from securemtk.onnx.building.registry import Step
from securemtk.onnx.model.graph import Graph, Node
from securemtk.onnx.rules.norms import inverse_root

_SMALLER = 2.0**8


@dataclass(frozen=True)
class InverseRoot:
    """A node that makes `factor` / sqrt(`radicand` + `epsilon`); factor "" is 1."""

    factor: str
    radicand: str
    epsilon: float

    def steps(self, node: Node, graph: Graph) -> list[Step]:
        """Return its steps: one function in place of a root and a quotient."""
        draft = Draft(node, graph)
        # Most radicands are variances: looked at 2**8 times smaller, they may be 2**23, and 2**-20 is still resolved.
        small = draft.scale(self.radicand, 1 / _SMALLER)
        value = inverse_root(draft, small, self.epsilon / _SMALLER, _SMALLER**-0.5)
        return draft.made(draft.binary("mul", self.factor, value) if self.factor else value)


def understood(graph: Graph) -> list[tuple[Node, InverseRoot | None]]:
    """Return the nodes that are still needed when quotients by roots are one, each with what it is part of."""
    makers = {name: node for node in graph.nodes for name in node.outputs if not node.domain}
    found: list[tuple[Node, InverseRoot | None]] = []
    wanted = set(graph.outputs)
    for node in reversed(graph.nodes):
        if not wanted.intersection(node.outputs):
            continue
        root = _inverse_root(node, graph, makers)
        found.append((node, root))
        wanted.update(node.inputs if root is None else (root.factor, root.radicand))
    return found[::-1]


def _inverse_root(node: Node, graph: Graph, makers: Mapping[str, Node]) -> InverseRoot | None:
    """Return what a node makes of a root: Div(a, Sqrt(x)), Reciprocal(Sqrt(x)), Pow(x, -0.5)."""
    if node.domain:
        return None
    if node.op_type == "Pow" and _number(graph, node.input(1)) == -0.5:
        return _of_sum(graph, makers, "", node.input(0))
    if node.op_type not in ("Div", "Reciprocal"):
        return None
    root = makers.get(node.inputs[-1])
    if root is None or not (root.op_type == "Sqrt" or (root.op_type == "Pow" and _number(graph, root.input(1)) == 0.5)):
        return None
    factor = "" if node.op_type == "Reciprocal" or _number(graph, node.input(0)) == 1.0 else node.input(0)
    known = factor in graph.shapes and root.outputs[0] in graph.shapes
    if factor and not (known and graph.rank(factor) == graph.rank(root.outputs[0])):
        return None
    return _of_sum(graph, makers, factor, root.input(0))


def _of_sum(graph: Graph, makers: Mapping[str, Node], factor: str, value: str) -> InverseRoot | None:
    """Take a small positive number out of the sum that a root is taken of."""
    total = makers.get(value)
    if total is not None and total.op_type == "Add":
        for x, y in (total.inputs, total.inputs[::-1]):
            epsilon = _number(graph, y)
            if x in graph.shapes and graph.shapes[x] == graph.shapes[value] and epsilon is not None and epsilon >= 0:
                return InverseRoot(factor, x, epsilon)
    return InverseRoot(factor, value, 0.0) if value in graph.shapes else None


def _number(graph: Graph, name: str) -> float | None:
    """Return a constant of one element, None for anything else."""
    value = graph.constants.get(name)
    return float(value.item()) if value is not None and value.size == 1 else None
