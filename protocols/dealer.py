"""The dealer: makes the correlations of a prediction and hands them to both parties.

At the start of a session the dealer draws one seed for each party. Prediction number i uses the
streams derived from those seeds for i alone; numbers only grow, so that no correlation is dealt
twice. Only corrections travel afterwards, and only to the keeper.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocols import correlation
from protocols.channel import Link
from protocols.correlation import KEEPER, USER, Request, Secrets
from protocols.errors import DealerError, IntegrityError
from protocols.party import Hand
from protocols.prg import Stream, fresh_seed

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

    def deal(self, prediction: int, listed: Sequence[Request], secrets: Secrets | None) -> Iterator[Tensor]:
        """Make the keeper's corrections of one prediction, in order.

        Raises:
            DealerError: the number has been dealt, or a later one has.
        """
        if prediction <= self._last:
            raise DealerError(f"prediction {prediction} has been dealt already: correlations are never dealt twice")
        self._last = prediction
        keeper, user = (stream_of(seed, prediction) for seed in self._seeds)
        return itertools.chain.from_iterable(correlation.deal(q, keeper, user, secrets) for q in listed)


def send_corrections(link: Link, prediction: int, corrections: Iterator[Tensor]) -> None:
    """Send corrections to the keeper while they are made."""
    frame: list[np.ndarray] = []
    for tensor in corrections:
        frame.append(tensor.numpy())
        if sum(a.nbytes for a in frame) >= FRAME_BYTES:
            link.send("corrections", {"prediction": prediction, "last": False}, frame)
            frame = []
    link.send("corrections", {"prediction": prediction, "last": True}, frame)


def receive_hand(link: Link, seed: bytes, prediction: int, listed: Sequence[Request]) -> Hand:
    """Return the keeper's hand of one prediction, once all its corrections are here."""
    corrections: list[Tensor] = []
    last = False
    while not last:
        message = link.recv("corrections")
        if message.meta.get("prediction") != prediction:
            raise DealerError(f"the dealer must deal prediction {prediction}; got another number")
        corrections += [torch.from_numpy(a) for a in message.arrays]
        last = bool(message.meta.get("last"))
    shapes = [shape for q in listed for shape in correlation.correction_shapes(q)]
    if [tuple(c.shape) for c in corrections] != shapes or any(c.dtype != torch.int64 for c in corrections):
        raise DealerError(f"the dealer's corrections of prediction {prediction} must fit the plan; they do not")
    return Hand(KEEPER, stream_of(seed, prediction), listed, corrections)


def receive_seed(link: Link) -> bytes:
    """Return this party's seed."""
    message = link.recv("seed")
    if [(a.dtype.str, a.shape) for a in message.arrays] != [("|u1", (16,))]:
        raise IntegrityError(f"{link.role} must send a seed of 16 bytes")
    return message.arrays[0].tobytes()
