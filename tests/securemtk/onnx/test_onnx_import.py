"""Import: every operator against onnxruntime, from three exporters; every bad file refused."""

import contextlib
import os
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import program_oracle
import pytest
import torch
from helpers import ROOT
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import agrees, build, floats, one, ops, torchscript
from program_oracle import run
from torch import nn

from protocols.errors import BundleError, InputError, NeedsInputs, RangeError, ShapeError, UnsupportedError
from protocols.program import plain
from protocols.program.program import OPERATORS, Program
from securemtk.onnx.building.registry import RULES
from securemtk.onnx.export import export_onnx
from securemtk.onnx.fix import fix
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.model import runtime
from securemtk.onnx.model.declared import declared
from securemtk.onnx.model.reading import NEWEST_OPSET, opset_of, read_proto
from securemtk.onnx.model.runtime import start
from securemtk.planning.check import check

quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
OPSETS = (9, 11, 13, 18, 22, 26)
node = helper.make_node


def fails_with(error: type[Exception], model: onnx.ModelProto | bytes | str | Path) -> str:
    """Return the message of the error that importing raises."""
    with pytest.raises(error) as caught:
        load_onnx(model.SerializeToString() if isinstance(model, onnx.ModelProto) else model)
    return str(caught.value)


def refused(model: onnx.ModelProto) -> list[tuple[str, str, str, str]]:
    """Return what stands in a model's way."""
    with pytest.raises(UnsupportedError) as caught:
        load_onnx(model.SerializeToString())
    return caught.value.nodes


# --- operators against onnxruntime


@st.composite
def windows(draw: st.DrawFn, pool: bool) -> dict:
    """Draw the attributes that convolution and pooling share, and an input size that they fit."""
    n = draw(st.sampled_from([1, 2, 2]))
    several = st.lists(st.integers(1, 3), min_size=n, max_size=n)
    kernel = draw(several)
    dilation = [1] * n if pool else draw(several)
    attrs: dict = {"kernel_shape": kernel, "strides": draw(several)}
    if not pool:
        attrs["dilations"] = dilation
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto == "NOTSET":
        most = [k - 1 if pool else 3 for k in kernel]
        attrs["pads"] = [draw(st.integers(0, m)) for m in most * 2]
    elif auto != "VALID":
        # onnxruntime knows neither SAME with dilation nor SAME of a pool that skips.
        assume(all(d == 1 for d in dilation))
        assume(not pool or all(k >= s for k, s in zip(kernel, attrs["strides"], strict=True)))
    attrs["auto_pad"] = auto
    size = [(k - 1) * d + 1 + draw(st.integers(0, 6)) for k, d in zip(kernel, dilation, strict=True)]
    return {"attrs": attrs, "size": size}


@quick
@given(
    window=windows(pool=False),
    groups=st.integers(1, 3),
    wide=st.integers(1, 2),
    bias=st.booleans(),
    opset=st.sampled_from(OPSETS),
)
def test_a_convolution_of_any_attributes_agrees(window, groups, wide, bias, opset):
    c_in, c_out = 2 * groups, wide * groups
    weight = floats(c_out, 2, *window["attrs"]["kernel_shape"])
    constants = [weight, floats(c_out, seed=1)] if bias else [weight]
    model = one("Conv", ["n", c_in, *window["size"]], constants, opset=opset, group=groups, **window["attrs"])
    imported = agrees(model, batches=(2,))
    if not bias:
        assert not imported.params["the Conv.bias"].any()


@quick
@given(
    window=windows(pool=True),
    kind=st.sampled_from(["MaxPool", "AveragePool"]),
    ceil=st.booleans(),
    counted=st.booleans(),
    opset=st.sampled_from(OPSETS[1:]),
)
def test_a_pool_of_any_attributes_agrees(window, kind, ceil, counted, opset):
    attrs = dict(window["attrs"])
    if attrs["auto_pad"] == "NOTSET":
        attrs["ceil_mode"] = int(ceil)
    if kind == "AveragePool":
        attrs["count_include_pad"] = int(counted)
    model = one(kind, ["n", 2, *window["size"]], opset=opset, **attrs)
    agrees(model, batches=(2,))


@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize(("size", "pads"), [(5, [0, 0, 0, 0]), (7, [1, 1, 0, 0]), (6, [1, 0, 0, 1]), (9, [1, 1, 1, 1])])
def test_a_last_window_that_reaches_over_the_edge_agrees(kind, counted, pads, size):
    attrs = {"count_include_pad": counted} if kind == "AveragePool" else {}
    model = one(kind, ["n", 2, size, size], kernel_shape=[3, 3], strides=[3, 3], pads=pads, ceil_mode=1, **attrs)
    imported = agrees(model, batches=(2,))
    windows = imported.program.layers[-1].shape[1]
    assert 3 * windows > size + pads[0] + pads[2]


@quick
@given(
    trans=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5, -2.0]),
    beta=st.sampled_from([1.0, 0.25, 0.0]),
    third=st.sampled_from(["none", "scalar", "vector", "row", "cell", "activation", "column activation"]),
    opset=st.sampled_from(OPSETS),
)
def test_a_gemm_of_any_attributes_agrees(trans, alpha, beta, third, opset):
    weights = {"b": floats(3, 5) if trans else floats(5, 3)}
    inputs: dict = {"x": ["n", 5]}
    shapes = {"scalar": (), "vector": (3,), "row": (1, 3), "cell": (1, 1)}
    if third in shapes:
        weights["c"] = np.asarray(floats(*shapes[third], seed=1), dtype=np.float32)
    elif third != "none":
        inputs["c"] = ["n", 1 if "column" in third else 3]
    elif opset < 11:
        return
    names = ["x", "b"] + (["c"] if third != "none" else [])
    gemm = node("Gemm", names, ["y"], alpha=alpha, beta=beta, transB=int(trans))
    agrees(build([gemm], inputs, ["y"], weights, opset=opset))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(
    "op",
    [
        "Relu",
        "Sigmoid",
        "Tanh",
        "LeakyRelu",
        "Identity",
        "Softmax",
        "GlobalAveragePool",
        "Flatten",
        "Dropout",
        "Transpose",
    ],
)
def test_a_plain_operator_agrees_in_every_opset(op, opset):
    attrs = {"Transpose": {"perm": [0, 2, 3, 1]}, "LeakyRelu": {"alpha": 0.2}}.get(op, {})
    agrees(one(op, ["n", 3, 4, 5], opset=opset, **attrs))


CONSTANT_FIRST = {"Add": ["shift"], "Sub": ["scale", "shift"], "Mul": ["affine"]}
CONSTANT_LAST = {"Add": ["shift"], "Sub": ["shift"], "Mul": ["affine"], "Div": ["affine"]}


@pytest.mark.parametrize(("op", "first"), [*((op, 0) for op in CONSTANT_LAST), *((op, 1) for op in CONSTANT_FIRST)])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (3, 4), (1, 3, 4), (1, 3, 1), (1, 1, 1)])
def test_arithmetic_with_a_constant_agrees(op, shape, first):
    constant = np.asarray(floats(*shape) + 3, dtype=np.float32)
    model = one(op, ["n", 3, 4], [constant], first=first)
    assert ops(agrees(model)) == (CONSTANT_FIRST if first else CONSTANT_LAST)[op]


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 1, 1), (1, 4, 1)])
def test_arithmetic_of_two_activations_agrees_and_broadcasts(op, shape):
    model = build([node(op, ["x", "z"], ["y"])], {"x": ["n", 3, 4, 4], "z": ["n", *shape]}, ["y"])
    assert ops(agrees(model)) == [op.lower()]


