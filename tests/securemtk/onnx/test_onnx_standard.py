"""What the standard says beyond what exporters write: old opsets, rare types and attributes, several outputs."""

import numpy as np
import onnx
import pytest
from both_parties import secure
from onnx import TensorProto, helper
from onnx_models import agrees, build, floats, one
from program_oracle import run

from protocols.errors import NeedsInputs, UnsupportedError
from securemtk.onnx.importer import load_onnx
from securemtk.onnx.model.reading import read_proto
from securemtk.onnx.model.runtime import start

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def with_outputs(model: onnx.ModelProto, **kinds: int) -> onnx.ModelProto:
    """Return a model of one node with these outputs, by their types."""
    names = [*kinds]
    model.graph.node[0].output[:] = [x if kinds[x] else "" for x in names]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(x, kinds[x], None) for x in names if kinds[x])
    return model


def inputs(model: onnx.ModelProto, **kinds: tuple) -> onnx.ModelProto:
    """Return a model with these inputs, type and shape."""
    del model.graph.input[:]
    model.graph.input.extend(helper.make_tensor_value_info(x, *kind) for x, kind in kinds.items())
    return model


def as_a_whole(model: onnx.ModelProto, seed: int = 0, low: float = -2.0) -> None:
    """Assert that a model of fixed shapes, of which no axis is the batch, gives what onnxruntime gives."""
    imported = load_onnx(model.SerializeToString())
    assert imported.program.whole
    rng = np.random.default_rng(seed)
    feeds = {x.name: rng.uniform(low, 2, x.shape).astype(x.dtype) for x in imported.inputs}
    got = run(imported.program, imported.params, {name: value[None] for name, value in feeds.items()})
    for want, x in zip(start(model.SerializeToString()).run(None, feeds), imported.outputs, strict=True):
        assert (got[x.name].shape[1:], x.dtype) == (want.shape, want.dtype.name)
        np.testing.assert_allclose(got[x.name][0], want, atol=2e-3)


@pytest.mark.parametrize("n", [64, 60])
def test_the_largest_variances_never_wrap_under_encryption(n):
    model = one("LayerNormalization", ("n", n), [np.ones(n, np.float32)], opset=17)
    imported, x = load_onnx(model.SerializeToString()), floats(40, n)
    x *= 60 / x.std(1, keepdims=True)
    got = secure("fss", imported.program, imported.params, {"x": x})[0]["y"]
    np.testing.assert_allclose(got, start(model.SerializeToString()).run(None, {"x": x})[0], atol=5e-3)


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [{"mean": FLOAT}, {"mean": FLOAT, "root": FLOAT}, {"mean": 0, "root": FLOAT}])
def test_mean_and_root_of_a_layer_norm_are_outputs_as_well(kinds):
    model = one("LayerNormalization", ("n", 3, 8), [1 + floats(8)], opset=17)
    agrees(with_outputs(model, y=FLOAT, **kinds), atol=2e-3)


def test_training_statistics_are_those_of_the_batch_where_it_is_an_axis():
    weights = [np.abs(floats(3, seed=i)) for i in range(4)]
    model = one("BatchNormalization", (2, 3, 4), weights, opset=15, training_mode=1)
    as_a_whole(with_outputs(model, y=FLOAT, mean=FLOAT, variance=FLOAT))
    free = one("BatchNormalization", ("n", 3, 4), weights, opset=15, training_mode=1)
    with pytest.raises(UnsupportedError, match="mix the samples"):
        load_onnx(with_outputs(free, y=FLOAT, mean=FLOAT, variance=FLOAT).SerializeToString())


def test_the_mask_of_a_dropout_says_that_all_is_kept():
    agrees(with_outputs(one("Dropout", ("n", 3), opset=13), y=FLOAT, mask=TensorProto.BOOL))
    agrees(one("Dropout", ("n", 3), [np.float32(0.0), np.bool_(True)], opset=13))


@pytest.mark.parametrize(
    ("size", "attrs"),
    [
        ((6,), {"kernel_shape": [3], "pads": [1, 1]}),
        ((5, 6), {"kernel_shape": [3, 2], "dilations": [2, 1], "pads": [1, 0, 1, 1], "strides": [1, 2]}),
        ((5, 6), {"kernel_shape": [2, 2], "storage_order": 1}),
        ((4, 4, 4), {"kernel_shape": [2, 3, 2], "storage_order": 1}),
    ],
)
def test_places_of_maxima_count_through_the_batch(size, attrs):
    as_a_whole(with_outputs(one("MaxPool", (2, 3, *size), **attrs), y=FLOAT, i=INT64))


