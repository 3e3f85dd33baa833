"""Convolutions and pools by samples and as a whole, against onnxruntime."""

import itertools
import math

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_models import agrees, build, floats, one, ops
from program_oracle import run
from test_protocols import secure

from protocols import runner
from protocols.errors import UnsupportedError
from securemtk.onnx.graph import fixed_shapes
from securemtk.onnx.importer import Imported, assemble, load_onnx
from securemtk.onnx.importer import _translated as translated
from securemtk.onnx.graph import analyse
from securemtk.onnx.reading import read_proto
from securemtk.onnx.registry import RULES
from securemtk.onnx.runtime import start
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
SIZES = {1: [9], 2: [7, 6], 3: [5, 4, 6]}
BATCH = 2


def as_a_whole(model: onnx.ModelProto) -> Imported:
    """Translate a model of fixed shapes as a whole, whether or not it could be by samples."""
    proto = read_proto(model.SerializeToString())
    understood = translated(analyse(proto, RULES, fixed_shapes(proto)))
    assert understood.ok, understood.problems
    return assemble(understood.graph, understood.steps)


def agrees_both_ways(model: onnx.ModelProto, atol: float = 1e-5) -> tuple[Imported, Imported]:
    """Assert that a model with a free batch says what onnxruntime says, by samples and with a fixed batch as a whole."""
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


POOLS = [
    ("MaxPool", 22, {}),
    ("MaxPool", 9, {}),
    ("MaxPool", 10, {"dilations": 2}),
    ("MaxPool", 22, {"dilations": 2, "pads": 1}),
    ("MaxPool", 22, {"ceil_mode": 1}),
    ("MaxPool", 22, {"ceil_mode": 1, "dilations": 2, "strides": 2}),
    ("AveragePool", 22, {}),
    ("AveragePool", 9, {}),
    ("AveragePool", 22, {"ceil_mode": 1}),
    ("AveragePool", 22, {"dilations": 2}),
    ("AveragePool", 22, {"dilations": 2, "pads": 1}),
    ("AveragePool", 22, {"dilations": 2, "pads": "uneven", "count_include_pad": 1}),
    ("AveragePool", 22, {"count_include_pad": 1}),
    ("AveragePool", 22, {"count_include_pad": 1, "ceil_mode": 1, "pads": "uneven"}),
    ("LpPool", 22, {"p": 1}),
    ("LpPool", 22, {"p": 2}),
    ("LpPool", 11, {}),
    ("LpPool", 22, {"p": 1, "ceil_mode": 1, "dilations": 2}),
]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("op", "opset", "attrs"), POOLS)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pads", PADS)
def test_a_pool_agrees(n, op, opset, attrs, stride, pads):
    if pads and ({"pads", "dilations", "ceil_mode"} & set(attrs)):
        pytest.skip("covered")
    kernel = list((3, 2, 3)[:n])
    if "pads" in pads | attrs:
        kernel = [3] * n
    attrs = spread(n, {"strides": stride, **pads, **attrs})
    agrees_both_ways(window(op, n, opset=opset, kernel_shape=kernel, **attrs))
