"""Tables of the keeper at places that nobody sees: embeddings of token ids."""

import warnings

import numpy as np
import onnx
import pytest
from both_parties import PROTOCOLS, secure
from onnx import TensorProto, helper, numpy_helper
from onnx_models import IR_VERSION, build, floats, ops
from program_oracle import run

from benchmarks.networks import zoo_models
from protocols.errors import NeedsInputs, UnsupportedError
from securemtk.onnx.building.lookups import LARGEST
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.model.runtime import start
from securemtk.serving.onnxruntime_api import InferenceSession


def embedding(
    table: np.ndarray, places: list[int | str], *, dtype: int = TensorProto.INT64, axis: int | None = None
) -> onnx.ModelProto:
    """A model that takes rows of a table at the places that are its input."""
    attrs = {} if axis is None else {"axis": axis}
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "x"], ["y"], name="the Gather", **attrs)],
        "test",
        [helper.make_tensor_value_info("x", dtype, places)],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(table.dtype), None)],
        [numpy_helper.from_array(table, "table")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=IR_VERSION)


def agrees(model: onnx.ModelProto, x: np.ndarray) -> Imported:
    data = model.SerializeToString()
    imported = load_onnx(data)
    want = start(data).run(None, {"x": x})[0]
    fed = x[None] if imported.program.whole else x
    got = run(imported.program, imported.params, {"x": fed.astype(np.float32)})["y"]
    np.testing.assert_allclose(got[0] if imported.program.whole else got, want, atol=1e-6)
    assert imported.outputs[0].dtype == want.dtype.name
    return imported


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 18, 50, 100])
def test_every_place_of_a_table_also_from_its_end_gives_its_row(rows):
    places = np.arange(-rows, rows).reshape(-1, 2)
    agrees(embedding(floats(rows, 3), ["n", 2]), places)


@pytest.mark.parametrize(
    ("places", "axis", "table"),
    [
        (["n"], 0, (20, 4)),
        (["n", 2, 3], 0, (20, 4)),
        (["n", 2], 0, (20,)),
        (["n", 2], 0, (20, 2, 3)),
        ([3], 1, (4, 20)),
        ([3, 2], -1, (2, 4, 20)),
        ([3, 2], 1, (2, 20, 4)),
        ([], 0, (20, 4)),
    ],
)
def test_tables_and_places_of_any_rank_agree(places, axis, table):
    shape = [5 if n == "n" else n for n in places]
    agrees(embedding(floats(*table), places, axis=axis), np.asarray(np.random.default_rng(1).integers(-20, 20, shape)))


def test_places_may_be_of_32_bits_and_rows_may_be_whole_numbers():
    model = embedding(np.arange(60).reshape(30, 2), ["n", 3], dtype=TensorProto.INT32)
    agrees(model, np.array([[29, 0, -30]], dtype=np.int32))


def test_places_fed_as_floats_are_cast_without_rounding():
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["y"]),
    ]
    model = build(nodes, {"x": ["n", 4]}, ["y"], {"table": floats(40, 3)})
    agrees(model, np.array([[0, 39, 7, -1]], dtype=np.float32))


def test_a_cast_that_says_more_than_places_still_refuses_to_round():
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["y"]),
    ]
    model = build(nodes, {"x": ["n", 4]}, ["y", "ids"], {"table": floats(40, 3)})
    with pytest.raises(UnsupportedError, match="a cast to int64 rounds"):
        load_onnx(model.SerializeToString())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("rows", [12, 300])
def test_encrypted_rows_are_exact(protocol, rows):
    table = np.round(floats(rows, 4) * 2**16).astype(np.float32) / 2**16
    imported = load_onnx(embedding(table, ["n", 6]).SerializeToString())
    places = np.random.default_rng(2).integers(-rows, rows, (3, 6))
    places[0, :4] = [0, rows - 1, -1, -rows]
    got, *_ = secure(protocol, imported.program, imported.params, {"x": places.astype(np.float32)})
    np.testing.assert_array_equal(got["y"], table[places])


def test_what_is_computed_does_not_depend_on_the_table_and_grows_as_its_root():
    def comparisons(rows: int) -> int:
        program = load_onnx(embedding(floats(rows, 2), ["n", 5]).SerializeToString()).program
        assert program == load_onnx(embedding(floats(rows, 2, seed=1), ["n", 5]).SerializeToString()).program
        return sum(int(np.prod(x.shape)) for x in program.layers if x.op == "spline") // 5

    assert comparisons(16) == 31
    assert comparisons(1000) == 88
    assert comparisons(LARGEST) == 361


def test_a_table_too_large_for_secret_places_is_refused_with_advice():
    model = embedding(np.zeros((LARGEST + 1, 1), np.float32), ["n", 2])
    with pytest.raises(UnsupportedError, match=r"at most 16384 rows; got 16385; .*feed one-hot rows"):
        load_onnx(model.SerializeToString())


def test_a_secret_place_in_an_activation_is_refused():
    nodes = [helper.make_node("Gather", ["x", "ids"], ["y"]), helper.make_node("ArgMax", ["x"], ["ids"], axis=1)]
    model = build(nodes[::-1], {"x": ["n", 4]}, ["y"])
    with pytest.raises((UnsupportedError, NeedsInputs), match="must"):
        load_onnx(model.SerializeToString())


@pytest.mark.usefixtures("in_open_session")
@pytest.mark.parametrize("exporter", zoo_models.EXPORTERS)
def test_a_session_classifies_a_text_from_its_tokens(exporter):
    with warnings.catch_warnings():
        # The exporters warn of things that concern other models.
        warnings.simplefilter("ignore")
        data = zoo_models.export(
            zoo_models.build("text-cnn-tokens"), zoo_models.samples("text-cnn-tokens", 2), exporter
        )
    tokens = zoo_models.samples("text-cnn-tokens", 2, seed=1).numpy()
    (want,) = start(data).run(None, {"x": tokens})
    with InferenceSession(data) as session:
        assert session.get_inputs()[0].type == "tensor(int64)"
        (got,) = session.run(None, {"x": tokens})
    np.testing.assert_allclose(got, want, atol=2e-3)
    assert "max" in ops(load_onnx(data))
