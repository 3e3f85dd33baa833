"""A run without values sends, takes and asks for what two parties do: one test for every operator and protocol."""

import numpy as np
import pytest
import torch
from both_parties import CASES, PROTOCOLS, secure, single
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import limits
from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, KINDS, USER, Dealing, Request
from protocols.primitives.prg import Stream
from protocols.program.program import Layer, Program
from protocols.running import rehearsal, runner
from protocols.two_party import compare, reused_masks
from protocols.two_party.recorder import Recorder

RNG = np.random.default_rng(0)
CASES_BY_NAME = {f"{op}-{i}": (op, case) for op, cases in CASES.items() for i, case in enumerate(cases)}


def recorded(plan: runner.Plan, rank: int) -> Recorder:
    """Run a plan without values as one party."""
    recorder = Recorder(rank)
    weights = {name: recorder.make(shape) for name, shape in plan.program.params.items()}
    inputs = {
        name: recorder.make((plan.batch, *shape)) if rank == USER else None
        for name, shape in plan.program.inputs.items()
    }
    runner.run(recorder.party(), plan, weights, inputs, runner.Probe())
    return recorder


def assert_same_traffic(program: Program, params: dict, protocol: str, batch: int, gated: bool, k: int) -> None:
    plan = runner.Plan(program, protocol, batch, gated, k)
    x = {
        name: RNG.uniform(0.1, min(1.0, limits.input_limit(k) / 8), (batch, *shape)).astype(np.float32)
        for name, shape in program.inputs.items()
    }
    # That the real parties take each correlation in the order of `runner.requests` their dealer sees to.
    _, _, sent = secure(protocol, program, params, x, gated, comparison_bits=k)
    recorders = [recorded(plan, rank) for rank in (KEEPER, USER)]
    for recorder, messages in zip(recorders, sent, strict=True):
        told = [(m.kind, m.shape, m.dtype) for m in recorder.messages if m.is_sent]
        assert told == [(kind, tuple(t.shape), t.dtype) for kind, t in messages]
        assert recorder.requests == runner.requests(plan)
    taken = [[(m.kind, m.shape, m.dtype) for m in r.messages if not m.is_sent] for r in recorders]
    assert taken == [[(m.kind, m.shape, m.dtype) for m in r.messages if m.is_sent] for r in recorders[::-1]]
    for tape, recorder in zip(rehearsal.rehearse(plan), recorders, strict=True):
        assert [(e.kind, e.is_sent) for e in tape.events] == [(m.kind, m.is_sent) for m in recorder.messages]
        assert [request for _, request in tape.requests] == recorder.requests


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_every_operator_without_values_has_the_traffic_of_one_with_values(name, protocol):
    program, params = single(*CASES_BY_NAME[name])
    for batch, gated in ((1, False), (3, True)):
        assert_same_traffic(program, params, protocol, batch, gated, limits.COMPARISON_BITS)


# x -> a linear layer with weights of any bits -> what compares and cuts it, on any number of bits.
COMPARED = {
    "relu": lambda n: ("relu", (n,), {}),
    "max": lambda n: ("max", (1,), {"axis": 1}),
    "argmax": lambda n: ("argmax", (1,), {"axis": 1, "last": 1}),
    "spline": lambda n: ("spline", (n,), CASES["spline"][0][3]),
}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PROTOCOLS),
    st.sampled_from(sorted(COMPARED)),
    st.integers(2, 19),
    st.integers(1, 4),
    st.booleans(),
    st.integers(limits.FEWEST_COMPARISON_BITS, limits.MOST_COMPARISON_BITS),
    st.integers(limits.FEWEST_WEIGHT_BITS, limits.MOST_WEIGHT_BITS),
)
def test_networks_of_any_shape_have_the_same_traffic_without_values(protocol, op, n, batch, gated, k, weight_bits):
    named, shape, attrs = COMPARED[op](n)
    layers = (
        Layer("matmul", "a", ("x",), "a", (n,), {"weight": "w", "bias": "b"}, weight_bits=weight_bits),
        Layer(named, "y", ("a",), "y", shape, attrs=attrs),
    )
    program = Program({"x": (5,)}, ("y",), layers, {"w": (5, n), "b": (n,)})
    program.validate()
    params = {"w": RNG.uniform(-0.1, 0.1, (5, n)).astype(np.float32), "b": np.zeros(n, np.float32)}
    assert_same_traffic(program, params, protocol, batch, gated, k)


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def requests(draw):
    """A request of any kind that the dealer makes from shapes alone."""
    kind = draw(st.sampled_from(["triple", "square", "and", "bit", "truncation", "key_gate", "output_gate", *KEYED]))
    shape, k = draw(shapes), draw(st.integers(limits.FEWEST_COMPARISON_BITS, limits.MOST_COMPARISON_BITS))
    if kind == "triple":
        return Request(kind, (shape, shape), (("op", "mul"),))
    if kind == "and":
        return Request(kind, (shape, shape))
    if kind in ("truncation", "output_gate"):
        task = (("task", "t"),) if kind == "output_gate" else ()
        return Request(kind, (shape,), (("bits", draw(st.integers(1, 62))), *task))
    if kind in ("sign", "pairs"):
        shape = (shape[0] + 1, *shape[1:])
        return compare.request_of(kind, shape, draw(st.sampled_from([0, 16])), k)
    if kind == "spline":
        degree, knots = draw(st.integers(0, 2)), draw(st.integers(1, 5))
        return Request(kind, (shape,), (("knots", knots), ("degree", degree), ("k", k)))
    if kind == "linear":
        return Request(kind, (shape, shape), (("op", "affine"), ("weight", "w")))
    if kind == "reused":
        return Request(kind, (shape, (*shape[:-1], 2), (shape[-1], 2)), (("weight", "w"), *reused_masks.MATMUL))
    return Request(kind, (shape,))


KEYED = ["sign", "pairs", "spline", "linear", "reused"]


def test_every_kind_of_correlation_is_drawn():
    assert set(KINDS) == {"triple", "square", "and", "bit", "truncation", "key_gate", "output_gate", *KEYED}


@settings(max_examples=150, deadline=None)
@given(requests())
def test_a_recorder_hands_out_parts_of_the_shapes_that_the_dealer_makes(request_):
    keeper, user = Stream(), Stream()
    mask = torch.ones(request_.shapes[-1][-2:] if request_.kind == "reused" else (1,), dtype=torch.int64)
    streams = [s.derive("parts") for s in (keeper, user)]
    own, common = correlation.deal(request_, keeper.derive("parts"), user.derive("parts"), Dealing(masks={"w": mask}))
    for rank, corrections in ((KEEPER, [*own, *common]), (USER, common)):
        assert [tuple(c.shape) for c in corrections] == correlation.correction_shapes(request_, rank)
        part = correlation.take(request_, rank, streams[rank], corrections)
        made = Recorder(rank).take(request_)
        assert [(tuple(t.shape), t.dtype) for t in part] == [(tuple(t.shape), t.dtype) for t in made]
