"""Small ONNX models for tests, and the comparison of an imported one with onnxruntime."""

import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from program_oracle import run

from securemtk.onnx.building.registry import RULES
from securemtk.onnx.importer import Imported, assemble, load_onnx
from securemtk.onnx.model.analyse import analyse
from securemtk.onnx.model.declared import fixed_shapes
from securemtk.onnx.model.problems import UnsupportedNodes
from securemtk.onnx.model.reading import read_proto
from securemtk.onnx.model.runtime import start
from securemtk.onnx.rules.all_rules import translate

IR_VERSION = 10


def build(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence],
    outputs: Sequence[str],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 18,
    dtype: int = TensorProto.FLOAT,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """Return a model; an input's shape has the batch first, "n" when it is free."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    for value in graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)


def one(
    op: str,
    shape: Sequence,
    constants: Sequence[np.ndarray | None] = (),
    *,
    opset: int = 18,
    first: int = 0,
    **attrs: object,
) -> onnx.ModelProto:
    """Return a model of one node: activation "x" at input `first`, the constants at the others (None: absent)."""
    names = ["" if value is None else f"c{i}" for i, value in enumerate(constants)]
    names.insert(first, "x")
    weights = {f"c{i}": value for i, value in enumerate(constants) if value is not None}
    node = helper.make_node(op, names, ["y"], name=f"the {op}", **attrs)
    return build([node], {"x": shape}, ["y"], weights, opset=opset)


def floats(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Return normal float32 values."""
    return np.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype=np.float32)


# Operators whose results are within an error of their own.
_SMOOTH = {"spline", "wide_spline"}


def agrees(model: onnx.ModelProto | bytes, batches: Sequence[int] = (1, 4), atol: float = 1e-5) -> Imported:
    """Import a model and assert that the program says what onnxruntime says, for each batch."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    imported = load_onnx(data)
    session = start(data)
    for batch in batches:
        feeds = {x.name: floats(batch, *x.shape, seed=i, scale=2.0) for i, x in enumerate(imported.inputs)}
        got = run(imported.program, imported.params, feeds)
        want = session.run(None, feeds)
        assert list(got) == [x.name for x in imported.outputs] == [x.name for x in session.get_outputs()]
        for value, name, info in zip(want, got, imported.outputs, strict=True):
            assert value.shape == (batch, *info.shape)
            assert str(value.dtype) == info.dtype
            np.testing.assert_allclose(
                got[name],
                value,
                atol=max(atol, 5e-4) if _SMOOTH.intersection(ops(imported)) else atol,
                rtol=1e-5,
            )
    return imported


def ops(imported: Imported) -> list[str]:
    """Return the operators of a program."""
    return [layer.op for layer in imported.program.layers]


def torchscript(module: torch.nn.Module, example: tuple, opset: int, outputs: Sequence[str], free: bool) -> bytes:
    """Export by torch's older exporter."""
    inputs = [f"x{i}" for i in range(len(example))]
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            example,
            buffer,
            dynamo=False,
            input_names=inputs,
            output_names=list(outputs),
            opset_version=opset,
            dynamic_axes={name: {0: "batch"} for name in inputs} if free else None,
        )
    return buffer.getvalue()


def imported_whole(model: onnx.ModelProto) -> Imported:
    """Import a model of fixed shapes as a whole, even where it could be understood by samples."""
    proto = read_proto(model.SerializeToString())
    graph = analyse(proto, RULES, fixed_shapes(proto, {}))
    steps, problems = translate(graph)
    if problems:
        raise UnsupportedNodes(problems)
    assert graph.failure is None
    return assemble(graph, steps)


def agrees_whole(model: onnx.ModelProto, atol: float = 1e-5) -> Imported:
    """As `agrees`, of a model of fixed shapes that is understood as a whole."""
    imported = imported_whole(model)
    feeds = {x.name: floats(*x.shape, seed=i, scale=2.0) for i, x in enumerate(imported.inputs)}
    got = run(imported.program, imported.params, {name: value[None] for name, value in feeds.items()})
    for value, info in zip(start(model.SerializeToString()).run(None, feeds), imported.outputs, strict=True):
        assert value.shape == info.shape == got[info.name].shape[1:]
        assert str(value.dtype) == info.dtype
        largest = max(atol, 5e-4) if _SMOOTH.intersection(ops(imported)) else atol
        np.testing.assert_allclose(got[info.name][0], value, atol=largest, rtol=1e-5)
    return imported


def fixed(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a model with its free batch made a number."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for x in copy.graph.input:
        x.type.tensor_type.shape.dim[0].dim_value = batch
    return copy
