"""--fix: rewrites keep the function, and say what they did."""

import numpy as np
import onnx
import onnx.external_data_helper
import pytest
from onnx import TensorProto, helper
from onnx_models import build, floats

from protocols.errors import BundleError, UnsupportedError
from securemtk.onnx import fix as module
from securemtk.onnx.fix import fix
from securemtk.onnx.model import runtime

node = helper.make_node

CLUTTERED = build(
    [
        node("Constant", [], ["two"], value=onnx.numpy_helper.from_array(np.float32(2))),
        node("Mul", ["two", "b"], ["double"]),
        node("MatMul", ["x", "w"], ["h"]),
        node("Dropout", ["h"], ["d"]),
        node("Add", ["d", "double"], ["a"]),
        node("Identity", ["a"], ["i"]),
        node("Relu", ["i"], ["r"]),
        node("Sqrt", ["b"], ["nobody"]),
        node("Shape", ["x"], ["s"]),
        node("Identity", ["r"], ["y"]),
    ],
    {"x": ["n", 3]},
    ["y"],
    {"w": floats(3, 4), "b": floats(4) ** 2, "unused": floats(5)},
    opset=13,
)


def run(model, x):
    return runtime.start(model.SerializeToString() if isinstance(model, onnx.ModelProto) else model).run(None, {"x": x})


def operators(data):
    return [n.op_type for n in onnx.load_model_from_string(data).graph.node]


def test_clutter_goes_and_the_answer_stays():
    fixed = fix(CLUTTERED.SerializeToString())
    assert operators(fixed.data) == ["MatMul", "Add", "Relu"]
    model = onnx.load_model_from_string(fixed.data)
    assert {t.name for t in model.graph.initializer} == {"w", "double"}
    assert [x.name for x in model.graph.output] == ["y"]
    x = floats(5, 3)
    np.testing.assert_allclose(run(fixed.data, x)[0], run(CLUTTERED, x)[0], atol=1e-6)
    said = " ".join(fixed.rewrites)
    for word in (
        "Constant",
        "computed 1 nodes",
        "dropped 2 nodes",
        "1 Dropout",
        "2 Identity",
        "initializers",
        "shapes",
    ):
        assert word in said
    again = fix(fixed.data)
    assert again.rewrites == ()
    assert again.data == fixed.data


def test_a_fixed_batch_is_freed():
    nodes = [node("Reshape", ["x", "s"], ["f"]), node("MatMul", ["f", "w"], ["y"])]
    model = build(nodes, {"x": [2, 3, 4]}, ["y"], {"s": np.array([2, 12]), "w": floats(12, 5)}, opset=13)
    fixed = fix(model.SerializeToString())
    assert "freed the batch" in fixed.rewrites
    x = floats(2, 3, 4)
    np.testing.assert_allclose(run(fixed.data, x)[0], run(model, x)[0], atol=1e-6)
    assert run(fixed.data, floats(7, 3, 4))[0].shape == (7, 5)


def test_a_batch_whose_samples_influence_each_other_stays_fixed():
    nodes = [node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1), node("Sub", ["x", "m"], ["y"])]
    model = build(nodes, {"x": [2, 3]}, ["y"], opset=13)
    fixed = fix(model.SerializeToString())
    assert "freed the batch" not in fixed.rewrites
    shape = onnx.load_model_from_string(fixed.data).graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_value == 2


def test_an_old_opset_is_converted():
    model = build([node("Relu", ["x"], ["y"])], {"x": ["n", 3]}, ["y"], opset=7)
    fixed = fix(model.SerializeToString())
    assert "converted opset 7 to 9" in fixed.rewrites
    x = floats(2, 3)
    np.testing.assert_array_equal(run(fixed.data, x)[0], np.maximum(x, 0))


def test_axes_go_where_the_opset_has_them():
    model = build([node("ReduceMax", ["x"], ["y"], axes=[1], keepdims=0)], {"x": ["n", 3]}, ["y"], opset=18)
    with pytest.raises(runtime.ERRORS):
        run(model, floats(2, 3))
    fixed = fix(model.SerializeToString())
    assert "moved the axes of 1 nodes to where opset 18 has them" in fixed.rewrites
    x = floats(4, 3)
    np.testing.assert_array_equal(run(fixed.data, x)[0], x.max(1))


def test_functions_are_inlined():
    body = helper.make_function("mine", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [])
    body.opset_import.extend([helper.make_opsetid("", 13)])
    model = build([node("Twice", ["x"], ["y"], domain="mine")], {"x": ["n", 3]}, ["y"], opset=13, domains=["mine"])
    model.functions.append(body)
    fixed = fix(model.SerializeToString())
    assert "inlined 1 functions of the model" in fixed.rewrites
    assert operators(fixed.data) == ["Add"]


def test_external_data_is_taken_in(tmp_path):
    model = build([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 3]}, ["y"], {"w": floats(3, 4)}, opset=13)
    whole = model.SerializeToString()
    onnx.external_data_helper.convert_model_to_external_data(model, location="w.bin", size_threshold=0)
    onnx.save_model(model, str(tmp_path / "m.onnx"))
    fixed = fix(tmp_path / "m.onnx")
    assert "took the external data into the file" in fixed.rewrites
    x = floats(2, 3)
    np.testing.assert_array_equal(run(fixed.data, x)[0], run(whole, x)[0])


def test_a_model_that_cannot_be_compared_is_not_rewritten():
    model = build([node("Mystery", ["x"], ["y"], domain="somebody")], {"x": ["n", 3]}, ["y"], domains=["somebody"])
    with pytest.raises(UnsupportedError, match="onnxruntime"):
        fix(model.SerializeToString())
    with pytest.raises(BundleError):
        fix(b"no model")


def test_a_rewrite_that_changes_the_answer_is_refused(monkeypatch):
    monkeypatch.setattr(module, "_does_nothing", lambda n, used: n.op_type == "Relu")
    model = build([node("Neg", ["x"], ["a"]), node("Relu", ["a"], ["y"])], {"x": ["n", 3]}, ["y"], opset=13)
    with pytest.raises(UnsupportedError, match="answer as the given one"):
        fix(model.SerializeToString())


def test_a_result_beyond_what_protobuf_holds_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(BundleError, match="at most 10 bytes"):
        fix(CLUTTERED.SerializeToString())


def test_inputs_of_whole_numbers_are_compared_too():
    model = build(
        [node("Cast", ["x"], ["c"], to=TensorProto.FLOAT), node("Identity", ["c"], ["y"])],
        {"x": ["n", 3]},
        ["y"],
        dtype=TensorProto.INT64,
        opset=13,
    )
    assert "Identity" not in operators(fix(model.SerializeToString()).data)