def test_a_value_may_be_added_to_itself():
    agrees(build([node("Mul", ["x", "x"], ["z"]), node("Add", ["z", "x"], ["y"])], {"x": ["n", 3]}, ["y"]))


@pytest.mark.parametrize(
    ("low", "high", "op", "knots"),
    [
        (0.0, 6.0, "spline", 2),
        (-1.0, None, "spline", 1),
        (None, 0.5, "spline", 1),
        (0.5, 0.5, "spline", 1),
        (0.0, None, "relu", 0),
        (None, None, "reshape", 0),
        (-3.4e38, 1.0, "spline", 1),
        (0.0, 3.4e38, "relu", 0),
        (-65504.0, 65504.0, "reshape", 0),
        (-1.0, 65504.0, "spline", 1),
        (-65504.0, -1.0, "spline", 1),
        (0.0, 40000.0, "relu", 0),
        (20000.0, 65504.0, "spline", 1),
    ],
)
@pytest.mark.parametrize("opset", [9, 11, 13])
def test_clip_with_any_bounds_agrees_and_is_exact(low, high, op, knots, opset):
    if opset < 11:
        attrs = {name: value for name, value in (("min", low), ("max", high)) if value is not None}
        model = one("Clip", ["n", 5], opset=opset, **attrs)
    else:
        bounds = [None if x is None else np.float32(x).reshape(()) for x in (low, high)]
        model = one("Clip", ["n", 5], bounds, opset=opset)
    (layer,) = agrees(model).program.layers
    assert layer.op == op
    assert len(layer.attrs.get("knots", ())) == knots
    # Whole slopes need no truncation.
    assert layer.attrs.get("frac_bits", 16) == layer.attrs.get("keep_bits", 16) == 16


@pytest.mark.parametrize("opset", [9, 12, 13, 22])
@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2, None])
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_softmax_follows_the_rule_of_its_opset(op, opset, axis):
    imported = agrees(one(op, ["n", 3, 4, 5], opset=opset, **({} if axis is None else {"axis": axis})))
    core = [x for x in ops(imported) if x != "reshape"]
    assert core == ["max", "sub", "spline", "sum", "spline", "mul" if op == "Softmax" else "sub"]


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 6, 5)])
@pytest.mark.parametrize("opset", [9, 14, 15])
def test_batch_normalisation_agrees(shape, opset):
    statistics = [floats(4), floats(4, seed=1), floats(4, seed=2), floats(4, seed=3) ** 2]
    agrees(one("BatchNormalization", ["n", *shape], statistics, opset=opset, epsilon=1e-3))


@pytest.mark.parametrize(
    ("constant", "shape", "first"),
    [
        ((5, 3), (5,), 0),
        ((5, 3), (4, 5), 0),
        ((1, 5, 3), (4, 5), 0),
        ((5,), (4, 5), 0),
        ((5,), (5,), 0),
        ((3, 4), (4, 5), 1),
        ((4,), (4, 5), 1),
        ((3, 4), (2, 4, 5), 1),
        ((5, 3), (2, 4, 5), 0),
    ],
)
def test_a_product_with_a_constant_agrees(constant, shape, first):
    agrees(one("MatMul", ["n", *shape], [floats(*constant)], first=first))


@pytest.mark.parametrize("axes", [[1], [2, 3], [-1], [1, 2, 3]])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("opset", [11, 18])
def test_a_mean_over_axes_of_a_sample_agrees(axes, keep, opset):
    if opset < 18:
        model = one("ReduceMean", ["n", 3, 4, 5], opset=opset, axes=axes, keepdims=keep)
    else:
        model = one("ReduceMean", ["n", 3, 4, 5], [np.array(axes)], opset=opset, keepdims=keep)
    assert ops(agrees(model)) == ["mean"]


def test_a_mean_over_no_axes_may_be_nothing():
    assert ops(agrees(one("ReduceMean", ["n", 3], opset=18, noop_with_empty_axes=1))) == ["reshape"]


@pytest.mark.parametrize("opset", [9, 13])
def test_axes_of_one_are_squeezed_and_put_back(opset):
    axes = np.array([2, 3])
    if opset < 13:
        nodes = [node("Squeeze", ["x"], ["z"], axes=[2, 3]), node("Unsqueeze", ["z"], ["y"], axes=[1])]
        weights = {}
    else:
        nodes, weights = (
            [node("Squeeze", ["x", "a"], ["z"]), node("Unsqueeze", ["z", "b"], ["y"])],
            {"a": axes, "b": np.array([1])},
        )
    imported = agrees(build(nodes, {"x": ["n", 3, 1, 1]}, ["y"], weights, opset=opset))
    assert ops(imported) == ["reshape"]


def test_values_are_joined_along_any_axis_of_a_sample():
    nodes = [node("Relu", ["x"], ["r"]), node("Concat", ["x", "r", "z"], ["y"], axis=-1)]
    agrees(build(nodes, {"x": ["n", 3, 4], "z": ["n", 3, 2]}, ["y"]))


@pytest.mark.parametrize("opset", [9, 13])
def test_padding_by_nothing_is_nothing(opset):
    constants = [] if opset < 11 else [np.zeros(6, np.int64)]
    attrs = {"pads": [0] * 6} if opset < 11 else {}
    assert ops(agrees(one("Pad", ["n", 1, 3], constants, opset=opset, **attrs))) == ["reshape"]


@pytest.mark.parametrize("shape", [[0, -1], [-1, 12], [-1, 3, 2, 2], [0, 0, 2, 2]])
def test_a_reshape_keeps_the_batch(shape):
    agrees(one("Reshape", ["n", 3, 4], [np.array(shape)]))


def test_a_cast_between_floats_is_nothing():
    nodes = [
        node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        node("Cast", ["d"], ["z"], to=TensorProto.FLOAT),
        node("Relu", ["z"], ["y"]),
    ]
    assert ops(agrees(build(nodes, {"x": ["n", 3]}, ["y"]))) == ["relu"]


def test_every_rule_and_every_operator_of_a_program_has_a_test_here():
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_onnx_*.py"))
    assert [op for op in RULES if f'"{op}"' not in text] == []
    assert set(OPERATORS) == set(program_oracle.OPERATORS) == set(plain.OPERATORS)


# --- folding and naming


def conv_then(
    *tail: onnx.NodeProto, weights: dict, shape: tuple = (2, 6, 6), outputs: tuple = ("y",), opset: int = 18
) -> onnx.ModelProto:
    kernel = (4, shape[0], *(3,) * (len(shape) - 1))
    conv = node("Conv", ["x", "w"], ["c"], name="conv")
    return build([conv, *tail], {"x": ["n", *shape]}, list(outputs), {"w": floats(*kernel), **weights}, opset=opset)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 6)])
def test_normalisation_and_scaling_fold_into_the_convolution(shape):
    ones = (1,) * (len(shape) - 1)
    weights = {name: floats(4, seed=i) ** 2 for i, name in enumerate("gbmv")} | {
        "s": floats(4, *ones),
        "t": np.float32([0.5]),
    }
    tail = [
        node("BatchNormalization", ["c", *"gbmv"], ["n1"]),
        node("Dropout", ["n1"], ["n2"]),
        node("Mul", ["n2", "s"], ["n3"]) if len(shape) == 3 else node("Identity", ["n2"], ["n3"]),
        node("Sub", ["n3", "t"], ["n4"]) if len(shape) == 3 else node("Identity", ["n3"], ["n4"]),
        node("Relu", ["n4"], ["y"]),
    ]
    imported = agrees(conv_then(*tail, weights=weights, shape=shape))
    assert ops(imported) == (["conv2d", "relu"] if len(shape) == 3 else ["reshape", "conv2d", "reshape", "relu"])
    assert imported.program.layers[len(shape) % 3 and 1].name == "conv"


