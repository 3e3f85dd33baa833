"""What convolutions and pools share: sliding windows over one to three axes, and steps in a row.

A value here has the shape (..., channels, *spatial) of one sample: leading axes are there where a model is understood
as a whole, whose samples are batches.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from protocols.program.program import Attribute, Shape
from securemtk.onnx.building.builder import Builder
from securemtk.onnx.building.registry import Refused, Step, activation_input, output_shape
from securemtk.onnx.model.graph import Array, Graph, Node

# The program's windows have two axes; of more, all but the last two are dealt with before.
MOST_AXES = 3


@dataclass(frozen=True)
class Axis:
    """A sliding window along one axis.

    Args:
        size: places of the input.
        made: windows.
        kernel: taps of each window.
        stride: places from one window to the next.
        dilation: places from one tap to the next.
        before: places of padding before the input, as declared; less than 0 where places are cut off.
        after: the same behind it; a window may reach further.
    """

    size: int
    made: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    def taps(self) -> Array:
        """Return the place of the input that each tap of each window reads, int64 (made, kernel)."""
        starts = np.arange(self.made) * self.stride - self.before
        return starts[:, None] + np.arange(self.kernel) * self.dilation

    def is_trivial(self) -> bool:
        """Return whether each window is the one place that it stands for."""
        return (self.kernel, self.stride, self.before) == (1, 1, 0) and self.made == self.size

    def reach(self) -> int:
        """Return the padding behind the input that the last window needs."""
        return max(0, (self.made - 1) * self.stride + (self.kernel - 1) * self.dilation + 1 - self.size - self.before)

    def gathered(self) -> "Axis":
        """Return the axis after the taps of all windows have been laid side by side."""
        return Axis(self.made * self.kernel, self.made, self.kernel, self.kernel)


class Chain:
    """Steps in a row, each of which works on what the one before has made; they start at a node's first input.

    Args:
        node: the node whose steps they are.
        graph: where it stands.

    Attributes:
        node: as given.
        value: name of the value that the next step works on.
        shape: its shape for one sample.
    """

    def __init__(self, node: Node, graph: Graph) -> None:
        output = node.outputs[0]
        self.node, self.value = node, activation_input(node, graph)
        self.shape = graph.shapes[self.value]
        self._builder = Builder(graph.shapes, lambda op, _: f"{node.name}/{op}", lambda n: f"{output}/{n}")

    def then(
        self,
        op: str,
        shape: Shape,
        params: Mapping[str, Array] | None = None,
        attrs: Mapping[str, Attribute] | None = None,
        *,
        main: bool = False,
        others: tuple[str, ...] = (),
    ) -> None:
        """Add a step; the `main` one bears the node's name, `others` are inputs besides the value."""
        name = self.node.name if main else None
        self.value = self._builder.put(op, (self.value, *others), shape, params, attrs, name=name)
        self.shape = shape

    def beside(self, step: Step) -> str:
        """Add a step that does not work on the value, and return the name of what it makes."""
        return self._builder.append(step)

    def reshape(self, *shape: int) -> None:
        """Give each sample a new shape."""
        if shape != self.shape:
            self.then("reshape", shape, attrs={"shape": shape})

    def transpose(self, *perm: int) -> None:
        """Permute the axes of a sample, the first of which is 0."""
        if perm != tuple(range(len(perm))):
            self.then("transpose", tuple(self.shape[i] for i in perm), attrs={"perm": (0, *(i + 1 for i in perm))})

    def take(self, axis: int, places: Array) -> None:
        """Choose places of an axis of a sample, which may be counted from the end; what lies outside it is 0."""
        axis %= len(self.shape)
        size = self.shape[axis]
        indices = tuple(int(i) if 0 <= i < size else -1 for i in places.ravel())
        if indices != tuple(range(size)):
            shape = (*self.shape[:axis], len(indices), *self.shape[axis + 1 :])
            self.then("take", shape, attrs={"axis": axis + 1, "indices": indices, "fill": 0})

    def end(self, graph: Graph) -> list[Step]:
        """Return the steps; the last one makes the node's output."""
        self.reshape(*output_shape(self.node, graph))
        if not self._builder.added:
            self.then("identity", self.shape)
        *others, last = self._builder.added
        return [*others, replace(last, output=self.node.outputs[0])]


def n_spatial(node: Node, graph: Graph) -> int:
    """Return the number of a node's spatial axes; refuse more than the rules know, and results without elements."""
    n = graph.rank(activation_input(node, graph)) - 2
    if not 1 <= n <= MOST_AXES:
        raise Refused(f"it must be 1-D, 2-D or 3-D; got {n}-D", "join axes, or use layers of fewer axes")
    if 0 in output_shape(node, graph):
        raise Refused("a window must fit into the padded input", "use a larger input or a smaller kernel")
    return n


def window(node: Node, graph: Graph, kernel: Shape) -> tuple[Axis, ...]:
    """Read the attributes that Conv and pools share; `kernel` has one entry for each spatial axis."""
    n = n_spatial(node, graph)
    sizes, made = graph.shapes[node.input(0)][-n:], output_shape(node, graph)[-n:]
    stride, dilation = numbers(node, "strides", n), numbers(node, "dilations", n)
    auto = node.attrs.get("auto_pad", "NOTSET")
    pads = tuple(int(x) for x in node.attrs.get("pads", (0,) * (2 * n)))
    found = [Axis(*each, 0, 0) for each in zip(sizes, made, kernel, stride, dilation, strict=True)]
    if auto == "VALID":
        return tuple(found)
    if auto in ("NOTSET", ""):
        return tuple(replace(x, before=pads[i], after=pads[n + i]) for i, x in enumerate(found))
    return tuple(_same(x, upper=auto == "SAME_UPPER") for x in found)


def _same(axis: Axis, *, upper: bool) -> Axis:
    """Pad for as many windows as strides fit, the odd place behind (upper) or before."""
    reach = (axis.kernel - 1) * axis.dilation + 1
    total = max((math.ceil(axis.size / axis.stride) - 1) * axis.stride + reach - axis.size, 0)
    before = total // 2 if upper else total - total // 2
    return replace(axis, before=before, after=total - before)


def numbers(node: Node, name: str, n: int, default: int = 1) -> Shape:
    """Return an attribute that has a whole number for each spatial axis."""
    return tuple(int(x) for x in node.attrs.get(name, ()) or (default,) * n)
