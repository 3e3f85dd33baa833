"""A party's parts of all correlations of one prediction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from protocols.dealing import correlation
from protocols.dealing.correlation import Request
from protocols.errors import DealerError
from protocols.primitives.prg import Stream


class Correlations(Protocol):
    """Where a party's parts of correlations come from."""

    def take(self, request: Request) -> tuple[Tensor, ...]:
        """Return this party's part; each part is handed out once."""


Parts = tuple[Tensor, ...]


@dataclass
class PredictionShares:
    """A party's parts of all correlations of one prediction, expanded before the prediction starts.

    Args:
        rank: 0 keeper, 1 user.
        stream: this prediction's stream, which the dealer expands as well.
        expected: the requests in order, as the dealer dealt them.
        corrections: what the dealer sent to this party, in order.
        finish: applied to each request and part; a linear layer computes there what it can before the input is known.
    """

    rank: int
    stream: Stream = field(repr=False)
    expected: Sequence[Request]
    corrections: Sequence[Tensor] = field(repr=False, default=())
    finish: Callable[[Request, Parts], Parts] = lambda request, part: part

    def __post_init__(self) -> None:
        self._next = 0
        self._parts: list[Parts | None] = []
        used = 0
        for request in self.expected:
            n = len(correlation.correction_shapes(request, self.rank))
            part = correlation.take(request, self.rank, self.stream, self.corrections[used : used + n])
            self._parts.append(self.finish(request, part))
            used += n
        self.corrections = ()

    def take(self, request: Request) -> tuple[Tensor, ...]:
        """Return this party's part of the next request.

        Raises:
            DealerError: the request is not the one that was dealt, or all are used up.
        """
        if self._next >= len(self.expected):
            raise DealerError(f"the dealer must have one more correlation; asked for {request.kind} {request.shapes}")
        dealt = self.expected[self._next]
        part = self._parts[self._next]
        if dealt != request or part is None:
            raise DealerError(
                f"correlation {self._next} must be {request.kind} {request.shapes}; "
                f"the dealer made {dealt.kind} {dealt.shapes}"
            )
        self._parts[self._next] = None
        self._next += 1
        return part