def test_a_bias_behind_a_product_folds_into_it():
    nodes = [node("MatMul", ["x", "w"], ["z"]), node("Add", ["b", "z"], ["y"])]
    imported = agrees(build(nodes, {"x": ["n", 7, 5]}, ["y"], {"w": floats(5, 3), "b": floats(3)}))
    assert ops(imported) == ["matmul"]
    assert imported.program.layers[0].output == "y"


def test_two_affine_layers_become_one():
    nodes = [node("Mul", ["x", "a"], ["z"]), node("Add", ["z", "b"], ["y"])]
    assert ops(agrees(build(nodes, {"x": ["n", 3, 4]}, ["y"], {"a": floats(3, 1), "b": floats(4)}))) == ["affine"]


def test_what_others_use_is_not_folded_away():
    tail = [node("Add", ["c", "t"], ["y"]), node("Relu", ["c"], ["z"])]
    assert ops(agrees(conv_then(*tail, weights={"t": np.float32([2])}, outputs=("y", "z")))) == [
        "conv2d",
        "shift",
        "relu",
    ]
    tail = [node("Add", ["c", "t"], ["y"])]
    assert ops(agrees(conv_then(*tail, weights={"t": np.float32([2])}, outputs=("y", "c")))) == ["conv2d", "shift"]


def test_a_shift_before_a_padded_convolution_stays():
    nodes = [node("Add", ["x", "t"], ["z"]), node("Conv", ["z", "w"], ["y"], pads=[1, 1, 1, 1])]
    imported = agrees(build(nodes, {"x": ["n", 2, 6, 6]}, ["y"], {"t": np.float32([2]), "w": floats(3, 2, 3, 3)}))
    assert ops(imported) == ["shift", "conv2d"]


def test_which_layers_there_are_does_not_depend_on_weights():
    def layers(t: np.ndarray, g: np.ndarray) -> list[str]:
        tail = [node("Add", ["c", "t"], ["a"]), node("BatchNormalization", ["a", *"gbmv"], ["y"])]
        weights = {name: np.ones(4, np.float32) for name in "bmv"} | {"g": g, "t": t}
        return ops(agrees(conv_then(*tail, weights=weights)))

    varied = layers(floats(4, 4, 4), floats(4))
    assert varied == layers(np.zeros((4, 4, 4), np.float32), np.ones(4, np.float32)) == ["conv2d", "affine"]


@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Tanh", "Clip", "LeakyRelu"])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_the_maximum_is_taken_before_a_function_that_never_decreases(op, pads):
    tail = [node(op, ["c"], ["r"]), node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2], pads=pads)]
    tail = [node("Clip", ["c", "lo", "hi"], ["r"]), tail[1]] if op == "Clip" else tail
    bounds = {"lo": np.float32(-0.5), "hi": np.float32(0.5)} if op == "Clip" else {}
    imported = agrees(conv_then(*tail, node("Flatten", ["p"], ["y"]), weights=bounds))
    function = "relu" if op == "Relu" else "spline"
    # A leaky ReLU may have a slope below 0.
    order = [function, "max_pool2d"] if op == "LeakyRelu" else ["max_pool2d", function]
    assert ops(imported) == ["conv2d", *order, "reshape"]


def test_the_maximum_stays_behind_a_function_that_others_use():
    tail = [
        node("Relu", ["c"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2]),
        node("Flatten", ["r"], ["y"]),
    ]
    imported = agrees(conv_then(*tail, weights={}, outputs=("y", "p")))
    assert sorted(ops(imported)[1:]) == ["max_pool2d", "relu", "reshape"]
    assert ops(imported)[1] == "relu"


def test_one_value_under_several_output_names_is_answered_under_each():
    nodes = [node("Relu", ["x"], ["r"]), *(node("Identity", ["r"], [y]) for y in ("a", "b"))]
    assert ops(agrees(build(nodes, {"x": ["n", 3]}, ["b", "a"]))) == ["relu", "reshape"]
    assert ops(agrees(build([*nodes, node("Identity", ["x"], ["c"])], {"x": ["n", 3]}, ["c", "r", "a"]))) == [
        "relu",
        "reshape",
        "reshape",
    ]


def test_layers_with_equal_or_absent_names_get_names_of_their_own():
    nodes = [
        node("Relu", ["x"], ["a"], name="same"),
        node("Tanh", ["a"], ["b"], name="same"),
        node("Relu", ["b"], ["y"]),
    ]
    names = [layer.name for layer in load_onnx(build(nodes, {"x": ["n", 3]}, ["y"]).SerializeToString()).program.layers]
    assert len(set(names)) == 3
    assert names[0] == "same"


def test_values_of_a_rule_do_not_meet_values_of_the_model():
    model = build(
        [
            node("MatMul", ["w", "x"], ["y"]),
            node("Relu", ["y"], ["y/turned"]),
            node("Tanh", ["y/turned"], ["y/product"]),
        ],
        {"x": ["n", 4, 5]},
        ["y/product"],
        {"w": floats(3, 4)},
    )
    agrees(model)


def test_nodes_that_no_output_needs_are_left_out():
    nodes = [node("Relu", ["x"], ["y"]), node("NonZero", ["x"], ["unused"])]
    assert ops(agrees(build(nodes, {"x": ["n", 3]}, ["y"]))) == ["relu"]


# --- constants and shapes


