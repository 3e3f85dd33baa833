"""Ranges: what is measured is what a protocol works on, and each bound is where answers become wrong."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from both_parties import CASES, CONV, LOCAL, secure, single
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_models import build, floats
from onnx_models import one as onnx_one

from protocols.errors import RangeError
from protocols.program import functions, plain
from protocols.program.program import OPERATORS, Layer, Program
from protocols.running import ranges
from protocols.running.ranges import LayerRange, headroom, measure
from securemtk.onnx.building.lower import lower
from securemtk.onnx.building.registry import Step
from securemtk.onnx.importer import load_onnx
from securemtk.planning.check import check

node = helper.make_node
WHOLE = {"kernel": (2, 2), "stride": (2, 2), "pads": (0, 0, 0, 0)}
AVERAGE = WHOLE | {"count_include_pad": 0}
PADDED = {"kernel": (2, 2), "stride": (1, 1), "pads": (0, 1, 0, 0)}


def rows(program: Program, params: dict, *batches: np.ndarray) -> list[LayerRange]:
    return list(measure(program, params, [{"x0": np.asarray(x, np.float32)} for x in batches]))


def lowered(op: str, attrs: dict) -> tuple[str, dict]:
    """Return an operator of a program, and its attributes, for a step in a model's words."""
    (step,) = lower([Step(op, op, ("x0",), "y", (1,), attrs=attrs)])
    return step.op, dict(step.attrs)


def one(op: str, x: np.ndarray, out: tuple, attrs: dict) -> tuple[LayerRange, float]:
    """Return what is measured of one layer on x, and how far the protocol's answer is from the right one."""
    op, attrs = lowered(op, attrs)
    program, params = single(op, ([x.shape[1:]], out, {}, attrs))
    (row,) = rows(program, params, x)
    got = secure("fss", program, params, {"x0": x})[0]["y"]
    return row, float(np.abs(got - plain.run(program, params, {"x0": x})["y"]).max())


