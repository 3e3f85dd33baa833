"""Small ONNX models and a bundle, made on the spot with fixed weights."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from securemtk.mtk.keys.key import draw_keys
from securemtk.onnx.bundle import write_bundle
from securemtk.tasks import Task

MODEL_ID = "00112233445566778899aabbccddeeff"
TASKS = (Task("digit", 4, secured=True), Task("parity", 2, secured=True), Task("large", 2))
SHAPE = (1, 6, 6)


def build(nodes, inputs, outputs, weights) -> bytes:
    """Return an ONNX model as bytes; inputs and outputs map names to shapes of one sample."""

    def value(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])

    graph = helper.make_graph(
        nodes,
        "test",
        [value(*item) for item in inputs.items()],
        [value(*item) for item in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


def mlp(seed: int = 0) -> bytes:
    """(8) -> relu -> (3), input "x", output "y"."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((8, 16)).astype(np.float32),
        "b1": rng.standard_normal(16).astype(np.float32),
        "w2": rng.standard_normal((16, 3)).astype(np.float32),
        "b2": rng.standard_normal(3).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="fc1"),
        helper.make_node("Relu", ["h"], ["r"], name="relu1"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="fc2"),
    ]
    return build(nodes, {"x": (8,)}, {"y": (3,)}, weights)


def slow(width: int = 24) -> bytes:
    """A convolution and many comparisons: seconds at batch 16."""
    rng = np.random.default_rng(1)
    weights = {
        "w": (rng.standard_normal((width, 3, 3, 3)) * 0.2).astype(np.float32),
        "b": rng.standard_normal(width).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1], name="conv1"),
        helper.make_node("Relu", ["h"], ["r"], name="relu1"),
        helper.make_node("GlobalAveragePool", ["r"], ["y"], name="pool1"),
    ]
    return build(nodes, {"x": (3, 32, 32)}, {"y": (width, 1, 1)}, weights)


def multitask() -> tuple[bytes, dict[str, np.ndarray]]:
    """A convolutional trunk and a head for each of TASKS; the model and its weights."""
    rng = np.random.default_rng(2)
    weights = {
        "w": (rng.standard_normal((3, 1, 3, 3)) * 0.5).astype(np.float32),
        "b": rng.standard_normal(3).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], name="conv1"),
        helper.make_node("Relu", ["h"], ["r"], name="relu1"),
        helper.make_node("Flatten", ["r"], ["f"], name="flat"),
    ]
    for task in TASKS:
        weights[f"w_{task.name}"] = (rng.standard_normal((48, task.classes)) * 0.5).astype(np.float32)
        weights[f"b_{task.name}"] = rng.standard_normal(task.classes).astype(np.float32)
        nodes.append(
            helper.make_node("Gemm", ["f", f"w_{task.name}", f"b_{task.name}"], [task.name], name=f"head_{task.name}")
        )
    return build(nodes, {"x": SHAPE}, {t.name: (t.classes,) for t in TASKS}, weights), weights


def answers() -> dict:
    """Statistics of answers for the secured tasks of `multitask`."""
    return {
        t.name: {"mean": (8 * np.eye(t.classes)).tolist(), "covariance": np.eye(t.classes).tolist()}
        for t in TASKS
        if t.secured
    }


def make_bundle(folder: Path, model_id: str = MODEL_ID) -> dict:
    """Write a bundle and its keys under `folder`; return the keys by task."""
    write_bundle(
        folder / "bundle",
        multitask()[0],
        model_id=model_id,
        tasks=TASKS,
        input_name="x",
        input_shape=SHAPE,
        low=-4.0,
        high=4.0,
        answers=answers(),
    )
    keys = draw_keys([t.name for t in TASKS if t.secured], SHAPE, model_id, side=3)
    (folder / "keys").mkdir()
    for name, key in keys.items():
        key.save(folder / "keys" / f"{name}.key")
    return keys
