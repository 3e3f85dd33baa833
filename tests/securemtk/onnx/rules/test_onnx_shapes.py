"""Operators that move, choose, join, reduce and multiply, by samples and as a whole, against onnxruntime."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from both_parties import secure
from onnx import helper
from onnx_models import agrees, agrees_whole, build, fixed, floats, imported_whole, one, ops

from protocols.errors import UnsupportedError
from protocols.program import plain
from securemtk.onnx.importer import load_onnx
from securemtk.onnx.model.problems import Problem


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def numbers(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def case(op: str, shape: Sequence[int], *constants: object, outputs: int = 1, opset: int = 18, **attrs: object):
    """A model of one node with a free batch, and a name for it that says what is special."""
    model = one(op, ("n", *shape), constants, opset=opset, **attrs)
    names = ["y", *(f"y{i}" for i in range(1, outputs))]
    model.graph.node[0].output[:] = names
    model.graph.output.extend(onnx.ValueInfoProto(name=x) for x in names[1:])
    if op in ("ArgMax", "ArgMin", "TopK"):
        model.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    said = [str(c.tolist()) for c in constants if isinstance(c, np.ndarray) and c.size < 9]
    text = " ".join([op, str(opset), *said, *(f"{k}={v}" for k, v in attrs.items())])
    return pytest.param(model, id=text)


MOVES = [
    *(case("Reshape", (2, 6), ints(0, 3, -1), opset=n) for n in (9, 13, 23)),
    case("Reshape", (2, 6), ints(-1, 12), opset=14, allowzero=1),
    *(case("Flatten", (2, 3, 2), axis=a) for a in (1, -3)),
    case("Flatten", (2, 3, 2), axis=1, opset=9),
    case("Squeeze", (1, 3, 1), ints(1, -1)),
    case("Squeeze", (1, 3, 1), axes=[1], opset=9),
    case("Unsqueeze", (3,), ints(1, -1)),
    case("Unsqueeze", (3,), axes=[1], opset=9),
    case("Transpose", (2, 3, 4), perm=[0, 3, 1, 2]),
    case("Transpose", (2, 3), perm=[0, 2, 1], opset=9),
    case("Split", (5, 6), outputs=3, axis=2, opset=9),
    case("Split", (5, 6), outputs=2, axis=1, split=[2, 3], opset=11),
    case("Split", (5, 6), ints(1, 4), outputs=2, axis=1, opset=13),
    case("Split", (5, 6), outputs=2, axis=-1, opset=13),
    case("Split", (5, 6), outputs=3, axis=1, num_outputs=3),
    case("Slice", (5, 6), axes=[1, 2], starts=[1, -2], ends=[-1, 100], opset=9),
    case("Slice", (5, 6), ints(1), ints(4), ints(2), opset=10),
    case("Slice", (5, 6), ints(-1, 100), ints(-100, 0), ints(1, -1), ints(-2, -1)),
    case("Slice", (5, 6), ints(0, 1), ints(2**63 - 1, 5)),
    case("Slice", (5, 6), ints(3), ints(-(2**63)), ints(1), ints(-1)),
    case("Gather", (4, 3), ints(2, -1, 0), axis=1),
    case("Gather", (4, 3), np.array(-2), axis=2),
    case("Gather", (4, 3), np.array([[0, 1], [3, 3]]), axis=1, opset=9),
    case("Gather", (4,), np.array(1), axis=-1),
    case("Expand", (3, 1), ints(1, 3, 4)),
    case("Expand", (1, 3), ints(1, 2, 1), opset=9),
    case("Tile", (2, 3), ints(1, 2, 3), opset=9),
    case("Pad", (4, 5), pads=[0, 1, 2, 0, 0, 1], value=0.5, opset=9),
    case("Pad", (4, 5), pads=[0, 1, 2, 0, 0, 1], mode="reflect", opset=9),
    case("Pad", (4, 5), ints(0, 2, -1, 0, -1, 3), numbers(-2.0).reshape(()), opset=11),
    *(case("Pad", (4, 5), ints(0, 2, 1, 0, 1, 3), None, mode=m, opset=19) for m in ("reflect", "edge", "wrap")),
    case("Pad", (4, 5), ints(0, -1, 1, 0, 1, -3), None, mode="edge", opset=19),
    case("Pad", (4, 5), ints(1, 2), numbers(1.0).reshape(()), ints(-1)),
    *(case("DepthToSpace", (8, 2, 3), blocksize=2, mode=m, opset=11) for m in ("DCR", "CRD")),
    case("SpaceToDepth", (2, 4, 6), blocksize=2, opset=9),
    *(case("Trilu", (4, 5), upper=u, opset=14) for u in (0, 1)),
    case("Trilu", (4, 5), np.array(-1), opset=14),
    *(case("CumSum", (4, 5), np.array(-1), exclusive=e, reverse=r, opset=14) for e in (0, 1) for r in (0, 1)),
]
MODES = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "tf_crop_and_resize"]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
ROI = numbers(0, 0, 0.1, 0.2, 1, 1, 0.8, 1.3)
NEAREST = [
    *(
        case("Resize", (2, 4, 5), ROI, numbers(1, 1, 1.6, 0.7), mode="nearest", opset=13,
             coordinate_transformation_mode=m, nearest_mode=r)
        for m in MODES for r in ROUNDINGS
    ),
    case("Resize", (2, 4, 5), numbers(1, 1, 2, 3), opset=10),
    case("Upsample", (2, 4, 5), numbers(1, 1, 2, 3), opset=9),
    case("Resize", (2, 4, 5), None, None, ints(7, 3), axes=[2, 3], mode="nearest"),
]  # fmt: skip
INTERPOLATED = [
    *(
        case("Resize", (2, 4, 5), ROI, numbers(1, 1, 1.6, 0.7), mode=k, opset=13, coordinate_transformation_mode=m)
        for m in MODES for k in ("linear", "cubic")
    ),
    case("Resize", (2, 4, 5), numbers(1, 1, 2, 3), opset=10, mode="linear"),
    case("Upsample", (2, 4, 5), numbers(1, 1, 2, 3), opset=9, mode="linear"),
    case("Resize", (2, 4, 5), None, numbers(2.5, 0.5), axes=[2, 3], mode="linear", opset=19),
    case("Resize", (2, 4, 5), None, numbers(1, 1, 2, 2), mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1),
    case("Resize", (2, 8, 9), None, numbers(1, 1, 0.5, 0.4), mode="linear", antialias=1),
]  # fmt: skip


@pytest.mark.parametrize("model", MOVES + NEAREST)
def test_what_only_moves_values_agrees_and_sends_nothing(model):
    local = {"reshape", "transpose", "take", "expand", "concat", "add"}
    assert set(ops(agrees(model))) <= local
    assert set(ops(agrees_whole(fixed(model, 3)))) <= local


@pytest.mark.parametrize("model", INTERPOLATED)
def test_an_interpolation_is_a_product_for_each_axis(model):
    assert ops(agrees(model, atol=2e-5)).count("matmul") == 2
    agrees_whole(fixed(model, 1), atol=2e-5)


REDUCTIONS = ("Sum", "Mean", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp", "Prod")


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [(1,), (-1, 1)])
def test_reductions_agree(op, keepdims, axes):
    old = one(f"Reduce{op}", ("n", 3, 5, 2), opset=11, axes=list(axes), keepdims=keepdims)
    new = one(f"Reduce{op}", ("n", 3, 5, 2), [ints(*axes)], keepdims=keepdims)
    for model in (old, new):
        agrees(model, atol=1e-4 if op != "L2" else 2e-3)
        agrees_whole(fixed(model, 2), atol=1e-4 if op != "L2" else 2e-3)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions_over_all_axes_and_none_agree_as_a_whole(op):
    agrees_whole(one(f"Reduce{op}", (2, 3), keepdims=0), atol=2e-3)
    if op in ("Sum", "Mean", "Max", "Min", "Prod"):
        agrees_whole(one(f"Reduce{op}", (2, 3), noop_with_empty_axes=1))


def test_the_logarithm_of_a_sum_agrees():
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("ReduceLogSum", ["r", "axes"], ["y"])]
    agrees(build(nodes, {"x": ("n", 30)}, ["y"], {"axes": ints(1)}))


CHOICES = [
    *(
        case(op, (5, 4), axis=a, keepdims=k, select_last_index=last, opset=13)
        for op in ("ArgMax", "ArgMin") for a in (1, -1) for k in (0, 1) for last in (0, 1)
    ),
    *(case("TopK", (5, 4), ints(1), outputs=2, axis=a, largest=n, opset=11) for a in (1, -1) for n in (0, 1)),
    case("TopK", (5,), ints(1), outputs=2, opset=10),
    case("Hardmax", (3, 4), opset=13, axis=1),
    case("Hardmax", (3, 4), opset=11, axis=1),
]  # fmt: skip


@pytest.mark.parametrize("model", CHOICES)
def test_places_of_extremes_agree(model):
    agrees(model)
    agrees_whole(fixed(model, 2))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_of_several_may_be_used_alone(used):
    for op, constants, attrs in (("TopK", ints(1), {}), ("Split", ints(2, 3), {"axis": 1})):
        model = case(op, (5,), constants, outputs=2, **attrs).values[0]
        del model.graph.output[1 - used]
        agrees(model)


@pytest.mark.parametrize("axis", [1, -1])
def test_constants_are_joined_to_activations(axis):
    shapes = ((1, 2, 4), (1, 3, 4)) if axis == 1 else ((1, 3, 1), (1, 3, 2))
    before, after = floats(*shapes[0]), floats(*shapes[1])
    node = helper.make_node("Concat", ["a", "x", "b", "x"], ["y"], axis=axis)
    model = build([node], {"x": (1, 3, 4)}, ["y"], {"a": before, "b": after})
    assert "matmul" not in ops(agrees_whole(model))


def test_a_constant_row_for_each_sample_is_joined():
    nodes = [
        helper.make_node("Shape", ["x"], ["all"], start=0, end=1),
        helper.make_node("Concat", ["all", "rest"], ["shape"], axis=0),
        helper.make_node("Expand", ["token", "shape"], ["tokens"]),
        helper.make_node("Concat", ["tokens", "x"], ["y"], axis=1),
    ]
    agrees(build(nodes, {"x": ("n", 3, 4)}, ["y"], {"token": floats(1, 1, 4), "rest": ints(1, 4)}))


def test_elements_are_gathered_by_constant_places():
    index = np.array([[[0, -1, 2]], [[1, 1, 0]]])
    agrees_whole(one("GatherElements", (2, 4, 3), [index], axis=1, opset=13))
    agrees_whole(one("GatherND", (2, 4, 3), [np.array([[[1], [-1]], [[0], [2]]])], batch_dims=1, opset=13))
    agrees_whole(one("GatherND", (2, 4, 3), [np.array([[1, 0], [0, -1]])], opset=13))


def test_a_model_as_a_whole_may_move_its_first_axis():
    for model in (
        one("Transpose", (2, 3, 4)),
        one("Slice", (4, 3), [ints(3), ints(0), ints(0), ints(-1)]),
        one("Expand", (3, 1), [ints(2, 3, 4)]),
        one("Gather", (4, 3), [np.array([1, 2])]),
        one("Flatten", (2, 3), axis=0),
        one("Split", (4, 2), num_outputs=1),
    ):
        agrees_whole(model)


# --- products -------------------------------------------------------------------------------------------------------


def product(op: str, x, y, constant: str = "", opset: int = 18, **attrs: object) -> onnx.ModelProto:
    """A product of x and y, of which `constant` is one."""
    shapes = {"x": x, "y": y}
    weights = {k: floats(*v, seed=7) for k, v in shapes.items() if k == constant}
    node = helper.make_node(op, ["x", "y"], ["z"], **attrs)
    return build([node], {k: v for k, v in shapes.items() if k != constant}, ["z"], weights, opset=opset)


BY_SAMPLES = [
    (("n", 4), (4, 5), "y"),
    (("n", 4), (4,), "y"),
    (("n", 2, 4), (4,), "y"),
    (("n", 2, 4), (4, 5), "y"),
    (("n", 2, 4), (1, 4, 5), "y"),
    (("n", 3, 2, 4), (3, 4, 5), "y"),
    (("n", 3, 2, 4), (1, 3, 4, 5), "y"),
    ((2, 4), ("n", 4, 5), "x"),
    ((4,), ("n", 4, 5), "x"),
    ((3, 2, 4), ("n", 1, 4, 5), "x"),
    (("n", 2, 4), ("n", 4, 5), ""),
    (("n", 3, 2, 4), ("n", 1, 4, 5), ""),
]
AS_A_WHOLE = [
    ((4,), (4,), ""),
    ((4,), (4,), "x"),
    ((4,), (4, 5), ""),
    ((3, 4), (4,), ""),
    ((3, 4), (4, 5), "x"),
    ((3, 4), (2, 4, 5), ""),
    ((2, 3, 4), (4, 5), ""),
    ((3, 4), (2, 4, 5), "y"),
    ((2, 3, 4), (4,), "x"),
]


@pytest.mark.parametrize(("x", "y", "constant"), BY_SAMPLES)
def test_products_agree_by_samples(x, y, constant):
    agrees(product("MatMul", x, y, constant))


@pytest.mark.parametrize(("x", "y", "constant"), BY_SAMPLES + AS_A_WHOLE)
def test_products_agree_as_a_whole(x, y, constant):
    x, y = (tuple(2 if n == "n" else n for n in shape) for shape in (x, y))
    agrees_whole(product("MatMul", x, y, constant))


@pytest.mark.parametrize("constant", ["", "x", "y"])
@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(
    ("third", "shared"), [(None, False), *((shape, s) for shape in ((), (5,), (3, 1), (3, 5)) for s in (False, True))]
)
def test_gemm_agrees_as_a_whole(constant, turned, third, shared):
    x, y = ((4, 3) if turned[0] else (3, 4)), ((5, 4) if turned[1] else (4, 5))
    model = product("Gemm", x, y, constant, transA=turned[0], transB=turned[1], alpha=0.5, beta=2.0)
    if third is not None:
        model.graph.node[0].input.append("c")
        if shared:
            model.graph.input.append(helper.make_tensor_value_info("c", 1, third))
        else:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(floats(*third)), "c"))
    agrees_whole(model)


EQUATIONS = [
    ("nij,njk->nik", ("n", 2, 3), ("n", 3, 4), ""),
    ("nij,nkj->nik", ("n", 2, 3), ("n", 4, 3), ""),
    ("nhid,nhjd->nhij", ("n", 2, 3, 4), ("n", 2, 5, 4), ""),
    ("nid,df->nif", ("n", 2, 3), (3, 4), "y"),
    ("nid,dhe->nhie", ("n", 2, 3), (3, 2, 4), "y"),
    ("nhi,hij->nhj", ("n", 2, 3), (2, 3, 4), "y"),
    ("ij,njk->nki", (2, 3), ("n", 3, 4), "x"),
    ("nij,nij->n", ("n", 2, 3), ("n", 2, 3), ""),
    ("ni,nj->nij", ("n", 2), ("n", 3), ""),
    ("nci,nc->nci", ("n", 2, 3), ("n", 2), ""),
    ("n...i,...ij->n...j", ("n", 2, 3), (2, 3, 4), "y"),
    ("nij,nik->njk", ("n", 2, 3), ("n", 2, 4), ""),
]


@pytest.mark.parametrize(("equation", "x", "y", "constant"), EQUATIONS)
def test_einsum_agrees(equation, x, y, constant):
    agrees(product("Einsum", x, y, constant, equation=equation))
    x, y = (tuple(2 if n == "n" else n for n in shape) for shape in (x, y))
    agrees_whole(product("Einsum", x, y, constant, equation=equation))


@pytest.mark.parametrize("equation", ["nij->nji", "nij->ni", "nij->n"])
def test_einsum_of_one_factor_agrees(equation):
    agrees(one("Einsum", ("n", 2, 3), equation=equation))


REFUSED = [
    (one("Transpose", ("n", 3), perm=[1, 0]), "batch must stay the first axis"),
    (one("Split", ("n", 4), axis=0), "must not run over the batch"),
    (one("Slice", ("n", 4), [ints(1), ints(2), ints(0)]), "must not run over the batch"),
    (one("Gather", ("n", 4), [ints(1, 0)]), "must not run over the batch"),
    (one("Pad", ("n", 4), [ints(1, 0, 0, 0)]), "must not run over the batch"),
    (one("Pad", ("n", 4), [ints(0, 1, 0, 0), numbers(np.inf).reshape(())]), "must be a number below"),
    (one("Tile", ("n", 4), [ints(2, 1)]), "must not run over the batch"),
    (one("Trilu", ("n", 4), opset=14), "batch must not be an axis"),
    (one("ReduceSum", ("n", 4)), "must not run over the batch"),
    (product("Gemm", ("n", 4), ("n", 5), transA=1), "batch must stay the first axis"),
    (product("Gemm", ("n", 4), ("n", 4), transB=1), "batch must stay the first axis"),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED)
def test_what_is_refused_has_a_reason(model, reason):
    with pytest.raises(UnsupportedError, match=reason) as caught:
        load_onnx(model.SerializeToString())
    assert [type(node) for node in caught.value.nodes] == [Problem]


@pytest.mark.parametrize(
    "model",
    [
        product("MatMul", (2, 2, 3), (2, 3, 2)),
        product("MatMul", (2, 2, 3), (2, 3, 2), "y"),
        one("ReduceMax", (4, 3, 5), [ints(1, 2)]),
        one("Concat", (1, 3, 4), [floats(1, 3, 2)], axis=2),
        one("Resize", (1, 2, 4, 4), [None, numbers(1, 1, 2, 2)], mode="linear"),
        one("ReduceProd", (2, 5), [ints(1)]),
        one("ReduceL1", (2, 5), [ints(1)]),
        one("ReduceL2", (2, 5), [ints(1)]),
        one("ReduceLogSumExp", (2, 5), [ints(1)]),
        one("ReduceMin", (2, 5), [ints(1)]),
        one("CumSum", (2, 5), [np.array(1)]),
        product("Gemm", (4, 3), (4, 5), transA=1, alpha=0.3),
        product("Einsum", (2, 3, 4), (2, 3, 4), equation="bhd,bhe->bde"),
        one("Hardmax", (3, 6)),
    ],
    ids=lambda model: model.graph.node[0].op_type,
)
def test_they_agree_under_encryption(model):
    imported = imported_whole(model)
    feeds = {x.name: floats(1, *x.shape, seed=i) for i, x in enumerate(imported.inputs)}
    got, *_ = secure("fss", imported.program, imported.params, feeds)
    want = plain.run(imported.program, imported.params, feeds)
    for name in imported.program.outputs:
        np.testing.assert_allclose(got[name], want[name], atol=1e-3)
