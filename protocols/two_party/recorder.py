"""A party that computes alone: what it would send, take and ask the dealer for, without the other one.

Neither messages nor correlations depend on values, so that tensors of the right shape may stand for what a peer would
send. On torch's meta device they hold no values at all, and a whole prediction costs next to nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protocols.dealing import correlation
from protocols.dealing.correlation import Request, Shape
from protocols.primitives.prg import Stream
from protocols.two_party.party import Party


@dataclass(frozen=True)
class Message:
    """A tensor that a party sends or takes.

    Args:
        kind: of the frame.
        is_sent: whether it goes out.
        shape, dtype: of the tensor.
    """

    kind: str
    is_sent: bool
    shape: Shape
    dtype: torch.dtype


class Recorder:
    """Wire and correlations of a party that computes alone; notes all that goes over the one and comes from the other.

    Args:
        rank: 0 keeper, 1 user.
        device: "meta" for tensors without values, "cpu" for made-up ones.

    Attributes:
        messages: what was sent and taken, in order.
        requests: the correlations that were asked for, in order.
    """

    def __init__(self, rank: int, device: str = "meta") -> None:
        self.messages: list[Message] = []
        self.requests: list[Request] = []
        self._rank, self._device = rank, device

    def exchange(self, kind: str, tensor: Tensor) -> Tensor:
        """Note a message each way; return a tensor like the one that is sent."""
        self.send(kind, tensor)
        return self._receive(kind, tensor.shape, tensor.dtype)

    def send(self, kind: str, tensor: Tensor) -> None:
        """Note a message that goes out."""
        self.note(Message(kind, True, tuple(tensor.shape), tensor.dtype))

    def recv(self, kind: str, shape: Sequence[int]) -> Tensor:
        """Note a message that comes in; return an int64 tensor of `shape`."""
        return self._receive(kind, shape, torch.int64)

    def take(self, request: Request) -> tuple[Tensor, ...]:
        """Note a request; return a part of the right shapes."""
        self.requests.append(request)
        return tuple(self.make(shape) for shape in correlation.part_shapes(request, self._rank))

    def note(self, message: Message) -> None:
        """Keep a message in mind."""
        self.messages.append(message)

    def make(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Return a tensor of ones, on the meta device one without values."""
        made = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        # Not zeros: those the system hands out when they are first touched, within the time that somebody may measure.
        return made if made.is_meta else made.fill_(1)

    def party(self) -> Party:
        """Return a party that has this recorder for its wire and its dealer."""
        nothing = Stream(bytes(16))  # draws no secret: what it masks is made up
        return Party(self._rank, self, self, nothing, nothing, nothing, device=self._device)

    def _receive(self, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.note(Message(kind, False, tuple(shape), dtype))
        return self.make(shape, dtype)
