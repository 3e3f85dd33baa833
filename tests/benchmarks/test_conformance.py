"""Operators agree with onnxruntime: all generated cases in float, some of them encrypted, and onnx's tests of torch."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.conformance import run
from benchmarks.conformance.cases import (
    LISTED,
    Case,
    generated_cases,
    ints,
    made,
    scalar,
    secret,
    torch_cases,
    weight_cases,
    weights,
)
from benchmarks.conformance.run import AGREES, DIFFERS, REFUSED, SKIPPED, Result, judge
from protocols.errors import ShapeError, UnsupportedError
from securemtk.onnx.building.registry import RULES
from securemtk.onnx.model.public import public_inputs
from securemtk.onnx.model.reading import read_proto
from securemtk.onnx.model.runtime import ERRORS, start

# One generated case of so many, encrypted.
STRIDE = {"crypten": 20, "fss": 8}


def failures(results: list[Result]) -> list[str]:
    return [f"{x.name}: {x.reason}" for x in results if x.status == DIFFERS]


@pytest.fixture(scope="module")
def in_float() -> list[Result]:
    execute = run.in_float()
    return [judge(case, execute) for case in generated_cases()]


def test_no_generated_case_differs_from_onnxruntime(in_float):
    assert failures(in_float) == []


def test_every_listed_operator_has_a_case_that_agrees(in_float):
    agreeing = Counter(x.op for x in in_float if x.status == AGREES)
    assert [op for op in LISTED if not agreeing[op]] == []


def test_generated_cases_lie_within_what_fixed_point_holds(in_float):
    assert [x.name for x in in_float if x.status == SKIPPED] == []
    assert max(Counter(x.name for x in in_float).values()) == 1


def test_torch_modules_do_not_differ_from_onnxruntime():
    execute = run.in_float()
    results = [judge(case, execute) for case in torch_cases()]
    assert failures(results) == []
    assert sum(x.status == AGREES for x in results) > len(results) // 2


def test_weights_that_are_inputs_give_what_constants_give():
    execute = run.in_float()
    results = [judge(case, execute) for case in weight_cases()]
    assert [f"{x.name}: {x.reason}" for x in results if x.status != AGREES] == []
    assert len({x.op for x in results}) > 8


@pytest.mark.parametrize("protocol", ["crypten", "fss"])
def test_a_sample_agrees_under_encryption(protocol):
    execute = run.in_process(protocol)
    cases = [case for case in generated_cases() if case.op not in ("Softmax", "LogSoftmax")]
    sample = cases[STRIDE[protocol] // 2 :: STRIDE[protocol]]
    assert failures([judge(case, execute) for case in sample]) == []


# --- judgement ------------------------------------------------------------------------------------------------------


def status_of(case: Case, change=lambda y: y) -> Result:
    def execute(model, inputs, constants):
        return {name: change(y) for name, y in run.in_float()(model, inputs, constants).items()}

    return judge(case, execute)


def test_a_wrong_value_a_wrong_shape_and_a_crash_differ():
    case = made("Relu", secret(2, 3))
    assert status_of(case).status == AGREES
    assert status_of(case, lambda y: y + 0.004).status == AGREES
    found = status_of(case, lambda y: y + 0.006)
    assert (found.status, found.error) == (DIFFERS, pytest.approx(0.006, abs=1e-6))
    assert status_of(case, lambda y: y[:1]).status == DIFFERS
    assert "KeyError" in status_of(case, lambda y: {}["absent"]).reason


def test_large_values_are_judged_by_their_size_and_whole_numbers_exactly():
    large = made("Relu", secret(2, 3, low=1000.0, high=2000.0))
    assert status_of(large, lambda y: y * 1.009).status == AGREES
    assert status_of(large, lambda y: y * 1.011).status == DIFFERS
    whole = made("Identity", secret(2, 3, low=-9, high=9, dtype="int32"))
    assert status_of(whole, lambda y: y + 0.4).status == AGREES
    assert status_of(whole, lambda y: y + 0.6).status == DIFFERS


def test_what_cannot_be_computed_is_refused_or_skipped_with_its_reason():
    found = status_of(made("Det", secret(3, 3)))
    assert (found.status, "'Det' is not supported" in found.reason) == (REFUSED, True)
    case = made("Relu", secret(2, 3))
    for value, reason in ((np.nan, "not finite"), (2.0**14, r"2**14 or more")):
        spoilt = Case(case.name, case.op, case.source, case.model, {"x0": np.full((2, 3), value, np.float32)})
        found = status_of(spoilt)
        assert (found.status, reason in found.reason) == (SKIPPED, True)


def test_the_document_tells_every_result():
    results = [
        Result("a", "Relu", "node", AGREES, 0.001, 0.001),
        Result("b", "Relu", "node", DIFFERS, 0.5, 0.5, "off by 0.5"),
        Result("c", "Det", "node", REFUSED, reason="no | rule"),
        Result("d", "Relu", "node", SKIPPED, reason="an input is not finite"),
    ]
    text = run.document(
        {
            "command": "command",
            "date": "today",
            "commit": "0123",
            "machine": {"cpu": "some", "cores": 2},
            "settings": {"way": "in float"},
            "cases": [vars(x) for x in results],
        }
    )
    assert "4 cases: 1 agrees, 1 differs, 1 refused, 1 skipped." in text
    assert "| Relu | 2 | 1 | 1 |  | 1 | 1.0e-03 | 1.0e-03 |" in text
    assert "| Det | no \\| rule | 1 | `c` |" in text
    assert "| Relu | `b` | off by 0.5 |" in text


# --- public inputs --------------------------------------------------------------------------------------------------


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 18]> case {text}')


def test_inputs_that_only_say_shapes_are_public_through_what_stands_between():
    model = parsed(
        """(float[2,6] x, int32[2] s, int64[2] both, int64[1] k) => (float[a,b] y, float[c,d] z, int64[e] w)
        { t = Cast<to = 7>(s)  y = Reshape(x, t)  z = Reshape(x, both)  w = Add(both, k) }"""
    )
    assert public_inputs(model) == ("s",)


def test_places_in_an_embedding_are_secret_and_in_computed_data_public():
    model = parsed(
        """(float[4,3] x, int64[2] i, int64[2] j) => (float[2,3] y, float[2,3] z) <float[2,1] table = {1, 2}>
        { y = Gather(x, i)  wide = Concat<axis = 1>(table, table, table)  z = Gather(wide, j) }"""
    )
    assert public_inputs(model) == ("i",)


def test_bounds_are_secret_and_exponents_public():
    model = parsed(
        """(float[2,3] x, float low, float high, float e) => (float[2,3] y)
        { c = Clip(x, low, high)  y = Pow(c, e) }"""
    )
    assert public_inputs(model) == ("e",)


# --- integers -------------------------------------------------------------------------------------------------------


def more_cases() -> Iterator[Case]:
    """Yield what the generated cases have nothing of."""
    for op in ("CastLike", "Sum", "Mean"):
        yield made(op, secret(2, 3), secret(2, 3))
    for op in ("Ceil", "Floor", "Round", "Celu", "IsInf", "IsNaN", "Hardmax", "Shrink", "Softsign", "ThresholdedRelu"):
        yield made(op, secret(2, 3))
    for op in ("LpNormalization", "MeanVarianceNormalization", "ReduceLogSum", "Trilu", "GlobalLpPool"):
        yield made(op, secret(2, 3, 4, 4))
    yield made("Swish", secret(2, 3), opset=24)
    yield made("CumSum", secret(2, 3), scalar(1, "int64"))
    yield made("GatherElements", secret(2, 3), ints(0, 1).reshape(2, 1), axis=1)
    yield made("GatherND", secret(2, 3), ints(0, 1).reshape(2, 1), batch_dims=1)
    yield made("Upsample", secret(1, 1, 2, 2), np.array([1, 1, 2, 2], np.float32), mode="linear", opset=9)
    for exponent in (0.5, 1.5, 2.0, -0.5, -1.0, 3):
        yield made("Pow", secret(2, 3), scalar(exponent))
    yield made("Gemm", secret(2, 3), weights(3, 4), alpha=0.5)
    yield made("ReduceL2", secret(2, 3))
    for kind in (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT64, TensorProto.INT64, TensorProto.FLOAT):
        yield made("Cast", secret(2, 3, low=-4, high=4), to=kind)


def of_integers(case: Case, kind: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a case whose floats, inputs and constants that are of the same type, are integers of some type."""
    model = onnx.ModelProto.FromString(case.model)
    del model.graph.value_info[:]
    for x in (*model.graph.input, *model.graph.output):
        if x.type.tensor_type.elem_type == TensorProto.FLOAT:
            x.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    for x in model.graph.output:
        x.ClearField("type")
    for x in model.graph.initializer:
        if x.data_type == TensorProto.FLOAT and case.op not in ("Pow", "Resize", "Upsample"):
            x.CopyFrom(numpy_helper.from_array(np.rint(2 * numpy_helper.to_array(x)).astype(kind), x.name))
    rng, low = np.random.default_rng(0), 0 if kind.startswith("u") else -3
    drawn = {k: rng.integers(low, 4, np.shape(v)) for k, v in case.inputs.items()}
    return model, {k: drawn[k].astype(kind) if v.dtype.kind == "f" else v for k, v in case.inputs.items()}


