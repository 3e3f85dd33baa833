"""Convolutions and pools by samples and as a whole, against onnxruntime."""

import numpy as np
import onnx
import pytest
from both_parties import secure
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_models import agrees, build, floats, one, ops
from program_oracle import run

from protocols.errors import UnsupportedError
from protocols.program.program import Program
from protocols.running import backend, ranges
from securemtk.onnx.building.registry import RULES
from securemtk.onnx.importer import Imported, assemble, load_onnx
from securemtk.onnx.model.analyse import analyse
from securemtk.onnx.model.declared import fixed_shapes
from securemtk.onnx.model.reading import read_proto
from securemtk.onnx.model.runtime import start
from securemtk.onnx.rules.all_rules import translate

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
SIZES = {1: [9], 2: [7, 6], 3: [5, 6, 5]}
BATCH = 2


def as_a_whole(model: onnx.ModelProto) -> Imported:
    """Translate a model of fixed shapes as a whole, whether or not it could be by samples."""
    proto = read_proto(model.SerializeToString())
    graph = analyse(proto, RULES, fixed_shapes(proto, {}))
    steps, problems = translate(graph)
    assert not problems
    return assemble(graph, steps)


def agrees_both_ways(model: onnx.ModelProto, atol: float = 1e-5) -> tuple[Imported, Imported]:
    """Assert that a model says what onnxruntime says, by samples and, with its batch fixed, as a whole."""
    by_samples = agrees(model, batches=(BATCH,), atol=atol)
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = BATCH
    whole = as_a_whole(fixed)
    x = floats(BATCH, *by_samples.inputs[0].shape, scale=2.0)
    want = start(fixed.SerializeToString()).run(None, {"x": x})[0]
    got = run(whole.program, whole.params, {"x": x[None]})["y"]
    assert got.shape == (1, *want.shape)
    np.testing.assert_allclose(got[0], want, atol=max(atol, 5e-4) if "spline" in ops(whole) else atol, rtol=1e-5)
    return by_samples, whole


def window(
    op: str, n: int, channels: int = 2, constants: tuple = (), opset: int = 22, **attrs: object
) -> onnx.ModelProto:
    return one(op, ["n", channels, *SIZES[n]], constants, opset=opset, **attrs)


PADS = [{}, {"pads": "uneven"}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "VALID"}]


def spread(n: int, attrs: dict) -> dict:
    """Give attributes a number for each of n axes: an integer for all of them, "uneven" pads, or a name."""
    axes = {"pads": 2 * n, "strides": n, "dilations": n, "kernel_shape": n, "output_padding": n}
    uneven = [*(1, 0, 1)[:n], *(0, 1, 1)[:n]]
    return {k: uneven if v == "uneven" else [v] * axes[k] if k in axes else v for k, v in attrs.items()}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("opset", [9, 22])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 2), (4, 1)])
