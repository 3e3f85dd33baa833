"""Softmax and normalisations, by samples and as a whole, against onnxruntime in float and under encryption."""

import numpy as np
import onnx
import pytest
import torch
from both_parties import secure
from onnx import helper
from onnx_models import agrees, agrees_whole, build, fixed, floats, one, ops, torchscript

from protocols.errors import UnsupportedError
from securemtk.onnx.importer import load_onnx
from securemtk.onnx.model.problems import Problem
from securemtk.onnx.model.runtime import start


def wide(n: int, seed: int = 3) -> np.ndarray:
    """Scales and shifts around 1."""
    return 1 + 0.3 * floats(n, seed=seed)


def encrypted(model: onnx.ModelProto, *values: np.ndarray) -> float:
    """Return the largest difference of an encrypted prediction from onnxruntime's."""
    data = model.SerializeToString()
    imported = load_onnx(data)
    feeds = {x.name: value for x, value in zip(imported.inputs, values, strict=True)}
    got, *_ = secure("fss", imported.program, imported.params, feeds)
    want = start(data).run(None, feeds)
    return max(float(np.abs(got[x.name] - value).max()) for x, value in zip(imported.outputs, want, strict=True))


SOFT = [
    (op, shape, axis, opset)
    for op in ("Softmax", "LogSoftmax")
    for shape, axis, opset in [((7,), -1, 13), ((3, 7), 1, 13), ((3, 7), 1, 9), ((3, 4, 5), 2, 11), ((3, 7), -1, 23)]
]


@pytest.mark.parametrize(("op", "shape", "axis", "opset"), SOFT)
def test_softmax_agrees(op, shape, axis, opset):
    model = one(op, ("n", *shape), axis=axis, opset=opset)
    agrees(model)
    agrees_whole(fixed(model, 2))


@pytest.mark.parametrize("n", [10, 1000])
def test_softmax_is_close_under_encryption_for_peaks_and_for_equal_scores(n):
    model = one("Softmax", ("n", n))
    assert encrypted(model, floats(2, n, scale=3.0)) < 0.005
    assert encrypted(model, np.full((1, n), 2.5, np.float32)) < 0.0005
    assert encrypted(one("LogSoftmax", ("n", n)), floats(1, n, scale=3.0)) < 0.005


NORMS = [
    one("InstanceNormalization", ("n", 4, 5, 6), [wide(4), floats(4)], opset=9),
    one("InstanceNormalization", ("n", 4, 50), [wide(4), floats(4)], epsilon=1e-3),
    one("GroupNormalization", ("n", 4, 5, 6), [wide(2), floats(2)], num_groups=2, opset=18),
    one("GroupNormalization", ("n", 4, 5, 6), [wide(4), floats(4)], num_groups=2, opset=21),
    one("LayerNormalization", ("n", 5, 32), [wide(32), floats(32)], opset=17),
    one("LayerNormalization", ("n", 5, 32), [wide(32)], epsilon=1e-3, opset=17),
    one("LayerNormalization", ("n", 4, 8), [wide(32).reshape(4, 8)], axis=1, opset=17),
    one("RMSNormalization", ("n", 5, 32), [wide(32)], opset=23),
    one("RMSNormalization", ("n", 4, 8), [wide(8)], axis=-1, epsilon=1e-3, opset=23),
    one("MeanVarianceNormalization", ("n", 3, 5, 6), axes=[2, 3], opset=13),
    one("LpNormalization", ("n", 3, 20), axis=-1, p=1, opset=22),
    one("LpNormalization", ("n", 3, 20), axis=1, p=2, opset=9),
    one("LRN", ("n", 6, 3, 4), size=3, alpha=0.3, beta=0.6, bias=1.5, opset=13),
    one("LRN", ("n", 6, 3, 4), size=5, opset=9),
]


def label(model: onnx.ModelProto) -> str:
    return f"{model.graph.node[0].op_type} {model.opset_import[0].version}"


@pytest.mark.parametrize("model", NORMS, ids=label)
def test_normalisations_agree(model):
    agrees(model, atol=2.5e-3)
    agrees_whole(fixed(model, 2), atol=2.5e-3)


@pytest.mark.parametrize("model", NORMS, ids=label)
def test_normalisations_agree_under_encryption(model):
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    assert encrypted(model, floats(2, *shape)) < 2.5e-3


def test_small_and_large_deviations_are_normalised_too():
    model = one("LayerNormalization", ("n", 64), [np.ones(64, np.float32)], opset=17)
    assert encrypted(model, floats(2, 64, scale=0.03)) < 0.01
    assert encrypted(model, floats(2, 64, scale=50.0)) < 0.01


