"""Files from somebody who means harm, or whose exporter failed: one clear error each, before anything is computed."""

import importlib
import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx_models import build, floats, one

from protocols.errors import BundleError, ProtocolAbort, SecureError, UnsupportedError
from securemtk.cli import app
from securemtk.onnx.fix import fix
from securemtk.onnx.importer import load_onnx
from securemtk.onnx.model import runtime
from securemtk.onnx.model.problems import UnsupportedNodes
from securemtk.onnx.model.reading import MAX_BYTES, NEWEST_OPSET
from securemtk.planning.check import check
from securemtk.serving.onnxruntime_api import InferenceSession
from securemtk.serving.session import Session

node = helper.make_node


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def refused(model: ModelProto | bytes, *, most: int = 600) -> str:
    """Assert that import and check refuse a model in the same words, in one message of bounded length."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(SecureError) as caught:
        load_onnx(data)
    message = str(caught.value)
    assert len(message) < most
    said = checked(data)
    assert said == "reported" or message.startswith(said)
    return message


def checked(data: bytes) -> str:
    """Return what check raises, or "reported" when it says in its report what is wrong."""
    try:
        report = check(data)
    except BundleError as error:
        return str(error)
    assert not report.ok
    assert report.unsupported
    return "reported"


def added(nodes: list[NodeProto], made: str, weights: dict[str, np.ndarray]) -> ModelProto:
    """Return a model that adds to its input the largest number of a constant that its nodes make."""
    last = [node("ReduceMax", [made], ["largest"], keepdims=0), node("Add", ["x", "largest"], ["y"])]
    return build([*nodes, *last], {"x": ["n", 3]}, ["y"], weights)


def changed(change: Callable[[ModelProto], object], model: ModelProto | None = None) -> ModelProto:
    copy = ModelProto.FromString((model or GOOD).SerializeToString())
    change(copy)
    return copy


GOOD = build(
    [node("MatMul", ["x", "w"], ["z"]), node("LeakyRelu", ["z"], ["y"], name="leaky", alpha=0.1)],
    {"x": ["n", 5]},
    ["y"],
    {"w": floats(5, 3)},
)


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused():
    data = GOOD.SerializeToString()
    for end in range(len(data)):
        with pytest.raises(SecureError) as caught:
            load_onnx(data[:end])
        assert isinstance(caught.value, BundleError)


def test_a_file_of_two_gibibytes_is_refused_unread(tmp_path):
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.write(GOOD.SerializeToString())
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(BundleError, match=f"must be at most {MAX_BYTES} bytes; got {MAX_BYTES + 1}"):
        load_onnx(path)


def external(folder: Path, count: int, **entries: str) -> Path:
    """Write a model of `count` weights that all lie in the same file."""
    nodes = [node("MatMul", ["x" if i == 0 else f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(count)]
    model = build(nodes, {"x": ["n", 4]}, [f"v{count}"])
    for i in range(count):
        weight = TensorProto(name=f"w{i}", dims=[4, 4], data_type=1, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": "weights.bin", **entries}.items():
            weight.external_data.add(key=key, value=value)
        model.graph.initializer.append(weight)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 1 << 40])
def test_external_data_of_two_gibibytes_is_refused_unread(tmp_path, size):
    path = external(tmp_path, 1)
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BundleError, match=f"must be at most {MAX_BYTES} bytes"):
        load_onnx(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18


def test_one_external_file_named_by_many_tensors_counts_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr("securemtk.onnx.model.reading.MAX_BYTES", 1 << 20)
    path = external(tmp_path, 40)
    (tmp_path / "weights.bin").write_bytes(bytes(1 << 15))
    with pytest.raises(BundleError, match="with its external data must be at most"):
        load_onnx(path)


@pytest.mark.parametrize(
    "entries",
    [{"offset": str(1 << 80)}, {"length": str(1 << 80)}, {"offset": "1e3"}, {"length": "0x40"}, {"offset": "64"}],
)
def test_external_data_at_a_place_that_is_not_there_is_refused(tmp_path, entries):
    path = external(tmp_path, 1, **entries)
    (tmp_path / "weights.bin").write_bytes(bytes(64))
    with pytest.raises(BundleError):
        load_onnx(path)


def test_a_path_of_external_data_may_be_of_any_length_and_is_refused(tmp_path):
    with pytest.raises(BundleError, match="cannot be read"):
        load_onnx(external(tmp_path, 1, location="a" * 10_000))
    with pytest.raises(BundleError, match="cannot be read"):
        load_onnx(external(tmp_path, 1, location="/".join(["a"] * 10_000)))


# --- versions, names, types -----------------------------------------------------------------------------------------


def version(number: int, domain: str = "") -> ModelProto:
    return changed(lambda m: m.opset_import[0].MergeFrom(helper.make_opsetid(domain, number)))


def weight(**fields: object) -> ModelProto:
    """Return a model whose weight is a tensor of these fields."""
    model = build([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 5]}, ["y"])
    model.graph.initializer.append(TensorProto(**{"name": "w", "dims": [5, 3], "data_type": 1} | fields))
    return model


def attribute(**fields: object) -> ModelProto:
    return changed(lambda m: m.graph.node[1].attribute[0].MergeFrom(AttributeProto(**fields)))


def twice(field: str) -> ModelProto:
    return changed(lambda m: getattr(m.graph, field).append(getattr(m.graph, field)[0]))


BROKEN = {
    "opset too new": (version(NEWEST_OPSET + 1), f"1..{NEWEST_OPSET}; got {NEWEST_OPSET + 1}"),
    "opset beyond all": (version(1 << 62), "must lie in 1.."),
    "opset below zero": (version(-3), "got -3"),
    "opset of a foreign domain": (version(18, "somebody.else"), "got none"),
    "two opsets, one too new": (
        changed(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 99))),
        "got 99",
    ),
    "format of the future": (changed(lambda m: setattr(m, "ir_version", 1000)), "ir_version 1000"),
    "a domain without opset": (changed(lambda m: setattr(m.graph.node[0], "domain", "nowhere")), "'nowhere'"),
    "data of the wrong length": (weight(raw_data=bytes(59)), "60 bytes"),
    "data of too great a length": (weight(raw_data=bytes(64)), "must hold data of its shape"),
    "data of length zero": (weight(raw_data=b""), "w"),
    "no data": (weight(), "w"),
    "negative sizes": (weight(dims=[-5, -3], raw_data=bytes(60)), "w"),
    "sizes that overflow": (weight(dims=[1 << 32, 1 << 32]), "w"),
    "sizes beyond memory": (weight(dims=[1 << 20, 1 << 20], raw_data=bytes(60)), "w"),
    "a type that there is not": (weight(data_type=99, raw_data=bytes(60)), "'w' must hold data of its shape"),
    "no type": (weight(data_type=0, raw_data=bytes(60)), "w"),
    "integers as weights": (weight(data_type=6, raw_data=bytes(60)), "onnxruntime"),
    "texts as weights": (weight(data_type=8, string_data=[b"a"] * 15), "onnxruntime"),
    "complex weights": (weight(data_type=14, raw_data=bytes(120)), "onnxruntime"),
    "a segment of data": (
        weight(raw_data=bytes(60), segment=TensorProto.Segment(begin=0, end=9)),
        "'w' must hold data of its shape",
    ),
    "data in the field of another type": (weight(int32_data=[0] * 15), "float_data"),
    "an initializer twice": (twice("initializer"), "not unique"),
    "an input twice": (twice("input"), "'x'"),
    "an attribute twice": (
        changed(lambda m: m.graph.node[1].attribute.append(m.graph.node[1].attribute[0])),
        "'alpha'",
    ),
    "an attribute of no type": (attribute(type=0, i=3), "alpha"),
    "an attribute of another attribute": (attribute(ref_attr_name="beta"), "'leaky' must have a value"),
    "an attribute that no operator has": (attribute(name="gamma"), "gamma"),
    "no nodes": (changed(lambda m: m.graph.ClearField("node")), "no graph with nodes"),
    "no outputs": (changed(lambda m: m.graph.ClearField("output")), "outputs"),
    "no inputs": (changed(lambda m: m.graph.ClearField("input")), "nothing makes"),
    "an operator without a name": (changed(lambda m: setattr(m.graph.node[0], "op_type", "")), "op_type"),
    "an output without a name": (changed(lambda m: setattr(m.graph.output[0], "name", "")), "name"),
    "a graph without a name": (changed(lambda m: setattr(m.graph, "name", "")), "name"),
    "a node without results": (changed(lambda m: m.graph.node.append(NodeProto(op_type="Relu", input=["x"]))), "Relu"),
    "a node without inputs": (changed(lambda m: m.graph.node[0].ClearField("input")), "MatMul"),
    "an input of no type": (changed(lambda m: m.graph.input[0].type.Clear()), "'x'"),
    "an input of an unknown type": (
        changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 77)),
        "'x'",
    ),
    "an input that is a list": (
        changed(lambda m: setattr(m.graph.input[0].type.sequence_type.elem_type.tensor_type, "elem_type", 1)),
        "'x'",
    ),
    "sizes that stay unknown": (build([node("Relu", ["x"], ["y"])], {"x": ["n", "h", "w"]}, ["y"]), "'h'"),
    "sizes below zero": (build([node("Relu", ["x"], ["y"])], {"x": ["n", -3]}, ["y"]), "--shape x=N,N"),
    "a size of zero": (build([node("Relu", ["x"], ["y"])], {"x": ["n", 0]}, ["y"]), "at least 1; got 0"),
    "a shape that the numbers decide": (
        build([node("NonZero", ["x"], ["i"]), node("Cast", ["i"], ["y"], to=1)], {"x": ["n", 3]}, ["y"]),
        "NonZero",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused_with_its_reason(case, capfd):
    model, reason = BROKEN[case]
    assert reason in refused(model)
    assert capfd.readouterr() == ("", "")


def test_outputs_may_be_inputs():
    imported = load_onnx(changed(lambda m: m.graph.output.append(m.graph.input[0])).SerializeToString())
    assert [x.name for x in imported.outputs] == ["y", "x"]


# --- numbers --------------------------------------------------------------------------------------------------------

WITH_NUMBERS = {
    "LeakyRelu": ([], ["alpha"]),
    "Elu": ([], ["alpha"]),
    "Celu": ([], ["alpha"]),
    "Selu": ([], ["alpha", "gamma"]),
    "HardSigmoid": ([], ["alpha", "beta"]),
    "ThresholdedRelu": ([], ["alpha"]),
    "Shrink": ([], ["lambd", "bias"]),
    "LRN": ([], ["alpha", "beta", "bias"]),
    "Gemm": ([floats(2, 3)], ["alpha"]),
    "BatchNormalization": ([np.abs(floats(2)) + 1] * 4, ["epsilon"]),
    "InstanceNormalization": ([floats(2)] * 2, ["epsilon"]),
    "LayerNormalization": ([floats(2)], ["epsilon"]),
}


def with_number(op: str, name: str, value: float) -> ModelProto:
    constants, names = WITH_NUMBERS[op]
    shape = ["n", 2, 3, 3] if op in ("LRN", "BatchNormalization", "InstanceNormalization") else ["n", 2]
    attrs = dict.fromkeys(names, 1.0) | {name: value} | ({"size": 3} if op == "LRN" else {})
    return one(op, shape, constants, **attrs)


NUMBERS = [(op, name) for op, (_, names) in WITH_NUMBERS.items() for name in names]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_an_attribute_that_is_not_finite_is_refused(op, name, value):
    assert f"attribute {name!r} of node 'the {op}' must be finite; got {value}" == refused(with_number(op, name, value))


@pytest.mark.parametrize("value", [1e30, -1e30])
@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_an_attribute_far_too_large_is_refused_or_harmless(op, name, value):
    model = with_number(op, name, value)
    try:
        load_onnx(model.SerializeToString()).program.validate()
    except SecureError:
        refused(model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30])
@pytest.mark.parametrize(
    ("op", "first"), [("Add", 0), ("Mul", 0), ("Div", 0), ("Div", 1), ("Pow", 0), ("Max", 0), ("Clip", 0), ("Less", 0)]
)
def test_a_constant_that_is_not_finite_or_too_large_is_refused_or_harmless(op, first, value):
    model = one(op, ["n", 3], [np.float32(value)], first=first)
    try:
        load_onnx(model.SerializeToString()).program.validate()
    except SecureError:
        refused(model)
    else:
        assert not np.isnan(value)


@pytest.mark.parametrize("number", [1 << 31, 1 << 62, -(1 << 63)])
@pytest.mark.parametrize(
    ("op", "shape", "name"),
    [
        ("DepthToSpace", ["n", 4, 2, 2], "blocksize"),
        ("SpaceToDepth", ["n", 4, 2, 2], "blocksize"),
        ("Softmax", ["n", 3], "axis"),
        ("Flatten", ["n", 3], "axis"),
        ("Cast", ["n", 3], "to"),
        ("LRN", ["n", 2, 3, 3], "size"),
    ],
)
def test_an_attribute_of_more_than_32_bits_is_refused(op, shape, name, number):
    # onnxruntime 1.31 divides by zero in DepthToSpace: 2**62 squared is 0 in 64 bits, and the process would end.
    assert f"must be a number of 32 bits; got {number}" in refused(one(op, shape, **{name: number}))


# --- size and time --------------------------------------------------------------------------------------------------

HUGE = 10**12
TOO_LARGE = {
    "ConstantOfShape": added([node("ConstantOfShape", ["s"], ["c"])], "c", {"s": whole(HUGE)}),
    "ConstantOfShape that overflows": added([node("ConstantOfShape", ["s"], ["c"])], "c", {"s": whole(1 << 62, 4)}),
    "Expand of a constant": added([node("Expand", ["w", "s"], ["c"])], "c", {"w": floats(1), "s": whole(HUGE)}),
    "Range": added(
        [node("Range", ["a", "b", "d"], ["c"])],
        "c",
        {"a": np.float32(0), "b": np.float32(HUGE), "d": np.float32(1)},
    ),
    "OneHot": added(
        [node("OneHot", ["i", "d", "v"], ["c"])], "c", {"i": whole(1), "d": np.int64(HUGE), "v": floats(2)}
    ),
    "a product of a row and a column": added(
        [node("Mul", ["a", "b"], ["c"])], "c", {"a": floats(10**5, 1), "b": floats(1, 10**5)}
    ),
    "Expand": one("Expand", ["n", 1], [whole(1, HUGE)]),
    "Tile": one("Tile", ["n", 1], [whole(1, HUGE)]),
    "Pad": one("Pad", ["n", 1], [whole(0, 0, 0, HUGE)]),
    "Resize by scales": one("Resize", ["n", 1, 2, 2], [None, np.float32([1, 1, 1e6, 1e6])], mode="nearest"),
    "Resize to sizes": one("Resize", ["n", 1, 2, 2], [None, None, whole(1, 1, 10**6, 10**6)], mode="nearest"),
    "ConvTranspose": one("ConvTranspose", ["n", 1, 3, 3], [floats(1, 1, 3, 3)], strides=[10**6] * 2),
    "Conv": one("Conv", ["n", 1, 3, 3], [floats(1, 1, 3, 3)], pads=[10**6] * 4),
    "an input": build([node("Relu", ["x"], ["y"])], {"x": ["n", HUGE]}, ["y"]),
    "a batch": build([node("Relu", ["x"], ["y"])], {"x": [HUGE, 3]}, ["y"]),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_sizes_that_no_machine_has_are_refused_before_memory_is_taken(case):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(TOO_LARGE[case])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # in KiB


def loop(body: list[NodeProto], times: int) -> ModelProto:
    """Return a model with a constant loop over the value v."""
    inside = helper.make_graph(
        [node("Identity", ["c"], ["c2"]), *body],
        "body",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, kind, shape in (("i", 7, []), ("c", 9, []), ("v", 1, None))
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in (("c2", 9), ("v2", 1))],
    )
    nodes = [node("Loop", ["times", "yes", "w"], ["c"], body=inside)]
    return added(nodes, "c", {"times": np.int64(times), "yes": np.array(True), "w": floats(3)})


SQUARE = [node("Mul", ["v", "v"], ["v2"])]


def test_a_constant_loop_is_a_constant():
    assert [layer.op for layer in load_onnx(loop(SQUARE, 3).SerializeToString()).program.layers] == ["shift"]


def test_a_loop_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(runtime, "MAX_SECONDS", 0.2)
    assert "must run once in the clear within 0.2 s" in refused(loop(SQUARE, 1 << 62))


def test_a_loop_that_doubles_its_value_is_stopped():
    assert "GiB; it asks for more" in refused(loop([node("Concat", ["v", "v"], ["v2"], axis=0)], 40))


# --- sub-graphs and functions ---------------------------------------------------------------------------------------


def graph(nodes: list[NodeProto], output: str) -> GraphProto:
    return helper.make_graph(nodes, output, [], [onnx.ValueInfoProto(name=output)])


def branches(condition: str, inside: str) -> NodeProto:
    yes, no = (graph([node(op, [inside], [op])], op) for op in ("Neg", "Abs"))
    return node("If", [condition], ["v"], name="branch", then_branch=yes, else_branch=no)


def test_a_branch_on_a_secret_is_refused_and_named():
    nodes = [
        node("ReduceSum", ["x", "axis"], ["s"], keepdims=0),
        node("Greater", ["s", "zero"], ["q"]),
        branches("q", "w"),
        node("Add", ["x", "v"], ["y"]),
    ]
    weights = {"axis": whole(1), "zero": np.float32(0), "w": floats(3)}
    assert "'branch' (If)" in refused(build(nodes, {"x": ["n", 3]}, ["y"], weights))


def test_loops_and_scans_over_secrets_are_refused_and_named():
    values = [helper.make_tensor_value_info(name, 1, None) for name in ("s", "e", "s2", "o")]
    body = helper.make_graph(
        [node("Add", ["s", "e"], ["s2"]), node("Identity", ["s2"], ["o"])], "body", values[:2], values[2:]
    )
    scan = node("Scan", ["w", "x"], ["f", "y"], name="over", body=body, num_scan_inputs=1)
    assert "'over' (Scan)" in refused(build([scan], {"x": ["n", 3]}, ["y"], {"w": floats(3)}))


def nested(depth: int) -> ModelProto:
    inner = graph([node("Neg", ["w"], ["b0"])], "b0")
    for i in range(1, depth):
        other = graph([node("Abs", ["w"], [f"e{i}"])], f"e{i}")
        inner = graph([node("If", ["q"], [f"b{i}"], then_branch=inner, else_branch=other)], f"b{i}")
    return added(
        [node("If", ["q"], ["c"], then_branch=inner, else_branch=graph([node("Abs", ["w"], ["e"])], "e"))],
        "c",
        {"q": np.array(True), "w": floats(3)},
    )


def test_branches_within_branches_are_constants_as_deep_as_a_file_can_hold_them():
    assert [layer.op for layer in load_onnx(nested(24).SerializeToString()).program.layers] == ["shift"]


def functions(count: int) -> ModelProto:
    """Return a model whose function F0 calls F1, and so on."""
    model = build([node("F0", ["x"], ["y"], domain="own")], {"x": ["n", 3]}, ["y"], domains=["own"])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    for i in range(count):
        call = node("Neg", ["a"], ["b"]) if i == count - 1 else node(f"F{i + 1}", ["a"], ["b"], domain="own")
        model.functions.append(helper.make_function("own", f"F{i}", ["a"], ["b"], [call], imports))
    return model


def test_functions_may_call_functions_but_not_without_end():
    assert load_onnx(functions(50).SerializeToString()).program.layers
    for count in (500, 5000):
        assert "functions must not call themselves" in refused(functions(count))


def test_a_function_made_twice_or_not_at_all_is_refused():
    assert "F1" in refused(changed(lambda m: m.functions.append(m.functions[1]), functions(3)))
    assert "F2" in refused(changed(lambda m: m.functions.pop(), functions(3)))


def test_functions_that_call_each_other_are_refused():
    model = functions(3)
    model.functions[2].node[0].MergeFrom(NodeProto(op_type="F0", domain="own"))
    assert "must not call themselves" in refused(model)


def test_operators_of_a_library_are_named_and_no_library_is_loaded(tmp_path, monkeypatch):
    for domain in ("com.microsoft", "com.microsoft.extensions", "pyopmulti_4", "../../evil.so"):
        model = build([node("Evil", ["x"], ["y"], name="odd", domain=domain)], {"x": ["n", 3]}, ["y"], domains=[domain])
        assert f"operator 'Evil' of domain {domain!r} is not supported" in refused(model)


def test_a_chain_of_thousands_of_nodes_is_read():
    names = ["x", *(f"v{i}" for i in range(2999)), "y"]
    nodes = [node(("Neg", "Relu", "Sigmoid")[i % 3], [names[i]], [names[i + 1]]) for i in range(3000)]
    assert len(load_onnx(build(nodes, {"x": ["n", 1]}, ["y"]).SerializeToString()).program.layers) > 2000


def test_a_chain_of_thousands_of_identities_is_fixed():
    names = ["x", *(f"v{i}" for i in range(2999)), "y"]
    nodes = [node("Identity", [names[i]], [names[i + 1]]) for i in range(3000)]
    assert "removed 2999 Identity nodes" in fix(build(nodes, {"x": ["n", 1]}, ["y"]).SerializeToString()).rewrites


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TOO_LARGE["an input"], "must hold at most"),
        (TOO_LARGE["Expand"], "GiB; it asks for more"),
        (build([node("Relu", ["nowhere"], ["y"])], {"x": ["n", 3]}, ["y"], opset=7), "onnx says"),
        (BROKEN["an input of no type"][0], "type information"),
    ],
)
def test_what_cannot_be_run_is_not_fixed(model, reason, capfd):
    with pytest.raises(SecureError, match=reason):
        fix(model.SerializeToString())
    assert capfd.readouterr() == ("", "")


def test_names_of_a_model_do_not_write_on_the_terminal(tmp_path, capsys):
    model = build([node("Frob", ["x"], ["y"], name="\x1b[31m[red]a\x07")], {"x": ["n", 3]}, ["y"])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert app.run(["check", str(tmp_path / "m.onnx")]) == app.UNSUPPORTED
    assert not {"\x1b", "\x07"} & set("".join(capsys.readouterr()))


# --- through every door ---------------------------------------------------------------------------------------------

DOORS = {
    "text": b"no model at all",
    "cut": GOOD.SerializeToString()[:-7],
    "cyclic": changed(lambda m: m.graph.node[0].input.__setitem__(0, "y")).SerializeToString(),
    "future": version(NEWEST_OPSET + 1).SerializeToString(),
    "huge": TOO_LARGE["ConstantOfShape"].SerializeToString(),
    "number": with_number("Elu", "alpha", 1e30).SerializeToString(),
    "free": BROKEN["sizes that stay unknown"][0].SerializeToString(),
    "branch": build(
        [branches("q", "x"), node("Relu", ["v"], ["y"])], {"x": ["n", 3], "q": []}, ["y"]
    ).SerializeToString(),
}


@pytest.mark.parametrize("case", DOORS)
def test_the_command_says_in_one_message_what_is_wrong(case, tmp_path, capsys):
    path = tmp_path / "m.onnx"
    path.write_bytes(DOORS[case])
    fixed = ["check", str(path), "--fix", str(tmp_path / "fixed.onnx")]
    for arguments in (["check", str(path)], ["check", str(path), "--json"], fixed):
        assert app.run(arguments) in (app.INPUT, app.UNSUPPORTED)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert "internal error" not in out + err
        assert out or err.startswith("securemtk: ")
        assert not (out and "--json" in arguments) or not json.loads(out)["ok"]
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_session_refuses_them_all_and_lives_on():
    with Session() as session:
        for data in DOORS.values():
            with pytest.raises(SecureError) as caught:
                session.load(data)
            assert not isinstance(caught.value, ProtocolAbort)
        assert session.load(GOOD.SerializeToString()).predict(floats(2, 5))["y"].shape == (2, 3)


def test_an_inference_session_refuses_when_it_is_made():
    with pytest.raises(BundleError, match="damaged"):
        InferenceSession(DOORS["text"])


# --- what nobody foresaw --------------------------------------------------------------------------------------------


def weight_in_a_message(*_: object, **__: object) -> None:
    raise KeyError("weight 0.7310585")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("rules.all_rules.RULES", "MatMul"),
        ("model.reading", "_parse"),
        ("model.reading", "_sort"),
        ("importer", "analyse"),
        ("importer", "translate"),
        ("importer", "run_passes"),
        ("model.probe", "opset_of"),
    ],
)
def test_an_error_that_nobody_foresaw_refuses_the_file_with_its_kind_and_place(module, name, monkeypatch):
    where = importlib.import_module(f"securemtk.onnx.{module.removesuffix('.RULES')}")
    if module == "rules.all_rules.RULES":
        monkeypatch.setitem(where.RULES, name, weight_in_a_message)
    else:
        monkeypatch.setattr(where, name, weight_in_a_message)
    data = GOOD.SerializeToString()
    with pytest.raises(UnsupportedNodes) as caught:
        load_onnx(data)
    assert re.search(r"it cannot be understood: KeyError in \w+\.py:\d+; tell the authors", str(caught.value))
    assert "0.731" not in str(caught.value)
    assert caught.value.__cause__ is None
    report = check(data)
    assert not report.ok
    assert [p.reason for p in report.unsupported] == [p.reason for p in caught.value.nodes]
    assert report.unsupported[0].op_type == ("MatMul" if name == "MatMul" else "model")


def test_a_wrong_argument_is_still_the_callers_own_error():
    with pytest.raises(TypeError):
        load_onnx(5)
    with pytest.raises(TypeError, match="must be a float array"):
        check(GOOD.SerializeToString(), sample="text")


def test_a_file_that_import_breaks_on_leaves_a_session_and_its_other_models_alive(tmp_path, monkeypatch):
    # Both roles find this before they serve: an importer with two faults.
    (tmp_path / "sitecustomize.py").write_text(
        "import securemtk.onnx.importer as importer\n"
        "from securemtk.onnx.building.registry import RULES\n"
        "load = importer.load_onnx\n"
        "def broken(*_):\n"
        "    raise KeyError('weight 0.7310585')\n"
        "def load_onnx(source, *more):\n"
        "    return 1 // 0 if b'worse' in source else load(source, *more)\n"
        "RULES['Tanh'], importer.load_onnx = broken, load_onnx\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    x, bad = floats(2, 5), build([node("Tanh", ["x"], ["y"], name="bent")], {"x": ["n", 3]}, ["y"])
    worse = build([node("Relu", ["x"], ["y"], name="worse")], {"x": ["n", 3]}, ["y"])
    with Session() as session:
        model = session.load(GOOD.SerializeToString())
        before = model.predict(x)["y"]
        for path in (None, tmp_path / "bad.onnx"):
            source = bad.SerializeToString() if path is None else path
            if path is not None:
                path.write_bytes(bad.SerializeToString())
            with pytest.raises(UnsupportedError, match=r"'bent' \(Tanh\).*KeyError in all_rules\.py:\d+"):
                session.load(source)
        with pytest.raises(UnsupportedError, match=r"keeper's process met ZeroDivisionError in sitecustomize\.py:7"):
            session.load(worse.SerializeToString())
        np.testing.assert_allclose(model.predict(x)["y"], before, atol=1e-3)
        with pytest.raises(UnsupportedError, match="KeyError in all_rules"):
            InferenceSession(bad.SerializeToString())
