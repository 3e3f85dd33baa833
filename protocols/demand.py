"""Correlations on demand: for programs that nobody can record in advance.

A party asks the dealer for correlation number n when its program comes to it. The dealer waits until both parties
have asked, checks that they want the same, and deals it once; a difference ends the run. Number n uses the streams
derived from the parties' seeds for n alone, so that no correlation is dealt twice.

Where the programs of the parties differ, one of them may ask the dealer while the other waits for its message: each
frame between the parties carries the number of correlations taken before it, so that the one that asks notices.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from protocols import correlation
from protocols.channel import Link
from protocols.correlation import KEEPER, USER, Dealing, Request
from protocols.dealer import pack, receive_corrections, send_corrections, stream_of, unpack
from protocols.errors import DealerError, IntegrityError, PeerTimeout
from protocols.prg import Stream, fresh_seed
from protocols.wire import TensorWire

# How often a party that waits for the dealer looks whether the other one has gone another way.
LOOK_S = 0.25
# Masks of weights that the dealer keeps at hand; it can draw any of them again.
_MASKS = 64

Enter = Callable[[str], None]


def mask_of(seed: bytes, number: int, shape: Sequence[int]) -> Tensor:
    """Return a party's share of the mask of weight `number`, which is used for that weight alone."""
    return Stream(seed).derive(f"weight {number}").words(shape)


class NumberedWire(TensorWire):
    """A wire whose frames say after how many correlations they are sent.

    Args:
        link: connection to the other party.
    """

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.taken = 0

    def _kind(self, kind: str) -> str:
        return f"{kind} after {self.taken}"

    def exchange(self, kind: str, tensor: Tensor) -> Tensor:
        """Send a tensor and return the peer's of the same shape: one round."""
        return super().exchange(self._kind(kind), tensor)

    def send(self, kind: str, tensor: Tensor) -> None:
        """Send a tensor; a small one may wait for the next one, or until this party waits."""
        super().send(self._kind(kind), tensor)

    def recv(self, kind: str, shape: Sequence[int]) -> Tensor:
        """Return the peer's int64 tensor of `shape`."""
        return super().recv(self._kind(kind), shape)


class Demand:
    """A party's `party.Correlations`, asked for one by one.

    Args:
        dealer: link to the dealer.
        peer: link to the other party, on which `wire` sends.
        wire: told how many correlations have been taken.
        rank: of this party.
        seed: this party's, from the dealer.
        enter: told each step.
    """

    def __init__(self, dealer: Link, peer: Link, wire: NumberedWire, rank: int, seed: bytes, enter: Enter) -> None:
        self._dealer, self._peer, self._wire = dealer, peer, wire
        self._rank, self._seed, self._enter = rank, seed, enter

    def take(self, request: Request) -> tuple[Tensor, ...]:
        """Return this party's part of the next correlation.

        Raises:
            DealerError: the other party asked for another one.
            IntegrityError: the other party has sent a message that our program does not wait for.
            PeerTimeout: the dealer is silent.
        """
        number = self._wire.taken
        self._enter(f"correlation {number}: {request.kind} {request.shapes}")
        self._peer.flush()
        self._dealer.send("want", {"number": number, "requests": pack([request])})
        self._wait(number)
        corrections = receive_corrections(self._dealer, self._rank, number, [request])
        self._wire.taken += 1
        return correlation.take(request, self._rank, stream_of(self._seed, number), corrections)

    def mask(self, number: int, shape: Sequence[int]) -> Tensor:
        """Return this party's share of the mask of weight `number`."""
        return mask_of(self._seed, number, shape)

    def end(self) -> None:
        """Tell the dealer that the program has ended."""
        self._dealer.send("want", {"number": self._wire.taken, "requests": []})

    def _wait(self, number: int) -> None:
        """Return once the dealer has answered."""
        started = time.monotonic()
        while self._dealer.peek(LOOK_S) is None:
            sent = self._peer.peek(0.0)
            if sent is not None and int(sent.rsplit(" ", 1)[1]) <= number:
                raise IntegrityError(
                    f"both parties must run the same program; {self._peer.role} sent {sent.split()[0]!r} "
                    f"where this one asks for correlation {number}"
                )
            if time.monotonic() - max(started, self._dealer.heard_at) > self._dealer.timeout_s:
                raise PeerTimeout(f"{self._dealer.role} must deal correlation {number}; it is silent")


def deal_on_demand(parties: tuple[Link, Link], enter: Enter) -> None:
    """Be the dealer until both parties' programs have ended.

    Args:
        parties: links to party 0 and party 1.
        enter: told each step.

    Raises:
        DealerError: the parties want different correlations.

    Security: the dealer learns the public requests; each correction is as `correlation.deal` says.
    """
    seeds = fresh_seed(), fresh_seed()
    for link, seed in zip(parties, seeds, strict=True):
        link.send("seed", None, [_bytes(seed)])

    @functools.lru_cache(_MASKS)
    def mask(number: int, shape: tuple[int, ...]) -> Tensor:
        return mask_of(seeds[KEEPER], number, shape) + mask_of(seeds[USER], number, shape)

    number = 0
    while True:
        enter(f"wait for correlation {number}")
        request = _agreed([link.recv("want", timeout_s=None).meta for link in parties], parties, number)
        if request is None:
            return
        enter(f"correlation {number}: {request.kind} {request.shapes}")
        streams = [stream_of(seed, number) for seed in seeds]
        masks = {}
        if request.kind == "reused":
            name = dict(request.options)["weight"]
            masks[str(name)] = mask(int(name), request.shapes[2])
        dealt = correlation.deal(request, streams[KEEPER], streams[USER], Dealing(None, masks))
        send_corrections(*parties, number, [request], iter([dealt]))
        number += 1


def _agreed(asked: Sequence[dict[str, Any]], parties: tuple[Link, Link], number: int) -> Request | None:
    """Return what both parties want next, None for the end."""
    wanted = [unpack(meta["requests"]) for meta in asked]
    if any(meta["number"] != number for meta in asked):
        raise DealerError(f"the parties must ask for correlation {number}: correlations are never dealt twice")
    if wanted[0] != wanted[1]:
        said = [f"{link.role} asks for {_describe(listed)}" for link, listed in zip(parties, wanted, strict=True)]
        raise DealerError(f"both parties must run the same program; at correlation {number} {' and '.join(said)}")
    return wanted[0][0] if wanted[0] else None


def _describe(listed: Sequence[Request]) -> str:
    return " ".join(f"{q.kind} {q.shapes} {dict(q.options) or ''}".strip() for q in listed) or "none, it has ended"


def _bytes(seed: bytes) -> np.ndarray:
    return np.frombuffer(seed, dtype=np.uint8)
