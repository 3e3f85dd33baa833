"""Operators agree with onnxruntime: all generated cases in float, some of them encrypted, and onnx's tests of torch."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

ROOT = Path(__file__).resolve().parent.parent
# CrypTen's wheel installs a package of the same name; ours must win however pytest was started.
sys.path.insert(0, str(ROOT))

from benchmarks import conformance  # noqa: E402
from benchmarks.conformance import AGREES, DIFFERS, REFUSED, SKIPPED, Result, judge  # noqa: E402
from benchmarks.conformance_cases import LISTED, Case, generated_cases, made, secret, torch_cases, weight_cases  # noqa: E402
from securemtk.onnx.public import public_inputs  # noqa: E402

# One generated case of so many, encrypted.
STRIDE = {"crypten": 20, "fss": 8}


def failures(results: list[Result]) -> list[str]:
    return [f"{x.name}: {x.reason}" for x in results if x.status == DIFFERS]


@pytest.fixture(scope="module")
def in_float() -> list[Result]:
    execute = conformance.in_float()
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
    execute = conformance.in_float()
    results = [judge(case, execute) for case in torch_cases()]
    assert failures(results) == []
    assert sum(x.status == AGREES for x in results) > len(results) // 2


def test_weights_that_are_inputs_give_what_constants_give():
    execute = conformance.in_float()
    results = [judge(case, execute) for case in weight_cases()]
    assert [f"{x.name}: {x.reason}" for x in results if x.status != AGREES] == []
    assert len({x.op for x in results}) > 8


@pytest.mark.parametrize("protocol", ["crypten", "fss"])
def test_a_sample_agrees_under_encryption(protocol):
    execute = conformance.in_process(protocol)
    cases = [case for case in generated_cases() if case.op not in ("Softmax", "LogSoftmax")]
    sample = cases[STRIDE[protocol] // 2 :: STRIDE[protocol]]
    assert failures([judge(case, execute) for case in sample]) == []


# --- judgement ------------------------------------------------------------------------------------------------------


def status_of(case: Case, change=lambda y: y) -> Result:
    def execute(model, inputs, constants):
        return {name: change(y) for name, y in conformance.in_float()(model, inputs, constants).items()}

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
    text = conformance.document(
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
