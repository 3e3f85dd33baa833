"""Several steps in the making: each call adds one and returns the name of its value.

`Builder` is what all that make steps share; `Draft` is the one of most rules, with a method for each kind of step. All
axes here are ours: the batch is 0 (of a model understood as a whole, an axis of 1 that ONNX does not have).
"""

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace

import numpy as np

from protocols.program.program import Attribute, Shape
from securemtk.onnx.building.lower import custom
from securemtk.onnx.building.registry import Refused, Step, affine, constant_input
from securemtk.onnx.model.graph import Array, Graph, Node

ABSENT = -1
# A value's name, or a constant in float64.
Operand = str | Array


def without(shape: Shape, axes: Sequence[int]) -> Shape:
    """Return the shape of a sample without some axes."""
    return tuple(n for i, n in enumerate(shape, 1) if i not in axes)


class Builder:
    """Steps that are added one by one.

    Args:
        shapes: of values that are there already, of one sample each.
        step_name: gives a step's name, from its operator and the number of steps before it; names of layers stand in
            manifests, so that they must not change.
        value_name: gives the name of a step's value, from that number.
    """

    def __init__(
        self, shapes: MutableMapping[str, Shape], step_name: Callable[[str, int], str], value_name: Callable[[int], str]
    ) -> None:
        self.added: list[Step] = []
        self._shapes: ChainMap[str, Shape] = ChainMap({}, shapes)
        self._step_name, self._value_name = step_name, value_name

    def shape(self, value: str) -> Shape:
        """Return the shape of one sample of a value."""
        return self._shapes[value]

    def put(
        self,
        op: str,
        inputs: Sequence[str],
        shape: Sequence[int],
        params: Mapping[str, Array] | None = None,
        attrs: Mapping[str, Attribute] | None = None,
        *,
        name: str | None = None,
    ) -> str:
        """Add a step.

        Args:
            op: its operator.
            inputs: names of values.
            shape: of one sample of its value.
            params: role -> float64 values of the keeper's.
            attrs: public attributes.
            name: the step's; absent, the one that this builder gives.

        Returns:
            The name of its value.
        """
        n = len(self.added)
        name = self._step_name(op, n) if name is None else name
        return self.append(Step(op, name, tuple(inputs), self._value_name(n), tuple(shape), params or {}, attrs or {}))

    def append(self, step: Step) -> str:
        """Add a step that has its names already; return the name of its value."""
        self.added.append(step)
        self._shapes[step.output] = step.shape
        return step.output

    def affine(self, value: str, *, scale: Array | None = None, shift: Array | None = None) -> str:
        """Add x * scale + shift with parameters of the value's rank, batch axis 1; None for ones and zeros."""
        shape = self.shape(value)
        return self.put("affine", (value,), shape, affine("", value, "", shape, scale=scale, shift=shift).params)


