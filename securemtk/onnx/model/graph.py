"""What is known about a model: its nodes, in order, which values are constant, and every other value's shape.

A model is understood in one of two ways. By samples: the first axis of every activation is the batch, which may be
free, and shapes are those of one sample. As a whole: every size is given, no axis is special, and the whole of each
input is the one sample of a prediction; ONNX's axis a is then our axis a + 1. `Graph.axis` and `Graph.rank` hide which.

Nothing here imports onnx: those who only name inputs and outputs need no more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from protocols.errors import InputError
from protocols.program.program import Shape
from securemtk.onnx.model.problems import Problem

Array = NDArray[Any]


@dataclass(frozen=True)
class ValueInfo:
    """An input or output of a model.

    Args:
        name: its name.
        shape: of one sample, without the batch axis (of a model understood as a whole, of the value itself); None
            when it could not be found out.
        dtype: name of its numpy type, such as "float32".
    """

    name: str
    shape: Shape | None
    dtype: str


@dataclass(frozen=True)
class Node:
    """One ONNX node, with Python values as attributes and "" in the place of an absent input."""

    name: str
    op_type: str
    domain: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]

    def input(self, index: int) -> str:
        """Return the name of an input, "" when it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass
class Graph:
    """A model's nodes, in order, and what is known about its values.

    Args:
        inputs: the model's inputs.
        outputs: names of its outputs, in order.
        nodes: the nodes that work on activations.
        constant_nodes: the nodes that do not; their results are in `constants`.
        constants: values that are the same whatever the input and the batch.
        activations: names of the values that depend on the input's numbers.
        shapes: shape of one sample of each activation that has the batch as its first axis.
        seen: shape of each value in a run with a batch of 2, where there was one.
        dtypes: numpy type of each activation.
        used: names of values that a node or the caller uses.
        problems: what is wrong with inputs and outputs.
        failure: why the model as a whole cannot be run, if it cannot.
        batch: the batch that the file fixes, None when it is free.
        whole: whether the model is understood as a whole.
    """

    inputs: tuple[ValueInfo, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constant_nodes: tuple[Node, ...]
    constants: dict[str, Array]
    activations: set[str]
    used: set[str]
    shapes: dict[str, Shape] = field(default_factory=dict)
    seen: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    failure: InputError | None = None
    batch: int | None = None
    whole: bool = False

    def rank(self, name: str) -> int:
        """Return the number of axes that an activation has in the model."""
        return len(self.shapes[name]) + (not self.whole)

    def axis(self, axis: int, rank: int) -> int:
        """Return our axis for an axis of a node, which may be negative, of a value with `rank` axes in the model.

        Args:
            axis: of a node.
            rank: number of axes that the value has in the model.
        """
        return (axis + rank if axis < 0 else axis) + self.whole

    def output_info(self) -> tuple[ValueInfo, ...]:
        """Return the model's outputs with their shapes."""
        return tuple(self._info(x) for x in self.outputs)

    def _info(self, name: str) -> ValueInfo:
        constant = None if name in self.activations else self.constants.get(name)
        if constant is not None:
            return ValueInfo(name, constant.shape[not self.whole :], constant.dtype.name)
        return ValueInfo(name, self.shapes.get(name), self.dtypes.get(name, "unknown"))


def unique(name: str, taken: set[str]) -> str:
    """Return `name`, or `name` with the first number that makes it new, and take it.

    Args:
        name: as wanted.
        taken: names that are taken; the new one is added.
    """
    candidate, i = name, 2
    while candidate in taken:
        candidate, i = f"{name}_{i}", i + 1
    taken.add(candidate)
    return candidate