def flatten_by_shape(batch: object, opset: int = 18) -> onnx.ModelProto:
    """Return a model as torch traces view(x.size(0), -1): the shape is computed by nodes."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array(0))),
        node("Gather", ["s", "zero"], ["b"], axis=0),
        node("Unsqueeze", ["b", "axes"], ["b1"]),
        node("Concat", ["b1", "rest"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["f"]),
        node("MatMul", ["f", "w"], ["y"]),
    ]
    weights = {"axes": np.array([0]), "rest": np.array([-1]), "w": floats(12, 3)}
    return build(nodes, {"x": [batch, 3, 4]}, ["y"], weights, opset=opset)


@pytest.mark.parametrize("batch", ["n", None, 1, 4])
def test_a_shape_that_is_computed_is_folded(batch):
    model = flatten_by_shape(batch)
    imported = agrees(model, batches=(1, 4) if batch in ("n", None) else (batch,))
    assert ops(imported) == ["reshape", "matmul"]
    assert imported.batch == (batch if isinstance(batch, int) else None)


def test_constants_are_folded_whatever_they_are_made_of():
    nodes = [
        node("ConstantOfShape", ["k"], ["ones"], value=numpy_helper.from_array(np.float32([2]))),
        node("Range", ["lo", "hi", "step"], ["range"]),
        node("Cast", ["range"], ["r"], to=TensorProto.FLOAT),
        node("Mul", ["ones", "r"], ["w1"]),
        node("Erf", ["w1"], ["w2"]),
        node("Mul", ["x", "w2"], ["y"]),
    ]
    weights = {"k": np.array([4]), "lo": np.array(0), "hi": np.array(4), "step": np.array(1)}
    assert ops(agrees(build(nodes, {"x": ["n", 4]}, ["y"], weights))) == ["affine"]


def test_zeros_in_the_shape_of_the_batch_are_a_constant():
    nodes = [node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["z"]), node("Add", ["x", "z"], ["y"])]
    assert ops(agrees(build(nodes, {"x": ["n", 4]}, ["y"]))) == ["shift"]


def test_initializers_may_be_listed_as_inputs():
    model = one("MatMul", ["n", 5], [floats(5, 3)], opset=9)
    model.graph.input.append(helper.make_tensor_value_info("c0", TensorProto.FLOAT, [5, 3]))
    model.ir_version = 3
    assert [x.name for x in agrees(model).inputs] == ["x"]


def test_a_batch_fixed_to_one_is_freed():
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Reshape", ["c", "flat"], ["f"]),
        node("Reshape", ["f", "image"], ["i"]),
        node("Flatten", ["i"], ["g"]),
        node("Gemm", ["g", "v"], ["y"]),
    ]
    weights = {"w": floats(3, 2, 3, 3), "flat": np.array([1, -1]), "image": np.array([1, 4, 12]), "v": floats(48, 5)}
    model = build(nodes, {"x": [1, 2, 4, 4]}, ["y"], weights)
    imported = agrees(model, batches=(1,))
    assert imported.batch == 1
    x = floats(6, 2, 4, 4)
    session = start(model.SerializeToString())
    alone = np.concatenate([session.run(None, {"x": x[i : i + 1]})[0] for i in range(6)])
    np.testing.assert_allclose(run(imported.program, imported.params, {"x": x})["y"], alone, atol=1e-5)


def test_a_model_in_a_newer_opset_than_onnxruntime_knows_is_read():
    def model(opset: int) -> onnx.ModelProto:
        nodes = [
            node("Cast", ["x"], ["z"], to=TensorProto.FLOAT),
            node("MatMul", ["z", "w"], ["r"]),
            node("Relu", ["r"], ["y"]),
        ]
        return build(nodes, {"x": ["n", 5]}, ["y"], {"w": floats(5, 3)}, opset=opset)

    newest = model(NEWEST_OPSET)
    newest.ir_version = onnx.IR_VERSION
    imported, reference = load_onnx(newest.SerializeToString()), agrees(model(18))
    assert imported.program == reference.program
    assert all(np.array_equal(imported.params[name], reference.params[name]) for name in reference.params)


def test_a_model_in_a_newer_opset_goes_through_onnx_s_converter_when_an_operator_has_changed(monkeypatch):
    # An onnxruntime that ends where Cast has changed since, whatever the one that is installed knows.
    asked = []
    convert = onnx.version_converter.convert_version
    monkeypatch.setattr(runtime, "_newest_runnable", lambda: 18)
    monkeypatch.setattr(
        onnx.version_converter, "convert_version", lambda model, opset: asked.append(opset) or convert(model, opset)
    )
    nodes = [node("Cast", ["x"], ["z"], to=TensorProto.FLOAT), node("Relu", ["z"], ["y"])]
    agrees(build(nodes, {"x": ["n", 5]}, ["y"], opset=19))
    assert set(asked) == {18}


def test_a_model_of_which_no_operator_has_changed_is_stamped_with_the_opset_that_onnxruntime_knows(monkeypatch):
    monkeypatch.setattr(runtime, "_newest_runnable", lambda: 18)
    monkeypatch.setattr(onnx.version_converter, "convert_version", lambda *_: pytest.fail("nothing to convert"))
    model = build([node("Sigmoid", ["x"], ["y"])], {"x": ["n", 5]}, ["y"], opset=NEWEST_OPSET)
    assert opset_of(runtime.runnable(model)) == 18


def test_the_newest_opset_is_the_one_that_the_installed_onnxruntime_runs():
    def runs(opset: int) -> bool:
        model = build([node("Relu", ["x"], ["y"])], {"x": [1]}, ["y"], opset=opset)
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        except runtime.ERRORS:
            return False
        return True

    newest = runtime._newest_runnable()
    assert runs(newest)
    assert newest == NEWEST_OPSET or not runs(newest + 1)


def test_a_model_that_onnxruntime_does_not_run_is_judged_without_what_it_does_not_know():
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="good"),
        node("SwiGLU", ["c", "c"], ["y"], name="new"),
        node("Sin", ["c"], ["p"], name="bad"),
    ]
    model = build(nodes, {"x": ["n", 2, 6, 6]}, ["y", "p"], {"w": floats(2, 2, 3, 3)}, opset=NEWEST_OPSET)
    assert [name for name, _, _, _ in refused(model)] == ["new", "bad"]


def test_nodes_in_any_order_are_sorted():
    model = build(
        [node("Relu", ["x"], ["a"]), node("Tanh", ["a"], ["b"]), node("Sigmoid", ["b"], ["y"])], {"x": ["n", 3]}, ["y"]
    )
    shuffled = onnx.ModelProto.FromString(model.SerializeToString())
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(model.graph.node[i] for i in (2, 0, 1))
    assert load_onnx(shuffled.SerializeToString()).program == agrees(model).program


def with_function(body: list, calls: int = 1) -> onnx.ModelProto:
    """Return a model whose only operators are calls of a function "own.Swish" (and of what its body calls)."""
    function = helper.make_function(
        "own", "Swish", ["a"], ["b"], body, [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    )
    nodes = [node("Swish", ["x" if i == 0 else f"y{i - 1}"], [f"y{i}"], domain="own") for i in range(calls)]
    model = build(nodes, {"x": ["n", 3]}, [f"y{calls - 1}"], domains=["own"])
    model.functions.append(function)
    return model


def test_functions_of_the_model_are_inlined():
    body = [node("Sigmoid", ["a"], ["s"]), node("Mul", ["a", "s"], ["b"])]
    assert ops(agrees(with_function(body, calls=2))) == ["spline"] * 2


def test_a_function_that_calls_itself_is_refused():
    assert "call themselves" in fails_with(BundleError, with_function([node("Swish", ["a"], ["b"], domain="own")]))


def test_functions_that_explode_are_refused():
    model = with_function([node("F0", ["a"], ["b"], domain="own")])
    for i in range(20):
        body = [
            node(f"F{i + 1}", ["a" if j == 0 else f"v{j}"], [f"v{j + 1}" if j < 9 else "b"], domain="own")
            for j in range(10)
        ]
        model.functions.append(
            helper.make_function("own", f"F{i}", ["a"], ["b"], body, [helper.make_opsetid("own", 1)])
        )
    model.functions.append(
        helper.make_function("own", "F20", ["a"], ["b"], [node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 18)])
    )
    assert "expand to at most" in fails_with(BundleError, model)


# --- torch's exporters


class TwoHeads(nn.Module):
    """Convolutions with all that torch users put around them, and two outputs."""

    def __init__(self, ceil: bool = True) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1, ceil_mode=ceil),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
            nn.ReLU6(),
            nn.AvgPool2d(2),
            nn.Dropout(0.5),
            nn.Conv2d(8, 16, 1),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.1),
        )
        self.narrow = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
        self.wide = nn.Sequential(nn.Linear(64, 3), nn.Softmax(dim=1))
        generator = torch.Generator().manual_seed(3)
        for parameter in [*self.parameters(), *(b for b in self.buffers() if b.is_floating_point())]:
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.01

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.trunk((x - 0.5) / 0.25)
        return self.narrow(z.mean((2, 3))), self.wide(z.view(z.size(0), -1))


class TwoInputs(nn.Module):
    """An image of one axis and a vector, scaled by a gate made of the vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(3, 6, 3, stride=2), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2))
        self.gate = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid())
        self.head = nn.Linear(6, 2)

    def forward(self, signal: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        z = self.conv(signal) * self.gate(vector).unsqueeze(-1)
        return self.head(torch.cat([z, z], dim=2).transpose(1, 2)).clamp(max=0.5).flatten(1)


IMAGE, SIGNAL = (torch.rand(1, 1, 8, 8),), (torch.rand(1, 3, 21), torch.rand(1, 5))


@pytest.mark.parametrize("opset", [9, 13, 17])
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(("module", "example", "n"), [(TwoHeads, IMAGE, 2), (TwoInputs, SIGNAL, 1)])
def test_models_of_the_torchscript_exporter_agree(module, example, n, opset, free):
    # In opset 9 torch writes ceil_mode as more padding than onnxruntime takes.
    network = TwoHeads(ceil=opset > 9) if module is TwoHeads else module()
    data = torchscript(network, example, opset, ["a", "b"][:n], free)
    imported = agrees(data, batches=(1, 4) if free else (1,), atol=1e-4)
    assert imported.batch == (None if free else 1)
    assert "affine" not in ops(imported)[1:]


@pytest.mark.parametrize(("module", "example", "n"), [(TwoHeads, IMAGE, 2), (TwoInputs, SIGNAL, 1)])
def test_models_of_the_dynamo_exporter_agree(module, example, n):
    names = tuple(f"x{i}" for i in range(len(example)))
    imported = agrees(export_onnx(module(), example, ["a", "b"][:n], input_names=names), atol=1e-4)
    assert tuple(x.name for x in imported.inputs) == names
    assert imported.batch is None


# --- the program


def test_a_program_goes_through_json_unchanged():
    program = agrees(torchscript(TwoHeads(), IMAGE, 17, ["a", "b"], True), atol=1e-4).program
    assert Program.from_json(program.to_json()) == program


def test_the_plain_interpreter_agrees_with_the_oracle():
    imported = load_onnx(torchscript(TwoInputs(), SIGNAL, 17, ["a"], True))
    feeds = {"x0": floats(4, 3, 21), "x1": floats(4, 5)}
    got = plain.run(imported.program, imported.params, feeds)
    np.testing.assert_allclose(got["a"], run(imported.program, imported.params, feeds)["a"], atol=1e-9)


def test_no_weight_is_in_a_program_or_a_repr():
    imported = load_onnx(one("MatMul", ["n", 2], [np.float32([[0.123456, 7.654321], [1.5, 2.5]])]).SerializeToString())
    for text in (imported.program.to_json(), repr(imported)):
        assert not any(value in text for value in ("0.1234", "7.654", "1.5", "2.5"))


# --- what is refused


def test_all_unsupported_nodes_are_named_at_once():
    nodes = [
        node("Sin", ["x"], ["a"], name="first"),
        node("MaxPool", ["a"], ["b", "index"], name="second", kernel_shape=[2, 2]),
        node("Mystery", ["b"], ["c"], name="third", domain="somebody"),
        node("Cos", ["c"], ["d"], name="fourth"),
        node("Cast", ["index"], ["e"], name="fifth", to=TensorProto.FLOAT),
        node("Relu", ["d"], ["y"], name="fine"),
    ]
    problems = refused(build(nodes, {"x": ["n", 2, 4, 4]}, ["y", "e"], domains=["somebody"]))
    assert [(name, op) for name, op, _, _ in problems] == [
        ("first", "Sin"),
        ("second", "MaxPool"),
        ("third", "Mystery"),
        ("fourth", "Cos"),
    ]
    assert all(reason and remedy for _, _, reason, remedy in problems)
    assert "'somebody'" in problems[2].reason
    with pytest.raises(UnsupportedError, match=r"(?s)first.*second.*third.*fourth"):
        load_onnx(build(nodes, {"x": ["n", 2, 4, 4]}, ["y", "e"], domains=["somebody"]).SerializeToString())


def test_an_operator_that_onnx_does_not_know_is_named():
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Frobnicate", ["a"], ["y"], name="odd")]
    [(name, op, _, _)] = refused(build(nodes, {"x": ["n", 2, 4, 4]}, ["y"], {"w": floats(2, 2, 3, 3)}))
    assert (name, op) == ("odd", "Frobnicate")


def branch(inside: str) -> onnx.ModelProto:
    """Return a model that adds what a constant If gives; its branches use the value `inside`."""
    graphs = {
        name: helper.make_graph([node(op, [inside], ["b"])], name, [], [onnx.ValueInfoProto(name="b")])
        for name, op in (("then_branch", "Neg"), ("else_branch", "Abs"))
    }
    nodes = [node("If", ["yes"], ["v"], **graphs), node("Add", ["x", "v"], ["y"])]
    return build(nodes, {"x": ["n", 3]}, ["y"], {"yes": np.array(True), "w": floats(3)})


def test_a_branch_on_constants_is_a_constant():
    assert ops(agrees(branch("w"))) == ["shift"]


NOT_SUPPORTED = {
    "a 4-D convolution": (one("Conv", ["n", 1, 3, 3, 3, 3], [floats(1, 1, 2, 2, 2, 2)]), "-D"),
    "softmax over the batch": (one("Softmax", ["n", 3], axis=0), "over the batch"),
    "a mean over the batch": (one("ReduceMean", ["n", 3], [np.array([0])]), "batch"),
    "a mean over all": (one("ReduceMean", ["n", 3]), "batch"),
    "a moved batch": (one("Transpose", ["n", 3, 4], perm=[1, 0, 2]), "batch"),
    "a batch moved by default": (one("Transpose", ["n", 3]), "batch"),
    "a batch joined": (one("Concat", ["n", 3], axis=0), "concatenation must not run over the batch"),
    "a batch flattened": (one("Flatten", ["n", 3, 4], axis=0), "batch"),
    "rows made samples": (one("Reshape", ["n", 3, 4], [np.array([-1, 4])]), "batch"),
    "an axis before the batch": (one("Unsqueeze", ["n", 3], [np.array([0])]), "batch"),
    "a constant with more axes": (one("Add", ["n", 3], [floats(2, 1, 3)]), "batch must stay the first"),
    "a zero divisor": (one("Div", ["n", 3], [np.zeros(3, np.float32)]), "zero"),
    "a constant times a vector": (one("MatMul", ["n", 4], [floats(3, 2)], first=1), "batch"),
    "statistics of the batch": (
        build(
            [node("BatchNormalization", ["x", *"sbmv"], ["y", "m2", "v2"], training_mode=1)],
            {"x": ["n", 2]},
            ["y"],
            {k: np.ones(2, np.float32) for k in "sbmv"},
        ),
        "mix",
    ),
    "dropout in training": (one("Dropout", ["n", 3], [np.float32(0.5), np.array(True)]), "training"),
    "a cast to integers": (
        build([node("Cast", ["x"], ["i"], to=6), node("Cast", ["i"], ["y"], to=1)], {"x": ["n", 3]}, ["y"]),
        "rounds",
    ),
    "bounds in the wrong order": (one("Clip", ["n", 3], [np.float32(2), np.float32(1)]), "exceed"),
    "two ranks added": (build([node("Add", ["x", "z"], ["y"])], {"x": ["n", 1, 4], "z": ["n", 4]}, ["y"]), "batch"),
    "a constant joined": (one("Concat", ["n", 3], [floats(1, 3)], axis=1), "Concat"),
    "a transposed activation": (
        build([node("Gemm", ["x", "w"], ["y"], transA=1)], {"x": ["n", 3]}, ["y"], {"w": floats(3, 4)}),
        "",
    ),
    "a weight from the input": (
        build([node("Conv", ["x", "z"], ["y"])], {"x": ["n", 2, 4, 4], "z": ["n", 2, 3, 3]}, ["y"]),
        "constant",
    ),
    "random numbers": (
        build([node("RandomNormalLike", ["x"], ["r"]), node("Add", ["x", "r"], ["y"])], {"x": ["n", 3]}, ["y"]),
        "not supported",
    ),
    "random constants": (
        build([node("RandomNormal", [], ["r"], shape=[3]), node("Add", ["x", "r"], ["y"])], {"x": ["n", 3]}, ["y"]),
        "'RandomNormal' is not supported",
    ),
    "a branch on the input": (branch("x"), "If"),
    "an output that is the batch": (
        build(
            [node("Shape", ["x"], ["s"]), node("Cast", ["s"], ["z"], to=1), node("Relu", ["x"], ["y"])],
            {"x": ["n", 3]},
            ["y", "z"],
        ),
        "must have the batch as its first axis",
    ),
    "a constant output without a batch": (
        build([node("Relu", ["x"], ["y"]), node("Relu", ["w"], ["z"])], {"x": ["n", 3]}, ["y", "z"], {"w": floats(3)}),
        "must have the batch as its first axis",
    ),
    "complex inputs": (
        build([node("Identity", ["x"], ["y"])], {"x": ["n", 3]}, ["y"], dtype=TensorProto.COMPLEX64),
        "numbers; got complex64",
    ),
    "text as input": (
        build([node("Identity", ["x"], ["y"])], {"x": ["n", 3]}, ["y"], dtype=TensorProto.STRING),
        "numbers; got",
    ),
}


@pytest.mark.parametrize("case", NOT_SUPPORTED)
def test_what_is_not_supported_is_refused_with_a_reason(case):
    model, reason = NOT_SUPPORTED[case]
    with pytest.raises((UnsupportedError, ShapeError)) as caught:
        load_onnx(model.SerializeToString())
    assert reason in str(caught.value)


NOT_ANY_BATCH = {
    "a free axis": build([node("Relu", ["x"], ["y"])], {"x": ["n", "height"]}, ["y"]),
    "no batch axis": build([node("Relu", ["x"], ["y"])], {"x": [], "z": ["n"]}, ["y"]),
    "no rank": build([node("Relu", ["x"], ["y"])], {"x": ["n", 3]}, ["y"]),
    "an empty batch": build([node("Relu", ["x"], ["y"])], {"x": [0, 3]}, ["y"]),
    "two batches": build(
        [node("Relu", ["x"], ["y"]), node("Relu", ["z"], ["w"])], {"x": [1, 3], "z": [5, 3], "q": ["n", 3]}, ["y", "w"]
    ),
    "a batch baked in": build(
        [node("Reshape", ["x", "s"], ["y"])], {"x": ["n", 3, 4]}, ["y"], {"s": np.array([2, 12])}
    ),
    "no batch at all": build([node("MatMul", ["x", "w"], ["y"])], {"x": ["n"]}, ["y"], {"w": floats(5, 3)}),
    "no input": build([node("Relu", ["w"], ["y"])], {}, ["y"], {"w": floats(3)}),
}
NOT_ANY_BATCH["no rank"].graph.input[0].type.tensor_type.ClearField("shape")


@pytest.mark.parametrize("case", NOT_ANY_BATCH)
def test_a_model_without_a_batch_axis_and_fixed_shapes_is_refused(case, capfd):
    with pytest.raises((ShapeError, UnsupportedError)) as caught:
        load_onnx(NOT_ANY_BATCH[case].SerializeToString())
    assert isinstance(caught.value, ShapeError) or case in ("no input",)
    assert capfd.readouterr() == ("", "")


def test_samples_that_influence_each_other_are_refused():
    # Every shape keeps the batch first; only the values show what happens.
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("ReduceMax", ["x"], ["m"], axes=[0]),
        node("Expand", ["m", "s"], ["e"]),
        node("Sub", ["x", "e"], ["y"]),
    ]
    problems = refused(build(nodes, {"x": ["n", 3]}, ["y"], opset=13))
    assert [op for _, op, _, _ in problems] == ["ReduceMax"]


