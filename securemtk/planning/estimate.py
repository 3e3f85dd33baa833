"""What a prediction will cost: bytes and rounds exactly as a session counts them, and seconds for a given network."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, USER, Request
from protocols.dealing.dealer import correction_bytes
from protocols.dealing.messages import Deal, pack
from protocols.errors import InputError
from protocols.net.frames import frame_bytes
from protocols.program.program import Program, chunk_size
from protocols.running import backend, rehearsal, replay
from protocols.running.rehearsal import Tape
from protocols.running.replay import BYTE_S, MESSAGE_S, Network, correction_frames
from protocols.running.runner import LayerCost, Plan
from securemtk.serving.config import Config
from securemtk.serving.messages import Granted, Ready
from securemtk.serving.parties.orders import PredictionKind, PreparedPrediction, predict_of, prepare_of

NETWORKS = {
    "local": Network(),
    "lan": Network(rtt_s=5e-4, bits_per_s=1e9),
    "wan": Network(rtt_s=4e-2, bits_per_s=1e8),
}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class LayerEstimate:
    """What one layer costs in a prediction.

    Args:
        name, op: of the layer; "input" and "output" are the sharing and the revelation.
        rounds, online_bytes: as `PredictionCost.layers` says.
        offline_bytes: of the layer's correlations, to both parties, without frames.
        online_s: seconds at the user; None where no network was given.
    """

    name: str
    op: str
    rounds: int
    online_bytes: int
    offline_bytes: int
    online_s: float | None = None


@dataclass(frozen=True)
class Estimate:
    """What a prediction costs, before it is asked.

    Args:
        protocol, batch: of the prediction.
        chunks: runs of the program that the batch needs.
        layers: the cost by layer, over all chunks.
        rounds, online_bytes: `PredictionCost.rounds` and `.online_bytes`.
        offline_bytes: `PredictionCost.offline_bytes` of a model's first prediction in a session, frames and requests
            included.
        repeat_bytes: the same of its next prediction with this batch, whose correlations both parties know already.
        load_bytes: of the masked weights, which go to the user once for each session.
        network: for which the seconds are; None where none was given.
        online_s: seconds from the input to the scores.
        offline_s: seconds that a prediction waits before, where nothing was ordered ahead.
    """

    protocol: str
    batch: int
    chunks: int
    layers: tuple[LayerEstimate, ...]
    rounds: int
    online_bytes: int
    offline_bytes: int
    repeat_bytes: int
    load_bytes: int
    network: Network | None = None
    online_s: float | None = None
    offline_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON values; an endless bandwidth is None."""
        document = asdict(self)
        if self.network is not None and math.isinf(self.network.bits_per_s):
            document["network"]["bits_per_s"] = None
        return document


def parse_network(name: str | None, rtt: str | None, bandwidth: str | None) -> Network | None:
    """Return the network of a preset, with its times replaced by those given; None for three Nones.

    Args:
        name: of `NETWORKS`.
        rtt: such as "40ms"; s, ms or us.
        bandwidth: such as "100mbit", of each direction; bit, kbit, mbit or gbit a second.

    Raises:
        InputError: anything else.
    """
    if name is None and rtt is None and bandwidth is None:
        return None
    if name is not None and name not in NETWORKS:
        raise InputError(f"the network must be one of {', '.join(NETWORKS)}; got {name!r}")
    preset = NETWORKS[name or "local"]
    rtt_s = preset.rtt_s if rtt is None else _quantity("the round-trip time", rtt, _SECONDS)
    bits = preset.bits_per_s if bandwidth is None else _quantity("the bandwidth", bandwidth, _BITS)
    if not bits:
        raise InputError(f"the bandwidth must be positive; got {bandwidth!r}")
    return Network(rtt_s, bits)


def _quantity(what: str, text: str, units: dict[str, float]) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if found is None or found[2] not in units:
        raise InputError(f"{what} must be a number and one of {', '.join(units)}; got {text!r}")
    return float(found[1]) * units[found[2]]


