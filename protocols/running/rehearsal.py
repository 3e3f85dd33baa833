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
from protocols.two_party.party import Party

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


class _Recorder:
    """Wire and correlations of a party that computes alone."""

    def __init__(self, rank: int, *, dry: bool) -> None:
        self.tape = Tape()
        self._hand: PredictionShares | None = None
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
        self._hand = PredictionShares(self._rank, Stream(), listed, corrections, finish)
        self.tape.take_s = self.pause()


def _record(plan: Plan, rank: int, weights: Mapping[str, Tensor], *, dry: bool) -> Tape:
    recorder = _Recorder(rank, dry=dry)
    if not dry:
        finish = partial(backend.find(plan.protocol).finish, masked=weights)
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