def test_parameters_outside_fixed_point_are_named():
    big = floats(5, 3)
    big[2, 1] = 3e9
    message = fails_with(RangeError, one("MatMul", ["n", 5], [big]))
    assert "'the MatMul.weight'" in message
    assert "3e+09" in message
    for bad in (np.nan, np.inf):
        big[2, 1] = bad
        assert "'the MatMul.weight' must be finite" in fails_with(RangeError, one("MatMul", ["n", 5], [big]))
    gamma = np.float32([1e30])
    model = one("BatchNormalization", ["n", 1], [gamma, gamma, gamma, np.zeros(1, np.float32)])
    fails_with(RangeError, model)


GOOD = build(
    [node("MatMul", ["x", "w"], ["z"]), node("Relu", ["z"], ["y"])], {"x": ["n", 5]}, ["y"], {"w": floats(5, 3)}
)


def changed(**changes: object) -> onnx.ModelProto:
    model = onnx.ModelProto.FromString(GOOD.SerializeToString())
    for name, value in changes.items():
        getattr(model.graph, name).extend(value) if isinstance(value, list) else setattr(model, name, value)
    return model


def cyclic() -> onnx.ModelProto:
    return build(
        [
            node("Add", ["x", "b"], ["a"], name="one"),
            node("Relu", ["a"], ["b"], name="two"),
            node("Relu", ["a"], ["y"]),
        ],
        {"x": ["n", 3]},
        ["y"],
    )


