"""What can be proven of a value before the model runs: that it is 0 or 1, that it is positive, that it is a number.

A rule that holds only for some values asks here first. Every proof rests on two promises: inputs are finite, because
data are checked before they are shared, and sums and products stay below float32's bound, because those of fixed point
are far below. What is not proven may still be true.
"""

from collections.abc import Callable, Mapping

import numpy as np

from securemtk.onnx.model.graph import Array, Graph, Node

# Operators that move elements of their first input, or repeat them, and change none.
MOVES = (
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Identity", "Slice", "Gather", "Tile"),
    *("GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth", "Dropout", "Split"),
)
_CASTS = ("Cast", "CastLike")
_SUMS = ("ReduceSum", "ReduceMean", "ReduceMax", "GlobalAveragePool", "AveragePool", "MaxPool", "GlobalMaxPool")
_BOUNDED = ("Sigmoid", "Tanh", "Erf", "HardSigmoid", "Softmax", "Hardmax")
# Of finite numbers they may make an infinity, or what is no number.
_FRAGILE = (
    *("Log", "Exp", "Div", "Reciprocal", "Sqrt", "Pow", "ReduceLogSum"),
    *("LpNormalization", "MeanVarianceNormalization", "BatchNormalization"),
)


class Proofs:
    """Proofs about the values of one graph.

    Args:
        graph: the model; its constants and types are read, nothing is changed.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.makers: Mapping[str, Node] = {name: n for n in graph.nodes for name in n.outputs if not n.domain}
        self._known: dict[tuple[str, str], bool] = {}
        self._culprits: dict[tuple[str, str], str] = {}
        self._judged = False

    # --- constants

    def constant(self, name: str) -> Array | None:
        """Return a constant, None for what is computed or unknown."""
        return None if name in self._graph.activations else self._graph.constants.get(name)

    def number(self, name: str) -> float | None:
        """Return a constant of one element, None for anything else."""
        value = self.constant(name)
        return float(value.item()) if value is not None and value.size == 1 and value.dtype.kind in "fiub" else None

    # --- truth values

    def is_truth(self, name: str) -> bool:
        """Return whether each element is 0 or 1."""
        return self._prove("truth", name, self._is_truth)

    def _is_truth(self, name: str) -> bool:
        value = self.constant(name)
        if value is not None:
            return bool(np.isin(value, (0, 1)).all())
        if self._graph.dtypes.get(name) == "bool":
            return True
        node = self.makers.get(name)
        if node is None:
            return False
        if node.op_type in MOVES or node.op_type in _CASTS:
            return self.is_truth(node.input(0))
        if node.op_type == "Sub":
            return self.number(node.input(0)) == 1.0 and self.is_truth(node.input(1))
        if node.op_type == "Where":
            return all(self.is_truth(x) for x in node.inputs[1:])
        return node.op_type in ("Mul", "Min", "Max", "Concat") and all(self.is_truth(x) for x in node.inputs)

    def is_sign(self, name: str) -> bool:
        """Return whether each element is -1, 0 or 1."""
        node = self.makers.get(name)
        if self.is_truth(name):
            return True
        if node is None:
            return False
        if node.op_type in MOVES or node.op_type in (*_CASTS, "Neg"):
            return self.is_sign(node.input(0))
        if node.op_type == "Sub":
            return self.is_truth(node.input(0)) and self.is_truth(node.input(1))
        return node.op_type == "Sign" or (node.op_type == "Mul" and all(self.is_sign(x) for x in node.inputs))

    def is_never(self, name: str) -> bool:
        """Return whether a truth value is false for all inputs."""
        return self._prove("never", name, self._is_never)

    def _is_never(self, name: str) -> bool:
        value = self.constant(name)
        if value is not None:
            return not value.any()
        node = self.makers.get(name)
        if node is None:
            return False
        if node.op_type == "IsNaN":
            return not self.may_be_nan(node.input(0))
        if node.op_type == "IsInf":
            return not self.may_be_infinite(node.input(0))
        if node.op_type in MOVES or node.op_type in _CASTS:
            return self.is_never(node.input(0))
        if node.op_type == "Or":
            return all(self.is_never(x) for x in node.inputs)
        return node.op_type == "And" and any(self.is_never(x) for x in node.inputs)

    # --- signs

    def is_nonnegative(self, name: str) -> bool:
        """Return whether each element is 0 at least."""
        return self._prove("nonnegative", name, self._is_nonnegative)

    def _is_nonnegative(self, name: str) -> bool:
        value = self.constant(name)
        if value is not None:
            return value.dtype.kind in "fiub" and bool((value >= 0).all())
        node = self.makers.get(name)
        if self.is_truth(name) or node is None:
            return self.is_truth(name)
        op, first = node.op_type, node.input(0)
        if op in ("Abs", "Relu", "Exp", "Sigmoid", "Softplus", "Softmax", "Sqrt", "ReduceSumSquare", "ReduceL1"):
            return True
        if op == "ReduceL2" or (op == "Mul" and first == node.input(1)):
            return True
        if op == "Pow":
            exponent = self.number(node.input(1))
            return (exponent is not None and exponent % 2 == 0) or self.is_nonnegative(first)
        if op in ("Clip", "Max") and any(self.is_nonnegative(x) for x in node.inputs[op == "Clip" : 2]):
            return True
        if op in MOVES or op in _CASTS or op in _SUMS:
            return self.is_nonnegative(first)
        if op == "Where":
            return all(self.is_nonnegative(x) for x in node.inputs[1:])
        return op in ("Add", "Mul", "Div", "Sum", "Mean", "Concat", "Max", "Min", "Reciprocal") and all(
            self.is_nonnegative(x) for x in node.inputs
        )

    def is_positive(self, name: str) -> bool:
        """Return whether each element is above a positive number that does not depend on the input."""
        return self._prove("positive", name, self._is_positive)

    def _is_positive(self, name: str) -> bool:
        value = self.constant(name)
        if value is not None:
            return value.dtype.kind in "fiub" and bool((value > 0).all())
        node = self.makers.get(name)
        if node is None:
            return False
        op, first = node.op_type, node.input(0)
        if op == "Add":
            return self.is_nonnegative(first) and self.is_nonnegative(node.input(1)) and self._any_positive(node)
        if op in ("Clip", "Max") and any(self.is_positive(x) for x in node.inputs[op == "Clip" : 2]):
            return True
        if op in ("Sqrt", "Pow") or op in MOVES or op in _CASTS or op in _SUMS:
            return self.is_positive(first)
        return op in ("Mul", "Max", "Min", "Concat") and all(self.is_positive(x) for x in node.inputs)

    def _any_positive(self, node: Node) -> bool:
        return any(self.is_positive(x) for x in node.inputs)

    # --- numbers

    def may_be_nan(self, name: str) -> str:
        """Return the name of a node that may make what is no number of it, "" when none does."""
        self._judge_in_order()
        return self._blame("nan", name, self._nan_maker)

    def may_be_infinite(self, name: str) -> str:
        """Return the name of a node, or constant, that may make it infinite, "" when none does."""
        self._judge_in_order()
        return self._blame("infinity", name, self._infinity_maker)

    def _judge_in_order(self) -> None:
        """Judge every value, those before it first: a network is deeper than calls may be nested."""
        if not self._judged:
            self._judged = True
            for name in (x for node in self._graph.nodes for x in node.outputs):
                self._blame("infinity", name, self._infinity_maker)
                self._blame("nan", name, self._nan_maker)

    def _nan_maker(self, name: str) -> str:
        value = self.constant(name)
        if value is not None:
            return name if value.dtype.kind == "f" and np.isnan(value).any() else ""
        node = self.makers.get(name)
        if node is None or not self._is_float(name):
            return ""
        given = self._chosen(node)
        if node.op_type == "Where" and self._asks("IsNaN", node):
            given = (node.input(1),)
        found = next((x for x in map(self.may_be_nan, given) if x), "")
        if found or node.op_type in MOVES or node.op_type in (*_CASTS, "Where", "Concat", "Clip", "Sigmoid", "Tanh"):
            return found
        # Infinities less each other, or times nothing.
        return next((x for x in map(self.may_be_infinite, given) if x), self._breaks(node))

    def _infinity_maker(self, name: str) -> str:
        value = self.constant(name)
        if value is not None:
            return name if value.dtype.kind == "f" and np.isinf(value).any() else ""
        node = self.makers.get(name)
        if node is None or not self._is_float(name) or node.op_type in _BOUNDED:
            return ""
        given = self._chosen(node)
        if node.op_type == "Where" and self._asks("IsInf", node):
            given = (node.input(1),)
        if node.op_type == "Clip" and all(
            np.isfinite(self.number(x) or 0.0) and x for x in (*node.inputs, "", "")[1:3]
        ):
            return ""
        return next((x for x in map(self.may_be_infinite, given) if x), self._breaks(node))

    def _is_float(self, name: str) -> bool:
        return np.dtype(self._graph.dtypes.get(name, "float32")).kind == "f"

    def _chosen(self, node: Node) -> tuple[str, ...]:
        """Return the inputs whose numbers the result may hold or come from."""
        if node.op_type != "Where":
            return tuple(x for x in node.inputs if x)
        return node.inputs[2:] if self.is_never(node.input(0)) else node.inputs[1:]

    def _asks(self, op: str, choice: Node) -> bool:
        """Return whether a choice puts its first branch wherever the second one fails."""
        asked = self.makers.get(choice.input(0))
        while asked is not None and asked.op_type in _CASTS:
            asked = self.makers.get(asked.input(0))
        return asked is not None and asked.op_type == op and asked.input(0) == choice.input(2) and not asked.attrs

    def _breaks(self, node: Node) -> str:
        """Return a node's name where finite numbers may make it infinite or no number."""
        op, first = node.op_type, node.input(0)
        if op not in _FRAGILE:
            return ""
        if op in ("Div", "Reciprocal", "Log", "ReduceLogSum"):
            divisor = self.constant(node.inputs[-1]) if op == "Div" else None
            fine = self.is_positive(node.inputs[-1] if op == "Div" else first)
            return "" if fine or (divisor is not None and bool(divisor.all())) else node.name
        if op == "Sqrt":
            return "" if self.is_nonnegative(first) else node.name
        if op == "Exp":
            return "" if self._is_difference(first) else node.name
        if op == "BatchNormalization":
            variance = self.constant(node.input(4))
            return "" if variance is not None and bool((variance >= 0).all()) else node.name
        if op == "Pow":
            exponent = self.number(node.input(1))
            whole = exponent is not None and exponent == int(exponent) and exponent >= 0
            return "" if whole or self.is_positive(first) else node.name
        return node.name

    def _is_difference(self, name: str) -> bool:
        """Return whether a value is one less its own maximum."""
        node = self.makers.get(name)
        largest = self.makers.get(node.input(1)) if node is not None and node.op_type == "Sub" else None
        return largest is not None and largest.op_type == "ReduceMax" and largest.input(0) == (node or largest).input(0)

    # --- each asked once

    def _prove(self, what: str, name: str, ask: Callable[[str], bool]) -> bool:
        key = (what, name)
        if key not in self._known:
            self._known[key] = False
            self._known[key] = bool(name) and ask(name)
        return self._known[key]

    def _blame(self, what: str, name: str, ask: Callable[[str], str]) -> str:
        key = (what, name)
        if key not in self._culprits:
            self._culprits[key] = ""
            self._culprits[key] = ask(name) if name else ""
        return self._culprits[key]
