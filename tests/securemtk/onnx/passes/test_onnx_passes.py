"""Each pass over a model's steps: where it applies and what it saves, where it must not, and onnxruntime beside it."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from both_parties import secure
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx_models import agrees, build, floats, ops

from protocols.errors import RangeError
from protocols.program import plain
from protocols.program.program import Program
from securemtk.onnx.building.lower import lower
from securemtk.onnx.building.registry import RULES
from securemtk.onnx.importer import layers_of, load_onnx
from securemtk.onnx.model.analyse import analyse
from securemtk.onnx.model.reading import read_proto
from securemtk.onnx.model.runtime import start
from securemtk.onnx.passes import all_passes, merge, simplify
from securemtk.onnx.passes.net import Net, Pass
from securemtk.onnx.rules.all_rules import translate

node = helper.make_node
ALL = (*all_passes.SIMPLIFY, *all_passes.MERGE, simplify.share_equal)


def net_of(model: onnx.ModelProto, passes: Sequence[Pass]) -> Net:
    """Return a model's steps after some passes."""
    graph = analyse(read_proto(model.SerializeToString()), RULES)
    steps, problems = translate(graph)
    assert not problems
    inputs = {x.name: x.shape or () for x in graph.inputs}
    merging = [p for p in passes if p is not simplify.share_equal]
    return all_passes.settle(all_passes.settle(Net(tuple(steps), inputs, graph.outputs), merging), passes)


def executable(net: Net) -> tuple[Program, dict[str, np.ndarray]]:
    """Return the program and the parameters of a net."""
    layers, params = layers_of(lower(net.steps))
    program = Program(net.inputs, net.outputs, layers, {name: value.shape for name, value in params.items()})
    program.validate()
    return program, params


def proven(model: onnx.ModelProto, net: Net) -> tuple[int, int]:
    """Assert that a net says what onnxruntime says; return its rounds and bytes, measured."""
    program, params = executable(net)
    feeds = {name: floats(3, *shape, seed=i) for i, (name, shape) in enumerate(net.inputs.items())}
    session = start(model.SerializeToString())
    values = plain.run(program, params, feeds)
    for want, output in zip(session.run(None, feeds), session.get_outputs(), strict=True):
        np.testing.assert_allclose(values[output.name], want, atol=2e-5, rtol=1e-4)
    got, rounds, sent = secure("fss", program, params, {k: x[:1] for k, x in feeds.items()})
    for name, y in got.items():
        np.testing.assert_allclose(y, values[name][:1], atol=0.01, rtol=0.001)
    return rounds, sum(t.numel() * t.element_size() for party in sent for _, t in party)


def model(
    *nodes: onnx.NodeProto, x: Sequence[int], outputs: Sequence[str] = ("y",), **weights: np.ndarray
) -> onnx.ModelProto:
    """Return a model of one input "x" with samples of a shape."""
    return build(nodes, {"x": ["n", *x]}, outputs, weights)


def bn(source: str, output: str) -> onnx.NodeProto:
    """Return batch normalisation with the constants of `STATISTICS`."""
    return node("BatchNormalization", [source, *"gbmv"], [output])


STATISTICS = {name: (floats(4, seed=i) ** 2 + 0.5).astype(np.float32) for i, name in enumerate("gbmv")}
RELU = node("Relu", ["x"], ["r"])
W3, W3B, W1 = floats(4, 4, 3, 3, scale=0.2), floats(4, 4, 3, 3, seed=1, scale=0.2), floats(4, 4, 1, 1, seed=2)
M1, M2, B4 = floats(6, 5), floats(5, 4, seed=1), floats(4, seed=2)
IMAGE = (4, 8, 8)


def conv(source: str, output: str, weight: str = "w", bias: str = "", pad: int = 0, **attrs: object) -> onnx.NodeProto:
    """Return a convolution."""
    return node("Conv", [source, weight, *([bias] if bias else [])], [output], pads=[pad] * 4, **attrs)


