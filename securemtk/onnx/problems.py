"""What stands in the way of a model, node by node."""

from collections.abc import Sequence
from typing import NamedTuple

from protocols.errors import UnsupportedError


class Problem(NamedTuple):
    """One thing in a model that cannot be run.

    Args:
        name: the node's (or input's) name.
        op_type: its ONNX operator, or "input", "output", "initializer", "model".
        reason: what is not supported about it.
        remedy: what its author can do.
    """

    name: str
    op_type: str
    reason: str
    remedy: str


class UnsupportedNodes(UnsupportedError):
    """A model holds nodes that we cannot run; all of them at once.

    Attributes:
        nodes: one `Problem`, a tuple (name, op_type, reason, remedy), for each of them.
    """

    def __init__(self, nodes: Sequence[Problem]) -> None:
        self.nodes = list(nodes)
        lines = [f"  {p.name!r} ({p.op_type}): {p.reason}; {p.remedy}" for p in self.nodes]
        super().__init__("every node of a model must be supported; these are not:\n" + "\n".join(lines))