@pytest.mark.parametrize("size", [(6,), (4, 5), (3, 4, 4)])
def test_places_of_maxima_may_be_all_that_is_used(size):
    model = with_outputs(one("MaxPool", (2, 3, *size), kernel_shape=[2] * len(size)), y=FLOAT, i=INT64)
    del model.graph.output[0]
    as_a_whole(model)


@pytest.mark.parametrize(
    ("op", "constants", "attrs"),
    [
        ("Dropout", [], {}),
        ("TopK", [np.array([2])], {}),
        ("LayerNormalization", [np.ones(6, np.float32)], {}),
    ],
)
def test_outputs_behind_the_first_may_be_all_that_is_used(op, constants, attrs):
    kind = {"Dropout": TensorProto.BOOL, "TopK": INT64, "LayerNormalization": FLOAT}[op]
    model = with_outputs(one(op, ("n", 6), constants, **attrs), y=FLOAT, i=kind)
    del model.graph.output[0]
    imported = load_onnx(model.SerializeToString())
    x = floats(4, 6)
    want = start(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(run(imported.program, imported.params, {"x": x})["i"], want, atol=2e-3)


@pytest.mark.parametrize("largest", [0, 1])
def test_several_largest_and_their_places_agree_where_values_are_equal_too(largest):
    model = one("TopK", ("n", 6, 2), [np.array([4])], axis=1, largest=largest, opset=11)
    imported = agrees(with_outputs(model, y=FLOAT, i=INT64))
    x = np.array([[[1, 5], [3, 5], [3, -5], [0, -5], [1, 0], [3, 0]]], np.float32)
    got = run(imported.program, imported.params, {"x": x})
    for name, want in zip(("y", "i"), start(model.SerializeToString()).run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(got[name], want)


# --- attributes and forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"])
def test_a_norm_over_no_axes_is_of_each_element(op):
    agrees(one(op, ("n", 5, 4), opset=18, noop_with_empty_axes=1), atol=2e-3)


def test_elements_may_have_exponents_of_their_own():
    exponents = np.float32([[2, 0, 3], [1, 2, 5]])
    agrees(one("Pow", ("n", 2, 3), [exponents]), atol=2e-3)
    as_a_whole(one("Pow", (3,), [exponents]))


@pytest.mark.parametrize("exponent", [1.7, 0.3, 1 / 3, 4.5])
def test_powers_that_are_not_whole_agree_above_0(exponent):
    x = np.linspace(2.0**-9, 8, 120, dtype=np.float32).reshape(2, 60)
    imported = load_onnx(one("Pow", ("n", 60), [np.float32(exponent)]).SerializeToString())
    np.testing.assert_allclose(run(imported.program, imported.params, {"x": x})["y"], x**exponent, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("p", [3, 4])
@pytest.mark.parametrize("size", [(5,), (5, 4)])
def test_norms_of_higher_powers_over_windows_agree(p, size):
    model = one("LpPool", ("n", 2, *size), opset=18, p=p, kernel_shape=[3] * len(size))
    agrees(model, atol=2e-2)


@pytest.mark.parametrize("equation", ["nii->ni", "niji->nj", "nii,ni->n"])
def test_diagonals_agree(equation):
    shapes = {"nii->ni": [(4, 4)], "niji->nj": [(3, 2, 3)], "nii,ni->n": [(4, 4), (4,)]}[equation]
    names = ["x", "z"][: len(shapes)]
    node = helper.make_node("Einsum", names, ["y"], equation=equation)
    agrees(build([node], {name: ("n", *shape) for name, shape in zip(names, shapes, strict=True)}, ["y"]), atol=1e-4)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize(("mode", "sizes"), [("nearest", (7, 8)), ("linear", (3, 5)), ("cubic", (2, 9))])
def test_sizes_that_keep_the_aspect_agree(policy, mode, sizes):
    attrs = {"mode": mode, "keep_aspect_ratio_policy": policy, "axes": [2, 3]}
    agrees(one("Resize", ("n", 2, 4, 5), [None, None, np.array(sizes)], **attrs))


# --- types and opsets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"])
def test_whole_numbers_of_every_type_are_inputs(kind):
    number = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    for op in ("Add", "Max", "Mul", "Sub"):
        model = build([helper.make_node(op, ["x", "z"], ["y"])], {}, ["y"], opset=20)
        model = inputs(model, x=(number, ("n", 3)), z=(number, ("n", 3)))
        model.graph.output[0].type.tensor_type.elem_type = number
        if op != "Max" and (kind.endswith(("8", "16")) or (op, kind[0]) == ("Sub", "u")):
            # onnxruntime wraps at the type's ends, which fixed point does not see.
            with pytest.raises(UnsupportedError, match=f"{op} of {kind} wraps what that does not hold"):
                load_onnx(model.SerializeToString())
            continue
        imported = load_onnx(model.SerializeToString())
        feeds = {"x": np.array([[3, 7, 0]]), "z": np.array([[5, 2, 0]])}
        wanted = {"Add": [[8, 9, 0]], "Max": [[5, 7, 0]], "Mul": [[15, 14, 0]], "Sub": [[-2, 5, 0]]}[op]
        assert [x.dtype for x in imported.outputs] == [kind]
        np.testing.assert_array_equal(run(imported.program, imported.params, feeds)["y"], wanted)


def test_a_mean_of_integers_is_refused_by_its_name():
    model = inputs(one("ReduceMean", ("n", 2), [np.array([1])]), x=(TensorProto.INT32, ("n", 2)))
    # onnxruntime's mean of 1 and 2 is 1.
    with pytest.raises(UnsupportedError, match="ReduceMean of integers makes fractions, which int32 cuts off"):
        load_onnx(model.SerializeToString())


def test_the_place_of_an_extreme_fits_every_type_that_holds_it():
    nodes = [helper.make_node("ArgMax", ["x"], ["i"], axis=1), helper.make_node("Cast", ["i"], ["y"], to=2)]
    agreed = build(nodes, {"x": ["n", 200]}, ["y"])
    agreed.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    agrees(agreed)
    agreed = build(nodes, {"x": ["n", 300]}, ["y"])
    with pytest.raises(UnsupportedError, match="a cast to uint8 wraps numbers"):
        load_onnx(agreed.SerializeToString())


def test_a_division_of_whole_numbers_is_refused_by_its_name():
    model = build([helper.make_node("Div", ["x", "z"], ["y"])], {}, ["y"])
    model = inputs(model, x=(TensorProto.INT32, ("n", 30)), z=(TensorProto.INT32, ("n", 30)))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT32
    with pytest.raises(UnsupportedError, match="a division of integers rounds"):
        load_onnx(model.SerializeToString())


@pytest.mark.parametrize(
    ("opset", "op", "attrs", "weights"),
    [
        (7, "BatchNormalization", {}, 4),
        (7, "MaxPool", {"kernel_shape": [2, 2]}, 0),
        (8, "Upsample", {"scales": [1.0, 1.0, 2.0, 2.0]}, 0),
        (7, "Dropout", {}, 0),
    ],
)
def test_old_opsets_are_raised(opset, op, attrs, weights):
    model = one(op, ("n", 3, 4, 4), [np.abs(floats(3, seed=i)) for i in range(weights)], opset=opset, **attrs)
    assert read_proto(model.SerializeToString()).opset_import[0].version == 9
    agrees(model)


def test_an_operator_that_has_never_changed_is_read_in_its_first_opset():
    model = inputs(build([helper.make_node("Not", ["x"], ["y"])], {}, ["y"], opset=1), x=(TensorProto.BOOL, ("n", 2)))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.BOOL
    imported = load_onnx(model.SerializeToString())
    np.testing.assert_array_equal(run(imported.program, imported.params, {"x": np.array([[0, 1]])})["y"], [[1, 0]])


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_of_a_cast_like_another_only_the_first_input_counts():
    nodes = [helper.make_node("CastLike", ["two", "x"], ["t"]), helper.make_node("Pow", ["x", "t"], ["y"])]
    agrees(build(nodes, {"x": ("n", 3)}, ["y"], {"two": np.array(2)}), atol=1e-4)


def test_axes_that_are_an_empty_input_are_all_axes():
    model = one("ReduceSum", (2, 3), [np.array([], np.int64)])
    del model.graph.initializer[:]
    model = inputs(model, x=(FLOAT, (2, 3)), c0=(INT64, (0,)))
    imported = load_onnx(model.SerializeToString(), public={"c0": np.array([], np.int64)})
    x = floats(2, 3)
    np.testing.assert_allclose(run(imported.program, imported.params, {"x": x[None]})["y"], [[[x.sum()]]], rtol=1e-5)


def test_an_exponent_that_is_an_input_is_asked_for_in_the_clear():
    model = inputs(build([helper.make_node("Pow", ["x", "e"], ["y"])], {}, ["y"]), x=(FLOAT, (2, 3)), e=(FLOAT, (3,)))
    with pytest.raises(NeedsInputs) as caught:
        load_onnx(model.SerializeToString())
    assert caught.value.public == ("e",)


def test_weights_that_are_inputs_ask_for_shapes_where_the_batch_is_free():
    model = build([helper.make_node("Conv", ["x", "w"], ["y"])], {}, ["y"])
    model = inputs(model, x=(FLOAT, ("n", 2, 4, 4)), w=(FLOAT, (3, 2, 3, 3)))
    with pytest.raises(NeedsInputs) as caught:
        load_onnx(model.SerializeToString())
    assert caught.value.shapes
    imported = load_onnx(model.SerializeToString(), shapes={"x": (2, 2, 4, 4)})
    assert imported.program.whole