# pass -> models on which it saves rounds, with their number, or (0) layers or bytes.
FIRES: dict[Pass, list[tuple[int, onnx.ModelProto]]] = {
    simplify.join_transposes: [
        (0, model(
            node("Transpose", ["x"], ["a"], perm=[0, 2, 3, 1]),
            node("Transpose", ["a"], ["b"], perm=[0, 3, 1, 2]),
            node("Relu", ["b"], ["y"]), x=(2, 3, 4))),
        (0, model(
            node("Transpose", ["x"], ["a"], perm=[0, 2, 1]), node("Transpose", ["a"], ["y"], perm=[0, 2, 1]),
            x=(2, 3))),
        (0, model(
            RELU, node("Transpose", ["r"], ["a"], perm=[0, 2, 1, 3]), node("Flatten", ["a"], ["y"]), x=(1, 3, 4))),
    ],
    simplify.drop_dead: [
        (0, model(
            node("Reshape", ["x", "s"], ["a"]), node("Flatten", ["a"], ["b"]), node("Relu", ["b"], ["y"]),
            x=(2, 3), s=np.array([0, 3, 2]))),
    ],
    simplify.join_clips: [
        (2, model(RELU, node("Clip", ["r", "lo", "hi"], ["y"]), x=(9,), lo=np.float32(-1), hi=np.float32(1))),
        (2, model(RELU, node("Relu", ["r"], ["y"]), x=(9,))),
        (2, model(
            node("Clip", ["x", "lo", "hi"], ["a"]), node("Clip", ["a", "lo2", "hi2"], ["y"]),
            x=(9,), lo=np.float32(-1), hi=np.float32(1), lo2=np.float32(0.5), hi2=np.float32(3))),
        (4, model(
            node("Clip", ["x", "", "hi"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["y"]),
            x=(9,), hi=np.float32(-1))),
    ],
    simplify.pool_first: [
        (0, model(RELU, node("MaxPool", ["r"], ["y"], kernel_shape=[2, 2], strides=[2, 2]), x=(2, 6, 6))),
        (0, model(
            RELU, node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1]),
            node("Flatten", ["p"], ["y"]), x=(2, 6, 6))),
    ],
    simplify.join_first: [
        (4, model(
            conv("x", "a", pad=1), conv("x", "b", "v"), conv("x", "c", "v", "t"), node("Relu", ["a"], ["d"]),
            node("Relu", ["b"], ["e"]), node("Relu", ["c"], ["f"]), node("Concat", ["d", "e", "f"], ["y"], axis=1),
            x=IMAGE, w=W3, v=W1, t=B4)),
        (4, model(
            RELU, conv("x", "a"), conv("r", "b"), node("LeakyRelu", ["a"], ["c"]), node("LeakyRelu", ["b"], ["d"]),
            node("Concat", ["c", "d"], ["y"], axis=2), x=IMAGE, w=W3)),
    ],
    simplify.share_equal: [
        (4, model(
            RELU, node("Relu", ["x"], ["q"]), node("Sub", ["x", "r"], ["a"]), node("Sub", ["x", "q"], ["b"]),
            node("Relu", ["a"], ["c"]), node("Relu", ["b"], ["d"]), node("Add", ["c", "d"], ["y"]), x=(5,))),
        (2, model(RELU, node("Relu", ["x"], ["q"]), x=(5,), outputs=("r", "q"))),
    ],
    merge.affine_into_previous: [
        (2, model(conv("x", "c", bias="b"), bn("c", "y"), x=IMAGE, w=W3, **STATISTICS)),
        (0, model(node("MatMul", ["x", "w"], ["c"]), node("Sub", ["c", "b"], ["y"]), x=(3, 5), w=M2, b=B4)),
        (0, model(node("MatMul", ["x", "w"], ["c"]), node("Neg", ["c"], ["y"]), x=(3, 5), w=M2)),
        (0, model(node("Mul", ["x", "s"], ["c"]), node("Sub", ["b", "c"], ["y"]), x=(3, 4), s=floats(3, 1), b=B4)),
        (2, model(
            conv("x", "c", pad=1), node("Div", ["c", "b"], ["d"]), node("Dropout", ["d"], ["e"]),
            node("Add", ["e", "b"], ["y"]), x=IMAGE, w=W3, b=np.float32(3).reshape(()))),
    ],
    merge.affine_before_reshape: [
        (2, model(
            node("Conv", ["x", "w"], ["c"]), node("Mul", ["c", "s"], ["y"]), x=(4, 9), w=W3[:, :, 0],
            s=floats(4, 1))),
        (0, model(
            node("MatMul", ["x", "w"], ["c"]), node("Flatten", ["c"], ["d"]), node("Add", ["d", "s"], ["y"]),
            x=(3, 5), w=M2, s=np.float32([2]))),
    ],
    merge.affine_into_next: [
        (2, model(RELU, bn("r", "z"), conv("z", "y"), x=IMAGE, w=W3, **STATISTICS)),
        (2, model(
            RELU, node("Mul", ["r", "b"], ["z"]), conv("z", "y", pad=1, group=2, bias="t"),
            x=IMAGE, w=W3[:, :2], b=B4.reshape(4, 1, 1), t=B4)),
        (2, model(
            RELU, bn("r", "z"), node("Transpose", ["z"], ["t"], perm=[0, 2, 3, 1]), node("Flatten", ["t"], ["f"]),
            node("MatMul", ["f", "w"], ["y"]), x=(4, 2, 2), w=floats(16, 3), **STATISTICS)),
        (0, model(
            RELU, node("Sub", ["s", "r"], ["z"]), node("MatMul", ["z", "w"], ["y"]),
            node("MatMul", ["z", "v"], ["q"]), x=(3, 5), outputs=("y", "q"), s=floats(5), w=M2, v=M2[:, :2])),
        (2, model(
            RELU, bn("r", "z"), node("Reshape", ["z", "s"], ["f"]), conv("f", "y"), x=(4,), s=np.array([0, 4, 1, 1]),
            w=W1, **STATISTICS)),
    ],
    merge.linear_into_linear: [
        (2, model(
            node("Gemm", ["x", "w", "a"], ["z"]), node("Gemm", ["z", "v", "b"], ["y"]), x=(6,), w=M1, a=floats(5), v=M2,
            b=B4)),
        (2, model(
            node("MatMul", ["x", "w"], ["z"]), node("MatMul", ["z", "v"], ["y"]), x=(3, 6), w=M1, v=M2)),
        (2, model(conv("x", "z", bias="b", pad=1, strides=[2, 2]), conv("z", "y", "v", "b"), x=IMAGE, w=W3, v=W1,
            b=B4)),
        (2, model(conv("x", "z", bias="b", dilations=[2, 2]), conv("z", "y", "v", "b"), x=IMAGE, w=W3, v=W1, b=B4)),
        (2, model(
            conv("x", "z", bias="b", pad=1, group=2, strides=[2, 1]), conv("z", "y", "v", strides=[1, 2]),
            x=IMAGE, w=W3[:, :2], v=W3B, b=B4)),
        (2, model(
            conv("x", "z", bias="b", pad=1, group=4), conv("z", "y", "v", group=2), x=IMAGE, w=W3[:, :1],
            v=W3B[:, :2], b=B4)),
        (2, model(conv("x", "z", "v"), conv("z", "y", bias="b", pad=1, dilations=[2, 2]), x=IMAGE, w=W3, v=W1, b=B4)),
        (0, model(
            conv("x", "z", bias="b"), node("AveragePool", ["z"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
            node("Relu", ["p"], ["y"]), x=IMAGE, w=W3, b=B4)),
        (0, model(conv("x", "z", bias="b", pad=1), node("GlobalAveragePool", ["z"], ["y"]), x=IMAGE, w=W1, b=B4)),
    ],
    simplify.exact_differences: [
        (0, model(
            node("ReduceMean", ["x", "axes"], ["m"]), node("Sub", ["x", "m"], ["y"]), x=(3, 8),
            axes=np.array([2]))),
        (1, model(
            node("ReduceMean", ["x", "axes"], ["m"]), node("Sub", ["x", "m"], ["y"]), x=(3, 7),
            axes=np.array([1, 2]))),
    ],
    merge.sum_for_mean: [
        (1, model(
            RELU, node("GlobalAveragePool", ["r"], ["p"]), node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "w", "b"], ["y"]), x=IMAGE, w=W1[:, :, 0, 0], b=B4)),
        (1, model(
            RELU, node("AveragePool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]), conv("p", "y", pad=1),
            x=IMAGE, w=W3)),
        (1, model(
            RELU, node("AveragePool", ["r"], ["p"], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
            conv("p", "y"), conv("p", "z", "v"), x=IMAGE, w=W3, v=W1, outputs=("y", "z"))),
    ],
    merge.parallel_linears: [
        (0, model(
            conv("x", "a", bias="b", pad=1), conv("x", "c", "v", "b"), node("Add", ["a", "c"], ["y"]),
            x=IMAGE, w=W3, v=W1, b=B4)),
        (0, model(
            conv("x", "a", pad=1, strides=[2, 2]), conv("x", "c", "v", strides=[2, 2]),
            node("Sub", ["a", "c"], ["d"]), node("Flatten", ["d"], ["y"]), x=IMAGE, w=W3, v=W1)),
        (0, model(
            node("MatMul", ["x", "w"], ["a"]), node("Gemm", ["x", "v", "b"], ["c"]), node("Sub", ["a", "c"], ["y"]),
            x=(5,), w=M2, v=M2 + 1, b=B4)),
        (0, model(
            conv("x", "a", pad=1), conv("x", "c", "v", "b"), conv("x", "d", "u", pad=2),
            node("Concat", ["a", "c", "d"], ["y"], axis=1), x=IMAGE, w=W3, v=W1, u=floats(3, 4, 5, 5), b=B4)),
        (0, model(
            node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["x", "v"], ["c"]),
            node("Concat", ["a", "c"], ["y"], axis=-1), x=(3, 5), w=M2, v=M2[:, :2])),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("each", "number"),
    [(each, i) for each, cases in FIRES.items() for i in range(len(cases))],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_pass_saves_what_it_promises_and_agrees_with_onnxruntime(each, number):
    saved, network = FIRES[each][number]
    without, whole = (net_of(network, [p for p in ALL if p is not x]) for x in (each, None))
    before, after = proven(network, without), proven(network, whole)
    assert before[0] - after[0] == saved
    assert after[1] <= before[1]
    assert saved or after[1] < before[1] or len(whole.steps) < len(without.steps)
    agrees(network)


def test_identities_go_and_reshapes_in_a_row_become_one():
    nodes = [
        node("Identity", ["x"], ["a"]), node("Reshape", ["a", "s"], ["b"]), node("Dropout", ["b"], ["c"]),
        node("Reshape", ["c", "t"], ["d"]), node("Relu", ["d"], ["e"]), node("Flatten", ["e"], ["y"]),
    ]  # fmt: skip
    network = model(*nodes, x=(2, 3), s=np.array([0, 6]), t=np.array([0, 3, 2]))
    assert [s.op for s in net_of(network, ()).steps].count("identity") == 2
    assert ops(agrees(network)) == ["reshape", "relu", "reshape"]


# pass -> models on which it must not do anything.
STAYS: dict[Pass, list[onnx.ModelProto]] = {
    simplify.join_transposes: [
        model(node("Transpose", ["x"], ["a"], perm=[0, 2, 1]), node("Relu", ["a"], ["y"]), x=(2, 3)),
    ],
    simplify.join_clips: [
        model(RELU, node("Relu", ["r"], ["y"]), x=(5,), outputs=("y", "r")),
        model(RELU, node("LeakyRelu", ["r"], ["y"]), x=(5,)),
    ],
    simplify.pool_first: [
        model(RELU, node("MaxPool", ["r"], ["y"], kernel_shape=[2, 2]), x=(2, 4, 4), outputs=("y", "r")),
        model(
            node("LeakyRelu", ["x"], ["r"], alpha=-1.0), node("MaxPool", ["r"], ["y"], kernel_shape=[2, 2]),
            x=(2, 4, 4)),
        model(RELU, node("AveragePool", ["r"], ["y"], kernel_shape=[2, 2]), x=(2, 4, 4)),
    ],
    simplify.join_first: [
        model(
            conv("x", "a"), conv("x", "b"), node("LeakyRelu", ["a"], ["c"]), node("LeakyRelu", ["b"], ["d"], alpha=0.5),
            node("Concat", ["c", "d"], ["y"], axis=1), x=IMAGE, w=W3),
        model(
            conv("x", "a"), conv("x", "b"), node("Relu", ["a"], ["c"]), node("Relu", ["b"], ["d"]),
            node("Concat", ["c", "d"], ["y"], axis=1), x=IMAGE, w=W3, outputs=("y", "d")),
        model(
            conv("x", "a"), conv("x", "b"), node("Relu", ["a"], ["c"]), node("Concat", ["c", "b"], ["y"], axis=1),
            x=IMAGE, w=W3),
        model(
            conv("x", "a"), node("Relu", ["a"], ["c"]), node("Relu", ["x"], ["d"]),
            node("Concat", ["c", "d"], ["y"], axis=1), x=IMAGE, w=W1),
    ],
    simplify.share_equal: [
        model(
            node("LeakyRelu", ["x"], ["a"], alpha=0.1), node("LeakyRelu", ["x"], ["b"], alpha=0.2),
            node("Concat", ["a", "b"], ["y"], axis=1), x=(5,)),
        model(node("Sub", ["x", "r"], ["a"]), node("Sub", ["r", "x"], ["b"]), RELU,
            node("Concat", ["a", "b"], ["y"], axis=1), x=(5,)),
    ],
    merge.affine_into_previous: [
        model(conv("x", "c"), bn("c", "y"), x=IMAGE, w=W3, outputs=("y", "c"), **STATISTICS),
        model(conv("x", "c"), bn("c", "y"), node("Relu", ["c"], ["z"]), x=IMAGE, w=W3, outputs=("y", "z"),
            **STATISTICS),
        model(conv("x", "c"), node("Mul", ["c", "s"], ["y"]), x=IMAGE, w=W3, s=floats(6, 1)),
        model(node("MatMul", ["x", "w"], ["c"]), node("Add", ["c", "s"], ["y"]), x=(3, 5), w=M2, s=floats(3, 1)),
        model(RELU, bn("r", "y"), x=IMAGE, **STATISTICS),
    ],
    merge.affine_before_reshape: [
        model(
            node("MatMul", ["x", "w"], ["c"]), node("Flatten", ["c"], ["d"]), node("Add", ["d", "s"], ["y"]),
            x=(3, 5), w=M2, s=floats(12)),
        model(
            node("MatMul", ["x", "w"], ["c"]), node("Flatten", ["c"], ["d"]), node("Add", ["d", "s"], ["y"]),
            x=(3, 5), w=M2, s=np.float32([2]), outputs=("y", "c")),
    ],
    merge.affine_into_next: [
        model(RELU, bn("r", "z"), conv("z", "y", pad=1), x=IMAGE, w=W3, **STATISTICS),
        model(RELU, bn("r", "z"), conv("z", "y"), x=IMAGE, w=W3, outputs=("y", "z"), **STATISTICS),
        model(RELU, bn("r", "z"), conv("z", "y"), node("Relu", ["z"], ["q"]), x=IMAGE, w=W3, outputs=("y", "q"),
            **STATISTICS),
        model(bn("x", "z"), conv("z", "y"), x=IMAGE, w=W3, **STATISTICS),
        model(node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), bn("t", "z"), conv("z", "y"), x=IMAGE, w=W3,
            **STATISTICS),
        model(RELU, node("Add", ["r", "s"], ["z"]), conv("z", "y"), x=IMAGE, w=W3, s=floats(8)),
        model(RELU, node("Mul", ["r", "s"], ["z"]), node("MatMul", ["z", "w"], ["y"]), x=(3, 5), w=M2, s=floats(3, 1)),
    ],
    merge.linear_into_linear: [
        model(node("MatMul", ["x", "w"], ["z"]), node("MatMul", ["z", "v"], ["y"]), x=(6,), w=M1, v=M2,
            outputs=("y", "z")),
        model(node("MatMul", ["x", "w"], ["z"]), node("MatMul", ["z", "v"], ["y"]), node("MatMul", ["z", "v"], ["q"]),
            x=(6,), w=M1, v=M2, outputs=("y", "q")),
        model(node("MatMul", ["x", "w"], ["z"]), node("MatMul", ["z", "v"], ["y"]), x=(400,), w=floats(400, 2),
            v=floats(2, 400)),
        model(conv("x", "z", bias="b"), conv("z", "y", "v", pad=1), x=IMAGE, w=W3, v=W3B, b=B4),
        model(conv("x", "z", "v", "b"), conv("z", "y", pad=1), x=IMAGE, w=W3, v=W1, b=B4),
        model(conv("x", "z", "v", pad=1), conv("z", "y", pad=1), x=IMAGE, w=W3, v=W1),
        model(conv("x", "z", "v", strides=[2, 2]), conv("z", "y", pad=1), x=IMAGE, w=W3, v=W1),
        model(conv("x", "z", bias="b"), node("AveragePool", ["z"], ["y"], kernel_shape=[2, 2], pads=[1] * 4), x=IMAGE,
            w=W3, b=B4),
        model(conv("x", "z"), node("ReduceMean", ["z", "axes"], ["y"]), x=IMAGE, w=W3, axes=np.array([1, 2])),
        model(conv("x", "z"), conv("z", "y", "v"), x=(64, 9, 9), w=floats(1, 64, 5, 5, scale=0.02),
            v=floats(64, 1, 5, 5, scale=0.2)),
    ],
    simplify.exact_differences: [
        model(node("ReduceMean", ["x", "axes"], ["m"]), node("Sub", ["m", "x"], ["y"]), x=(3, 8), axes=np.array([2])),
        model(node("ReduceMean", ["x", "axes"], ["m"]), node("Relu", ["x"], ["z"]), node("Sub", ["z", "m"], ["y"]),
            x=(3, 8), axes=np.array([2])),
    ],
    merge.sum_for_mean: [
        model(RELU, node("GlobalAveragePool", ["r"], ["y"]), x=IMAGE),
        model(RELU, node("GlobalAveragePool", ["r"], ["p"]), node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "w"], ["y"]), x=IMAGE, w=W1[:, :, 0, 0], outputs=("y", "p")),
        model(RELU, node("AveragePool", ["r"], ["p"], kernel_shape=[2, 2], pads=[1] * 4), conv("p", "y"), x=IMAGE,
            w=W3),
        model(RELU, node("GlobalAveragePool", ["r"], ["p"]), conv("p", "y"), x=(4, 12, 12), w=W1),
        model(RELU, node("GlobalAveragePool", ["r"], ["p"]), conv("p", "a"), node("Add", ["a", "p"], ["y"]), x=IMAGE,
            w=W1),
    ],
    merge.parallel_linears: [
        model(conv("x", "a"), conv("x", "c"), node("Add", ["a", "c"], ["y"]), x=IMAGE, w=W3, outputs=("y", "c")),
        model(conv("x", "a"), RELU, conv("r", "c"), node("Add", ["a", "c"], ["y"]), x=IMAGE, w=W3),
        model(conv("x", "a", pad=1), conv("x", "c", pad=2, dilations=[2, 2]), node("Add", ["a", "c"], ["y"]), x=IMAGE,
            w=W3),
        model(conv("x", "a", strides=[2, 2]), conv("x", "c", "v", strides=[3, 3]),
            node("Concat", ["a", "c"], ["y"], axis=1), x=(4, 7, 7), w=W3, v=W1),
        model(conv("x", "a"), conv("x", "c"), node("Concat", ["a", "c"], ["y"], axis=2), x=IMAGE, w=W3),
        model(conv("x", "a", group=2), conv("x", "c", group=2), node("Concat", ["a", "c"], ["y"], axis=1), x=IMAGE,
            w=W3[:, :2]),
        model(conv("x", "a"), node("Add", ["a", "a"], ["y"]), x=IMAGE, w=W3),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("each", "number"),
    [(each, i) for each, cases in STAYS.items() for i in range(len(cases))],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_pass_leaves_what_is_not_its_own(each, number):
    network = STAYS[each][number]
    without, whole = (net_of(network, [p for p in ALL if p is not x]) for x in (each, None))
    assert whole.layout() == without.layout()
    proven(network, whole)
    agrees(network)


@pytest.mark.parametrize(
    ("nodes", "x", "left"),
    [
        ([conv("x", "z", bias="b"), conv("z", "y", "one", "b")], IMAGE, ["conv2d"]),
        ([conv("x", "z", bias="b"), node("GlobalAveragePool", ["z"], ["y"])], IMAGE, ["conv2d"]),
        (
            [conv("x", "a", bias="b", pad=1), conv("x", "c", "one", "b"), node("Add", ["a", "c"], ["y"])],
            IMAGE,
            ["conv2d"],
        ),
        ([conv("x", "c", bias="b"), bn("c", "y")], IMAGE, ["conv2d"]),
        ([RELU, bn("r", "z"), conv("z", "y")], IMAGE, ["relu", "conv2d"]),
        ([RELU, node("GlobalAveragePool", ["r"], ["p"]), conv("p", "y", "one")], IMAGE, ["relu", "sum", "conv2d"]),
    ],
)
def test_passes_merge_images_of_a_model_understood_as_a_whole(nodes, x, left):
    # Nothing but the last transpose forbids to understand it by samples.
    transpose = node("Transpose", ["y"], ["last"], perm=[1, 0, 2, 3])
    weights = STATISTICS | {"w": W3, "one": W1, "b": B4}
    network = build([*nodes, transpose], {"x": [2, *x]}, ["last"], weights)
    imported = load_onnx(network.SerializeToString())
    assert imported.program.whole
    assert ops(imported) == [*left, "transpose"]
    value = floats(2, *x)
    (want,) = start(network.SerializeToString()).run(None, {"x": value})
    got = plain.run(imported.program, imported.params, {"x": value[None]})["last"][0]
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-4)


