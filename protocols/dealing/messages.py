"""What a dealer and the parties say to each other: plans, corrections, and what is wanted on demand. All public."""

from collections.abc import Iterable
from typing import Annotated, ClassVar

import msgspec

from protocols.dealing import correlation
from protocols.dealing.correlation import Request
from protocols.net.frames import Count, Index, Message, Record, Shape

_Number = Annotated[int, msgspec.Meta(ge=-(1 << 53), le=1 << 53)]
_Option = bool | _Number | float | str | tuple[_Number, ...] | None


class PackedRequest(Record, frozen=True, array_like=True):
    """A correlation that is asked for, as `correlation.Request` describes it."""

    kind: str
    shapes: Annotated[tuple[Shape, ...], msgspec.Meta(max_length=64)]
    options: Annotated[tuple[tuple[str, _Option], ...], msgspec.Meta(max_length=64)]

    def __post_init__(self) -> None:
        if self.kind not in correlation.KINDS:
            raise ValueError("a list of correlations must name kinds that we know")


Requests = tuple[PackedRequest, ...]


def pack(listed: Iterable[Request]) -> Requests:
    """Return requests as they travel."""
    return tuple(PackedRequest(q.kind, q.shapes, q.options) for q in listed)


def unpack(packed: Iterable[PackedRequest]) -> list[Request]:
    """Return what `pack` was given."""
    return [Request(q.kind, q.shapes, q.options) for q in packed]


class Deal(Message, frozen=True):
    """What the dealer says to both parties before it deals a prediction.

    Args:
        prediction: its number; numbers only grow.
        plan: number of the model, and batch.
        requests: the plan's correlations, the first time; None later.
    """

    kind: ClassVar[str] = "deal"

    prediction: Index
    plan: tuple[Index, Count]
    requests: Requests | None = None


class Corrections(Message, frozen=True):
    """Some of the corrections of one prediction, or of one correlation on demand, which come as arrays.

    Args:
        prediction: its number.
        last: whether these are the last.
    """

    kind: ClassVar[str] = "corrections"
    holds_arrays: ClassVar[bool] = True

    prediction: Index
    last: bool


class Want(Message, frozen=True):
    """What a party asks for on demand.

    Args:
        number: of the correlation.
        request: None says that the program has ended.
    """

    kind: ClassVar[str] = "want"

    number: Index
    request: PackedRequest | None = None


class Supply(Message, frozen=True):
    """What the dealer says to both parties before it deals a correlation on demand.

    Args:
        number: of the correlation.
        epoch: which only grows, by one with each wrong guess of the dealer's.
        request: what it is.
    """

    kind: ClassVar[str] = "supply"

    number: Index
    epoch: Index
    request: PackedRequest
