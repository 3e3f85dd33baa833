"""What each protocol consists of: one `Backend` for each name that `Session(protocol=...)` takes.

A backend lies in a module of its own, which is imported when the protocol is first asked for: whoever computes with
keys imports no CrypTen, and whoever only names a protocol imports neither.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from protocols import limits
from protocols.dealing.correlation import Request
from protocols.errors import UnsupportedError
from protocols.on_demand import load
from protocols.program.program import Program
from protocols.running.names import PROTOCOLS
from protocols.two_party.party import Party
from protocols.two_party.value import Operator, Weights

__all__ = ["PROTOCOLS", "Backend", "find", "require"]

Params = Mapping[str, NDArray[np.floating]]
Parts = tuple[Tensor, ...]


class ShareWeights(Protocol):
    """How a program's parameters become shares."""

    def __call__(
        self, program: Program, params: Params | None, comparison_bits: int = limits.COMPARISON_BITS
    ) -> dict[str, Tensor]:
        """Return this party's shares: of `params` at the keeper, of None at the user; nothing is sent."""


class Finish(Protocol):
    """What the user does with one correlation before the input is known."""

    def __call__(self, request: Request, part: Parts, masked: Weights) -> Parts:
        """Return what takes the part's place; `masked` are the keeper's masked parameters."""


@dataclass(frozen=True)
class Backend:
    """A protocol.

    Args:
        operators: each operator of `program.OPERATORS` -> its function of (party, layer, weights, values).
        is_negative: share -> share of the bit [x < 0], for whatever operator compares.
        share_weights: makes this party's shares of a program's parameters.
        pack_weights: prepares weights for their products, so that no prediction waits for it.
        masked_names: the parameters that the keeper sends once, masked.
        finish: does the user's work on one correlation before the input is known.
        warm: loads or compiles what a prediction needs.
        acting: while its block runs, this thread computes as the party.
    """

    operators: Mapping[str, Operator]
    is_negative: Callable[[Party, Tensor], Tensor]
    share_weights: ShareWeights
    pack_weights: Callable[[Program, Weights], None]
    masked_names: Callable[[Program], list[str]]
    finish: Finish
    warm: Callable[[], None]
    acting: Callable[[Party], AbstractContextManager[None]]


def require(name: str) -> None:
    """Raise UnsupportedError unless there is a protocol of this name; imports none."""
    if name not in PROTOCOLS:
        raise UnsupportedError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {name!r}")


@functools.cache
def find(name: str) -> Backend:
    """Return a protocol by name; the first time, import what it consists of.

    Raises:
        UnsupportedError: there is no such protocol.
    """
    require(name)
    backend: Backend = load(PROTOCOLS[name]).BACKEND
    return backend