def test_what_a_pass_does_depends_on_no_weight():
    rng = np.random.default_rng(7)
    for cases in FIRES.values():
        for _, network in cases:
            varied = onnx.ModelProto.FromString(network.SerializeToString())
            for weight in varied.graph.initializer:
                if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) > 0:
                    value = rng.uniform(0.5, 1.0, tuple(weight.dims)).astype(np.float32)
                    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
            assert net_of(varied, ALL).layout() == net_of(network, ALL).layout()


def test_weights_whose_product_is_too_large_stay_apart():
    big = np.eye(5, dtype=np.float32) * 2**20
    network = model(node("MatMul", ["x", "w"], ["z"]), node("MatMul", ["z", "w"], ["y"]), x=(5,), w=big)
    assert ops(agrees(network)) == ["matmul", "matmul"]
    for value in (3e9, np.inf):
        big[0, 0] = value
        with pytest.raises(RangeError, match="weight"):
            load_onnx(model(*network.graph.node, x=(5,), w=big).SerializeToString())


def test_products_of_weights_are_made_in_float64():
    # In float32 the sum of products would lose every digit.
    w, v = np.float32([[1e4, 1e4]]), np.float32([[1e4 + 0.01], [-1e4]])
    network = model(node("MatMul", ["x", "w"], ["z"]), node("MatMul", ["z", "v"], ["y"]), x=(1,), w=w, v=v)
    (merged,) = [value for name, value in load_onnx(network.SerializeToString()).params.items() if "weight" in name]
    exact = (w.astype(np.float64) @ v.astype(np.float64)).item()
    assert merged.item() == np.float32(exact)


