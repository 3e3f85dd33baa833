"""What stands in the way of a model, node by node."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from protocols.errors import SecureError, UnsupportedError, place_of

_HERE = Path(__file__).resolve().parents[1]


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


_UNFORESEEN = "it cannot be understood: "


def unforeseen(error: Exception) -> tuple[str, str]:
    """Return reason and remedy of an error that nobody foresaw: its kind and place, for its text may hold a weight."""
    return (
        _UNFORESEEN + place_of(error, _HERE),
        "tell the authors of securemtk, with the file if you may; until then leave this part out of the model",
    )


def is_unforeseen(problem: Problem) -> bool:
    """Return whether a problem is an error that nobody foresaw."""
    return problem.reason.startswith(_UNFORESEEN)


@contextlib.contextmanager
def foreseen(name: str = "model", kind: str = "model") -> Iterator[None]:
    """Turn whatever goes wrong inside, and is no error of ours, into a refusal of the file.

    Args:
        name: what could not be understood, as in `Problem`.
        kind: its `Problem.op_type`.

    Raises:
        UnsupportedNodes: in the place of any exception that nobody foresaw.
    """
    try:
        yield
    except SecureError:
        raise
    except Exception as error:
        raise UnsupportedNodes([Problem(name, kind, *unforeseen(error))]) from None
