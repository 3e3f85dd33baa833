"""What a plan will cost before it runs: each party's side alone, then both sides' messages against each other.

Neither messages nor correlations depend on values, so that a party's side of a prediction can run without the other
one, on a wire that notes what would travel and gives tensors of the right shape in return. Two such tapes say
everything about the traffic: `replay` lets each message wait for those it waits for, and counts frames as `Link` does
and rounds by the same logical clock (docs/decisions/0008). Without values (`rehearse`) that costs next to nothing; with
made-up values (`perform`) the tapes also hold how long each party computes between its messages on this machine, and
`replay` then says how long the prediction takes over a given network.
"""

import gc
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from protocols import correlation, runner
from protocols.channel import frame_bytes
from protocols.correlation import KEEPER, USER, Dealing, Request
from protocols.dealer import FRAME_BYTES, correction_bytes
from protocols.errors import ProtocolAbort
from protocols.party import Hand, Parts, Party
from protocols.pool import Finish
from protocols.prg import Stream
from protocols.runner import LayerCost, Plan, Probe

# What a message and each of its bytes cost the processes at both ends together, beyond the network: Python, system
# calls, TLS, copies, a peer that has to wake up and finds its caches cold. Found by predictions on one machine.
MESSAGE_S = 4.0e-4
BYTE_S = 1.5e-9

_DTYPES = {torch.int64: "<i8", torch.uint8: "|u1"}


# --- tapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A message that a party sends or takes.

    Args:
        layer: number of the layer, counted with the sharing of the input as 0.
        is_sent: whether it goes out.
        kind: of the frame.
        bytes: of the frame; 0 where it comes in, for its sender counts it.
        seconds: that the party computed before, since its last event.
    """

    layer: int
    is_sent: bool
    kind: str
    bytes: int
    seconds: float


@dataclass
class Tape:
    """One party's side of a plan.

    Args:
        layers: name and operator of each layer, the sharing of the input and the revelation of the outputs included.
        events: in order.
        requests: the correlations asked for, each with its layer's number.
        rest_s: seconds computed after the last event.
        take_s: seconds of expanding correlations, which a session does before the input is known.
    """

    layers: list[tuple[str, str]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    requests: list[tuple[int, Request]] = field(default_factory=list)
    rest_s: float = 0.0
    take_s: float = 0.0


class _Recorder:
    """Wire and correlations of a party that computes alone."""

    def __init__(self, rank: int, *, dry: bool) -> None:
        self.tape = Tape()
        self._hand: Hand | None = None
        self._rank, self._device = rank, "meta" if dry else "cpu"
        self._layer = -1
        self._mark = time.perf_counter()

    def enter(self, name: str) -> None:
        self._layer += 1

    def exchange(self, kind: str, tensor: Tensor) -> Tensor:
        self.send(kind, tensor)
        return self._receive(kind, tensor.shape, tensor.dtype)

    def send(self, kind: str, tensor: Tensor) -> None:
        self._note(kind, frame_bytes(kind, None, [(_DTYPES[tensor.dtype], tuple(tensor.shape))]))

    def recv(self, kind: str, shape: Sequence[int]) -> Tensor:
        return self._receive(kind, shape, torch.int64)

    def _receive(self, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._note(kind, 0)
        received = self._ones(shape, dtype)
        self._mark = time.perf_counter()
        return received

    def _note(self, kind: str, n_bytes: int) -> None:
        seconds = self.pause()
        self.tape.events.append(Event(self._layer, n_bytes > 0, kind, n_bytes, seconds))

    def pause(self) -> float:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def _ones(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        # Not zeros: those the system hands out when they are first touched, within the time that is measured.
        return torch.ones(tuple(shape), dtype=dtype, device=self._device)

    def take(self, request: Request) -> Parts:
        self.tape.requests.append((self._layer, request))
        if self._hand is not None:
            return self._hand.take(request)
        return tuple(self._ones(shape) for shape in correlation.part_shapes(request, self._rank))

    def deal(self, listed: Sequence[Request], finish: Finish) -> None:
        """Make this party's parts of made-up correlations, all of them before they are needed, as a session does."""
        self._mark = time.perf_counter()
        corrections = [self._ones(shape) for q in listed for shape in correlation.correction_shapes(q, self._rank)]
        self._hand = Hand(self._rank, Stream(), listed, corrections, finish)
        self.tape.take_s = self.pause()


