"""Two tapes played against each other: what a prediction costs over a network."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, USER, Request
from protocols.dealing.dealer import FRAME_BYTES, correction_bytes
from protocols.dealing.messages import Corrections
from protocols.errors import ProtocolAbort
from protocols.running.rehearsal import Tape
from protocols.running.runner import LayerCost

# What a message and each of its bytes cost the processes at both ends together, beyond the network: Python, system
# calls, TLS, copies, a peer that has to wake up and finds its caches cold. Found by predictions on one machine.
MESSAGE_S = 4.0e-4
BYTE_S = 1.5e-9


@dataclass(frozen=True)
class Network:
    """A connection between two roles.

    Args:
        rtt_s: seconds there and back.
        bits_per_s: in each direction.
    """

    rtt_s: float = 0.0
    bits_per_s: float = float("inf")

    def transfer_s(self, n_bytes: int) -> float:
        """Return how long bytes take to leave."""
        return 8 * n_bytes / self.bits_per_s


LOOPBACK = Network()


@dataclass
class _Spent:
    """What a layer has cost the user so far."""

    bytes: int = 0
    rounds: int = 0
    seconds: float = 0.0


@dataclass
class _Side:
    """A party during a replay."""

    tape: Tape
    at: int = 0
    clock: int = 0
    now: float = 0.0
    is_free: float = 0.0
    incoming: deque[tuple[str, int, int, float]] = field(default_factory=deque)

    def advance(self, other: "_Side", network: Network, layers: list[_Spent] | None) -> bool:
        """Play events until one has to wait; return whether any was played."""
        start = self.at
        while self.at < len(self.tape.events):
            event = self.tape.events[self.at]
            if not event.is_sent and not self.incoming:
                break
            before = self.clock, self.now
            self.now += event.seconds
            n_bytes = event.bytes
            if event.is_sent:
                self.now += (MESSAGE_S + n_bytes * BYTE_S) / 2
                self.is_free = max(self.is_free, self.now) + network.transfer_s(n_bytes)
                other.incoming.append((event.kind, self.clock + 1, n_bytes, self.is_free + network.rtt_s / 2))
            else:
                kind, clock, n_bytes, arrival = self.incoming.popleft()
                if kind != event.kind:
                    raise ProtocolAbort(f"both parties must expect the same messages; got {kind!r} for {event.kind!r}")
                self.clock = max(self.clock, clock)
                self.now = max(self.now, arrival) + (MESSAGE_S + n_bytes * BYTE_S) / 2
            if layers is not None:
                row = layers[event.layer]
                row.bytes += n_bytes
                row.rounds += self.clock - before[0]
                row.seconds += self.now - before[1]
            self.at += 1
        return self.at > start


def replay(keeper: Tape, user: Tape, network: Network = LOOPBACK) -> list[LayerCost]:
    """Return what each layer costs the user, by playing both tapes against each other.

    Args:
        keeper, user: of one plan.
        network: between both; seconds mean something for tapes of `perform` only.

    Raises:
        ProtocolAbort: the tapes do not fit each other.
    """
    spent = [_Spent() for _ in user.layers]
    sides = _Side(keeper), _Side(user)
    while sides[KEEPER].advance(sides[USER], network, None) | sides[USER].advance(sides[KEEPER], network, spent):
        pass
    if any(side.at < len(side.tape.events) or side.incoming for side in sides):
        raise ProtocolAbort("both parties must take all of each other's messages; one waits for ever")
    spent[-1].seconds += user.rest_s
    return [LayerCost(*layer, s.seconds, s.bytes, s.rounds) for layer, s in zip(user.layers, spent, strict=True)]


def correction_frames(listed: Sequence[Request], rank: int, prediction: int) -> int:
    """Return the bytes of the frames by which `dealer.send_corrections` sends a party its corrections."""
    at_once = correction_bytes(listed, KEEPER) <= FRAME_BYTES
    total, waiting, size = 0, [], 0
    for request in listed:
        shapes = correlation.correction_shapes(request, rank)
        waiting += shapes
        size += correction_bytes([request], rank)
        if not at_once and size >= FRAME_BYTES:
            total += _corrections(waiting, prediction, last=False)
            waiting, size = [], 0
    return total + _corrections(waiting, prediction, last=True)


def _corrections(shapes: Sequence[correlation.Shape], prediction: int, *, last: bool) -> int:
    return Corrections(prediction, last).frame_bytes([("<i8", shape) for shape in shapes])
