"""Formulas over the operands of one node: activations and constants that broadcast to its result as in numpy.

By samples no operand can mix the batch: where one of another rank did, the result would not have the batch as its first
axis, or the model would not run with every batch, and either is refused before.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import numpy as np

from protocols.limits import WIDEST
from protocols.program.program import Attribute, Shape
from securemtk.onnx.building.builder import Builder, Operand
from securemtk.onnx.building.registry import Refused, Step, constant_input, output_shape
from securemtk.onnx.model.graph import Array, Graph, Node


class Formula(Builder):
    """Steps that make a node's result, one by one; each method returns the operand that it makes.

    An operand is a value's name, or a constant in float64 that has the rank of the result behind a batch of 1.

    Constants among themselves are computed at once; what the keeper's constants do to a value is its secret.
    """

    def __init__(self, node: Node, graph: Graph) -> None:
        """Begin without steps.

        Raises:
            Refused: the result has no batch of samples.
        """
        output = node.outputs[0]
        super().__init__(graph.shapes, lambda _, n: f"{node.name}/{n}", lambda n: f"{output}/{n}")
        self.result_shape = output_shape(node, graph)
        self._node, self._graph = node, graph

    def operand(self, index: int, what: str = "an operand") -> Operand:
        """Return an input with the result's rank; it may still have axes of 1 where the result has more."""
        name = self._node.input(index)
        if name in self._graph.activations:
            return self._activation(name)
        value = constant_input(self._node, self._graph, index, what).astype(np.float64)
        return value.reshape((1,) * (len(self.result_shape) + 1 - value.ndim) + value.shape)

    def operands(self) -> list[Operand]:
        """Return all inputs."""
        return [self.operand(i) for i in range(len(self._node.inputs))]

    def _activation(self, name: str) -> str:
        shape = self.shape(name)
        if len(shape) == len(self.result_shape):
            return name
        aligned = (1,) * (len(self.result_shape) - len(shape)) + shape
        return self.put("reshape", (name,), aligned, attrs={"shape": aligned})

    def apply(self, op: str, *operands: Operand, **attrs: Attribute) -> str:
        """Add a step on values that broadcast; none of them a constant."""
        inputs = tuple(_value(x) for x in operands)
        shape = np.broadcast_shapes(*(self.shape(x) for x in inputs))
        return self.put(op, inputs, shape, attrs=attrs)

    def scale(self, x: Operand, factor: float, offset: float = 0.0) -> Operand:
        """Return x * factor + offset with public numbers."""
        return self.apply("scale", x, factor=factor, offset=offset) if isinstance(x, str) else x * factor + offset

    def linear(self, x: Operand, scale: Array | None, shift: Array | None) -> Operand:
        """Return x * scale + shift with the keeper's constants; None for ones and zeros."""
        if not isinstance(x, str):
            return (x if scale is None else x * scale) + (0.0 if shift is None else shift)
        given = [v for v in (scale, shift) if v is not None]
        x = self.widened(x, np.broadcast_shapes(self.shape(x), *(v.shape[1:] for v in given)))
        return self.affine(x, scale=scale, shift=shift)

    def widened(self, x: str, shape: Shape) -> str:
        """Return x with its axes of 1 repeated to `shape`."""
        if self.shape(x) == shape:
            return x
        return self.put("expand", (x,), shape, attrs={"shape": shape})

    def add(self, x: Operand, y: Operand) -> Operand:
        """Return x + y."""
        if isinstance(x, str) and isinstance(y, str):
            return self.apply("add", x, y)
        return self.linear(x, None, y) if not isinstance(y, str) else self.linear(y, None, _constant(x))

    def sub(self, x: Operand, y: Operand) -> Operand:
        """Return x - y."""
        if isinstance(x, str) and isinstance(y, str):
            return self.apply("sub", x, y)
        return self.linear(x, None, -y) if not isinstance(y, str) else self.add(x, self.scale(y, -1.0))

    def mul(self, x: Operand, y: Operand) -> Operand:
        """Return x * y."""
        if isinstance(x, str) and isinstance(y, str):
            return self.apply("mul", x, y)
        return self.linear(x, y, None) if not isinstance(y, str) else self.linear(y, _constant(x), None)

    def largest(self, x: Operand, y: Operand) -> Operand:
        """Return the larger one."""
        return self.add(y, self.relu(self.sub(x, y)))

    def smallest(self, x: Operand, y: Operand) -> Operand:
        """Return the smaller one."""
        return self.sub(x, self.relu(self.sub(x, y)))

    def relu(self, x: Operand) -> Operand:
        """Return max(x, 0)."""
        return self.apply("relu", x) if isinstance(x, str) else np.maximum(x, 0.0)

    def all_by(self, op: Callable[[Operand, Operand], Operand], operands: list[Operand]) -> Operand:
        """Join operands by an operation in a tree, whose depth is what costs rounds; constants first, among them."""
        fixed: list[Operand] = [x for x in operands if not isinstance(x, str)]
        row: list[Operand] = [x for x in operands if isinstance(x, str)]
        if fixed:
            row.append(reduce(op, fixed))
        while len(row) > 1:
            row = [*(op(a, b) for a, b in zip(row[::2], row[1::2], strict=False)), *row[len(row) // 2 * 2 :]]
        return row[0]

    def steps(self, x: Operand) -> list[Step]:
        """Return all steps; `x` becomes the node's result."""
        result = self.widened(_value(x), self.result_shape)
        output = self._node.outputs[0]
        if not self.added or self.added[-1].output != result:
            return [*self.added, Step("identity", self._node.name, (result,), output, self.result_shape)]
        return [*self.added[:-1], replace(self.added[-1], name=self._node.name, output=output)]


def _value(x: Operand) -> str:
    if isinstance(x, str):
        return x
    raise Refused("what is compared or put into a function must depend on the model's input", "compute it beforehand")


def _constant(x: Operand) -> Array:
    return np.asarray(x)


def finite(x: Operand) -> Operand:
    """Return an operand; refuse a constant that holds infinity or what is no number: a mask has smaller ones here."""
    if isinstance(x, str) or bool(np.isfinite(x).all()):
        return x
    reason = f"a constant must hold numbers; it holds {x[~np.isfinite(x)].ravel()[0]}, and not to mask a softmax"
    raise Refused(reason, "use a number that leaves results which fixed point holds")


def decidable(x: Operand) -> Operand:
    """Return an operand whose constants beyond all that comparisons decide, infinity too, are such as they do."""
    return x if isinstance(x, str) else np.where(np.abs(x) >= WIDEST, np.sign(x) * WIDEST / 2, x)


def is_integral(name: str, graph: Graph) -> bool:
    """Return whether a value's numbers are whole by construction."""
    if name not in graph.activations:
        return name in graph.constants and graph.constants[name].dtype.kind in "iub"
    if np.dtype(graph.dtypes.get(name, "float32")).kind in "iub":
        return True
    maker = next((node for node in graph.nodes if name in node.outputs), None)
    if maker is None or maker.domain or maker.op_type not in _KEEP_WHOLE:
        return False
    return maker.op_type == "Sign" or all(is_integral(x, graph) for x in maker.inputs[: _KEEP_WHOLE[maker.op_type]])


# How many inputs must be whole for the result to be.
_KEEP_WHOLE = {
    **dict.fromkeys(("Cast", "CastLike", "Identity", "Floor", "Ceil", "Round", "Sign", "Neg", "Abs", "Relu"), 1),
    **dict.fromkeys(("Reshape", "Transpose"), 1),
    **dict.fromkeys(("Flatten", "Squeeze", "Unsqueeze", "Gather", "Slice", "Expand", "ReduceSum", "ReduceMax"), 1),
    **dict.fromkeys(("Add", "Sub", "Mul"), 2),
    **dict.fromkeys(("Max", "Min", "Sum", "Concat"), None),
}