def vector(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


def image(*values: float) -> np.ndarray:
    return np.array(values, np.float32).reshape(1, 1, 2, 2)


# operator, attributes, shape of the result, data inside and data beyond, what is largest in each
BOUNDS = [
    ("relu", {}, (2,), vector(32767.5, -32000), vector(32768, 1), 32767.5, 32768),
    ("relu", {}, (2,), vector(-32767.5, 1), vector(-33000, 1), 32767.5, 33000),
    ("leaky_relu", {"slope": 0.5}, (2,), vector(32767, -1), vector(33000, -1), 32767, 33000),
    ("clip", {"low": -10000.0, "high": 9.0}, (2,), vector(20000, 0), vector(24000, 0), 30000, 34000),
    ("clip", {"low": -9.0, "high": 10000.0}, (2,), vector(-22000, 0), vector(-23000, 0), 32000, 33000),
    ("clip", {"low": -9.0, "high": 10000.0}, (2,), vector(32758, -9), vector(32760, -9), 32767, 32769),
    ("clip", {"low": -65504.0, "high": 16000.0}, (2,), vector(-16000, 0), vector(-17000, 0), 32000, 33000),
    ("indicator", {"knots": (1 << 16,), "below": 0}, (2,), vector(-32000, 3), vector(-32768, 3), 32001, 32769),
    ("max_pool2d", WHOLE, (1, 1, 1), image(16000, 16000, -16000, -16000), image(17000, 1, -17000, 1), 32000, 34000),
    ("max_pool2d", PADDED, (1, 1, 2), image(-16000, 1, -16000, 1), image(-17000, 1, -17000, 1), 16000, 17000),
    ("max_pool2d", PADDED, (1, 1, 2), image(16000, 1, 1, 1), image(17000, 1, 1, 1), 16000, 17000),
    ("sigmoid", {}, (2,), vector(-32000, 32000), vector(32760, 1), 32012, 32772),
    ("tanh", {}, (2,), vector(-32000, 32000), vector(-32764, 1), 32006, 32770),
    ("gelu", {}, (2,), vector(-32000, 32000), vector(-32764, 1), 32005, 32769),
    ("max", {"axis": 1}, (1,), vector(16000, 1, -16000, 1), vector(17000, 1, -17000, 1), 32000, 34000),
    ("argmax", {"axis": 1, "last": 0}, (1,), vector(16000, -16000, 1), vector(17000, -17000, 1), 32000, 34000),
]


@pytest.mark.parametrize(("op", "attrs", "out", "inside", "beyond", "fits", "breaks"), BOUNDS)
def test_answers_are_right_below_a_bound_and_wrong_beyond_it(op, attrs, out, inside, beyond, fits, breaks):
    row, error = one(op, inside, out, attrs)
    assert (row.largest, row.headroom, error < 0.05) == (pytest.approx(fits), 0, True)
    row, error = one(op, beyond, out, attrs)
    assert (row.largest, row.headroom < 0, error > 0.2) == (pytest.approx(breaks), True, True)


def test_a_softmax_is_right_for_any_number_of_near_equal_values():
    for n in (2, 300):
        imported = load_onnx(onnx_one("Softmax", ["n", n], axis=1).SerializeToString())
        x = np.concatenate([np.zeros((1, n)), np.eye(1, n) * 16000, floats(1, n)]).astype(np.float32)
        found = measure(imported.program, imported.params, [{"x": x}])
        assert min(row.headroom for row in found) >= 0
        got = secure("fss", imported.program, imported.params, {"x": x})[0]["y"]
        weights = np.exp(x - x.max(1, keepdims=True))
        np.testing.assert_allclose(got, weights / weights.sum(1, keepdims=True), atol=1e-3)


@pytest.mark.parametrize(
    ("layers", "bits"),
    [
        ([("avg_pool2d", (1, 1, 1), AVERAGE)], 48),
        ([("mean", (1, 1, 1), {"axes": (2, 3), "keepdims": 1})], 34),
        ([("scale", (1, 2, 2), {"factor": 1.5, "offset": 0})], 48),
        ([("sum", (1, 1, 1), {"axes": (2, 3), "keepdims": 1})], 32),
        ([("sum", (1, 1, 1), {"axes": (2, 3), "keepdims": 1}), ("scale", (1, 1, 1), {"factor": 3, "offset": 0})], 32),
        ([("scale", (1, 2, 2), {"factor": 1.5, "offset": 0}), ("relu", (1, 2, 2), {})], 48),
    ],
)
def test_a_value_behind_a_product_is_bounded_by_its_scale_until_it_is_truncated(layers, bits):
    names = ["h", *(f"v{i}" for i in range(len(layers) - 1)), "y"]
    made = [Layer("affine", "first", ("x0",), "h", (1, 2, 2), {"scale": "s", "shift": "t"})]
    for i, (op, shape, attrs) in enumerate(layers):
        made.append(Layer(op, f"layer{i}", (names[i],), names[i + 1], shape, {}, attrs))
    program = Program({"x0": (1, 2, 2)}, ("y",), tuple(made), {"s": (1, 1, 1, 1), "t": (1, 1, 1, 1)})
    params = {"s": np.full((1, 1, 1, 1), 2.0**12, np.float32), "t": np.zeros((1, 1, 1, 1), np.float32)}
    probe = np.ones((64, 1, 2, 2), np.float32)
    largest = {row.name: row.largest for row in rows(program, params, probe) if row.step == "truncation"}
    bounded = [row for row in rows(program, params, probe) if row.step == "truncation"][-1]
    assert bounded.bound == 2.0 ** (62 - bits)
    # Half of the bound is right; at almost twice the bound some of 64 masks break it.
    for share, right in ((0.5, True), (1.9, False)):
        x = (probe * share * bounded.bound / largest[bounded.name]).astype(np.float32)
        if layers[-1][0] == "relu" and right:
            x = x.clip(max=7.9)
        found = rows(program, params, x)
        assert all(row.headroom >= 0 for row in found) == right
        got = secure("fss", program, params, {"x0": x})[0]["y"]
        want = plain.run(program, params, {"x0": x})["y"]
        assert bool(np.abs(got - want).max() <= 1e-3 * want.max()) == right


def test_a_network_whose_inner_value_is_beyond_is_reported_by_layer_and_gives_a_wrong_relu():
    layers = (
        Layer("matmul", "first", ("x0",), "h", (2,), {"weight": "w", "bias": "b"}),
        Layer("relu", "second", ("h",), "r", (2,)),
        Layer("matmul", "third", ("r",), "y", (2,), {"weight": "v", "bias": "c"}),
    )
    program = Program({"x0": (2,)}, ("y",), layers, {"w": (2, 2), "b": (2,), "v": (2, 2), "c": (2,)})
    params = {"w": 400 * np.eye(2), "b": np.zeros(2), "v": 0.001 * np.eye(2), "c": np.zeros(2)}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    small, large = vector(40, 60), vector(40, 90)
    found = rows(program, params, small, large)
    assert [(r.name, r.step, r.largest) for r in found] == [
        ("first", "truncation", 36000),
        ("second", "comparison", 36000),
        ("third", "truncation", pytest.approx(36)),
    ]
    assert [r.headroom >= 0 for r in found] == [True, False, True]
    for x, right in ((small, True), (large, False)):
        got = secure("fss", program, params, {"x0": x})[0]["y"]
        assert np.allclose(got, plain.run(program, params, {"x0": x})["y"], atol=0.5) == right
    with pytest.raises(RangeError, match=r"those of 'second' \(comparison\) do not"):
        ranges.require(headroom(found))
    assert ranges.warning(headroom(rows(program, params, small))) == (
        "on sample data the values of 'second' (comparison) reach half of what fixed point holds"
    )


def test_a_product_too_large_to_be_truncated_is_reported_and_wrong():
    layers = (
        Layer("mul", "square", ("x0", "x0"), "h", (1,)),
        Layer("affine", "scale", ("h",), "y", (1,), {"scale": "s", "shift": "t"}),
    )
    program = Program({"x0": (1,)}, ("y",), layers, {"s": (1, 1), "t": (1, 1)})
    params = {"s": np.float32([[2.0**-12]]), "t": np.zeros((1, 1), np.float32)}
    # Just beyond the bound few masks break the truncation; at 2**31 all would, and one of 64 surely does here.
    for value, right in ((32000, True), (45000, False)):
        x = np.full((64, 1), value, np.float32)
        row = rows(program, params, x)[0]
        assert (row.step, row.largest, row.headroom >= 0) == ("truncation", value**2, right)
        got = secure("fss", program, params, {"x0": x})[0]["y"]
        assert (np.abs(got - value**2 / 2**12).max() < 1) == right


@pytest.mark.parametrize(
    ("name", "inside", "beyond"),
    [
        ("sqrt", vector(32767, -2000), vector(32769, 1)),
        ("sqrt", vector(0.001, 5), vector(-2100, 1)),
        ("reciprocal", vector(16000, -16000), vector(16500, 1)),
        ("reciprocal", vector(0.01, -0.01), vector(-16500, 1)),
    ],
)
def test_a_function_of_two_scales_has_the_room_of_each_sign(name, inside, beyond):
    attrs = asdict(functions.pieces(name)) | {"keep_bits": 24}
    program, params = single("wide_spline", ([(2,)], (2,), {}, attrs))
    assert max(row.share for row in rows(program, params, inside)) < 1
    assert max(row.share for row in rows(program, params, beyond)) >= 1
    got = secure("fss", program, params, {"x0": inside})[0]["y"]
    np.testing.assert_allclose(got, plain.run(program, params, {"x0": inside})["y"], rtol=1e-3, atol=1e-3)


def test_ordinary_values_of_a_norm_are_not_close_to_any_bound():
    model = onnx_one("LayerNormalization", ["n", 64], [np.ones(64, np.float32)], opset=17)
    found = check(model.SerializeToString(), floats(4, 64))
    assert all(row.headroom > 2 for row in found.ranges)
    assert not list(found.found.hints())


def test_crypten_compares_what_is_beyond_the_bound_of_comparison_keys():
    program, params = single("relu", ([(2,)], (2,), {}, {}))
    x = vector(40000, -40000)
    assert secure("crypten", program, params, {"x0": x})[0]["y"].tolist() == [[40000, 0]]
    room = headroom(rows(program, params, x))
    ranges.require(room, ranges.steps_of("crypten"))
    with pytest.raises(RangeError, match="comparison"):
        ranges.require(room, ranges.steps_of("fss"))


def test_every_operator_that_works_on_values_has_a_bound():
    bounded = set()
    for op, cases in CASES.items():
        for case in cases:
            program, params = single(op, case)
            batch = {name: floats(3, *shape) for name, shape in program.inputs.items()}
            bounded |= {row.op for row in measure(program, params, [batch])}
    # What moves values, and sums of values that need no truncation, has none.
    assert bounded == set(OPERATORS) - (LOCAL - {"scale"})


def test_the_largest_of_all_samples_and_batches_counts_whatever_the_chunks(monkeypatch):
    program, params = single("conv2d", CASES["conv2d"][0])
    x = [floats(5, 3, 6, 5, seed=i) for i in range(3)]
    (whole,) = rows(program, params, *x)
    monkeypatch.setattr(ranges, "_CHUNK_ELEMENTS", 1)
    assert rows(program, params, *x)[0].largest == pytest.approx(whole.largest)
    assert whole.largest == pytest.approx(np.abs(plain.run(program, params, {"x0": np.concatenate(x)})["y"]).max())


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1e9), st.sampled_from([500.0, 2.0**15, 2.0**30]))
def test_headroom_is_the_number_of_doublings_that_fit(largest, bound):
    room = LayerRange("a", "relu", "comparison", largest, bound).headroom
    assert room == ranges.MOST_HEADROOM or bound <= largest * 2.0 ** (room + 1)
    assert largest * 2.0**room < bound