class Draft(Builder):
    """Steps of one node; values are named by their number until `made` gives the node's outputs their names.

    Args:
        node: what is translated.
        graph: where it stands.
    """

    def __init__(self, node: Node, graph: Graph) -> None:
        super().__init__(graph.shapes, lambda op, n: f"{node.name}/{op}", lambda n: f"{node.name}/value {n}")
        self._node, self._graph = node, graph

    def add(self, op: str, inputs: Sequence[str], shape: Shape, /, **attrs: Attribute) -> str:
        """Add a step without parameters."""
        return self.put(op, inputs, shape, attrs=attrs)

    def made(self, *values: str) -> list[Step]:
        """Return the steps, with the values as the node's outputs in order; "" for an output that nobody uses."""
        own = {step.output for step in self.added}
        named = {v: output for v, output in zip(values, self._node.outputs, strict=False) if v in own}
        steps: list[Step] = []
        for step in self.added:
            name = self._node.name if step.output in named else step.name
            inputs = tuple(named.get(x, x) for x in step.inputs)
            steps.append(replace(step, name=name, inputs=inputs, output=named.get(step.output, step.output)))
        for value, output in zip(values, self._node.outputs, strict=False):
            if value and named.get(value) != output:
                source = named.get(value, value)
                steps.append(Step("identity", self._node.name, (source,), output, self.shape(value)))
        return steps

    def weight(self, index: int, what: str) -> Operand:
        """Return an input that files hold as a constant and that may be computed where a model is seen as a whole.

        Args:
            index: which input.
            what: what a refusal calls it.

        Raises:
            Refused: it is computed from the input, and the model is understood by samples: it has no batch.
        """
        if self._node.input(index) not in self._graph.activations:
            return constant_input(self._node, self._graph, index, what)
        if not self._graph.whole:
            raise Refused(f"{what} must be constant where the batch is free", "fix all sizes of the inputs")
        return self._node.input(index)

    def shaped(self, x: Operand, shape: Sequence[int]) -> Operand:
        """Give an operand the shape of a sample; a constant has a batch axis of 1 before it."""
        return self.reshape(x, shape) if isinstance(x, str) else x.reshape((1, *shape))

    # --- movement

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        """Give each sample a new shape."""
        shape = tuple(int(n) for n in shape)
        return value if shape == self.shape(value) else self.add("reshape", (value,), shape, shape=shape)

    def transpose(self, value: str, perm: Sequence[int]) -> str:
        """Permute axes; perm[0] is 0."""
        perm = tuple(perm)
        old = (0, *self.shape(value))
        if perm == tuple(range(len(old))):
            return value
        return self.add("transpose", (value,), tuple(old[i] for i in perm[1:]), perm=perm)

    def to_last(self, value: str, axis: int) -> tuple[str, tuple[int, ...]]:
        """Move an axis to the end; return the value and the permutation that moves it back."""
        n = len(self.shape(value)) + 1
        perm = (*(i for i in range(n) if i != axis), axis)
        return self.transpose(value, perm), tuple(perm.index(i) for i in range(n))

    def take(self, value: str, axis: int, indices: Sequence[int], fill: float = 0.0) -> str:
        """Choose places of an axis; `ABSENT` stands for the number `fill`."""
        old, indices = self.shape(value), tuple(int(i) for i in indices)
        if indices == tuple(range(old[axis - 1])):
            return value
        shape = (*old[: axis - 1], len(indices), *old[axis:])
        return self.add("take", (value,), shape, axis=axis, indices=indices, fill=fill)

    def places(self, value: str, places: Array, fill: float = 0.0) -> str:
        """Choose elements by their number in a sample: the result has the shape of `places`."""
        flat = self.take(self.reshape(value, (math.prod(self.shape(value)),)), 1, places.ravel().tolist(), fill)
        return self.reshape(flat, places.shape)

    def windows(self, value: str, taps: Sequence[Array], fill: float = 0.0) -> str:
        """Lay the places of sliding windows side by side: (N, C, *sizes) -> (N, C, *kernel, *made).

        Args:
            value: of a model understood as a whole.
            taps: of each axis, int64 (made, kernel): the place that each tap of each window reads; `ABSENT` for `fill`.
            fill: a public number.
        """
        n = len(taps)
        for axis, places in enumerate(taps, 3):
            value = self.take(value, axis, places.ravel().tolist(), fill)
        apart = self.reshape(value, (*self.shape(value)[:2], *(size for x in taps for size in x.shape)))
        return self.transpose(apart, (0, 1, 2, *range(4, 4 + 2 * n, 2), *range(3, 3 + 2 * n, 2)))

    def expand(self, value: str, shape: Sequence[int]) -> str:
        """Repeat axes of 1; the rank stays."""
        shape = tuple(shape)
        return value if shape == self.shape(value) else self.add("expand", (value,), shape, shape=shape)

    def concat(self, values: Sequence[str], axis: int) -> str:
        """Join along an axis."""
        if len(values) == 1:
            return values[0]
        shapes = [self.shape(x) for x in values]
        size = sum(s[axis - 1] for s in shapes)
        return self.add("concat", values, (*shapes[0][: axis - 1], size, *shapes[0][axis:]), axis=axis)

    def constant(self, source: str, value: Array) -> str:
        """Make a constant of the keeper's a shared value, of the shape of one sample; `source` is any activation."""
        zero = self.take(self.reshape(source, (math.prod(self.shape(source)),)), 1, (ABSENT,))
        flat = self.affine(self.expand(zero, (value.size,)), shift=value.reshape(1, -1))
        return self.reshape(flat, value.shape)

    # --- arithmetic

    def binary(self, op: str, x: str, y: str) -> str:
        """Add a sum, difference or product ("add", "sub", "mul") of two values of one rank, which broadcast."""
        return self.add(op, (x, y), np.broadcast_shapes(self.shape(x), self.shape(y)))

    def scale(self, value: str, factor: float, offset: float = 0.0) -> str:
        """Add x * factor + offset, both public."""
        return self.add("scale", (value,), self.shape(value), factor=factor, offset=offset)

    def linear(self, value: str, scale: Operand | None, shift: Operand | None) -> str:
        """Add x * scale + shift with operands that `shaped` has made; None for ones and zeros."""
        if not isinstance(scale, str) and not isinstance(shift, str):
            return value if scale is None and shift is None else self.affine(value, scale=scale, shift=shift)
        if isinstance(scale, str):
            value = self.binary("mul", value, scale)
        elif scale is not None:
            value = self.affine(value, scale=scale)
        return self.binary("add", value, shift) if isinstance(shift, str) else self.linear(value, None, shift)

    def matmul(self, value: str, weight: Array, bias: Array | None = None) -> str:
        """Multiply the last axis by a constant (K, N) matrix."""
        shape = (*self.shape(value)[:-1], weight.shape[1])
        params = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return self.put("matmul", (value,), shape, params)

    def dot(self, x: str, y: str) -> str:
        """Add the products of two values' matrices, of one rank; leading axes broadcast."""
        a, b = self.shape(x), self.shape(y)
        return self.add("dot", (x, y), (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1]))

    def function(self, value: str, name: str, *numbers: float) -> str:
        """Apply a function of `protocols.program.functions`: of FUNCTIONS, or with numbers of CUSTOM."""
        if not numbers:
            return self.add(name, (value,), self.shape(value))
        return self.add("function", (value,), self.shape(value), **custom(name, *numbers))

    def magnitude(self, value: str) -> str:
        """Add |x|: exact."""
        return self.add("leaky_relu", (value,), self.shape(value), slope=-1.0)

    def whole_power(self, value: str, n: int) -> str:
        """Add x**n, n at least 1, by repeated squaring."""
        result = ""
        while True:
            if n & 1:
                result = self.binary("mul", result, value) if result else value
            n >>= 1
            if not n:
                return result
            value = self.binary("mul", value, value)

    # --- reductions; they keep their axes with size 1

    def reduce(self, op: str, value: str, axes: Sequence[int], *, keepdims: bool = True) -> str:
        """Add a "sum" or "mean" over axes."""
        if not axes:
            return value
        shape = self._reduced(value, axes) if keepdims else without(self.shape(value), axes)
        return self.add(op, (value,), shape, axes=tuple(axes), keepdims=int(keepdims))

    def deviation(self, value: str, axes: Sequence[int]) -> str:
        """Add c (x - mean) over axes of n values, c = n / 2**floor(log2 n)."""
        return self.add("deviation", (value,), self.shape(value), axes=tuple(axes))

    def largest(self, value: str, axes: Sequence[int]) -> str:
        """Add the maximum over axes."""
        if not axes:
            return value
        if len(axes) == 1:
            return self.add("max", (value,), self._reduced(value, axes), axis=axes[0])
        joined = self.joined(value, axes)
        last = len(self.shape(joined))
        return self.reshape(
            self.add("max", (joined,), self._reduced(joined, (last,)), axis=last), self._reduced(value, axes)
        )

    def joined(self, value: str, axes: Sequence[int]) -> str:
        """Move axes to the end and make them one."""
        n = len(self.shape(value)) + 1
        kept = [i for i in range(n) if i not in axes]
        moved = self.transpose(value, (*kept, *axes))
        shape = self.shape(moved)
        return self.reshape(moved, (*shape[: len(kept) - 1], math.prod(shape[len(kept) - 1 :])))

    def _reduced(self, value: str, axes: Sequence[int]) -> Shape:
        return tuple(1 if i in axes else n for i, n in enumerate(self.shape(value), 1))
