"""The networks of `benchmarks.networks.models` as ONNX files with a free batch, and what onnxruntime makes of them."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.networks.models import POOL, RELU, Conv, Dense, Floats, Network

OPSET, IR_VERSION = 17, 8


def to_onnx(network: Network, name: str) -> bytes:
    """Return a network as the bytes of an ONNX file.

    Args:
        network: what to build; its weights are `network.weights()`.
        name: of the graph.

    Returns:
        A model with input "input" of shape (n, *input_shape) and output "scores", n free.
    """
    weights = iter(network.weights())
    nodes, initializers, value = [], [], "input"
    for i, layer in enumerate(network.layers):
        inputs, output = [value], "scores" if i == len(network.layers) - 1 else f"value{i}"
        if isinstance(layer, Conv | Dense):
            for role, array in zip("wb", next(weights), strict=True):
                inputs.append(f"{role}{i}")
                initializers.append(numpy_helper.from_array(array, f"{role}{i}"))
        op, label, attributes = _node(layer)
        nodes.append(helper.make_node(op, inputs, [output], name=f"{label}{i}", **attributes))
        value = output
    shapes = {"input": network.input_shape, "scores": _output_shape(network)}
    infos = {k: helper.make_tensor_value_info(k, TensorProto.FLOAT, ["n", *shape]) for k, shape in shapes.items()}
    graph = helper.make_graph(nodes, name, [infos["input"]], [infos["scores"]], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def _node(layer: object) -> tuple[str, str, dict[str, Any]]:
    """Return operator, label and attributes of a layer."""
    if isinstance(layer, Conv):
        return "Conv", "conv", {"pads": [1, 1, 1, 1]}
    if isinstance(layer, Dense):
        return "Gemm", "fc", {"transB": 1}
    if layer == RELU:
        return "Relu", "relu", {}
    if layer == POOL:
        return "MaxPool", "pool", {"kernel_shape": [2, 2], "strides": [2, 2]}
    return "Flatten", "flatten", {}


def _output_shape(network: Network) -> tuple[int, ...]:
    shape = network.input_shape
    for layer in network.layers:
        if isinstance(layer, Conv):
            shape = (layer.n_out, *shape[1:])
        elif isinstance(layer, Dense):
            shape = (layer.n_out,)
        elif layer == POOL:
            shape = (shape[0], shape[1] // 2, shape[2] // 2)
        elif layer != RELU:
            shape = (int(np.prod(shape)),)
    return shape


def run_float(model: bytes, x: Floats) -> Floats:
    """Return the scores of onnxruntime on the CPU, in parts so that its memory stays small."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"input": x[i : i + 16]})[0] for i in range(0, len(x), 16)]
    return np.concatenate(parts)