def estimate_prediction(
    program: Program,
    batch: int = 1,
    protocol: str = "fss",
    *,
    gated: bool = False,
    open_tasks: Sequence[str] = (),
    network: Network | None = None,
    config: Config | None = None,
) -> Estimate:
    """Tell what a prediction of a program will cost.

    Args:
        program: of the model.
        batch: number of samples.
        protocol: a name of `runner.PROTOCOLS`.
        gated: whether the model has secured tasks.
        open_tasks: names of the tasks that the prediction opens; their names travel, nothing else depends on them.
        network: between every two roles. Where given, each party's side runs with made-up values on this machine,
            which takes the computing time of some predictions.
        config: of the session; its chunks and threads matter.

    Raises:
        InputError: a batch below 1, or above 1 for a program that takes its inputs as a whole.
        UnsupportedError: an unknown protocol.
    """
    config = config or Config()
    if batch < 1 or (program.whole and batch > 1):
        limit = "1: the model takes its inputs as a whole" if program.whole else "1 or more"
        raise InputError(f"the batch must be {limit}; got {batch}")
    size = chunk_size(program, batch, config.chunk_elements)
    sizes = [min(size, batch - begin) for begin in range(0, batch, size)]
    runs = {n: _Run(Plan(program, protocol, n, gated), network, config) for n in sorted(set(sizes))}
    columns = zip(*(runs[n].layers for n in sizes), strict=True)
    layers = tuple(_summed(column) for column in columns)
    seen: set[int] = set()
    offline = repeat = 0
    for number, n in enumerate(sizes):
        offline += runs[n].offline_bytes(number, open_tasks, first=n not in seen)
        repeat += runs[n].offline_bytes(number, open_tasks, first=False)
        seen.add(n)
    names = backend.find(protocol).masked_names(program)
    timed = network is not None
    return Estimate(
        protocol=protocol,
        batch=batch,
        chunks=len(sizes),
        layers=layers,
        rounds=sum(layer.rounds for layer in layers),
        online_bytes=sum(layer.online_bytes for layer in layers),
        offline_bytes=offline,
        repeat_bytes=repeat,
        load_bytes=frame_bytes("weights", None, [("<i8", program.params[name]) for name in names]),
        network=network,
        online_s=sum(layer.online_s or 0.0 for layer in layers) if timed else None,
        offline_s=sum(runs[n].offline_s for n in sizes) if timed else None,
    )


def _summed(column: Sequence[LayerEstimate]) -> LayerEstimate:
    first = column[0]
    rounds, online, offline = (
        sum(getattr(layer, name) for layer in column) for name in ("rounds", "online_bytes", "offline_bytes")
    )
    seconds = None if first.online_s is None else sum(layer.online_s or 0.0 for layer in column)
    return LayerEstimate(first.name, first.op, rounds, online, offline, seconds)


class _Run:
    """One chunk: one run of the program."""

    def __init__(self, plan: Plan, network: Network | None, config: Config) -> None:
        self._plan = plan
        self.offline_s = 0.0
        if network is None:
            keeper, user = rehearsal.rehearse(plan)
            costs = replay.replay(keeper, user)
        else:
            threads = torch.get_num_threads()
            torch.set_num_threads(config.threads)
            try:
                keeper, user, deal_s = rehearsal.perform(plan)
            finally:
                torch.set_num_threads(threads)
            costs = replay.replay(keeper, user, network)
            self.offline_s = _waiting(keeper, user, deal_s, network)
        self._requests = [request for _, request in keeper.requests]
        self.layers = _with_offline(costs, keeper, timed=network is not None)

    def offline_bytes(self, prediction: int, open_tasks: Sequence[str], *, first: bool) -> int:
        """Return what all roles send for one prediction before it starts, as `Session` counts it."""
        order = PreparedPrediction(prediction, PredictionKind(0, self._plan.batch, tuple(open_tasks)))
        to_keeper, to_user = (
            self._deal(prediction, first=first) + correction_frames(self._requests, rank, prediction)
            for rank in (KEEPER, USER)
        )
        return (
            to_keeper
            + to_user
            + prepare_of(order).frame_bytes()
            + Granted(prediction).frame_bytes()
            + predict_of(order).frame_bytes()
            + Ready(prediction, to_keeper).frame_bytes()
        )

    def _deal(self, prediction: int, *, first: bool) -> int:
        packed = pack(self._requests) if first else None
        return Deal(prediction, (0, self._plan.batch), packed).frame_bytes()


def _waiting(keeper: Tape, user: Tape, deal_s: float, network: Network) -> float:
    """Return the seconds of a prediction that has to wait for its dealer, who sends while it deals."""
    listed = [request for _, request in keeper.requests]
    n_bytes = [correction_bytes(listed, rank) for rank in (KEEPER, USER)]
    made_s = deal_s + sum(n_bytes) * BYTE_S
    # The user hears from the keeper that it is ready too.
    ready = [
        max(made_s, network.transfer_s(n)) + tape.take_s + way_back
        for n, tape, way_back in zip(n_bytes, (keeper, user), (network.rtt_s / 2, 0.0), strict=True)
    ]
    # The order, the corrections, the keeper's word.
    return network.rtt_s + max(ready) + 3 * MESSAGE_S


def _with_offline(costs: Sequence[LayerCost], tape: Tape, *, timed: bool) -> list[LayerEstimate]:
    offline = [0] * len(costs)
    for layer, request in tape.requests:
        offline[layer] += _both(request)
    return [
        LayerEstimate(cost.name, cost.op, cost.rounds, cost.bytes, n_bytes, cost.seconds if timed else None)
        for cost, n_bytes in zip(costs, offline, strict=True)
    ]


def _both(request: Request) -> int:
    return sum(
        8 * math.prod(shape) for rank in (KEEPER, USER) for shape in correlation.correction_shapes(request, rank)
    )
