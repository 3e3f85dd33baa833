"""What a protocol costs, declared beside it and compared with the channel's counters in a test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Cost:
    """Communication between the two computing parties.

    Args:
        rounds: messages, or simultaneous exchanges, that have to wait for the one before.
        payload_bytes: bytes of tensors in both directions, without frame headers and TLS records.
    """

    rounds: int = 0
    payload_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.rounds + other.rounds, self.payload_bytes + other.payload_bytes)


def costs(cost: Callable[..., Cost]) -> Callable[[F], F]:
    """Attach `cost(...)` to a protocol; it takes the public sizes that the protocol's docstring names."""

    def attach(protocol: F) -> F:
        protocol.cost = cost  # type: ignore[attr-defined]
        return protocol

    return attach
