"""check: one report of everything, and the page of the docs that lists what is supported."""

import json

import numpy as np
import pytest
from helpers import ROOT
from onnx import TensorProto, helper
from onnx_models import build, floats, one

from protocols.errors import BundleError, UnsupportedError
from protocols.program import functions
from protocols.program.program import Layer
from securemtk.cli import app
from securemtk.onnx.importer import load_onnx
from securemtk.onnx.rules.all_rules import operator_table
from securemtk.planning.check import _costs, check

node = helper.make_node

SUPPORTED = build(
    [
        node("Conv", ["x", "w"], ["c"], name="conv", group=2, pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", *"gbmv"], ["n"], name="norm"),
        node("Clip", ["n", "zero", "six"], ["r"], name="clip"),
        node("MaxPool", ["r"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("Abs", ["v"], ["v2"], name="constant"),
        node("Mul", ["one", "v2"], ["d"], name="another"),
        node("Gemm", ["f", "u"], ["y"], name="dense"),
        node("Mul", ["y", "y"], ["z"], name="square"),
        node("Add", ["y", "d"], ["s"], name="sum"),
    ],
    {"x": ["n", 4, 6, 6]},
    ["z", "s"],
    {
        "w": floats(6, 2, 3, 3),
        **{name: floats(6, seed=i) ** 2 for i, name in enumerate("gbm")},
        "v": floats(6) ** 2,
        "zero": np.float32(0),
        "six": np.float32(6),
        "one": np.float32(1),
        "u": floats(54, 6),
    },
)

MIXED = build(
    [
        node("Sin", ["x"], ["a"], name="first"),
        node("Cos", ["a"], ["b"], name="second"),
        node("Mystery", ["b"], ["c"], name="third", domain="somebody"),
        node("Tan", ["c"], ["d"], name="fourth"),
        node("Conv", ["x", "w"], ["e"], name="fifth"),
        node("Relu", ["d"], ["y"], name="sixth"),
    ],
    {"x": ["n", 2, 4, 4]},
    ["y", "e"],
    {"w": floats(2, 2, 3, 3)},
    domains=["somebody"],
)


def test_a_model_that_runs_is_reported_layer_by_layer():
    report = check(SUPPORTED.SerializeToString())
    assert report.ok
    assert report.unsupported == ()
    assert [(x.name, x.shape, x.dtype) for x in report.inputs] == [("x", (4, 6, 6), "float32")]
    assert [(x.name, x.shape) for x in report.outputs] == [("z", (6,)), ("s", (6,))]
    rows = {row.name: (row.op, row.shape, row.parameters, row.macs, row.comparisons) for row in report.layers}
    assert rows == {
        "conv": ("conv2d", (6, 6, 6), 6 * 2 * 9 + 6, 6 * 36 * 2 * 9, 0),
        "pool": ("max_pool2d", (6, 3, 3), 0, 0, 3 * 54),
        "clip": ("spline", (6, 3, 3), 0, 0, 2 * 54),
        "flat": ("reshape", (54,), 0, 0, 0),
        "dense": ("matmul", (6,), 54 * 6 + 6, 54 * 6, 0),
        "square": ("mul", (6,), 0, 6, 0),
        "sum": ("shift", (6,), 6, 0, 0),
    }
    status = {x.name: x.status for x in report.nodes}
    assert {name for name in status if status[name] == "constant"} == {"constant", "another"}
    assert {name for name in status if status[name] == "supported"} == {*rows, "norm"}


def test_products_and_comparisons_of_secrets_are_counted():
    nodes = [
        node("Softmax", ["x"], ["a"], name="soft"),
        node("Mul", ["a", "z"], ["b"], name="times"),
        node("Tanh", ["b"], ["y"], name="smooth"),
    ]
    report = check(build(nodes, {"x": ["n", 4, 5], "z": ["n", 4, 5]}, ["y"]).SerializeToString())
    rows = {row.name: (row.op, row.macs, row.comparisons) for row in report.layers}
    knots = {row.name: row.comparisons // 20 for row in report.layers if row.op == "spline"}
    assert rows["soft/max"] == ("max", 0, 4 * 4)
    assert rows["soft"] == rows["times"] == ("mul", 20, 0)
    assert rows["soft/sum"] == ("sum", 0, 0)
    assert knots["smooth"] == len(functions.pieces("tanh").knots)
    assert all(n > 1 for n in knots.values())


def test_a_product_of_secret_matrices_has_its_multiplications():
    layer = Layer("dot", "d", ("x", "z"), "y", (2, 3, 5))
    (row,) = _costs([layer], {}, {"x": (2, 3, 7), "z": (1, 7, 5)})
    assert row.macs == 2 * 3 * 5 * 7


def test_the_report_of_a_model_is_json_with_totals():
    report = check(SUPPORTED.SerializeToString())
    text = json.loads(json.dumps(report.to_dict()))
    assert text["total"] == {
        name: sum(getattr(row, name) for row in report.layers) for name in ("parameters", "macs", "comparisons")
    }
    assert text["ok"] is True
    assert text["layers"][0]["shape"] == [6, 6, 6]


def test_the_number_of_parameters_is_what_the_importer_returns():
    data = SUPPORTED.SerializeToString()
    total = sum(value.size for value in load_onnx(data).params.values())
    assert check(data).to_dict()["total"]["parameters"] == total


def test_everything_that_stands_in_the_way_is_in_one_report():
    report = check(MIXED.SerializeToString())
    assert not report.ok
    assert [(p.name, p.op_type) for p in report.unsupported] == [
        ("first", "Sin"),
        ("second", "Cos"),
        ("third", "Mystery"),
        ("fourth", "Tan"),
    ]
    assert all(p.reason and p.remedy for p in report.unsupported)
    assert [(x.name, x.status) for x in report.nodes] == [
        ("first", "unsupported"),
        ("second", "unsupported"),
        ("third", "unsupported"),
        ("fourth", "unsupported"),
        ("fifth", "supported"),
        ("sixth", "unknown"),
    ]
    assert [row.name for row in report.layers] == ["fifth"]
    assert report.to_dict()["unsupported"][2]["op_type"] == "Mystery"


def test_what_check_reports_is_what_import_raises():
    with pytest.raises(UnsupportedError) as caught:
        load_onnx(MIXED.SerializeToString())
    assert tuple(caught.value.nodes) == check(MIXED.SerializeToString()).unsupported


BIG = one("MatMul", ["n", 2], [np.full((2, 2), 1e20, np.float32)])
FREE = build([node("Relu", ["x"], ["y"], name="r"), node("Sin", ["y"], ["z"], name="e")], {"x": ["n", "h"]}, ["z"])
TEXT = build([node("Identity", ["x"], ["y"])], {"x": ["n", 3]}, ["y"], dtype=TensorProto.STRING)
BAKED = build([node("Reshape", ["x", "s"], ["y"])], {"x": ["n", 3, 4]}, ["y"], {"s": np.array([2, 12])})


@pytest.mark.parametrize(
    ("model", "kinds", "word"),
    [
        (BIG, ["parameter"], "weight"),
        (FREE, ["Sin", "model"], "'h'"),
        (TEXT, ["input"], "array of numbers"),
        (BAKED, ["model"], "batch"),
    ],
)
def test_a_model_that_cannot_run_as_a_whole_is_reported_not_raised(model, kinds, word):
    report = check(model.SerializeToString())
    assert not report.ok
    assert [p.op_type for p in report.unsupported] == kinds
    assert word in report.unsupported[-1].reason


def test_samples_that_influence_each_other_are_reported():
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("ReduceSumSquare", ["x"], ["m"], axes=[0]),
        node("Expand", ["m", "s"], ["e"]),
        node("Sub", ["x", "e"], ["y"]),
    ]
    report = check(build(nodes, {"x": ["n", 3]}, ["y"], opset=13).SerializeToString())
    assert "influence" in report.unsupported[-1].reason


def test_what_follows_an_unknown_operator_is_judged_when_the_file_tells_its_shape():
    nodes = [
        node("Mystery", ["x"], ["c"], name="unknown", domain="somebody"),
        node("LpPool", ["c"], ["d"], name="large", kernel_shape=[1, 1], p=9),
        node("Relu", ["d"], ["y"], name="fine"),
    ]
    model = build(nodes, {"x": ["n", 2, 4, 4]}, ["y"], domains=["somebody"])
    assert [p.name for p in check(model.SerializeToString()).unsupported] == ["unknown"]
    model.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.INT64, ["n", 3, 6, 6]))
    assert [p.name for p in check(model.SerializeToString()).unsupported] == ["unknown"]
    model.graph.value_info[0].type.tensor_type.elem_type = TensorProto.FLOAT
    report = check(model.SerializeToString())
    assert [p.name for p in report.unsupported] == ["unknown", "large"]
    assert [(row.name, row.shape) for row in report.layers] == [("fine", (3, 6, 6))]


def test_sparse_weights_are_reported():
    model = build([node("Relu", ["x"], ["y"])], {"x": ["n", 3]}, ["y"])
    model.graph.sparse_initializer.add().values.name = "thin"
    report = check(model.SerializeToString())
    assert [(p.name, p.op_type) for p in report.unsupported] == [("thin", "initializer")]


def test_a_constant_made_by_a_foreign_operator_is_reported():
    nodes = [node("Mystery", ["w"], ["v"], name="odd", domain="somebody"), node("Add", ["x", "v"], ["y"], name="sum")]
    model = build(nodes, {"x": ["n", 3]}, ["y"], {"w": floats(3)}, domains=["somebody"])
    assert [p.name for p in check(model.SerializeToString()).unsupported] == ["odd"]


@pytest.mark.parametrize("data", [b"", b"no model", SUPPORTED.SerializeToString()[:-9]])
def test_only_a_file_that_cannot_be_read_raises(data, tmp_path, capfd):
    (tmp_path / "m.onnx").write_bytes(data)
    for source in (data, tmp_path / "m.onnx"):
        with pytest.raises(BundleError):
            check(source)
    assert capfd.readouterr() == ("", "")


def test_the_docs_list_the_operators_that_have_a_rule():
    assert operator_table() in (ROOT / "docs" / "onnx.md").read_text()


def test_a_model_that_moves_its_batch_is_judged_for_one_batch():
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("MatMul", ["t", "w"], ["m"]),
        node("Relu", ["m"], ["r"]),
        node("Transpose", ["r"], ["y"], perm=[1, 0, 2]),
    ]
    model = build(nodes, {"x": ["n", 3, 4]}, ["y"], {"w": floats(4, 5)}).SerializeToString()
    report = check(model, batch=2)
    assert report.ok
    assert report.inputs[0].shape == (2, 3, 4)
    assert report.outputs[0].shape == (2, 3, 5)
    assert report.estimate is not None
    assert report.estimate.batch == 1
    sampled = check(model, floats(6, 3, 4))
    assert sampled.inputs[0].shape == (6, 3, 4)
    assert sampled.ranges
    free = build(nodes, {"x": ["n", "m", 4]}, ["y"], {"w": floats(4, 5)}).SerializeToString()
    assert not check(free).ok


def test_the_command_takes_the_shape_that_its_refusal_asks_for(tmp_path, capsys):
    weights = {"w": floats(2, 3, 3, 3)}
    model = build([node("Conv", ["x", "w"], ["y"])], {"x": [-1, 3, -1, -1]}, ["y"], weights)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert app.run(["check", str(path), "--json"]) == app.UNSUPPORTED
    told = json.loads(capsys.readouterr().out)["unsupported"][0]["reason"]
    assert "check --shape x=N,3,N,N, in Python with shapes={'x': (N, 3, N, N)}, a number for each N" in told
    assert app.run(["check", str(path), "--shape", "x=1,3,48,192", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"][0]["shape"] == [1, 3, 48, 192]
    assert app.run(["check", str(path), "--shape", "x=1,4,48,192", "--json"]) == app.INPUT
    assert "of the form (?, 3, ?, ?), at least 1; got (1, 4, 48, 192)" in capsys.readouterr().err
