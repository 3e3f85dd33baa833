"""Sessions over models that keep no batch, inputs in the clear, outputs of every dtype, comparisons of every width."""

import re
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import small_models
from onnx import TensorProto, helper, numpy_helper

from securemtk import Config, InferenceSession, InputError, NeedsInputs, RangeError, Session
from securemtk.serving.onnxruntime_api import PublicInputWarning

RNG = np.random.default_rng(0)
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def model(nodes, inputs, outputs, weights=()) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in dict(weights).items()],
    )
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return made.SerializeToString()


def agree(data: bytes, session: InferenceSession, feed: dict) -> None:
    expected = onnxruntime.InferenceSession(data).run(None, feed)
    for got, want in zip(session.run(None, feed), expected, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(got, want, atol=2e-3)


TURNED = model(
    [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["t", "w"], ["p"]),
        helper.make_node("Relu", ["p"], ["y"]),
    ],
    {"x": (FLOAT, ["rows", "columns"])},
    {"y": FLOAT},
    {"w": RNG.standard_normal((3, 5)).astype(np.float32)},
)


@pytest.mark.usefixtures("in_open_session")
def test_a_model_without_a_batch_is_understood_for_the_shapes_that_it_is_fed():
    with InferenceSession(TURNED) as session:
        assert [(x.name, x.shape, x.type) for x in session.get_inputs()] == [
            ("x", ["rows", "columns"], "tensor(float)")
        ]
        assert [(x.name, x.type) for x in session.get_outputs()] == [("y", "tensor(float)")]
        for columns in (4, 2, 4):
            agree(TURNED, session, {"x": RNG.standard_normal((3, columns)).astype(np.float32)})
        assert [(x.name, x.shape) for x in session.get_outputs()] == [("y", [4, 5])]
        assert session.whole


def test_a_session_says_what_it_needs_and_takes_it(open_session):
    with pytest.raises(NeedsInputs, match="whole shape of each input") as caught:
        open_session.load(TURNED)
    assert (caught.value.shapes, caught.value.public) == (True, ())
    loaded = open_session.load(TURNED, shapes={"x": (3, 2)})
    x = RNG.standard_normal((3, 2)).astype(np.float32)
    np.testing.assert_allclose(
        loaded.predict(x)["y"], onnxruntime.InferenceSession(TURNED).run(None, {"x": x})[0], atol=2e-3
    )
    with pytest.raises(InputError, match=r"of shape \(3, 2\)"):
        loaded.predict(x[None])
    with pytest.raises(InputError, match="one of the inputs x; got z"):
        open_session.load(TURNED, shapes={"z": (3, 2)})


RESHAPED = model(
    [helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("Relu", ["r"], ["y"])],
    {"x": (FLOAT, [2, 6]), "shape": (INT64, [2])},
    {"y": FLOAT},
)


@pytest.mark.usefixtures("in_open_session")
def test_an_input_that_says_a_shape_is_taken_in_the_clear_and_said_to_be():
    feed = {"x": RNG.standard_normal((2, 6)).astype(np.float32), "shape": np.array([4, 3])}
    with InferenceSession(RESHAPED) as session:
        with pytest.warns(PublicInputWarning, match="values of shape are shown"):
            agree(RESHAPED, session, feed)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PublicInputWarning)
            agree(RESHAPED, session, feed)  # understood already
        with pytest.raises(InputError, match="must hold shape"):
            session.run(None, {"x": feed["x"]})
    with InferenceSession(RESHAPED, public=["shape"]) as session, warnings.catch_warnings():
        warnings.simplefilter("error", PublicInputWarning)
        agree(RESHAPED, session, feed)


def test_the_width_of_comparisons_decides_range_and_key_material():
    bytes_of, x = {}, RNG.uniform(-1, 1, (2, 8)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(small_models.mlp()).run(None, {"x": x})
    for bits in (20, 40):
        with Session(Config(comparison_bits=bits)) as session:
            loaded = session.load(small_models.mlp())
            np.testing.assert_allclose(loaded.predict(x)["y"], expected, atol=2e-3)
            bytes_of[bits] = session.cost.offline_bytes
            with pytest.raises(RangeError, match=re.escape(f"[-{2.0 ** (bits - 18):g}")):
                loaded.predict(x * 0 + 2.0 ** (bits - 18) * 1.01)
    assert bytes_of[20] < bytes_of[40]


@pytest.mark.parametrize("bits", [19, 41])
def test_a_width_that_keys_do_not_have_is_refused(bits):
    with pytest.raises(InputError, match=r"must lie in 20\.\.40"):
        Config(comparison_bits=bits)


def test_sizes_below_0_are_free_for_a_session_too():
    data = model(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("GlobalAveragePool", ["c"], ["y"])],
        {"x": (FLOAT, [-1, 3, -1, -1])},
        {"y": FLOAT},
        {"w": RNG.standard_normal((2, 3, 3, 3)).astype(np.float32)},
    )
    with InferenceSession(data) as session:
        assert [x.shape for x in session.get_inputs()] == [["?", 3, "?", "?"]]
        for shape in ((2, 3, 5, 6), (1, 3, 4, 4)):
            agree(data, session, {"x": RNG.standard_normal(shape).astype(np.float32)})
