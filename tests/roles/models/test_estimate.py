"""Estimates of a prediction: bytes and rounds are those that a session then measures."""

import math
from dataclasses import replace

import numpy as np
import pytest
import small_models
from onnx import helper
from onnx_models import build, floats, one

from protocols.dealing import dealer
from protocols.dealing.correlation import KEEPER, USER
from protocols.errors import InputError, ProtocolAbort, UnsupportedError
from protocols.program.program import Layer, Program
from protocols.running import rehearsal, replay, runner
from protocols.running.runner import Plan
from securemtk.onnx.importer import load_onnx
from securemtk.planning.estimate import NETWORKS, estimate_prediction, parse_network
from securemtk.serving.config import Config
from securemtk.serving.session import Session

node = helper.make_node
RNG = np.random.default_rng(5)

SMOOTH = build(
    [
        node("MatMul", ["x", "w"], ["q"], name="query"),
        node("Mul", ["q", "x"], ["s"], name="scores"),
        node("Softmax", ["s"], ["p"], name="softmax", axis=-1),
        node("Sigmoid", ["q"], ["g"], name="gate"),
        node("ReduceMean", ["g"], ["y"], name="mean", axes=[1], keepdims=0),
    ],
    {"x": ["n", 3, 4]},
    ["y", "p"],
    {"w": floats(4, 4)},
    opset=17,
).SerializeToString()

POOLED = build(
    [
        node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"], name="relu"),
        node("MaxPool", ["r"], ["p"], name="pool", kernel_shape=[3, 3], strides=[2, 2]),
        node("GlobalAveragePool", ["p"], ["g"], name="average"),
        node("Flatten", ["g"], ["f"], name="flat"),
        node("Gemm", ["f", "u"], ["y"], name="dense"),
    ],
    {"x": ["n", 2, 7, 7]},
    ["y"],
    {"w": floats(3, 2, 3, 3), "u": floats(3, 5)},
    opset=17,
).SerializeToString()

MODELS = {"mlp": small_models.mlp(), "pooled": POOLED, "smooth": SMOOTH}


@pytest.fixture(scope="module", params=["fss", "crypten"])
def session(request):
    with Session(protocol=request.param) as running:
        yield running


def expected(cost):
    layers = [(layer.name, layer.op, layer.rounds, layer.bytes) for layer in cost.layers]
    return layers, cost.rounds, cost.online_bytes, cost.offline_bytes


def estimated(found):
    layers = [(layer.name, layer.op, layer.rounds, layer.online_bytes) for layer in found.layers]
    return layers, found.rounds, found.online_bytes, found.offline_bytes


@pytest.mark.parametrize("name", MODELS)
def test_bytes_and_rounds_are_those_that_a_session_measures(session, name):
    model = session.load(MODELS[name])
    (shape,) = model.program.inputs.values()
    for batch in (1, 3):
        found = estimate_prediction(model.program, batch, session._protocol)
        model.predict(RNG.standard_normal((batch, *shape)).astype(np.float32))
        assert estimated(found) == expected(session.cost)
        assert found.offline_bytes > sum(layer.offline_bytes for layer in found.layers) > 0


def test_a_gated_model_and_correlations_of_many_frames_cost_what_was_estimated(tmp_path):
    small_models.make_bundle(tmp_path)
    with Session(key_files=tmp_path / "keys") as running:
        model = running.load(tmp_path / "bundle")
        x = RNG.standard_normal((3, *small_models.SHAPE)).astype(np.float32)
        model.predict(x, open_tasks=["digit"])
        found = estimate_prediction(model.program, 3, gated=True, open_tasks=["digit"])
        assert estimated(found) == expected(running.cost)
        model = running.load(small_models.slow(8))
        model.predict(RNG.standard_normal((1, 3, 32, 32)).astype(np.float32))
        found = estimate_prediction(model.program, 1)
        assert found.offline_bytes > 4 << 20
        assert estimated(found) == expected(running.cost)
        # The next prediction needs no plan; its number has as many digits.
        model.predict(RNG.standard_normal((1, 3, 32, 32)).astype(np.float32))
        assert running.cost.offline_bytes == found.repeat_bytes < found.offline_bytes


def test_a_batch_of_several_chunks_costs_their_sum():
    program = load_onnx(small_models.mlp()).program
    config = Config(chunk_elements=32)
    found = estimate_prediction(program, 5, config=config)
    parts = [estimate_prediction(program, n, config=config) for n in (2, 2, 1)]
    assert found.chunks == 3
    assert found.rounds == sum(part.rounds for part in parts)
    assert found.online_bytes == sum(part.online_bytes for part in parts)
    # The second chunk's correlations are described already.
    assert found.offline_bytes == parts[0].offline_bytes + parts[1].repeat_bytes + parts[2].offline_bytes


@pytest.mark.parametrize("protocol", ["fss", "crypten"])
def test_a_rehearsal_asks_for_the_correlations_of_the_plan(protocol):
    plan = Plan(load_onnx(SMOOTH).program, protocol, 2, False)
    for tape in rehearsal.rehearse(plan):
        assert [request for _, request in tape.requests] == runner.requests(plan)