# --- networks by chance

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Chance:
    """Draws a network: each step works on one or two of the values made so far."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.nodes, self.weights = draw, [], {}
        channels, size = draw(st.integers(1, 3)), draw(st.integers(1, 6))
        self.shapes: dict[str, tuple[int, ...]] = {"x": (channels, size, size)}
        for _ in range(draw(st.integers(1, 8))):
            self.grow()

    def constant(self, *shape: int) -> str:
        """Add a constant by name."""
        name = f"w{len(self.weights)}"
        scale = 1 / np.sqrt(max(np.prod(shape[1:]), 1))
        self.weights[name] = floats(*shape, seed=len(self.weights), scale=scale)
        return name

    def add(self, op: str, inputs: Sequence[str], shape: tuple[int, ...], **attrs: object) -> None:
        """Add a node."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(op, list(inputs), [name], **attrs))
        self.shapes[name] = shape

    def grow(self) -> None:
        """Add one node that fits what is there; recent values are likelier, so that chains come about."""
        draw, names = self.draw, list(self.shapes)
        source = draw(st.sampled_from([*names, *names[-1:] * len(names)]))
        shape = self.shapes[source]
        alike = [name for name in names if self.shapes[name] == shape]
        kind = draw(st.sampled_from(["linear", "linear", "affine", "pool", "relu", "two", "shape", "none"]))
        if kind == "relu":
            self.add("Relu", [source], shape)
        elif kind == "none":
            self.add(draw(st.sampled_from(["Identity", "Dropout"])), [source], shape)
        elif kind == "two":
            other = draw(st.sampled_from(alike))
            if draw(st.booleans()):
                self.add(draw(st.sampled_from(["Add", "Sub"])), [source, other], shape)
            else:
                self.add("Concat", [source, other], (2 * shape[0], *shape[1:]), axis=1)
        elif kind == "affine":
            form = draw(st.sampled_from([(1,), (shape[0], *(1,) * (len(shape) - 1)), shape]))
            self.add(draw(st.sampled_from(["Add", "Mul", "Sub"])), [source, self.constant(*form)], shape)
        elif len(shape) == 3:
            self.image(kind, source, shape)
        else:
            n = draw(st.integers(1, 5))
            self.add("MatMul", [source, self.constant(shape[-1], n)], (*shape[:-1], n))

    def image(self, kind: str, source: str, shape: tuple[int, ...]) -> None:
        """Add a node that works on an image."""
        draw, (c, h, _) = self.draw, shape
        k, pad, stride = draw(st.integers(1, min(h, 3))), draw(st.integers(0, 1)), draw(st.integers(1, 2))
        pad = min(pad, k - 1)
        made = (h + 2 * pad - k) // stride + 1
        window = {"kernel_shape": [k, k], "pads": [pad] * 4, "strides": [stride, stride]}
        if kind == "linear":
            groups = draw(st.sampled_from([1, 1, c]))
            n = draw(st.integers(1, 3)) * groups
            bias = [self.constant(n)] if draw(st.booleans()) else []
            weight = self.constant(n, c // groups, k, k)
            self.add("Conv", [source, weight, *bias], (n, made, made), group=groups, **window)
        elif kind == "pool":
            op = draw(st.sampled_from(["MaxPool", "AveragePool", "GlobalAveragePool"]))
            glob = op == "GlobalAveragePool"
            self.add(op, [source], (c, 1, 1) if glob else (c, made, made), **({} if glob else window))
        elif draw(st.booleans()):
            self.add("Flatten", [source], (c * h * h,))
        else:
            self.add("Transpose", [source], shape, perm=[0, 1, 3, 2])

    def model(self) -> onnx.ModelProto:
        """Return the network; its last value is an output, and sometimes another."""
        names = list(self.shapes)[1:]
        outputs = list(dict.fromkeys([names[-1], self.draw(st.sampled_from([names[-1], *names]))]))
        return build(self.nodes, {"x": ["n", *self.shapes["x"]]}, outputs, self.weights)


@quick
@given(st.data())
def test_a_network_by_chance_says_the_same_in_no_more_rounds(data):
    network = Chance(data.draw).model()
    plainly = (simplify.shorten_reshapes, simplify.drop_dead)
    before, after = (proven(network, net_of(network, passes)) for passes in (plainly, ALL))
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    agrees(network, atol=1e-4)


def test_every_pass_has_a_model_here_on_which_it_applies_and_one_on_which_not():
    assert set(FIRES) == set(ALL) - {simplify.shorten_reshapes}
    assert set(STAYS) == set(FIRES) - {simplify.drop_dead}


def test_the_table_in_the_documentation_is_that_of_the_passes():
    assert all_passes.pass_table() in (ROOT / "docs" / "onnx.md").read_text()
