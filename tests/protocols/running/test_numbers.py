"""Right numbers, or a word: constants, offsets, arguments and counts of any size, against onnxruntime in float."""

import json

import numpy as np
import pytest
from both_parties import CASES, secure, single
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_models import build, floats

from benchmarks import numbers
from protocols import limits
from protocols.program import plain
from protocols.program.program import Layer, Program
from protocols.running import backend, fixed, precision
from securemtk.onnx.building.registry import Step
from securemtk.onnx.building.scales import MOST_ERROR, weight_bits
from securemtk.onnx.importer import load_onnx
from securemtk.onnx.model.runtime import start
from securemtk.planning.check import check

node = helper.make_node
slow = settings(max_examples=12, deadline=None)


def model(nodes, x, **weights) -> bytes:
    shape = ["n", *x.shape[1:]]
    return build(nodes, {"x": shape}, ["y"], {k: np.asarray(v) for k, v in weights.items()}).SerializeToString()


def told_or_right(data: bytes, x: np.ndarray) -> None:
    """Assert that answers are within 1 % of the largest right one, or that `check` says so before."""
    found = check(data, x).found
    imported = load_onnx(data)
    (wanted,) = start(data).run(None, {"x": x})
    (name,) = imported.program.outputs
    got = fixed.run(imported.program, imported.params, {"x": x})[name].reshape(wanted.shape)
    error, largest = np.abs(got - wanted).max(), np.abs(wanted).max()
    assert error <= 0.01 * largest + ring_unit() or found.wrong() or list(found.hints())


def ring_unit() -> float:
    return 2.0**-limits.FRAC_BITS


sizes = st.floats(-7, 7).map(lambda e: 10.0**e)


# --- the sweep: each draw is a constant of 1e-7 to 1e7, n of 2 to 200,000, an offset of 0 to 10^4 ---------------------


@slow
@given(size=sizes, sign=st.sampled_from([-1.0, 1.0]), op=st.sampled_from(["Mul", "Div", "Add"]), at=sizes)
def test_a_constant_of_any_size_keeps_its_digits_or_is_told(size, sign, op, at):
    x = (min(at, 16000.0) * np.array([[1.0, -0.5, 0.25]])).astype(np.float32)
    told_or_right(model([node(op, ["x", "c"], ["y"])], x, c=np.float32(sign * size)), x)


@slow
@given(small=sizes, large=sizes, seed=st.integers(0, 99))
def test_constants_of_several_sizes_in_one_product_keep_their_digits_or_are_told(small, large, seed):
    """A scaler of two features, each of the size that it is divided by, and a product behind it."""
    rng = np.random.default_rng(seed)
    std = np.clip([small, large], 1e-3, 4000.0)
    x = (std * rng.standard_normal((16, 2)).clip(-3, 3)).astype(np.float32)
    nodes = [node("Div", ["x", "s"], ["z"]), node("MatMul", ["z", "w"], ["y"])]
    told_or_right(model(nodes, x, s=std.astype(np.float32), w=floats(2, 3)), x)


@settings(max_examples=8, deadline=None)
@given(n=st.integers(2, 200_000), offset=st.floats(0, 1e4), op=st.sampled_from(["ReduceMean", "ReduceSum"]))
def test_means_and_sums_of_any_number_of_values_are_right_or_told(n, offset, op):
    x = (offset + floats(1, n)).astype(np.float32)
    told_or_right(model([node(op, ["x", "a"], ["y"])], x, a=np.array([1])), x)


@pytest.mark.parametrize("size", [2, 3, 7, 100, 224, 447])
def test_averages_over_pages_of_any_size_are_right(size):
    x = (3 + floats(1, 1, size, size)).astype(np.float32)
    data = model([node("GlobalAveragePool", ["x"], ["y"])], x)
    imported = load_onnx(data)
    (got,) = fixed.run(imported.program, imported.params, {"x": x})[imported.program.outputs[0]].ravel()
    assert got == pytest.approx(float(x.astype(np.float64).mean()), rel=1e-3)