def of_whole_numbers(case: Case, kind: str) -> str:
    """Return what becomes of a case of integers: "not run" by onnxruntime, "refused", "agrees", or what is wrong."""
    model, given = of_integers(case, kind)
    try:
        expected = start(model.SerializeToString()).run(None, given)
    except ERRORS:
        return "not run"
    names = public_inputs(model)
    secrets = {k: v for k, v in given.items() if k not in names}
    try:
        got = run.in_float()(read_proto(model.SerializeToString()), secrets, {k: given[k] for k in names})
    except (UnsupportedError, ShapeError) as error:
        return str(error) if "cannot be understood" in str(error) else "refused"
    for want, found in zip(expected, got.values(), strict=True):
        exact = np.asarray(want).dtype.kind != "f"
        if not np.allclose(found, want, atol=1e-3 if exact else 5e-3, rtol=0 if exact else 1e-3):
            return f"{np.ravel(found)[:4]} for {np.ravel(want)[:4]}"
    return "agrees"


@pytest.mark.parametrize("kind", ["int32", "uint8"])
def test_no_rule_makes_of_integers_what_onnxruntime_does_not(kind):
    found: dict[str, set[str]] = {}
    wrong = []
    for case in (*generated_cases(), *more_cases()):
        said = of_whole_numbers(case, kind)
        wrong += [] if said in ("not run", "refused", "agrees") else [f"{case.name}: {said}"]
        found.setdefault(said, set()).update(node.op_type for node in onnx.load_from_string(case.model).graph.node)
    assert wrong == []
    # Of most operators onnxruntime has no kernels for integers.
    assert set().union(*found.values()) >= RULES.keys()
    if kind == "int32":
        assert found["refused"] >= {"ReduceMean", "ReduceL2", "ReduceLogSum", "Div", "Pow", "Resize", "Cast"}
        assert found["agrees"] >= {"Add", "MatMul", "ReduceSum", "ReduceMax", "Pow", "Resize", "Cast", "CumSum"}
    else:
        assert found["refused"] >= {"Add", "Sub", "Mul", "Resize"}
        assert found["agrees"] >= {"MaxPool", "Max", "Resize", "Gather"}
