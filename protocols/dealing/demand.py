"""Correlations on demand: for programs that nobody can record in advance.

A party asks the dealer for correlation number n when its program comes to it. The dealer checks that both parties want
the same, and deals it; a difference ends the run. What the parties will want next it guesses from what they wanted
after the same requests before, and deals it ahead, so that a program that repeats itself seldom waits. A wrong guess
begins a new epoch: what was dealt ahead in the old one is thrown away. Number n of an epoch uses streams of its own,
derived from the parties' seeds, so that no correlation is dealt twice.

Where the programs of the parties differ, one of them may ask the dealer while the other waits for its message: each
frame between the parties carries the number of correlations taken before it, so that the one that asks notices.

Source: docs/protocols.md#correlations-on-demand.
"""

import functools
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, Dealing, Request
from protocols.dealing.dealer import correction_bytes, receive_corrections, send_corrections
from protocols.dealing.messages import Supply, Want, pack, unpack
from protocols.dealing.prediction_shares import Parts
from protocols.errors import DealerError, IntegrityError, PeerTimeout, ProtocolAbort, SecureError
from protocols.net.link import Link
from protocols.net.wire import TensorWire
from protocols.primitives.prg import Stream, fresh_seed

# How often a party that waits for the dealer looks whether the other one has gone another way.
LOOK_S = 0.25
# Masks of weights that the dealer keeps at hand; it can draw any of them again.
_MASKS = 64
# What may be dealt ahead: correlations, and bytes of corrections to one party.
AHEAD = 256
AHEAD_BYTES = 1 << 26
# A guess rests on so many requests before it, the most first.
CONTEXTS = (16, 4)

Enter = Callable[[str], None]


def mask_of(seed: bytes, number: int, shape: Sequence[int]) -> Tensor:
    """Return a party's share of the mask of weight `number`, which is used for that weight alone."""
    return Stream(seed).derive(f"weight {number}").words(shape)


def _stream_of(seed: bytes, number: int, epoch: int) -> Stream:
    return Stream(seed).derive(f"correlation {number} of epoch {epoch}")


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


