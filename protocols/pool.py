"""A party's hands, received and expanded in the background before they are needed.

The pool's thread owns a connection to the dealer. A prediction takes its hand by number, once; until then the hand
waits in memory, so that no prediction waits for the dealer where one was ordered ahead.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from protocols.channel import Link
from protocols.correlation import Request
from protocols.dealer import receive_corrections, stream_of, unpack
from protocols.errors import PeerLost, PeerTimeout, ProtocolAbort, SecureError
from protocols.party import Hand, Parts

PlanKey = tuple[int, str, int]
Finish = Callable[[Request, Parts], Parts]


@dataclass(frozen=True)
class Deal:
    """What the dealer says to both parties before it deals a prediction: public.

    Args:
        prediction: its number; numbers only grow.
        plan: model, protocol and batch.
        requests: the plan's correlations as `dealer.pack` gives them, the first time; None later.
    """

    prediction: int
    plan: PlanKey
    requests: list[Any] | None = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"prediction": self.prediction, "plan": self.plan, "requests": self.requests}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Deal":
        """Read what `to_json` returned."""
        model, protocol, batch = raw["plan"]
        return cls(int(raw["prediction"]), (int(model), str(protocol), int(batch)), raw["requests"])


@dataclass(frozen=True)
class Ready:
    """A hand, and the bytes that it cost on the way here."""

    hand: Hand
    bytes: int


class Pool(threading.Thread):
    """Receives hands until it is closed.

    Args:
        link: to the dealer, for this thread alone.
        rank: of the party.
        seed: the party's, from the dealer.
        finish: gives for a model's number what a hand applies to each part.
    """

    def __init__(
        self, link: Link, rank: int, seed: bytes, finish: Callable[[int], Finish] = lambda model: lambda request, p: p
    ) -> None:
        super().__init__(name=f"securemtk-pool-{rank}", daemon=True)
        self._link, self._rank, self._seed, self._finish = link, rank, seed, finish
        self._plans: dict[PlanKey, list[Request]] = {}
        self._ready: dict[int, Ready] = {}
        self._unwanted: set[int] = set()
        self._failure: SecureError | None = None
        self._changed = threading.Condition()

    def run(self) -> None:
        """Receive until the link fails or is closed."""
        self._link.enter("offline")
        try:
            while True:
                self._receive()
        except SecureError as error:
            failure = error
        except Exception as error:
            # Its text could hold a value.
            failure = ProtocolAbort(f"internal error: {type(error).__name__} while a hand was received")
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _receive(self) -> None:
        deal = Deal.from_json(self._link.recv("deal", timeout_s=None).meta)
        if deal.requests is not None:
            self._plans[deal.plan] = unpack(deal.requests)
        listed = self._plans[deal.plan]
        corrections = receive_corrections(self._link, self._rank, deal.prediction, listed)
        traffic = self._link.counters["offline"]
        n_bytes = traffic.sent + traffic.received
        self._link.reset_counters()
        with self._changed:
            wanted = deal.prediction not in self._unwanted
        stream = stream_of(self._seed, deal.prediction)
        hand = Hand(self._rank, stream, listed, corrections, self._finish(deal.plan[0])) if wanted else None
        with self._changed:
            if hand is not None and deal.prediction not in self._unwanted:
                self._ready[deal.prediction] = Ready(hand, n_bytes)
            self._unwanted.discard(deal.prediction)
            self._changed.notify_all()

    def take(self, prediction: int) -> Ready:
        """Return a prediction's hand as soon as it is here; it is handed out once.

        Raises:
            PeerTimeout: the dealer has sent nothing for the link's `timeout_s`.
            SecureError: what ended the pool.
        """
        started, limit = time.monotonic(), self._link.timeout_s
        with self._changed:
            while prediction not in self._ready:
                if self._failure is not None:
                    raise self._failure
                if time.monotonic() - max(started, self._link.heard_at) > limit:
                    raise PeerTimeout(f"{self._link.role} has dealt nothing for {limit:g} s ({self._link.step})")
                self._changed.wait(timeout=0.5)
            return self._ready.pop(prediction)

    def drop(self, prediction: int) -> None:
        """Throw a prediction's hand away, now or when it comes."""
        with self._changed:
            if self._ready.pop(prediction, None) is None:
                self._unwanted.add(prediction)

    def close(self) -> None:
        """End the thread and its link."""
        self._link.fail(PeerLost(f"the connection to {self._link.role} is closed"))
        if self.is_alive():
            self.join(timeout=5.0)
        self._link.close()