def test_mean_variance_normalisation_over_the_batch_is_of_a_whole():
    model = one("MeanVarianceNormalization", (2, 3, 5, 6), opset=13)
    agrees_whole(model, atol=2.5e-3)


def test_batch_normalisation_agrees_as_a_whole():
    constants = [wide(4), floats(4), floats(4, seed=1), np.abs(floats(4, seed=2)) + 0.5]
    for shape in ((2, 4, 5, 6), (2, 4, 5), (2, 4)):
        agrees_whole(one("BatchNormalization", shape, constants))


def decomposed(kind: str, epsilon: float = 1e-5) -> onnx.ModelProto:
    """A normalisation of rows of 32 as exporters write it."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[-1], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["d"]),
        helper.make_node("Mul", ["d", "d"], ["s"]),
        helper.make_node("ReduceMean", ["s"], ["v"], axes=[-1], keepdims=1),
        helper.make_node("Add", ["v", "eps"], ["e"]),
    ]
    if kind != "power":
        nodes.append(helper.make_node("Sqrt", ["e"], ["r"]))
    if kind == "quotient":
        nodes.append(helper.make_node("Div", ["d", "r"], ["y"]))
    elif kind == "reciprocal":
        nodes += [helper.make_node("Reciprocal", ["r"], ["i"]), helper.make_node("Mul", ["d", "i"], ["y"])]
    elif kind == "one over":
        nodes += [helper.make_node("Div", ["one", "r"], ["i"]), helper.make_node("Mul", ["d", "i"], ["y"])]
    else:
        nodes += [helper.make_node("Pow", ["e", "half"], ["i"]), helper.make_node("Mul", ["d", "i"], ["y"])]
    weights = {"eps": np.float32(epsilon), "half": np.float32(-0.5), "one": np.float32(1.0)}
    return build(nodes, {"x": ("n", 3, 32)}, ["y"], {k: np.asarray(v) for k, v in weights.items()}, opset=13)


@pytest.mark.parametrize("kind", ["quotient", "reciprocal", "one over", "power"])
def test_normalisations_as_exporters_decompose_them_take_one_inverse_root(kind):
    imported = agrees(decomposed(kind), atol=2.5e-3)
    assert (ops(imported).count("wide_spline"), ops(imported).count("spline")) == (1, 0)
    agrees_whole(fixed(decomposed(kind), 2), atol=2.5e-3)
    assert encrypted(decomposed(kind), floats(2, 3, 32)) < 2.5e-3


@pytest.mark.parametrize(
    ("norm", "opset"),
    [
        (torch.nn.LayerNorm(16), 17),
        *((norm, n) for norm in (torch.nn.GroupNorm(2, 4), torch.nn.InstanceNorm1d(4)) for n in (11, 17)),
    ],
)
def test_normalisations_that_torch_exports_agree(norm, opset):
    agrees(torchscript(norm, (torch.randn(2, 4, 16),), opset, ["y"], free=True), atol=2.5e-3)


@pytest.mark.parametrize("mask", [-np.inf, -3.4e38, -1e9])
def test_attention_with_a_mask_agrees_under_encryption(mask):
    nodes = [
        helper.make_node("MatMul", ["x", "q"], ["xq"]),
        helper.make_node("MatMul", ["x", "k"], ["xk"]),
        helper.make_node("Transpose", ["xk"], ["kx"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["xq", "kx"], ["scores"]),
        helper.make_node("Mul", ["scores", "less"], ["scaled"]),
        helper.make_node("Add", ["scaled", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "x"], ["y"]),
    ]
    weights = {
        "q": floats(8, 8, seed=1),
        "k": floats(8, 8, seed=2),
        "less": np.float32([8**-0.5]),
        "mask": np.triu(np.full((6, 6), mask, np.float32), 1),
    }
    model = build(nodes, {"x": ("n", 6, 8)}, ["y"], weights)
    agrees(model, atol=1e-3)
    assert encrypted(model, floats(2, 6, 8, scale=0.5)) < 0.005


REFUSED = [
    (one("LayerNormalization", ("n", 8), [wide(8)], axis=0), "must not run over the batch"),
    (one("MeanVarianceNormalization", ("n", 3, 5, 6)), "must not run over the batch"),
    (one("LRN", ("n", 6, 3, 4), size=3, bias=-1.0), "must be above 0"),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED)
def test_what_is_refused_has_a_reason(model, reason):
    with pytest.raises(UnsupportedError, match=reason) as caught:
        load_onnx(model.SerializeToString())
    assert [type(node) for node in caught.value.nodes] == [Problem]
