"""The execution of a program by a party, and by a recorder that lists the correlations it needs."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from protocols import limits
from protocols.dealing.correlation import KEEPER, Request
from protocols.limits import FRAC_BITS
from protocols.program.program import Layer, Program
from protocols.running import backend
from protocols.two_party import gate
from protocols.two_party.party import Party, reveal_to_user, share_input
from protocols.two_party.recorder import Recorder
from protocols.two_party.value import Value


@dataclass(frozen=True)
class Plan:
    """What the two parties agree to run: public.

    Args:
        program: the network.
        protocol: a name of `backend.PROTOCOLS`.
        batch: number of samples.
        gated: whether the authority's gates are at the input and at every output.
        comparison_bits: as in `Party`.
    """

    program: Program
    protocol: str
    batch: int
    gated: bool
    comparison_bits: int = limits.COMPARISON_BITS


@dataclass(frozen=True)
class LayerCost:
    """What one layer cost at this party: seconds, bytes both ways, rounds."""

    name: str
    op: str
    seconds: float
    bytes: int
    rounds: int


@dataclass
class Probe:
    """Reads the wire's counters between layers.

    Args:
        traffic: returns (bytes both ways, rounds) so far.
        enter: told the name of each layer before it runs.
    """

    traffic: Callable[[], tuple[int, int]] = lambda: (0, 0)
    enter: Callable[[str], None] = lambda name: None
    layers: list[LayerCost] = field(default_factory=list)
    scales: dict[str, int] = field(default_factory=dict)

    def measure(self, name: str, op: str, work: Callable[[], None]) -> None:
        """Run `work` and note what it cost."""
        self.enter(name)
        start, (n_bytes, rounds) = time.perf_counter(), self.traffic()
        work()
        after_bytes, after_rounds = self.traffic()
        seconds = time.perf_counter() - start
        self.layers.append(LayerCost(name, op, seconds, after_bytes - n_bytes, after_rounds - rounds))


def run(
    party: Party, plan: Plan, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor | None], probe: Probe
) -> dict[str, Tensor | None]:
    """Run a plan as one party.

    Args:
        party: this party.
        plan: the same at both parties.
        weights: this party's shares of the parameters, from the backend's `share_weights`.
        inputs: name -> the user's batch, int64 at scale 2**f; None at the keeper.
        probe: notes the cost of each layer.

    Returns:
        Output name -> int64 tensor at scale 2**f at the user; None at the keeper.

    Security: the keeper learns nothing, the user the outputs; see each protocol.
    """
    protocol = backend.find(plan.protocol)
    program, operators = plan.program, protocol.operators
    party.is_negative, party.comparison_bits = protocol.is_negative, plan.comparison_bits
    values: dict[str, Value] = {}
    revealed: dict[str, Tensor | None] = {}

    def share() -> None:
        into = gate.share_gated_input if plan.gated else share_input
        for name, shape in program.inputs.items():
            values[name] = Value(into(party, inputs[name], (plan.batch, *shape)))

    def apply(layer: Layer) -> None:
        arguments = [values[name] for name in layer.inputs]
        values[layer.output] = operators[layer.op](party, layer, weights, *arguments)
        probe.scales[layer.name] = values[layer.output].frac_bits

    def reveal() -> None:
        outputs = [
            gate.Scores(name, values[name].raised_to(FRAC_BITS), max(values[name].frac_bits - FRAC_BITS, 0), plan.gated)
            for name in program.outputs
        ]
        for y, closed in zip(outputs, gate.close_outputs(party, outputs), strict=True):
            revealed[y.name] = reveal_to_user(party, closed)

    with protocol.acting(party), torch.no_grad():
        probe.measure("input", "share", share)
        for layer in program.layers:
            probe.measure(layer.name, layer.op, partial(apply, layer))
        probe.measure("output", "reveal", reveal)
    return revealed


# --- recording ------------------------------------------------------------------------------------------------------


def requests(plan: Plan) -> list[Request]:
    """Return the correlations that a plan needs, in order, by running it once on tensors without values.

    A protocol's messages and correlations never depend on values, so that this list, made from
    public data, is the same for the dealer and both parties.
    """
    return _rehearse(plan)[0]


def scales(plan: Plan) -> dict[str, int]:
    """Return layer -> fraction bits of what it makes; each use may truncate it, to no more than that."""
    return _rehearse(plan)[1].scales


def _rehearse(plan: Plan) -> tuple[list[Request], Probe]:
    recorder, probe = Recorder(KEEPER), Probe()
    weights = {name: recorder.make(shape) for name, shape in plan.program.params.items()}
    run(recorder.party(), plan, weights, dict.fromkeys(plan.program.inputs), probe)
    return recorder.requests, probe


def warm_recorder() -> None:
    """Let torch load what operations on tensors without values need: seconds that no request should wait for."""
    one = Recorder(KEEPER).make((1,))
    torch.stack([one, one]).sum(0)