CHOICE = Program(
    {"x": (2, 5)},
    ("k", "m", "d"),
    (
        Layer("argmax", "best", ("x",), "k", (2, 1), attrs={"axis": 2, "last": 1}),
        Layer("max", "largest", ("x",), "m", (2, 1), attrs={"axis": 2}),
        Layer("transpose", "turn", ("x",), "t", (5, 2), attrs={"perm": (0, 2, 1)}),
        Layer("dot", "pairs", ("x", "t"), "d", (2, 2)),
    ),
    {},
)


@pytest.mark.parametrize("protocol", ["fss", "crypten"])
@pytest.mark.parametrize("program", [load_onnx(SMOOTH).program, CHOICE], ids=["smooth", "choice"])
def test_with_values_the_same_messages_travel(program, protocol):
    plan = Plan(program, protocol, 2, False)
    dry, (keeper, user, _) = rehearsal.rehearse(plan), rehearsal.perform(plan, repeats=1)
    costs = [[(x.name, x.op, x.bytes, x.rounds) for x in replay.replay(*pair)] for pair in (dry, (keeper, user))]
    assert costs[0] == costs[1]


def test_parties_that_do_not_fit_are_refused():
    keeper, user = rehearsal.rehearse(Plan(load_onnx(small_models.mlp()).program, "fss", 1, False))
    with pytest.raises(ProtocolAbort, match="same messages"):
        replay.replay(keeper, replace(user, events=[replace(event, kind="other") for event in user.events]))
    with pytest.raises(ProtocolAbort, match="waits for ever"):
        replay.replay(replace(keeper, events=keeper.events[:-1]), user)


def test_seconds_grow_by_half_a_round_trip_a_round_and_by_the_time_to_transfer():
    plan = Plan(load_onnx(small_models.mlp()).program, "fss", 4, False)
    keeper, user = rehearsal.rehearse(plan)
    keeper, user = (
        replace(tape, events=[replace(event, seconds=0.0) for event in tape.events], rest_s=0.0)
        for tape in (keeper, user)
    )
    here = sum(x.seconds for x in replay.replay(keeper, user))
    far = sum(x.seconds for x in replay.replay(keeper, user, replay.Network(rtt_s=1.0)))
    rounds = sum(x.rounds for x in replay.replay(keeper, user))
    assert far - here == pytest.approx(rounds / 2, abs=0.01)
    narrow = sum(x.seconds for x in replay.replay(keeper, user, replay.Network(bits_per_s=8.0)))
    n_bytes = [sum(event.bytes for event in tape.events) for tape in (keeper, user)]
    assert max(n_bytes) - 0.01 < narrow - here < sum(n_bytes) + 0.01


def test_an_estimate_with_a_network_has_seconds_by_layer():
    program = load_onnx(small_models.mlp()).program
    found = estimate_prediction(program, 2, network=NETWORKS["wan"])
    assert found.online_s == pytest.approx(sum(layer.online_s for layer in found.layers))
    assert found.online_s > found.rounds * 0.02
    assert found.offline_s > 0.04
    assert estimated(found) == estimated(estimate_prediction(program, 2))
    assert found.to_dict()["network"] == {"rtt_s": 0.04, "bits_per_s": 1e8}


@pytest.mark.parametrize(
    ("given", "network"),
    [
        ((None, None, None), None),
        (("lan", None, None), (5e-4, 1e9)),
        (("wan", "10ms", None), (0.01, 1e8)),
        ((None, "40 ms", "100Mbit"), (0.04, 1e8)),
        ((None, None, "2.5gbit"), (0.0, 2.5e9)),
        ((None, "1500us", None), (0.0015, math.inf)),
    ],
)
def test_a_network_is_a_preset_or_numbers_with_units(given, network):
    found = parse_network(*given)
    assert (found and (found.rtt_s, found.bits_per_s)) == (network and pytest.approx(network))


@pytest.mark.parametrize(
    "given",
    [("moon", None, None), (None, "40", None), (None, "-1ms", None), (None, None, "0mbit"), (None, None, "1mb")],
)
def test_a_network_of_another_form_is_refused(given):
    with pytest.raises(InputError, match="must be"):
        parse_network(*given)


def test_what_cannot_be_asked_is_not_estimated():
    program = load_onnx(small_models.mlp()).program
    with pytest.raises(InputError, match="1 or more"):
        estimate_prediction(program, 0)
    with pytest.raises(InputError, match="as a whole"):
        estimate_prediction(replace(program, whole=True), 2)
    with pytest.raises(UnsupportedError):
        estimate_prediction(program, 1, "none")


def test_by_layer_the_offline_bytes_are_those_of_the_corrections():
    program = load_onnx(one("Relu", ["n", 5], []).SerializeToString()).program
    found = estimate_prediction(program)
    (tape, _) = rehearsal.rehearse(Plan(program, "fss", 1, False))
    requests = [request for _, request in tape.requests]
    by_layer = {layer.name: layer.offline_bytes for layer in found.layers}
    total = sum(dealer.correction_bytes(requests, rank) for rank in (KEEPER, USER))
    assert sum(by_layer.values()) == total > 0
    assert by_layer["input"] == by_layer["output"] == 0