def test_a_convolution_agrees(n, pads, opset, groups, stride):
    weight, bias = floats(4, 4 // groups, *(3, 2, 3)[:n], scale=0.5), floats(4, seed=1)
    attrs = spread(n, {"strides": stride, **pads})
    agrees_both_ways(window("Conv", n, 4, (weight, bias), opset, group=groups, **attrs))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("pads", [0, 2])
def test_a_dilated_convolution_agrees(n, pads):
    agrees_both_ways(window("Conv", n, 2, (floats(3, 2, *[2] * n),), **spread(n, {"dilations": 2, "pads": pads})))


TRANSPOSED = [
    {},
    {"strides": 2},
    {"strides": 3, "pads": 1},
    {"strides": 2, "output_padding": 1, "pads": "uneven"},
    {"strides": 2, "dilations": 2},
    {"strides": 3, "dilations": 2, "output_padding": 2},
    {"dilations": 3, "pads": 2},
    {"strides": 5},
    {"strides": 2, "auto_pad": "SAME_UPPER"},
    {"strides": 2, "auto_pad": "SAME_LOWER"},
    {"strides": 2, "auto_pad": "VALID"},
    {"strides": 2, "output_shape": 1},
    {"strides": 2, "output_shape": 1, "auto_pad": "SAME_UPPER"},
]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("opset", [9, 22])
@pytest.mark.parametrize(("attrs", "groups"), [*((a, 1) for a in TRANSPOSED), (TRANSPOSED[3], 2)])
def test_a_transposed_convolution_agrees(n, opset, attrs, groups):
    attrs = spread(n, attrs)
    if "output_shape" in attrs:
        attrs["output_shape"] = [2 * size + i % 2 for i, size in enumerate(SIZES[n])]
    weight, bias = floats(4, 2, *(3, 3, 2)[:n], scale=0.5), floats(2 * groups, seed=1)
    agrees_both_ways(window("ConvTranspose", n, 4, (weight, bias), opset, group=groups, **attrs))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_transposed_convolution_as_wide_as_its_stride_is_one_product_for_each_place(n):
    model = window("ConvTranspose", n, 2, (floats(2, 3, *[2] * n), floats(3, seed=1)), **spread(n, {"strides": 2}))
    for imported in agrees_both_ways(model):
        assert set(ops(imported)) <= {"conv2d", "reshape", "transpose"}
        assert imported.params["the ConvTranspose.weight"].shape == (3 * 2**n, 2, 1, 1)


# Attributes, and whether the other forms of padding are tried with them.
POOLS = [
    ("MaxPool", 22, {}, True),
    ("MaxPool", 9, {}, True),
    ("MaxPool", 10, {"dilations": 2}, False),
    ("MaxPool", 22, {"dilations": 2, "pads": 1}, False),
    ("MaxPool", 22, {"ceil_mode": 1}, False),
    ("MaxPool", 22, {"ceil_mode": 1, "dilations": 2}, False),
    ("AveragePool", 22, {}, True),
    ("AveragePool", 9, {}, True),
    ("AveragePool", 22, {"ceil_mode": 1}, False),
    ("AveragePool", 22, {"dilations": 2}, False),
    ("AveragePool", 22, {"dilations": 2, "pads": 1}, False),
    ("AveragePool", 22, {"dilations": 2, "pads": "uneven", "count_include_pad": 1}, False),
    ("AveragePool", 22, {"count_include_pad": 1}, True),
    ("AveragePool", 22, {"count_include_pad": 1, "ceil_mode": 1, "pads": "uneven"}, False),
    ("LpPool", 22, {"p": 1}, True),
    ("LpPool", 11, {}, False),
    ("LpPool", 22, {"p": 2, "ceil_mode": 1, "dilations": 2}, False),
]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    ("op", "opset", "attrs"),
    [(op, opset, attrs | pads) for op, opset, attrs, padded in POOLS for pads in (PADS if padded else [{}])],
)
@pytest.mark.parametrize("stride", [1, 3])
def test_a_pool_agrees(n, op, opset, attrs, stride):
    attrs = spread(n, {"strides": stride, "kernel_shape": 3, **attrs})
    # The square root is approximated to 3e-4 of its value.
    atol = 4e-3 if op == "LpPool" and attrs.get("p", 2) == 2 else 1e-5
    agrees_both_ways(window(op, n, opset=opset, **attrs), atol)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("op", "attrs"), [("GlobalMaxPool", {}), ("GlobalLpPool", {"p": 1}), ("GlobalLpPool", {})])
def test_a_global_pool_agrees(n, op, attrs):
    agrees_both_ways(window(op, n, opset=18, **attrs), 2e-2 if op == "GlobalLpPool" and not attrs else 1e-5)


# --- any geometry -----------------------------------------------------------------------------------------------------


@st.composite
def geometry(draw: st.DrawFn, op: str) -> dict:
    """Draw the attributes of a window, the size of its input, and an opset."""
    n = draw(st.sampled_from([1, 2, 2, 3]))
    several = st.lists(st.integers(1, 3), min_size=n, max_size=n)
    kernel, stride, dilation = draw(several), draw(several), draw(several)
    attrs: dict = {"kernel_shape": kernel, "strides": stride, "dilations": dilation}
    most = [k - 1 if op.endswith("Pool") else 3 for k in kernel]
    attrs["pads"] = [draw(st.integers(0, m)) for m in most * 2]
    size = [(k - 1) * d + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True)]
    if op == "ConvTranspose":
        attrs["output_padding"] = [draw(st.integers(0, s - 1)) for s in stride]
        size = draw(several)
        ends = zip(
            size, stride, kernel, dilation, attrs["output_padding"], attrs["pads"][:n], attrs["pads"][n:], strict=True
        )
        assume(all((i - 1) * s + (k - 1) * d + 1 + o - a - b > 0 for i, s, k, d, o, a, b in ends))
    elif op.endswith("Pool"):
        attrs["ceil_mode"] = draw(st.integers(0, 1))
        if op == "AveragePool":
            attrs["count_include_pad"] = draw(st.integers(0, 1))
    return {"attrs": attrs, "size": size}