def test_values_that_leave_float64_are_reported_as_numbers():
    layers = [Layer("mul", f"m{i}", (f"x{i}", f"x{i}"), f"x{i + 1}", (1,)) for i in range(12)]
    program = Program({"x0": (1,)}, ("x12",), tuple(layers), {})
    found = rows(program, {}, vector(1e4))
    assert found[-1].headroom < 0
    assert json.loads(json.dumps([row.largest for row in found])) == [row.largest for row in found]
    assert np.isfinite([row.largest for row in found]).all()


def test_no_data_gives_no_ranges():
    program, params = single("relu", CASES["relu"][0])
    assert measure(program, params, []) == ()


# --- check ----------------------------------------------------------------------------------------------------------

MODEL = build(
    [
        node("Gemm", ["x", "w"], ["h"], name="dense"),
        node("Relu", ["h"], ["r"], name="rectify"),
        node("Gemm", ["r", "w"], ["y"], name="head"),
    ],
    {"x": ["n", 4]},
    ["y"],
    {"w": 30 * np.eye(4, dtype=np.float32)},
).SerializeToString()


def test_check_reports_ranges_on_a_sample_and_none_without():
    assert check(MODEL).ranges == ()
    assert check(MODEL).to_dict()["ranges"] == []
    x = np.full((3, 4), 1000, np.float32)
    report = check(MODEL, x)
    assert report.in_range
    x[1, 2] = -2000
    report = check(MODEL, {"x": x})
    assert report.ok
    assert not report.in_range
    assert [(r.name, r.largest) for r in report.ranges] == [("dense", 60000), ("rectify", 60000), ("head", 900000)]
    text = json.loads(json.dumps(report.to_dict()))
    assert text["in_range"] is False
    assert text["ranges"][1] == {
        "name": "rectify",
        "op": "relu",
        "step": "comparison",
        "largest": 60000.0,
        "bound": 32768.0,
        "share": 60000 / 32768,
        "headroom": -1,
    }


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (np.zeros((2, 5), np.float32), "got shape"),
        (np.zeros((2, 4), np.int64), "got dtype"),
        (np.full((2, 4), np.nan, np.float32), "finite"),
        (np.full((2, 4), 1e5, np.float32), "must lie in"),
        ({"z": np.zeros((2, 4), np.float32)}, "inputs must be x"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        check(MODEL, sample)


def test_every_parameter_outside_fixed_point_is_named_with_its_layer():
    weights = {"w": np.full((4, 4), 1e10, np.float32), "b": np.full(4, np.nan, np.float32), "v": floats(4, 4)}
    nodes = [
        node("Gemm", ["x", "v"], ["g"], name="fine"),
        node("Relu", ["g"], ["h"], name="between"),
        node("Gemm", ["h", "w", "b"], ["y"], name="broken"),
    ]
    report = check(build(nodes, {"x": ["n", 4]}, ["y"], weights).SerializeToString(), np.zeros((1, 4), np.float32))
    assert not report.ok
    assert report.ranges == ()
    assert [(p.name, p.op_type) for p in report.unsupported] == [("broken", "parameter")] * 2
    assert "'broken.weight' must stay below" in report.unsupported[0].reason
    assert "'broken.bias' must be finite" in report.unsupported[1].reason


def test_the_operators_of_this_file_have_the_attributes_of_the_others():
    assert set(PADDED) == set(OPERATORS["max_pool2d"][2])
    assert set(CONV) == set(OPERATORS["conv2d"][2])