def with_opset(version: int) -> onnx.ModelProto:
    model = changed()
    model.opset_import[0].version = version
    return model


def short_weight() -> onnx.ModelProto:
    model = changed()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    return model


def without_opset() -> onnx.ModelProto:
    model = changed()
    del model.opset_import[:]
    return model


NOT_A_MODEL = {
    "empty": (b"", "empty"),
    "text": (b"this is not a model, but text of some length " * 10, "damaged"),
    "zeros": (bytes(1000), "damaged"),
    "truncated": (GOOD.SerializeToString()[:-20], ""),
    "truncated early": (GOOD.SerializeToString()[:15], ""),
    "a graph without nodes": (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
    "a cycle": (cyclic(), "cycle"),
    "a value that nothing makes": (changed(node=[node("Relu", ["nowhere"], ["q"])]), "nowhere"),
    "a value made twice": (changed(node=[node("Relu", ["x"], ["y"])]), "twice"),
    "an output that nothing makes": (changed(output=[helper.make_tensor_value_info("q", 1, None)]), "'q'"),
    "an old opset that cannot be raised": (
        build([node("Add", ["x", "c"], ["y"], broadcast=1, axis=0)], {"x": ["n", 3]}, ["y"], {"c": floats(1)}, opset=6),
        "converts to 9",
    ),
    "a future opset": (with_opset(NEWEST_OPSET + 1), "got"),
    "no opset": (without_opset(), "none"),
    "a weight too short": (short_weight(), ""),
    "an attribute of the wrong kind": (one("Softmax", ["n", 3], axis="last"), "onnx says"),
    "shapes that do not fit": (
        build([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 4]}, ["y"], {"w": floats(5, 3)}),
        "onnxruntime",
    ),
}


@pytest.mark.parametrize("case", NOT_A_MODEL)
def test_what_is_no_model_is_refused(case, capfd):
    model, reason = NOT_A_MODEL[case]
    assert reason in fails_with(BundleError, model)
    assert capfd.readouterr() == ("", "")