@slow
@given(
    n=st.integers(2, 3000),
    offset=st.floats(0, 1e4),
    spread=st.floats(-2.3, 3).map(lambda e: 10.0**e),
    as_formula=st.booleans(),
    seed=st.integers(0, 99),
)
def test_an_offset_does_not_eat_what_is_normalised(n, offset, spread, as_formula, seed):
    rng = np.random.default_rng(seed)
    x = (offset + spread * rng.standard_normal((1, n)).clip(-3, 3)).astype(np.float32)
    if as_formula:
        data = numbers._formula_norm(n, x)[0]
    else:
        data = model([node("LayerNormalization", ["x", "s"], ["y"])], x, s=np.ones(n, np.float32))
    # In float64: float32 loses as much as is asked for here where the offset is large.
    exact = x.astype(np.float64)
    wanted = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    imported = load_onnx(data)
    got = fixed.run(imported.program, imported.params, {"x": x})[imported.program.outputs[0]]
    found = check(data, x).found
    right = np.abs(got - wanted).max() <= 0.01 * np.abs(wanted).max()
    # An input has 16 fraction bits: a spread of a few hundred units is what is left of 0.005.
    assert right or found.wrong() or list(found.hints())
    if spread >= 0.02 and not as_formula:
        assert right


@slow
@given(
    at=st.floats(-2.5, 4).map(lambda e: 10.0**e),
    op=st.sampled_from(["Reciprocal", "Sqrt", "Log", "Exp", "Softplus", "Tanh", "Gelu"]),
)
def test_an_argument_of_any_size_is_right_or_told(at, op):
    x = np.array([[at, at / 3, at / 2]], np.float32)
    told_or_right(model([node(op, ["x"], ["y"])], x) if op != "Gelu" else model_20(op, x), x)


def model_20(op: str, x: np.ndarray) -> bytes:
    return build([node(op, ["x"], ["y"])], {"x": ["n", *x.shape[1:]]}, ["y"], {}, opset=20).SerializeToString()


@slow
@given(sizes=st.lists(sizes, min_size=2, max_size=6), p=st.sampled_from([1, 2]))
def test_vectors_of_any_size_are_normalised_or_told(sizes, p):
    x = np.clip([sizes], 1e-4, 15000).astype(np.float32)
    told_or_right(model([node("LpNormalization", ["x"], ["y"], axis=1, p=p)], x), x)


# --- the cases of the table, encrypted ------------------------------------------------------------------------------

SILENT = [i for i, (_, name, _) in enumerate(numbers.CASES) if "224" not in name and "150,000" not in name]


@pytest.mark.parametrize("number", SILENT, ids=lambda i: numbers.CASES[i][1])
def test_a_case_of_the_table_is_right_under_encryption_or_told(number):
    found = numbers.measure(number)
    assert max(found["error"].values()) <= 0.01 or found["told"] in ("wrong", "refused")


def test_the_table_in_the_documentation_is_that_of_the_results():
    now = json.loads((numbers.report.RESULTS / "numbers.json").read_text())["rows"]
    before = json.loads(numbers.BEFORE.read_text())
    assert numbers.table(now, before) in numbers.DOCUMENT.read_text()
    assert [row["case"] for row in now] == [name for _, name, _ in numbers.CASES]
    assert all(max(row["error"].values()) <= 0.01 or row["told"] == "wrong" for row in now if "error" in row)


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", sorted(backend.PROTOCOLS))
@pytest.mark.parametrize(("op", "number"), [(op, i) for op, cases in CASES.items() for i in range(len(cases))])
def test_what_is_computed_in_the_clear_is_what_two_parties_compute(protocol, op, number):
    program, params = single(op, CASES[op][number])
    inputs = {k: floats(2, *s, seed=4) for k, s in program.inputs.items()}
    got, *_ = secure(protocol, program, params, inputs)
    clear = fixed.run(program, params, inputs, protocol)["y"]
    # A truncation rounds up or down at random; a root of a few units, or a product, makes more of that.
    np.testing.assert_allclose(got["y"], clear, atol=6 * ring_unit())


def test_comparisons_beyond_their_bits_answer_in_the_clear_as_they_do_encrypted():
    program, params = single("relu", ([(2,)], (2,), {}, {}))
    x = np.array([[40000.0, -40000.0]])
    for protocol in backend.PROTOCOLS:
        got, *_ = secure(protocol, program, params, {"x0": x})
        np.testing.assert_array_equal(fixed.run(program, params, {"x0": x}, protocol)["y"], got["y"])


