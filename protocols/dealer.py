"""The dealer: makes the correlations of a prediction and hands them to both parties.

At the start of a session the dealer draws one seed for each party. Prediction number i uses the
streams derived from those seeds for i alone; numbers only grow, so that no correlation is dealt
twice. Only corrections travel afterwards: shares to the keeper alone, comparison keys to both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocols import correlation
from protocols.channel import Link
from protocols.correlation import KEEPER, USER, Dealing, Dealt, Request
from protocols.errors import DealerError, IntegrityError
from protocols.prg import Stream, fresh_seed
from protocols.program import Program

# Corrections are sent as they are made, in frames of about this size.
FRAME_BYTES = 1 << 23


def stream_of(seed: bytes, prediction: int) -> Stream:
    """Return the stream of one party for one prediction."""
    return Stream(seed).derive(f"prediction {prediction}")


def pack(listed: Sequence[Request]) -> list[Any]:
    """Return requests as JSON values."""
    return [[q.kind, q.shapes, q.options] for q in listed]


def unpack(raw: Sequence[Any]) -> list[Request]:
    """Read what `pack` returned; raise IntegrityError for anything else."""

    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    try:
        listed = [Request(str(kind), freeze(shapes), freeze(options)) for kind, shapes, options in raw]
    except (TypeError, ValueError):
        raise IntegrityError("a list of correlations must consist of kind, shapes and options") from None
    if not all(q.kind in correlation.KINDS for q in listed):
        raise IntegrityError("a list of correlations must name kinds that we know")
    return listed


@dataclass
class TrustedDealer:
    """Makes correlations; knows every mask, and sees no message between the parties.

    Security: the parties trust the dealer not to collude with either of them; it learns the
    public plan, and for models with secured tasks it supplies the keys.
    """

    _seeds: tuple[bytes, bytes] = field(default_factory=lambda: (fresh_seed(), fresh_seed()), repr=False)
    _last: int = -1

    def seed_parties(self, keeper: Link, user: Link) -> None:
        """Give each party its seed."""
        for link, seed in ((keeper, self._seeds[KEEPER]), (user, self._seeds[USER])):
            link.send("seed", None, [np.frombuffer(seed, dtype=np.uint8)])

    def masks(self, model: int, program: Program) -> dict[str, Tensor]:
        """Return the masks of a model's weights, which the keeper draws as well."""
        return weight_masks(self._seeds[KEEPER], model, program)

    def deal(self, prediction: int, listed: Sequence[Request], dealing: Dealing) -> Iterator[Dealt]:
        """Make the corrections of one prediction, request by request.

        Raises:
            DealerError: the number has been dealt, or a later one has.
        """
        if prediction <= self._last:
            raise DealerError(f"prediction {prediction} has been dealt already: correlations are never dealt twice")
        self._last = prediction
        keeper, user = (stream_of(seed, prediction) for seed in self._seeds)
        return (correlation.deal(q, keeper, user, dealing) for q in listed)


def weight_masks(seed: bytes, model: int, program: Program) -> dict[str, Tensor]:
    """Return a mask for each parameter, drawn from the keeper's seed: known to keeper and dealer alone."""
    return {name: Stream(seed).derive(f"weights {model} {name}").words(shape) for name, shape in program.params.items()}


class _Outbox:
    """Collects the corrections of one party into frames."""

    def __init__(self, link: Link, prediction: int) -> None:
        self._link, self._prediction = link, prediction
        self._frame: list[np.ndarray] = []

    def add(self, tensors: Sequence[Tensor]) -> None:
        self._frame += [t.numpy() for t in tensors]
        if sum(a.nbytes for a in self._frame) >= FRAME_BYTES:
            self.flush(last=False)

    def flush(self, *, last: bool) -> None:
        self._link.send("corrections", {"prediction": self._prediction, "last": last}, self._frame)
        self._frame = []


def send_corrections(keeper: Link, user: Link, prediction: int, dealt: Iterator[Dealt]) -> None:
    """Send corrections to both parties while they are made."""
    to_keeper, to_user = _Outbox(keeper, prediction), _Outbox(user, prediction)
    for own, common in dealt:
        to_keeper.add([*own, *common])
        to_user.add(common)
    to_keeper.flush(last=True)
    to_user.flush(last=True)


def receive_corrections(link: Link, rank: int, prediction: int, listed: Sequence[Request]) -> list[Tensor]:
    """Return a party's corrections of one prediction, once all are here."""
    corrections: list[Tensor] = []
    last = False
    while not last:
        message = link.recv("corrections")
        if message.meta.get("prediction") != prediction:
            raise DealerError(f"the dealer must deal prediction {prediction}; got another number")
        corrections += [torch.from_numpy(a) for a in message.arrays]
        last = bool(message.meta.get("last"))
    shapes = [shape for q in listed for shape in correlation.correction_shapes(q, rank)]
    if [tuple(c.shape) for c in corrections] != shapes or any(c.dtype != torch.int64 for c in corrections):
        raise DealerError(f"the dealer's corrections of prediction {prediction} must fit the plan; they do not")
    return corrections


def receive_seed(link: Link) -> bytes:
    """Return this party's seed."""
    message = link.recv("seed")
    if [(a.dtype.str, a.shape) for a in message.arrays] != [("|u1", (16,))]:
        raise IntegrityError(f"{link.role} must send a seed of 16 bytes")
    return message.arrays[0].tobytes()