@quick
@given(window=geometry("Conv"), groups=st.integers(1, 3), wide=st.integers(1, 2), bias=st.booleans())
def test_a_convolution_of_any_geometry_agrees(window, groups, wide, bias):
    weight = floats(wide * groups, 2, *window["attrs"]["kernel_shape"])
    constants = [weight, floats(wide * groups, seed=1)] if bias else [weight]
    agrees_both_ways(one("Conv", ["n", 2 * groups, *window["size"]], constants, group=groups, **window["attrs"]))


@quick
@given(window=geometry("ConvTranspose"), groups=st.integers(1, 3), wide=st.integers(1, 2), bias=st.booleans())
def test_a_transposed_convolution_of_any_geometry_agrees(window, groups, wide, bias):
    weight = floats(2 * groups, wide, *window["attrs"]["kernel_shape"])
    constants = [weight, floats(wide * groups, seed=1)] if bias else [weight]
    agrees_both_ways(
        one("ConvTranspose", ["n", 2 * groups, *window["size"]], constants, group=groups, **window["attrs"])
    )


@quick
@given(window=geometry("MaxPool"))
def test_a_maximum_over_windows_of_any_geometry_agrees_or_is_refused(window):
    model = one("MaxPool", ["n", 2, *window["size"]], **window["attrs"])
    x = floats(BATCH, 2, *window["size"])
    want = start(model.SerializeToString()).run(None, {"x": x})[0]
    if want.min() > -1e30:
        agrees_both_ways(model)
    else:
        with pytest.raises(UnsupportedError, match="padding alone"):
            load_onnx(model.SerializeToString())


@quick
@given(window=geometry("AveragePool"))
def test_an_average_over_windows_of_any_geometry_agrees(window):
    agrees_both_ways(one("AveragePool", ["n", 2, *window["size"]], opset=22, **window["attrs"]))


def test_windows_in_the_padding_alone_have_an_average_of_0_and_no_maximum():
    attrs = {"kernel_shape": [2], "dilations": [2], "pads": [1, 1]}
    agrees_both_ways(one("AveragePool", ["n", 1, 1], opset=22, **attrs))
    agrees_both_ways(one("LpPool", ["n", 1, 1], opset=22, p=1, **attrs))
    with pytest.raises(UnsupportedError, match="padding alone"):
        load_onnx(one("MaxPool", ["n", 1, 1], opset=22, **attrs).SerializeToString())


# --- with their neighbours --------------------------------------------------------------------------------------------


def block(n: int, op: str, weight: np.ndarray, pool: str = "", **attrs: object) -> onnx.ModelProto:
    """Return a convolution with batch normalisation, ReLU and a pool."""
    channels = weight.shape[1 if op == "ConvTranspose" else 0]
    names = ("scale", "shift", "mean", "variance")
    weights = {name: np.abs(floats(channels, seed=i)) + 0.5 for i, name in enumerate(names)} | {"w": weight}
    nodes = [
        helper.make_node(op, ["x", "w"], ["c"], name="conv", **spread(n, attrs)),
        helper.make_node("BatchNormalization", ["c", *names], ["b"], name="norm"),
        helper.make_node("Relu", ["b"], ["r" if pool else "y"], name="relu"),
    ]
    if pool:
        both = {"kernel_shape": [2] * n, "strides": [2] * n}
        nodes.append(helper.make_node(pool, ["r"], ["y"], name="pool", **both))
    return build(nodes, {"x": ["n", 2, *SIZES[n]]}, ["y"], weights, opset=18)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    ("op", "attrs"), [("Conv", {"pads": 1}), ("ConvTranspose", {"strides": 2, "pads": 1, "output_padding": 1})]
)
def test_normalisation_goes_into_the_convolution_and_the_maximum_before_the_relu(n, op, attrs):
    for imported in agrees_both_ways(block(n, op, floats(2, 2, *[3] * n), "MaxPool", **attrs), 1e-4):
        found = ops(imported)
        assert {"affine", "shift", "scale"}.isdisjoint(found)
        assert found.count("conv2d") == found.count("relu") == 1
        assert "max_pool2d" not in found[found.index("relu") :]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_convolution_of_a_mean_is_right_as_a_whole(n):
    weights = {"w": floats(3, 2, *[3] * n), "v": floats(2, 3, *[1] * n)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="first"),
        helper.make_node("AveragePool", ["c"], ["a"], name="mean", kernel_shape=[2] * n),
        helper.make_node("Conv", ["a", "v"], ["d"], name="second"),
        helper.make_node("Conv", ["a", "v"], ["e"], name="third"),
        helper.make_node("Add", ["d", "e"], ["f"], name="sum"),
        helper.make_node("GlobalAveragePool", ["f"], ["y"], name="all"),
    ]
    agrees_both_ways(build(nodes, {"x": ["n", 2, *SIZES[n]]}, ["y"], weights), 1e-4)