@pytest.mark.parametrize("bits", [16, 20, 24, 30])
@pytest.mark.parametrize("behind", ["relu", "max_pool2d"])
@pytest.mark.parametrize("protocol", sorted(backend.PROTOCOLS))
def test_a_comparison_takes_a_product_of_any_number_of_fraction_bits(bits, behind, protocol):
    conv = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
    window = {"kernel": (2, 2), "stride": (2, 2), "pads": (0, 0, 0, 0)}
    layers = (
        Layer("conv2d", "c", ("x",), "z", (3, 4, 4), {"weight": "w", "bias": "b"}, conv, bits),
        Layer(
            behind,
            "r",
            ("z",),
            "y",
            (3, 4, 4) if behind == "relu" else (3, 2, 2),
            {},
            {} if behind == "relu" else window,
        ),
    )
    program = Program({"x": (2, 4, 4)}, ("y",), layers, {"w": (3, 2, 1, 1), "b": (3,)})
    program.validate()
    params = {"w": floats(3, 2, 1, 1, scale=0.01), "b": floats(3, scale=0.01)}
    x = 100 * floats(2, 2, 4, 4)
    got, rounds, _ = secure(protocol, program, params, {"x": x})
    want = plain.run(program, params, {"x": x})["y"]
    np.testing.assert_allclose(got["y"], want, atol=2 * ring_unit() + 2 * 400 * 2.0**-bits)
    if protocol == "fss" and behind == "relu":
        assert rounds == 4  # the product's message, the opening and the bits of the comparison, the answer


def test_the_bits_of_a_weight_follow_its_smallest_row_as_far_as_there_is_room():
    def bits(weight: np.ndarray, op: str = "matmul") -> int:
        role = "scale" if op == "affine" else "weight"
        attrs = {"groups": 1} if op == "conv2d" else {}
        return weight_bits(Step(op, "l", ("x",), "y", (3,), {role: weight}, attrs))

    ordinary = floats(64, 32, scale=0.1)
    assert bits(ordinary) == 16
    assert bits(ordinary.T.reshape(32, 64, 1, 1), "conv2d") == 16
    scaler = ordinary * np.where(np.arange(64) == 5, 1e-3, 1.0)[:, None]
    assert 20 <= bits(scaler) <= 28
    assert bits(np.zeros((4, 4))) == 16
    assert bits(np.full((1, 1), 1e-4), "affine") >= 24
    # A product with 16000 must stay below 2**62 with 16 + b fraction bits.
    wide = np.array([[1e4], [1e-4]])
    assert bits(wide) == 18
    assert 1e4 * 2**14 * 2.0 ** (16 + bits(wide)) < 2.0**62
    assert bits(np.full((1, 1), 1e-12), "affine") == 16  # no input makes anything of it


def test_what_more_bits_would_not_hold_is_named():
    x = np.array([[100.0]], np.float32)
    report = check(model([node("Mul", ["x", "c"], ["y"])], x, c=np.float32(3e-9)))
    (found,) = report.found.constants
    assert (found.role, found.count, found.of) == ("scale", 1, 1)
    assert found.error > MOST_ERROR
    assert any("constants" in text for text in report.found.hints())
    assert not check(model([node("Mul", ["x", "c"], ["y"])], x, c=np.float32(3e-3))).found.constants


def test_wider_comparisons_leave_fewer_bits_to_weights():
    layer = Layer("affine", "a", ("x",), "y", (1,), {"scale": "s", "shift": "t"}, {}, 30)
    assert (layer.bits_of_weight(32), layer.bits_of_weight(40), layer.bits_of_weight(20)) == (30, 22, 30)
    program = Program({"x": (1,)}, ("y",), (layer,), {"s": (1, 1), "t": (1, 1)})
    params = {"s": np.full((1, 1), 0.001, np.float32), "t": np.zeros((1, 1), np.float32)}
    for k in (32, 40):
        got = fixed.run(program, params, {"x": np.array([[8000.0]])}, comparison_bits=k)["y"]
        assert got == pytest.approx(8.0, rel=1e-3)


def test_a_layers_own_error_is_told_and_none_of_those_before():
    layers = (
        Layer("scale", "less", ("x",), "small", (2,), {}, {"factor": 2.0**-12, "offset": 0}),
        Layer("relu", "cut", ("small",), "cut", (2,)),
        Layer("scale", "more", ("cut",), "y", (2,), {}, {"factor": 4096, "offset": 0}),
    )
    program = Program({"x": (2,)}, ("y",), layers, {})
    rows, answers = precision.measure(program, {}, [{"x": np.array([[1.03, 0.4]])}])
    shares = {row.name: row.share for row in rows}
    assert shares["cut"] > 0.01  # 16 units of 2**-16 are left of 1.03
    assert shares["less"] < 1e-4
    assert shares["more"] == 0
    assert abs(answers["y"][0, 0] - 1.03) > 0.01


def test_a_mean_of_many_values_takes_no_more_rounds_than_one_of_few():
    for n in (49, 64, 50_000):
        program, params = single("mean", ([(n,)], (1,), {}, {"axes": (1,), "keepdims": 1}))
        assert secure("fss", program, params, {"x0": np.ones((1, n))})[1] == 2
