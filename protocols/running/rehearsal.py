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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, USER, Dealing, Request
from protocols.dealing.pool import Finish
from protocols.dealing.prediction_shares import Parts, PredictionShares
from protocols.net.frames import frame_bytes
from protocols.primitives.prg import Stream
from protocols.running import backend, runner
from protocols.running.runner import Plan, Probe
from protocols.two_party.recorder import Message, Recorder

_DTYPES = {torch.int64: "<i8", torch.uint8: "|u1"}


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


class _TapeRecorder(Recorder):
    """A recorder that knows the layer it is in, and how long the party has computed since its last event."""

    def __init__(self, rank: int, device: str) -> None:
        super().__init__(rank, device)
        self.tape = Tape()
        self._shares: PredictionShares | None = None
        self._layer = -1
        self._mark = time.perf_counter()

    def enter(self, name: str) -> None:
        self._layer += 1

    def note(self, message: Message) -> None:
        seconds = self.pause()
        n_bytes = 0
        if message.is_sent:
            n_bytes = frame_bytes(message.kind, None, [(_DTYPES[message.dtype], message.shape)])
        self.tape.events.append(Event(self._layer, message.is_sent, message.kind, n_bytes, seconds))

    def make(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        made = super().make(shape, dtype)
        self._mark = time.perf_counter()
        return made

    def take(self, request: Request) -> Parts:
        self.tape.requests.append((self._layer, request))
        return super().take(request) if self._shares is None else self._shares.take(request)

    def pause(self) -> float:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def deal(self, listed: Sequence[Request], finish: Finish) -> None:
        """Make this party's parts of made-up correlations, all of them before they are needed, as a session does."""
        corrections = [self.make(shape) for q in listed for shape in correlation.correction_shapes(q, self._rank)]
        self._shares = PredictionShares(self._rank, Stream(), listed, corrections, finish)
        self.tape.take_s = self.pause()


def _record(plan: Plan, rank: int, weights: Mapping[str, Tensor], device: str) -> Tape:
    recorder = _TapeRecorder(rank, device)
    if device != "meta":
        finish = partial(backend.find(plan.protocol).finish, masked=weights)
        recorder.deal(runner.requests(plan), finish if rank == USER else lambda request, part: part)
    program = plan.program
    inputs = {
        name: recorder.make((plan.batch, *shape)) if rank == USER else None for name, shape in program.inputs.items()
    }
    probe = Probe(enter=recorder.enter)
    recorder.pause()
    runner.run(recorder.party(), plan, weights, inputs, probe)
    recorder.tape.rest_s = recorder.pause()
    recorder.tape.layers = [(layer.name, layer.op) for layer in probe.layers]
    return recorder.tape


def rehearse(plan: Plan) -> tuple[Tape, Tape]:
    """Return the keeper's and the user's tape, made on tensors without values: no seconds on them mean anything."""
    weights = {
        name: torch.empty(shape, dtype=torch.int64, device="meta") for name, shape in plan.program.params.items()
    }
    return _record(plan, KEEPER, weights, "meta"), _record(plan, USER, weights, "meta")


def perform(plan: Plan, *, repeats: int = 3, enough_s: float = 2.0) -> tuple[Tape, Tape, float]:
    """Return the keeper's and the user's tape with the seconds each computes on this machine, and the dealer's seconds.

    Args:
        plan: on made-up weights, inputs and correlations.
        repeats: how often at most, after a first time that is not counted; the median of them is returned.
        enough_s: no more repetitions once a party's side has taken so long.

    Cost: computing time and memory of some predictions, one after the other.
    """
    protocol = backend.find(plan.protocol)
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
    best, spent = _record(plan, rank, weights, "cpu"), 0.0
    spent = _computing(best)
    if spent < enough_s:
        tapes: list[Tape] = []
        while len(tapes) < repeats and (not tapes or spent < enough_s):
            tapes.append(_record(plan, rank, weights, "cpu"))
            spent += _computing(tapes[-1])
        best = sorted(tapes, key=_computing)[len(tapes) // 2]
    return best


def _computing(tape: Tape) -> float:
    return sum(event.seconds for event in tape.events) + tape.rest_s
