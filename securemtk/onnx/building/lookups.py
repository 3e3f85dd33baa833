"""Rows of the keeper's table at places that nobody may see, such as the tokens of a text: Gather with a secret index.

A place p is split as p = a * B + b. Comparisons with public numbers say which a it is, as a vector with one 1 in it,
and then which b; their products are the 1 of p among all rows, and a matrix product takes the row: no step shows p, and
every step does the same whatever p is.
"""

import math

import numpy as np

from protocols.limits import input_limit
from securemtk.onnx.building.builder import Draft
from securemtk.onnx.building.registry import Refused, Step, activation_input, constant_input, output_shape
from securemtk.onnx.model.graph import Array, Graph, Node

# Places are inputs, which fixed point bounds.
LARGEST = int(input_limit())
# Up to so many rows each has a comparison of its own, which saves the rounds of the second digit.
_FEW = 16


def is_lookup(node: Node, graph: Graph) -> bool:
    """Return whether a node takes rows of a constant at places that depend on the model's input."""
    return node.op_type == "Gather" and node.input(0) not in graph.activations and node.input(1) in graph.activations


def only_looked_up(name: str, graph: Graph) -> bool:
    """Return whether a value says places in constant tables, and nothing else."""
    users = [node for node in graph.nodes if name in node.inputs]
    return name not in graph.outputs and bool(users) and all(is_lookup(n, graph) and n.input(0) != name for n in users)


def looked_up(node: Node, graph: Graph) -> list[Step]:
    """Return the steps of Gather on a constant with a secret index.

    For V rows each place costs 2A + B comparisons with about A = sqrt(V / 2), B = V / A (88 for V = 1,000), V products
    of truth values, and V products with the table's numbers for each of a row's; 2V comparisons up to 16 rows.

    Raises:
        Refused: the table has more than `LARGEST` rows.
    """
    table = constant_input(node, graph, 0, "the table").astype(np.float64)
    axis = int(node.attrs.get("axis", 0)) % table.ndim
    source, shape, draft = activation_input(node, graph, 1), output_shape(node, graph), Draft(node, graph)
    n = table.shape[axis]
    if n > LARGEST:
        reason = f"a table with a secret index must have at most {LARGEST} rows; got {n}"
        raise Refused(reason, "let the user's side take the rows, or feed one-hot rows to a MatMul with the table")
    if not n:
        raise Refused("a table must have rows; got none", "leave the lookup out")
    rows = np.moveaxis(table, axis, 0).reshape(n, -1)
    places = draft.shape(source)
    found = draft.matmul(_hits(draft, draft.reshape(source, (*places, 1)), n), _padded(rows, _digits(n)))
    rest = table.shape[:axis], table.shape[axis + 1 :]
    found = draft.reshape(found, (*places, *rest[0], *rest[1]))
    before, after, ours = len(rest[0]), len(rest[1]), len(places) + 1
    order = [*range(ours, ours + before), *range(1, ours), *range(ours + before, ours + before + after)]
    return draft.made(draft.reshape(draft.transpose(found, (0, *order)), shape))


def _digits(n: int) -> tuple[int, int]:
    """Return how many values the two digits of a place among n rows have."""
    if n <= _FEW:
        return n, 1
    low = math.ceil(n / max(round(math.sqrt(n / 2)), 1))
    return math.ceil(n / low), low


def _padded(rows: Array, digits: tuple[int, int]) -> Array:
    return np.pad(rows, ((0, math.prod(digits) - len(rows)), (0, 0)))


def _hits(draft: Draft, places: str, n: int) -> str:
    """Return the truth values (..., A * B) of places (..., 1), from -n to n - 1, being one of n rows or its padding."""
    high, low = _digits(n)
    # The first digit of negative places beside that of others: ONNX counts them from the end.
    starts = np.array([*range(-n + low, 0, low), *range(0, n, low)], dtype=np.float64)
    reached = _reached(draft, places, starts)
    blocks = _only_last(draft, reached)
    last = len(draft.shape(places))
    halves = (draft.take(blocks, last, [*range(i, i + high)]) for i in (0, high))
    first = draft.binary("add", *halves)
    if low == 1:
        return first
    # The start of a place's block is that of the first one and the widths of all blocks behind which it lies.
    steps = draft.scale(draft.reduce("sum", reached, [last]), -low, n)
    past = draft.scale(draft.take(reached, last, [high - 1]), low * high - n)
    rest = draft.binary("add", places, draft.binary("add", steps, past))
    second = _only_last(draft, _reached(draft, rest, np.arange(1.0, low)))
    lead = draft.shape(places)[:-1]
    pairs = draft.binary("mul", draft.reshape(first, (*lead, high, 1)), draft.reshape(second, (*lead, 1, low)))
    return draft.reshape(pairs, (*lead, high * low))


def _reached(draft: Draft, places: str, starts: Array) -> str:
    """Return the truth values (..., k) of whole numbers (..., 1) being one of k starts or above it."""
    shape = (*draft.shape(places)[:-1], len(starts))
    # Between whole numbers, so that a unit in the last place decides nothing.
    away = (0.5 - starts).reshape((1,) * len(shape) + (-1,))
    far = draft.affine(draft.expand(places, shape), shift=away)
    return draft.add("indicator", (far,), shape, knots=(0,), below=0)


def _only_last(draft: Draft, reached: str) -> str:
    """Return (..., k + 1) with a 1 behind the last start that is reached, at 0 for none."""
    last = len(draft.shape(reached))
    k = draft.shape(reached)[-1]
    ones = draft.take(reached, last, [-1, *range(k)], fill=1.0)
    return draft.binary("sub", ones, draft.take(reached, last, [*range(k), -1]))