def test_convolutions_side_by_side_become_one_as_a_whole():
    weights = {"w": floats(3, 2, 3, 3), "v": floats(3, 2, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="wide", pads=[1] * 4),
        helper.make_node("Conv", ["x", "v"], ["d"], name="narrow"),
        helper.make_node("Add", ["c", "d"], ["y"], name="sum"),
    ]
    for imported in agrees_both_ways(build(nodes, {"x": ["n", 2, *SIZES[2]]}, ["y"], weights), 1e-4):
        assert ops(imported).count("conv2d") == 1


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_ranges_are_those_of_the_same_pool_by_samples(op):
    attrs = {"ceil_mode": 1, "strides": [2, 2], "kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    by_samples, whole = agrees_both_ways(window(op, 2, **attrs))
    x = floats(BATCH, 2, *SIZES[2])
    (one_by_one,) = ranges.measure(by_samples.program, {}, [{"x": x}])
    assert (one_by_one,) == ranges.measure(whole.program, {}, [{"x": x[None]}])


@pytest.mark.parametrize("op", ["MaxUnpool", "MaxRoiPool", "RoiAlign", "DeformConv", "Col2Im"])
def test_what_has_no_rule(op):
    assert op not in RULES


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (one("Conv", ["n", 1, 3, 3, 3, 3], (floats(1, 1, 2, 2, 2, 2),)), "1-D, 2-D or 3-D"),
        (one("MaxPool", ["n", 1, 3], kernel_shape=[4]), "must fit into the padded input"),
        (one("LpPool", ["n", 1, 3, 3], kernel_shape=[2, 2], p=5), "p must be 1 to 4; got 5"),
    ],
)
def test_what_is_refused(model, reason):
    with pytest.raises(UnsupportedError, match=reason):
        load_onnx(model.SerializeToString())


def test_places_of_maxima_are_refused_where_the_batch_is_free():
    node = helper.make_node("MaxPool", ["x"], ["y", "i"], name="pool", kernel_shape=[2, 2])
    model = build([node], {"x": ["n", 1, 3, 3]}, ["y", "i"])
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    with pytest.raises(UnsupportedError, match="count through all samples"):
        load_onnx(model.SerializeToString())


# --- encrypted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", sorted(backend.PROTOCOLS))
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        block(3, "Conv", floats(2, 2, 3, 3, 3, scale=0.3), "MaxPool", pads=1),
        block(2, "ConvTranspose", floats(2, 3, 2, 2, scale=0.5), "AveragePool", strides=2),
        window("AveragePool", 3, kernel_shape=[3, 3, 3], pads=[1] * 6),
        window("AveragePool", 3, kernel_shape=[3, 3, 3], strides=[2, 2, 2]),
        window("MaxPool", 2, kernel_shape=[3, 3], dilations=[2, 2], pads=[1] * 4),
        window("AveragePool", 2, kernel_shape=[3, 3], dilations=[2, 2], pads=[1] * 4),
        window("LpPool", 2, kernel_shape=[2, 2], p=1),
        window("LpPool", 2, kernel_shape=[2, 2]),
    ],
    ids=lambda model: model.graph.node[0].op_type,
)
def test_two_parties_agree_with_the_program_in_float(protocol, whole, model):
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = BATCH
    imported = as_a_whole(fixed) if whole else load_onnx(model.SerializeToString())
    assert Program.from_json(imported.program.to_json()) == imported.program
    x = {"x": floats(1 if whole else BATCH, *imported.inputs[0].shape)}
    got, *_ = secure(protocol, imported.program, imported.params, x)
    want = run(imported.program, imported.params, x)["y"]
    np.testing.assert_allclose(got["y"], want, atol=2e-3)