@settings(quick, max_examples=60)
@given(st.data())
def test_a_damaged_file_gives_an_error_of_ours_or_a_program(data):
    raw = bytearray(GOOD.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BundleError, ShapeError, RangeError, UnsupportedError):
        load_onnx(bytes(raw)).program.validate()


def test_a_file_that_is_absent_or_no_file_is_refused(tmp_path):
    assert "absent.onnx" in fails_with(BundleError, tmp_path / "absent.onnx")
    fails_with(BundleError, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "regular" in fails_with(BundleError, tmp_path / "pipe")


# --- as a whole


def agrees_whole(model: onnx.ModelProto, atol: float = 1e-5, **given: object) -> Imported:
    """Import a model as a whole and assert that its program says what onnxruntime says."""
    imported = load_onnx(model.SerializeToString(), **given)
    session = start(model.SerializeToString())
    feeds = {x.name: np.asarray(floats(*x.shape, seed=i, scale=2.0), x.dtype) for i, x in enumerate(imported.inputs)}
    got = run(imported.program, imported.params, {name: value[None] for name, value in feeds.items()})
    inner = plain.run(imported.program, imported.params, {name: value[None] for name, value in feeds.items()})
    assert imported.program.whole
    assert {x.name: x.shape for x in imported.inputs} == dict(imported.program.inputs)
    for want, info in zip(session.run(None, feeds | dict(given.get("public", {}))), imported.outputs, strict=True):
        assert (want.shape, want.dtype.name) == (info.shape, info.dtype)
        for values in (got, inner):
            np.testing.assert_allclose(values[info.name][0], want, atol=atol, rtol=1e-5)
    return imported


WHOLE = {
    "a batch transposed away": (
        build(
            [
                node("Transpose", ["x"], ["t"], perm=[1, 0]),
                node("MatMul", ["t", "w"], ["m"]),
                node("Relu", ["m"], ["y"]),
            ],
            {"x": [4, 3]},
            ["y"],
            {"w": floats(4, 2)},
        ),
        ["transpose", "matmul", "relu"],
    ),
    "a vector": (
        build([node("MatMul", ["x", "w"], ["y"])], {"x": [5]}, ["y"], {"w": floats(5, 3)}),
        None,
    ),
    "a number": (build([node("Relu", ["x"], ["y"])], {"x": []}, ["y"]), ["relu"]),
    "two batches": (
        build([node("Relu", ["x"], ["y"]), node("Relu", ["z"], ["w"])], {"x": [1, 3], "z": [5, 3]}, ["y", "w"]),
        ["relu", "relu"],
    ),
    "a mean over all": (one("ReduceMean", [2, 3]), ["mean"]),
    "a softmax over the first axis": (
        one("Softmax", [3, 4], axis=0),
        ["max", "sub", "spline", "sum", "spline", "mul"],
    ),
    "rows made samples": (one("Reshape", [2, 3, 4], [np.array([-1, 4])]), ["reshape"]),
    "joined along the first axis": (
        build([node("Concat", ["x", "z"], ["y"], axis=0)], {"x": [2, 3], "z": [4, 3]}, ["y"]),
        ["concat"],
    ),
    "a matrix turned by Gemm": (
        build(
            [node("Gemm", ["x", "w", "b"], ["y"], transA=1)], {"x": [4, 3]}, ["y"], {"w": floats(4, 2), "b": floats(2)}
        ),
        ["transpose", "matmul"],
    ),
    "a convolution behind a transpose": (
        build(
            [node("Transpose", ["x"], ["t"], perm=[3, 2, 0, 1]), node("Conv", ["t", "w"], ["y"], pads=[1, 1, 1, 1])],
            {"x": [5, 6, 2, 3]},
            ["y"],
            {"w": floats(4, 2, 3, 3)},
        ),
        ["transpose", "conv2d"],
    ),
    "a row of its own for each": (one("Add", [3, 4], [floats(3, 4)]), ["shift"]),
    "a constant output": (
        build([node("Relu", ["x"], ["y"]), node("Relu", ["w"], ["z"])], {"x": [2, 3]}, ["y", "z"], {"w": floats(3, 2)}),
        None,
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_model_of_fixed_shapes_without_samples_is_understood_as_a_whole(case):
    model, operators = WHOLE[case]
    imported = agrees_whole(model, 5e-4 if "softmax" in case else 1e-5)
    assert operators is None or ops(imported) == operators
    assert imported.batch is None
    assert Program.from_json(imported.program.to_json()) == imported.program


def test_a_model_of_fixed_shapes_that_has_samples_is_understood_by_them():
    imported = agrees(one("Relu", [4, 3]), batches=(4,))
    assert not imported.program.whole
    assert imported.program.inputs == {"x": (3,)}


FREE = build([node("Transpose", ["x"], ["t"]), node("MatMul", ["t", "z"], ["y"])], {"x": [4, "n"], "z": [4, 2]}, ["y"])


def test_free_sizes_are_given_by_the_caller():
    model = one("Transpose", [4, "n"], perm=[1, 0])
    fails_with(ShapeError, model)
    for n in (1, 5):
        assert agrees_whole(model, shapes={"x": (4, n)}).outputs[0].shape == (n, 4)


def test_a_public_input_is_a_constant():
    imported = agrees_whole(FREE, shapes={"x": (4, 3)}, public={"z": floats(4, 2, seed=9)})
    assert ops(imported) == ["transpose", "matmul"]
    assert [x.name for x in imported.inputs] == ["x"]
    by_samples = build([node("Mul", ["x", "z"], ["y"])], {"x": ["n", 3], "z": [3]}, ["y"])
    imported = load_onnx(by_samples.SerializeToString(), public={"z": np.array([1.0, 2.0, 3.0])})
    np.testing.assert_allclose(run(imported.program, imported.params, {"x": np.ones((2, 3))})["y"], [[1, 2, 3]] * 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shapes": {"q": (4, 3)}}, "got q"),
        ({"shapes": {"z": (4, 2)}}, "leaves free"),
        ({"shapes": {"x": (5, 3)}}, "form (4, n), at least 1; got (5, 3)"),
        ({"shapes": {"x": (4,)}}, "got (4,)"),
        ({"shapes": {"x": (4, 0)}}, "got (4, 0)"),
        ({"shapes": {"x": (4, -3)}}, "got (4, -3)"),
        ({"public": {"w": np.zeros(3)}}, "got w"),
        ({"public": {"z": np.zeros((4, 2), complex)}}, "float32; got complex128"),
        ({"public": {"z": np.array("text")}}, "float32; got <U4"),
        ({"public": {"z": np.zeros(4)}}, "got (4,)"),
        ({"public": {"z": np.zeros((4, 2))}, "shapes": {"z": (4, 2)}}, "got z"),
    ],
)
def test_shapes_and_public_inputs_that_do_not_fit_are_refused(given, message):
    with pytest.raises(InputError) as caught:
        load_onnx(FREE.SerializeToString(), **given)
    assert message in str(caught.value)


def test_an_output_that_is_the_same_for_all_samples_is_answered_for_each():
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("ConstantOfShape", ["s"], ["z"], value=numpy_helper.from_array(np.float32([2.5]))),
        node("Relu", ["x"], ["y"]),
    ]
    agrees(build(nodes, {"x": ["n", 3]}, ["z", "y"]))
    fixed = build(
        [node("Relu", ["x"], ["y"]), node("Relu", ["w"], ["z"])], {"x": [1, 3]}, ["y", "z"], {"w": floats(1, 4)}
    )
    imported = agrees(fixed, batches=(1,))
    assert [x.shape for x in imported.outputs] == [(3,), (4,)]
    got = run(imported.program, imported.params, {"x": floats(2, 3)})
    np.testing.assert_allclose(got["z"], np.maximum(np.repeat(floats(1, 4), 2, 0), 0))


@pytest.mark.parametrize("dtype", [TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL])
def test_an_input_may_be_of_any_type_of_numbers(dtype):
    model = build([node("Cast", ["x"], ["y"], to=1)], {"x": ["n", 3]}, ["y"], dtype=dtype)
    imported = load_onnx(model.SerializeToString())
    name = helper.tensor_dtype_to_np_dtype(dtype).name
    assert [(x.shape, x.dtype) for x in imported.inputs] == [((3,), name)]
    x = np.array([[0, 1, 1]], name)
    np.testing.assert_array_equal(run(imported.program, imported.params, {"x": x})["y"], x.astype(np.float32))


# --- external data


def external(folder: Path, location: str = "weights.bin", **entries: str) -> Path:
    """Write a model whose weight lies in another file, and return the model's path."""
    model = changed()
    weight = model.graph.initializer[0]
    data, weight.raw_data = weight.raw_data, b""
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=value)
    (folder / "weights.bin").write_bytes(data)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_beside_the_model_is_read(tmp_path):
    imported = load_onnx(external(tmp_path, length="60"))
    assert imported.program == load_onnx(GOOD.SerializeToString()).program
    np.testing.assert_array_equal(imported.params["MatMul_0.weight"], floats(5, 3))


