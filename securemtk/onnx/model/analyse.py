"""Find out what is known about a model before it is translated.

No rule folds constants or infers shapes: the graph is run, and what was seen is what is known.
"""

import math
from collections.abc import Container, Iterable, Mapping

import numpy as np
import onnx.helper
from onnx import ModelProto, NodeProto

from protocols.errors import ShapeError
from protocols.program.program import Shape
from securemtk.onnx.model.declared import batch_first, dtype_of, inputs_of
from securemtk.onnx.model.graph import Graph, Node, ValueInfo, unique
from securemtk.onnx.model.inputs import NUMBERS
from securemtk.onnx.model.opsets import opset_of
from securemtk.onnx.model.probe import BATCHES, observe, reach, same
from securemtk.onnx.model.problems import Problem
from securemtk.onnx.model.reading import captured, initializer

# In one input, of all samples of a run: far more than a prediction under encryption can have.
MOST_NUMBERS = 1 << 27


def analyse(model: ModelProto, runnable: Container[str], shapes: Mapping[str, Shape] | None = None) -> Graph:
    """Find out which values of a model are constant and every other value's shape.

    Args:
        model: as `read_proto` returns it.
        shapes: the whole shape of each input, to understand the model as a whole; None to understand it by samples.
        runnable: operators of the default domain that can be translated; when onnxruntime refuses the model, it is
            tried once more without the others, so that the rest can be judged.

    Returns:
        What was found; `problems` and `failure` say what is wrong.

    Raises:
        BundleError: an initializer's data do not fill its shape, or a run takes too much memory or time.
    """
    protos = _needed(model)
    weights = {t.name: initializer(t) for t in model.graph.initializer}
    inputs = inputs_of(model)
    failure, batch = None, None
    try:
        if shapes is None:
            infos, batch = batch_first(inputs)
        else:
            infos = tuple(ValueInfo(x.name, tuple(shapes[x.name]), dtype_of(x)) for x in inputs)
        _check_size(infos, 1 if shapes is not None else max(batch or 0, *BATCHES))
    except ShapeError as error:
        infos, failure = tuple(ValueInfo(x.name, None, dtype_of(x)) for x in inputs), error
    activations = reach(protos, {x.name for x in inputs}, through_shape=False)
    _name(protos)
    nodes = [_node(p, opset_of(model)) for p in protos]
    used = {x.name for x in model.graph.output}.union(*({*p.input, *captured(p)} for p in protos))
    graph = Graph(
        inputs=infos,
        outputs=tuple(x.name for x in model.graph.output),
        nodes=tuple(n for n in nodes if activations.intersection(n.outputs)),
        constant_nodes=tuple(n for n in nodes if not activations.intersection(n.outputs)),
        constants=weights,
        activations=activations,
        used=used - {""},
        problems=[
            Problem(x.name, "input", f"an input must be an array of numbers; got {x.dtype}", "feed it as numbers")
            for x in infos
            if x.dtype not in NUMBERS
        ],
        failure=failure,
        batch=batch,
        whole=shapes is not None,
    )
    if failure is None:
        observe(graph, model, protos, runnable)
    for name in graph.outputs:
        if name not in activations and graph.failure is None and not _is_same_for_all(graph, name):
            reason = "an output that does not depend on the input's numbers must have the batch as its first axis, and "
            reason += "say the same for each of its samples"
            graph.problems.append(Problem(name, "output", reason, "remove it: it says the same to every caller"))
    return graph


def _check_size(inputs: Iterable[ValueInfo], batch: int) -> None:
    for x in inputs:
        if batch * math.prod(x.shape or ()) > MOST_NUMBERS:
            got = f"{batch} samples of shape {x.shape}"
            raise ShapeError(f"input {x.name!r} must hold at most {MOST_NUMBERS} numbers; got {got}")


def _is_same_for_all(graph: Graph, name: str) -> bool:
    """Return whether a constant output is one value for all samples."""
    value = graph.constants.get(name)
    if value is None or graph.whole:
        return value is not None
    if value.shape[:1] == (1,) and graph.seen.get(name, ())[:1] == BATCHES[:1]:
        return True
    return value.shape[:1] == (graph.batch,) and same(value, np.repeat(value[:1], len(value), 0))


def _needed(model: ModelProto) -> list[NodeProto]:
    """Return the nodes that some output depends on."""
    wanted = {x.name for x in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted |= {*node.input, *captured(node)} - {""}
    return kept[::-1]


def _name(protos: list[NodeProto]) -> None:
    """Give every node a name of its own; the standard asks for none, onnxruntime does."""
    names: set[str] = set()
    for i, proto in enumerate(protos):
        proto.name = unique(proto.name or f"{proto.op_type}_{i}", names)


def _node(proto: NodeProto, opset: int) -> Node:
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
    attrs = {k: v.decode(errors="replace") if isinstance(v, bytes) else v for k, v in attrs.items()}
    return Node(proto.name, proto.op_type, proto.domain, opset, tuple(proto.input), tuple(proto.output), attrs)
