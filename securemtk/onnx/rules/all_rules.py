"""All rules together: a model's nodes become steps, and everything that stands in the way is collected.

To support one more operator, write a function under `@rule` in the module of its kind and run the tests.
"""

from dataclasses import replace

import numpy as np

from protocols.errors import SecureError
from securemtk.onnx.building import integers
from securemtk.onnx.building.registry import RULES, Refused, Step
from securemtk.onnx.model import classical
from securemtk.onnx.model.graph import Graph, Node, unique
from securemtk.onnx.model.problems import Problem, unforeseen
from securemtk.onnx.rules import (
    arithmetic,
    convolutions,
    elementwise,
    linear,
    logic,
    masks,
    norms,
    pools,
    reductions,
    roots,
    shapes,
)

# Named so that no tool takes these imports for unused: importing a module registers its rules.
MODULES = (arithmetic, convolutions, elementwise, linear, logic, norms, pools, reductions, shapes)


# What overflows or is not a number is found, by its name, when parameters are checked.
@np.errstate(all="ignore")
def translate(graph: Graph) -> tuple[list[Step], list[Problem]]:
    """Apply each node's rule; return the steps in order and everything that stands in the way."""
    steps: list[Step] = []
    problems = list(graph.problems)
    taken = graph.activations | graph.constants.keys()
    for node in graph.constant_nodes:
        if graph.failure is None and any(x in graph.used and x not in graph.seen for x in node.outputs):
            problems.append(_problem(node, "its result cannot be found out", "use operators of the ONNX standard"))
    found = masks.find(graph)
    for node, root in roots.understood(graph):
        node, whole = found.nodes.get(node.name, node), root or found.wholes.get(node.name)
        if node.domain == classical.DOMAIN and (refused := classical.refusal(node.op_type, node.attrs)):
            problems.append(_problem(node, *refused))
        elif node.domain or node.op_type not in RULES:
            what = f"operator {node.op_type!r}" + (f" of domain {node.domain!r}" if node.domain else "")
            problems.append(_problem(node, f"{what} is not supported", _remedy(node)))
        elif _is_known(node, graph):
            try:
                integers.require_whole(node, graph)
                made = RULES[node.op_type](node, graph) if whole is None else whole.steps(node, graph)
                steps += _own_names(made, node, taken)
            except Refused as error:
                problems.append(_problem(node, error.reason, error.remedy))
            except SecureError:
                raise
            except Exception as error:
                problems.append(_problem(node, *unforeseen(error)))
    return steps, problems


def operator_table() -> str:
    """Return the supported operators as a Markdown table, the one in docs/onnx.md."""
    known = [(name, (function.__doc__ or "").strip()) for name, function in sorted(RULES.items())]
    rows = [f"| `{name}` | {what} |" for name, what in known + classical.table_rows()]
    return "\n".join(["| operator | what of it |", "| --- | --- |", *rows])


def _own_names(steps: list[Step], node: Node, taken: set[str]) -> list[Step]:
    """Rename what a rule made on the way so that no value of the model has the same name."""
    names = {step.output: unique(step.output, taken) for step in steps if step.output not in node.outputs}
    return [
        replace(step, inputs=tuple(names.get(x, x) for x in step.inputs), output=names.get(step.output, step.output))
        for step in steps
    ]


_REMEDY = "replace it by supported operators (docs/onnx.md), or run this part of the model in the clear"
_REMEDIES = {
    **dict.fromkeys(("Sin", "Cos", "Tan", "Mod"), "compute it in the clear, before or behind the model"),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "Loop"), "use convolutions or a fixed number of unrolled steps"),
    **dict.fromkeys(("ArgMax", "TopK"), "end the model at the scores and choose after the prediction"),
    "If": "export again with the branch that is meant, so that nothing is decided at run time",
    "Scan": "use a fixed number of unrolled steps; in the place of nearest neighbours a linear model or an MLP",
    "CDist": "use a linear model or an MLP in the place of nearest neighbours",
    "LayerNormalization": "use BatchNormalization",
    "Einsum": "write it as MatMul with a constant on the right",
}


def _remedy(node: Node) -> str:
    return _REMEDIES.get(node.op_type, _REMEDY)


def _problem(node: Node, reason: str, remedy: str) -> Problem:
    return Problem(node.name, node.op_type, reason, remedy)


def _is_known(node: Node, graph: Graph) -> bool:
    """Return whether shapes are known; they are not behind a node that cannot be run or moves the batch."""
    inputs = [x for x in node.inputs if x in graph.activations]
    return any(x in graph.seen for x in node.outputs) and all(x in graph.shapes for x in inputs)
