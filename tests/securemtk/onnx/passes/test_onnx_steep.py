"""Functions of a product with a large number: right for every x, though comparisons do not decide the product."""

import numpy as np
import pytest
from both_parties import PROTOCOLS, secure
from onnx import helper
from onnx_models import build, ops
from program_oracle import run

from protocols.running.ranges import measure
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.model.runtime import start

OP = helper.make_node
ENDS = {
    "sigmoid": [OP("Sigmoid", ["z"], ["y"])],
    "tanh": [OP("Tanh", ["z"], ["y"])],
    "erf": [OP("Erf", ["z"], ["y"])],
    "hard sigmoid": [OP("HardSigmoid", ["z"], ["y"])],
    "clip": [OP("Clip", ["z", "low", "high"], ["y"])],
    "sign": [OP("Sign", ["z"], ["y"])],
    "comparison": [OP("Greater", ["z", "high"], ["t"]), OP("Cast", ["t"], ["y"], to=1)],
    "softmax": [OP("Softmax", ["z"], ["y"], axis=1)],
    "place": [OP("ArgMax", ["z"], ["i"], axis=1), OP("Cast", ["i"], ["y"], to=1)],
}
FACTORS = [1100.0, -3e4, 1e6, -2e7, 9e8]


def model(end: str, factor: float, shift: float) -> bytes:
    nodes = [OP("Mul", ["x", "a"], ["p"]), OP("Add", ["p", "b"], ["z"]), *ENDS[end]]
    weights = {"a": factor, "b": shift, "low": -2.5, "high": 1.5}
    weights = {k: np.asarray(v, np.float32) for k, v in weights.items()}
    return build(nodes, {"x": ["n", 9]}, ["y"], weights).SerializeToString()


def values(factor: float, shift: float) -> np.ndarray:
    """Numbers of fixed point: around where a function bends, and all the way to what an input may hold."""
    at = -shift / factor
    near = np.array([-64, -8, -3, -2, -1, 1, 2, 8, 64]) * 2.0**-16 + round(at * 2**16) * 2.0**-16
    far = np.array([-16000, -3, -1, -0.25, 0.125, 0.5, 1, 2, 16000])
    return np.stack([near, far, -far[::-1]]).astype(np.float32)


def right(end: str, factor: float, shift: float) -> Imported:
    data, x = model(end, factor, shift), values(factor, shift)
    imported = load_onnx(data)
    assert all(row.share < 1 for row in measure(imported.program, imported.params, [{"x": x.astype(np.float64)}]))
    got = run(imported.program, imported.params, {"x": x})["y"]
    np.testing.assert_allclose(got, start(data).run(None, {"x": x})[0], atol=1e-3)
    return imported


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("end", ENDS)
def test_a_function_of_a_steep_line_is_right_everywhere(end, factor):
    if factor > 0 or end not in ("softmax", "place"):
        right(end, factor, 0.0)
        right(end, factor, factor * 0.25)
        right(end, factor, 3.0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("end", ["sigmoid", "softmax", "comparison"])
def test_a_steep_line_is_right_under_encryption(end, protocol):
    data, x = model(end, 1e6, 2.5e5), values(1e6, 2.5e5)[1:]
    imported = load_onnx(data)
    got, *_ = secure(protocol, imported.program, imported.params, {"x": x})
    np.testing.assert_allclose(got["y"], start(data).run(None, {"x": x})[0], atol=2e-3)


@pytest.mark.parametrize("op", ["Relu", "LeakyRelu", "GlobalMaxPool"])
def test_a_large_factor_goes_behind_what_keeps_it(op):
    nodes = [OP("Mul", ["x", "a"], ["p"]), OP(op, ["p"], ["q"]), OP("Div", ["q", "a"], ["y"])]
    data = build(nodes, {"x": ["n", 3, 4, 5]}, ["y"], {"a": np.float32(1e6)}).SerializeToString()
    imported = load_onnx(data)
    x = np.linspace(-100, 100, 60).reshape(1, 3, 4, 5).astype(np.float32)
    assert all(row.share < 1 for row in measure(imported.program, imported.params, [{"x": x.astype(np.float64)}]))
    got = run(imported.program, imported.params, {"x": x})["y"]
    np.testing.assert_allclose(got, start(data).run(None, {"x": x})[0], rtol=1e-5, atol=1e-4)


def test_a_program_says_of_a_large_number_in_which_range_it_lies_and_no_more():
    programs = [load_onnx(model("sigmoid", a, b)).program.to_json() for a, b in [(2e3, 500.0), (5e5, 1e5)]]
    assert programs[0] == programs[1]
    assert ops(load_onnx(model("sigmoid", 900.0, 3.0))).count("spline") == 1