def _record(plan: Plan, rank: int, weights: Mapping[str, Tensor], *, dry: bool) -> Tape:
    recorder = _Recorder(rank, dry=dry)
    if not dry:
        finish = partial(runner.protocol_module(plan.protocol).finish, masked=weights)
        recorder.deal(runner.requests(plan), finish if rank == USER else lambda request, part: part)
    nothing = Stream(bytes(16))  # draws no secret: what it masks is made up
    party = Party(rank, recorder, recorder, nothing, nothing, nothing, dry=dry)
    program = plan.program
    inputs = {
        name: recorder._ones((plan.batch, *shape)) if rank == USER else None for name, shape in program.inputs.items()
    }
    probe = Probe(enter=recorder.enter)
    recorder.pause()
    runner.run(party, plan, weights, inputs, probe)
    recorder.tape.rest_s = recorder.pause()
    recorder.tape.layers = [(layer.name, layer.op) for layer in probe.layers]
    return recorder.tape


def rehearse(plan: Plan) -> tuple[Tape, Tape]:
    """Return the keeper's and the user's tape, made on tensors without values: no seconds on them mean anything."""
    weights = {
        name: torch.empty(shape, dtype=torch.int64, device="meta") for name, shape in plan.program.params.items()
    }
    return _record(plan, KEEPER, weights, dry=True), _record(plan, USER, weights, dry=True)


def perform(plan: Plan, *, repeats: int = 3, enough_s: float = 2.0) -> tuple[Tape, Tape, float]:
    """Return the keeper's and the user's tape with the seconds each computes on this machine, and the dealer's seconds.

    Args:
        plan: on made-up weights, inputs and correlations.
        repeats: how often at most, after a first time that is not counted; the median of them is returned.
        enough_s: no more repetitions once a party's side has taken so long.

    Cost: computing time and memory of some predictions, one after the other.
    """
    protocol = runner.protocol_module(plan.protocol)
    protocol.warm()
    weights = protocol.share_weights(plan.program, None)
    protocol.pack_weights(plan.program, weights)
    enabled = gc.isenabled()
    gc.disable()
    try:
        keeper, user = (_typical(plan, rank, weights, repeats, enough_s) for rank in (KEEPER, USER))
        deal_s = _dealing(user.requests, weights)
    finally:
        if enabled:
            gc.enable()
    return keeper, user, deal_s


def _dealing(requests: Sequence[tuple[int, Request]], masks: Mapping[str, Tensor]) -> float:
    """Return the seconds in which a dealer makes correlations; equal ones are made and measured once."""
    keeper, user, dealing = Stream(), Stream(), Dealing(masks=masks)
    known: dict[Request, float] = {}
    for _, request in requests:
        if request not in known:
            start = time.perf_counter()
            correlation.deal(request, keeper, user, dealing)
            known[request] = time.perf_counter() - start
    return sum(known[request] for _, request in requests)


def _typical(plan: Plan, rank: int, weights: Mapping[str, Tensor], repeats: int, enough_s: float) -> Tape:
    best, spent = _record(plan, rank, weights, dry=False), 0.0
    spent = _computing(best)
    if spent < enough_s:
        tapes: list[Tape] = []
        while len(tapes) < repeats and (not tapes or spent < enough_s):
            tapes.append(_record(plan, rank, weights, dry=False))
            spent += _computing(tapes[-1])
        best = sorted(tapes, key=_computing)[len(tapes) // 2]
    return best


def _computing(tape: Tape) -> float:
    return sum(event.seconds for event in tape.events) + tape.rest_s


# --- both against each other ----------------------------------------------------------------------------------------


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


# --- correlations ---------------------------------------------------------------------------------------------------


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
    meta = {"prediction": prediction, "last": last}
    return frame_bytes("corrections", meta, [("<i8", shape) for shape in shapes])