@pytest.mark.parametrize(
    "location",
    [
        "../weights.bin",
        "/etc/hostname",
        "sub/../../weights.bin",
        "link",
        "linked/weights.bin",
        "",
        "absent.bin",
        ".",
        "sub",
        "..\\weights.bin",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_external_data_outside_the_folder_or_absent_is_refused(tmp_path, location):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "weights.bin").write_bytes(bytes(60))
    (folder / "link").symlink_to(tmp_path / "weights.bin")
    (folder / "linked").symlink_to(tmp_path)
    assert "external data" in fails_with(BundleError, external(folder, location))


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "4"},
        {"offset": "-4"},
        {"length": "1000"},
        {"length": "x"},
        {"offset": "8", "length": "60"},
        {"length": "-9"},
    ],
)
def test_external_data_of_the_wrong_size_is_refused(tmp_path, entries):
    fails_with(BundleError, external(tmp_path, **entries))


def test_external_data_of_a_model_given_as_bytes_is_refused(tmp_path):
    assert "another file" in fails_with(BundleError, external(tmp_path).read_bytes())


def test_external_data_of_a_constant_inside_a_function_is_seen(tmp_path):
    value = TensorProto(name="hidden", dims=[3], data_type=1, data_location=TensorProto.EXTERNAL)
    value.external_data.add(key="location", value="/etc/passwd")
    body = [node("Constant", [], ["c"], value=value), node("Add", ["a", "c"], ["b"])]
    (tmp_path / "m.onnx").write_bytes(with_function(body).SerializeToString())
    assert "/etc/passwd" in fails_with(BundleError, tmp_path / "m.onnx")


def with_opsets(model: onnx.ModelProto, *versions: tuple[str, int]) -> onnx.ModelProto:
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions)
    return model


@pytest.mark.parametrize(
    "versions",
    [
        [("", 11), ("", 13)],
        [("", 13), ("", 11)],
        [("ai.onnx", 13), ("", 11)],
        [("", 13), ("ai.onnx", 11)],
        [("", 11), ("somebody", 3), ("ai.onnx", 13)],
    ],
)
def test_of_several_versions_of_a_domain_the_last_one_counts_as_in_onnxruntime(versions):
    # Before 13 a softmax runs over all axes behind its own.
    model = with_opsets(one("Softmax", ("n", 3, 4), axis=1), *versions)
    agrees(model)
    assert read_proto(model.SerializeToString()).opset_import[0].version == versions[-1][1]
    fixed = fix(model.SerializeToString())
    agrees(fixed.data)


PADDLE = build(
    [node("Conv", ["x", "w"], ["c"]), node("GlobalAveragePool", ["c"], ["y"])],
    {"x": [-1, 3, -1, -1]},
    ["y"],
    {"w": floats(2, 3, 3, 3)},
)


def test_a_size_below_0_is_free_as_in_onnxruntime():
    data = PADDLE.SerializeToString()
    assert declared(data)[0] == [("x", ["?", 3, "?", "?"], "float32")]
    said = fails_with(NeedsInputs, data)
    assert "check --shape x=N,3,N,N" in said
    assert "shapes={'x': (N, 3, N, N)}" in said
    assert said.count("--shape") == 1
    for shape in ((1, 3, 8, 9), (2, 3, 5, 5)):
        agrees_whole(PADDLE, shapes={"x": shape})
    with pytest.raises(ShapeError, match=re.escape("of the form (?, 3, ?, ?), at least 1; got (1, 4, 8, 9)")):
        load_onnx(data, shapes={"x": (1, 4, 8, 9)})
    report = check(data, shapes={"x": (1, 3, 8, 9)})
    assert (report.ok, report.inputs[0].shape) == (True, (1, 3, 8, 9))
    # Where it is the batch alone nothing needs to be given.
    assert not agrees(one("Relu", [-1, 3])).program.whole
    assert agrees(one("Relu", [-7, 3])).batch is None


def test_how_shapes_are_given_is_told_for_a_shell():
    model = build([node("MatMul", ["a b", "z"], ["y"])], {"a b": ["n", "k"], "z": [4, 2]}, ["y"])
    assert "--shape 'a b=N,N', in Python with shapes={'a b': (N, N)}" in fails_with(NeedsInputs, model)


ONE_BATCH = {
    "a constant for each sample": ([node("Add", ["x", "c"], ["y"])], {"c": floats(4, 2, 3)}),
    "a split of samples": (
        [node("Split", ["x"], ["a", "b"], axis=0, num_outputs=2), node("Sub", ["a", "b"], ["y"])],
        {},
    ),
    "a shape for all samples": ([node("Reshape", ["x", "s"], ["y"])], {"s": np.array([24])}),
    "the last sample": ([node("Gather", ["x", "i"], ["y"], axis=0)], {"i": np.array([3])}),
}


@pytest.mark.parametrize("case", ONE_BATCH)
def test_a_model_that_runs_with_one_batch_alone_is_understood_as_a_whole(case):
    nodes, weights = ONE_BATCH[case]
    fixed = build(nodes, {"x": [4, 2, 3]}, ["y"], weights)
    agrees_whole(fixed)
    assert check(fixed.SerializeToString()).ok
    free = build(nodes, {"x": ["n", 2, 3]}, ["y"], weights)
    agrees_whole(free, shapes={"x": (4, 2, 3)})
    # What is measured on says the batch.
    assert check(free.SerializeToString(), floats(4, 2, 3)).ok
    assert "--shape x=N,2,3" in fails_with(NeedsInputs, free)


def test_a_model_of_batch_1_that_is_free_in_the_file_is_judged_for_it():
    squeezed = build([node("Squeeze", ["x", "a"], ["y"])], {"x": ["n", 2, 3]}, ["y"], {"a": np.array([0])})
    assert check(squeezed.SerializeToString()).ok
    report = check(squeezed.SerializeToString(), batch=3)
    assert "must run with a batch of 2" in report.unsupported[0].reason