class DemandReceiver(threading.Thread):
    """Receives a party's correlations and expands them until its link is closed.

    Args:
        link: from the dealer, for this thread alone.
        rank: of this party.
        seed: this party's, from the dealer.
    """

    def __init__(self, link: Link, rank: int, seed: bytes) -> None:
        super().__init__(name=f"securemtk-supply-{rank}", daemon=True)
        self._link, self._rank, self._seed = link, rank, seed
        self._ready: dict[tuple[int, int], tuple[Request, Parts]] = {}
        self._failure: SecureError | None = None
        self._changed = threading.Condition()

    def is_overdue(self, started: float) -> bool:
        """Return whether the dealer has been silent for too long, as `Link.is_overdue` says."""
        return self._link.is_overdue(started)

    def run(self) -> None:
        """Receive until the link fails or is closed."""
        try:
            while True:
                self._receive()
        except SecureError as error:
            failure = error
        except Exception as error:
            # Its text could hold a value.
            failure = ProtocolAbort(f"internal error: {type(error).__name__} while a correlation was received")
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _receive(self) -> None:
        supply = self._link.hear(Supply, timeout_s=None).message
        number, epoch, (request,) = supply.number, supply.epoch, unpack([supply.request])
        corrections = receive_corrections(self._link, self._rank, number, [request])
        part = correlation.take(request, self._rank, _stream_of(self._seed, number, epoch), corrections)
        with self._changed:
            self._ready[number, epoch] = (request, part)
            self._changed.notify_all()

    def take(self, number: int, epoch: int, timeout_s: float) -> tuple[Request, Parts] | None:
        """Return what was dealt as number and epoch, once; None where it has not come within `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: (number, epoch) in self._ready or self._failure, timeout_s)
            if (number, epoch) not in self._ready and self._failure is not None:
                raise self._failure
            return self._ready.pop((number, epoch), None)

    def forget(self, epoch: int) -> None:
        """Throw away what was dealt ahead in earlier epochs."""
        with self._changed:
            for key in [key for key in self._ready if key[1] < epoch]:
                del self._ready[key]


class DemandCorrelations:
    """A party's `party.Correlations`, asked for one by one.

    Args:
        dealer: link to the dealer for what this party wants.
        supply: where correlations come.
        peer: link to the other party, on which `wire` sends.
        wire: told how many correlations have been taken.
        enter: told each step.
    """

    def __init__(self, dealer: Link, supply: DemandReceiver, peer: Link, wire: NumberedWire, enter: Enter) -> None:
        self._dealer, self._supply, self._peer, self._wire = dealer, supply, peer, wire
        self._enter = enter
        self._epoch = 0

    def take(self, request: Request) -> tuple[Tensor, ...]:
        """Return this party's part of the next correlation.

        Raises:
            DealerError: the other party asked for another one.
            IntegrityError: the other party has sent a message that our program does not wait for.
            PeerTimeout: the dealer is silent.
        """
        number = self._wire.taken
        self._enter(f"correlation {number}: {request.kind} {request.shapes}")
        self._want(request)
        dealt, part = self._wait(number)
        if dealt != request:
            self._epoch += 1
            self._supply.forget(self._epoch)
            dealt, part = self._wait(number)
        if dealt != request:
            raise DealerError(f"correlation {number} must be {request.kind} {request.shapes}; got {dealt.kind}")
        self._wire.taken += 1
        return part

    def end(self) -> None:
        """Tell the dealer that the program has ended."""
        self._want(None)

    def _want(self, request: Request | None) -> None:
        self._peer.flush()
        self._dealer.say(Want(self._wire.taken, None if request is None else pack([request])[0]))

    def _wait(self, number: int) -> tuple[Request, Parts]:
        """Return what the dealer has dealt as the next correlation, once it is here."""
        started = time.monotonic()
        while (dealt := self._supply.take(number, self._epoch, LOOK_S)) is None:
            sent = self._peer.peek(0.0)
            if sent is not None and _taken_before(sent, self._peer.role) <= number:
                raise IntegrityError(
                    f"both parties must run the same program; {self._peer.role} sent {sent.split()[0]!r} "
                    f"where this one asks for correlation {number}"
                )
            if self._supply.is_overdue(started):
                raise PeerTimeout(f"{self._dealer.role} must deal correlation {number}; it is silent")
        return dealt


# --- the dealer -----------------------------------------------------------------------------------------------------


class RequestPredictor:
    """Guesses what follows a list of requests from what followed its last ones before."""

    def __init__(self) -> None:
        self._past: deque[Request] = deque(maxlen=max(CONTEXTS))
        self._followed: dict[tuple[Request, ...], Request] = {}

    def _contexts(self, recent: Sequence[Request]) -> list[tuple[Request, ...]]:
        return [tuple(recent[-n:]) for n in CONTEXTS if len(recent) >= n]

    def learn(self, request: Request) -> None:
        """Note what came next."""
        for context in self._contexts(list(self._past)):
            self._followed[context] = request
        self._past.append(request)

    def guess(self, ahead: Sequence[Request]) -> Request | None:
        """Return what may follow `ahead`, which may follow what came so far."""
        recent = [*self._past, *ahead][-max(CONTEXTS) :]
        return next((self._followed[c] for c in self._contexts(recent) if c in self._followed), None)


class DemandDealer:
    """Deals to two parties what both want, and ahead of that what they may want.

    Args:
        wants: links to party 0 and party 1, on which they ask.
        supplies: links to them on which correlations go.
        enter: told each step.

    Security: the dealer learns the public requests; each correction is as `correlation.deal` says. What was dealt in
        vain is used by nobody.
    """

    def __init__(self, wants: tuple[Link, Link], supplies: tuple[Link, Link], enter: Enter) -> None:
        self._wants, self._supplies, self._enter = wants, supplies, enter
        self._seeds = fresh_seed(), fresh_seed()
        for link, seed in zip(wants, self._seeds, strict=True):
            link.send("seed", None, [np.frombuffer(seed, dtype=np.uint8)])
        self._mask = functools.lru_cache(_MASKS)(self._draw_mask)
        self._foresight = RequestPredictor()
        self._ahead: deque[Request] = deque()
        self._number = self._epoch = 0

    def _draw_mask(self, number: int, shape: tuple[int, ...]) -> Tensor:
        keeper, user = (mask_of(seed, number, shape) for seed in self._seeds)
        return keeper + user

    def serve(self) -> None:
        """Deal until both parties' programs have ended.

        Raises:
            DealerError: the parties want different correlations.
        """
        while True:
            self._enter(f"wait for correlation {self._number}")
            while self._wants[KEEPER].peek(0.0) is None and self._deal_ahead():
                pass
            asked = [link.hear(Want, timeout_s=None).message for link in self._wants]
            request = _agreed(asked, self._wants, self._number)
            if request is None:
                return
            self._enter(f"correlation {self._number}: {request.kind} {request.shapes}")
            guessed = self._ahead.popleft() if self._ahead else None
            if guessed != request:
                if guessed is not None:
                    self._epoch += 1
                    self._ahead.clear()
                self._deal(self._number, request)
            self._foresight.learn(request)
            self._number += 1

    def _deal_ahead(self) -> bool:
        """Deal the next guess; return whether there is one, and room for it."""
        request = self._foresight.guess(list(self._ahead)[-max(CONTEXTS) :])
        if request is None or len(self._ahead) >= AHEAD:
            return False
        if correction_bytes([*self._ahead, request], KEEPER) > AHEAD_BYTES:
            return False
        self._deal(self._number + len(self._ahead), request)
        self._ahead.append(request)
        return True

    def _deal(self, number: int, request: Request) -> None:
        keeper, user = (_stream_of(seed, number, self._epoch) for seed in self._seeds)
        masks = {}
        if request.kind == "reused":
            name = dict(request.options)["weight"]
            masks[str(name)] = self._mask(int(name), request.shapes[2])
        for link in self._supplies:
            link.say(Supply(number, self._epoch, pack([request])[0]), hold=True)
        dealt = correlation.deal(request, keeper, user, Dealing(None, masks))
        send_corrections(*self._supplies, number, [request], iter([dealt]))


def _taken_before(kind: str, role: str) -> int:
    """Return how many correlations were taken before a frame of `NumberedWire` was sent."""
    found = re.fullmatch(r".* after ([0-9]{1,18})", kind, re.DOTALL)
    if found is None:
        raise IntegrityError(f"{role} must number its frames; one has no number")
    return int(found[1])


def _agreed(asked: Sequence[Want], parties: tuple[Link, Link], number: int) -> Request | None:
    """Return what both parties want next, None for the end."""
    wanted = [unpack([want.request] if want.request is not None else []) for want in asked]
    if any(want.number != number for want in asked):
        raise DealerError(f"the parties must ask for correlation {number}: correlations are never dealt twice")
    if wanted[0] != wanted[1]:
        said = [f"{link.role} asks for {_describe(listed)}" for link, listed in zip(parties, wanted, strict=True)]
        raise DealerError(f"both parties must run the same program; at correlation {number} {' and '.join(said)}")
    return wanted[0][0] if wanted[0] else None


def _describe(listed: Sequence[Request]) -> str:
    return " ".join(f"{q.kind} {q.shapes} {dict(q.options) or ''}".strip() for q in listed) or "none, it has ended"
