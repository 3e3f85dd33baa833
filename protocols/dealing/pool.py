"""A party's prediction shares, received and expanded in the background before they are needed.

The pool's thread owns a connection to the dealer. A prediction takes its shares by number, once; until then they
wait in memory, so that no prediction waits for the dealer where one was ordered ahead. With a store only the next
shares wait in memory; the corrections of the others wait on disk, and a second thread opens them when there is room.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from protocols.dealing.correlation import Request, correction_shapes
from protocols.dealing.dealer import receive_corrections, stream_of
from protocols.dealing.messages import Deal, unpack
from protocols.dealing.prediction_shares import Parts, PredictionShares
from protocols.dealing.store import SealedStore
from protocols.errors import DealerError, PeerLost, PeerTimeout, ProtocolAbort, SecureError, TransportError
from protocols.forks import Origin
from protocols.net.link import Link

# Number of a model, and batch.
PlanKey = tuple[int, int]
Finish = Callable[[Request, Parts], Parts]


def _plain(model: int) -> Finish:
    return lambda request, part: part


def _ignore(error: SecureError) -> None:
    pass


@dataclass(frozen=True)
class Ready:
    """Prediction shares, what they were dealt for, and the bytes that they cost on the way here."""

    shares: PredictionShares
    plan: PlanKey
    bytes: int


@dataclass(frozen=True)
class _Arrival:
    """What came for one prediction, beside its corrections."""

    prediction: int
    plan: PlanKey
    bytes: int


class CorrelationPool(threading.Thread):
    """Receives prediction shares until it is closed.

    Args:
        link: to the dealer, for this thread alone.
        rank: of the party.
        seed: the party's, from the dealer.
        finish: gives for a model's number what prediction shares apply to each part.
        store: where corrections wait that have no room in memory, closed with the pool; None for room without end.
        slots: predictions whose shares are in memory where there is a store.
        on_failure: told once, in a thread of the pool, what ended it, unless a connection broke or was closed.
    """

    def __init__(
        self,
        link: Link,
        rank: int,
        seed: bytes,
        finish: Callable[[int], Finish] = _plain,
        *,
        store: SealedStore | None = None,
        slots: int = 1,
        on_failure: Callable[[SecureError], None] = _ignore,
    ) -> None:
        super().__init__(name=f"securemtk-pool-{rank}", daemon=True)
        self._link, self._rank, self._seed, self._finish = link, rank, seed, finish
        self._store, self._slots, self._on_failure = store, slots, on_failure
        self._last = -1
        self._plans: dict[PlanKey, list[Request]] = {}
        self._ready: dict[int, Ready] = {}
        self._stored: dict[int, _Arrival] = {}
        self._unwanted: set[int] = set()
        # Of the thread that opens what is stored: the shares that somebody waits for, whether it may compete with a
        # prediction, whether it has one in work.
        self._awaited: int | None = None
        self._predicting = self._opening = False
        self._opener = threading.Thread(
            target=self._repeat, args=(self._open,), name=f"securemtk-opener-{rank}", daemon=True
        )
        self._origin = Origin()
        self._failure: SecureError | None = None
        self._changed = threading.Condition()

    def run(self) -> None:
        """Receive until the link fails or is closed."""
        if self._store is not None:
            self._opener.start()
        self._link.enter("offline")
        self._repeat(self._receive)

    def _repeat(self, work: Callable[[], None]) -> None:
        try:
            while True:
                work()
        except SecureError as error:
            failure = error
        except Exception as error:
            # Its text could hold a value.
            failure = ProtocolAbort(f"internal error: {type(error).__name__} while shares were received")
        with self._changed:
            is_first = self._failure is None
            self._failure = self._failure or failure
            self._changed.notify_all()
        self._link.fail(failure)
        if is_first and not isinstance(failure, TransportError):
            self._on_failure(failure)

    def _receive(self) -> None:
        deal = self._link.hear(Deal, timeout_s=None).message
        if deal.prediction <= self._last:
            raise DealerError(f"the dealer must deal each prediction once; got {deal.prediction} again or late")
        self._last = deal.prediction
        if deal.requests is not None:
            self._plans[deal.plan] = unpack(deal.requests)
        if deal.plan not in self._plans:
            raise DealerError(
                f"the dealer must describe a plan before it deals one; prediction {deal.prediction} has none"
            )
        corrections = receive_corrections(self._link, self._rank, deal.prediction, self._plans[deal.plan])
        traffic = self._link.counters["offline"]
        arrival = _Arrival(deal.prediction, deal.plan, traffic.sent + traffic.received)
        self._link.reset_counters()
        with self._changed:
            if arrival.prediction in self._unwanted:
                self._unwanted.remove(arrival.prediction)
                return
            has_room = self._awaited == arrival.prediction or (self._has_room() and not self._stored)
        if self._store is None or has_room:
            self._expand(arrival, corrections)
        else:
            self._keep(arrival, corrections, self._store)

    def _keep(self, arrival: _Arrival, corrections: list[Tensor], store: SealedStore) -> None:
        store.put(arrival.prediction, corrections)
        with self._changed:
            if arrival.prediction in self._unwanted:
                self._unwanted.remove(arrival.prediction)
                store.drop(arrival.prediction)
            else:
                self._stored[arrival.prediction] = arrival
            self._changed.notify_all()

    def _expand(self, arrival: _Arrival, corrections: list[Tensor]) -> None:
        stream = stream_of(self._seed, arrival.prediction)
        shares = PredictionShares(
            self._rank, stream, self._plans[arrival.plan], corrections, self._finish(arrival.plan[0])
        )
        with self._changed:
            if arrival.prediction not in self._unwanted:
                self._ready[arrival.prediction] = Ready(shares, arrival.plan, arrival.bytes)
            self._unwanted.discard(arrival.prediction)
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._ready) + self._opening < self._slots

    def _find_openable(self) -> int | None:
        """Return which stored shares to open now; called with the lock."""
        if self._awaited in self._stored:
            return self._awaited
        if self._predicting or not self._has_room():
            return None
        return min(self._stored, default=None)

    def _open(self) -> None:
        """Wait until stored shares may be opened, and open them."""
        with self._changed:
            while (prediction := self._find_openable()) is None or self._store is None:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()
            arrival = self._stored.pop(prediction)
            self._opening = True
        shapes = [shape for q in self._plans[arrival.plan] for shape in correction_shapes(q, self._rank)]
        self._expand(arrival, self._store.take(prediction, shapes))
        with self._changed:
            self._opening = False

    def take(self, prediction: int, plan: PlanKey | None = None) -> Ready:
        """Return a prediction's shares as soon as they are here; they are handed out once.

        Until `rest` no other stored shares are opened: nothing shall compete with the prediction.

        Args:
            prediction: its number.
            plan: what it must have been dealt for; None for anything.

        Raises:
            DealerError: it was dealt for another plan.
            PeerTimeout: the dealer has sent nothing for the link's `timeout_s`, and no watch judges it.
            WrongProcess: this process is a fork of the one that made the pool.
            SecureError: what ended the pool.
        """
        self._origin.require("a pool of correlations")
        started = time.monotonic()
        with self._changed:
            self._awaited, self._predicting = prediction, True
            self._changed.notify_all()
            while prediction not in self._ready:
                if self._failure is not None:
                    raise self._failure
                if self._link.is_overdue(started):
                    limit_s = self._link.timeout_s
                    raise PeerTimeout(f"{self._link.role} has dealt nothing for {limit_s:g} s ({self._link.step})")
                self._changed.wait(timeout=0.5)
            self._awaited = None
            ready = self._ready.pop(prediction)
        if plan not in (None, ready.plan):
            raise DealerError(f"prediction {prediction} must be dealt for model and batch {plan}; got {ready.plan}")
        return ready

    def rest(self) -> None:
        """Say that the prediction is over: stored shares may be opened for the next."""
        self._origin.require("a pool of correlations")
        with self._changed:
            self._predicting = False
            self._changed.notify_all()

    def drop(self, prediction: int) -> None:
        """Throw a prediction's shares away, now or when they come."""
        self._origin.require("a pool of correlations")
        with self._changed:
            if self._ready.pop(prediction, None) is not None:
                self._changed.notify_all()
            elif self._stored.pop(prediction, None) is not None and self._store is not None:
                self._store.drop(prediction)
            else:
                self._unwanted.add(prediction)

    def close(self) -> None:
        """End the threads and the link, and remove what is stored. In a fork it does nothing."""
        if not self._origin.is_here:
            return
        self._link.fail(PeerLost(f"the connection to {self._link.role} is closed"))
        for thread in (self, self._opener):
            if thread.is_alive():
                thread.join(timeout=5.0)
        self._link.close()
        if self._store is not None:
            self._store.close()
