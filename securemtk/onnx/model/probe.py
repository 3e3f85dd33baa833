"""A model's values as onnxruntime computes them for made-up samples, every value an output.

The model is run with batches of 2 and of 3 samples, or once as a whole. A value that does not depend on the input and
is the same in both runs is a constant, whatever it was made of, and an activation's shape is what was seen, with the
batch where it was seen.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import numpy as np
import onnx.defs
import onnx.helper
import onnx.numpy_helper
from onnx import ModelProto, NodeProto, ValueInfoProto

from protocols.errors import BundleError, InputError, ShapeError
from protocols.program.program import Shape
from securemtk.onnx.model import runtime
from securemtk.onnx.model.declared import dtype_of
from securemtk.onnx.model.graph import Array, Graph
from securemtk.onnx.model.opsets import opset_of
from securemtk.onnx.model.reading import captured

BATCHES = (2, 3)
# Their result is another at each run: never a constant.
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


def reach(nodes: Iterable[NodeProto], sources: set[str], *, through_shape: bool) -> set[str]:
    """Return the values that depend on `sources`: on their numbers, or `through_shape` on their shapes too.

    Args:
        nodes: in order.
        sources: names of values.
        through_shape: whether a value depends on what only gives it its shape.
    """
    reached = set(sources)
    for node in nodes:
        inputs = list(node.input)
        if node.domain == "" and not through_shape:
            # Of these only shape and type count: of all inputs, or of those behind the first one.
            inputs = {"Shape": [], "Size": [], "CastLike": inputs[:1]}.get(node.op_type, inputs)
        if node.op_type in _RANDOM or reached.intersection(inputs) or reached & captured(node):
            reached |= set(node.output)
    return reached - {""}


def observe(graph: Graph, model: ModelProto, protos: list[NodeProto], runnable: Container[str]) -> None:
    """Run the model and note constants, shapes and types in `graph`, or why it cannot be run.

    Args:
        graph: what is known; it is changed.
        model: is not changed.
        protos: its nodes, in order, each with a name of its own.
        runnable: operators that can be translated; the others are left out where the model does not run whole.
    """
    opset = opset_of(model)
    strange = [p for p in protos if p.domain != "" or not onnx.defs.has(p.op_type, opset, "")]
    without_rule = [p for p in protos if graph.activations.intersection(p.output) and p.op_type not in runnable]
    for left_out in (strange, strange + without_rule):
        try:
            probe = _Probe(model, protos, left_out, graph)
            if graph.batch is not None:
                probe = probe.with_free_batch(graph.batch)
            runs = [probe.run(b) for b in ((None,) if graph.whole else BATCHES)]
        except runtime.TooCostly:
            raise
        except InputError as error:
            graph.failure = error
        else:
            graph.failure = None
            _note(graph, runs)
            return


@np.errstate(all="ignore")
def _note(graph: Graph, runs: list[dict[str, Array]]) -> None:
    if graph.whole:
        _note_whole(graph, runs[0])
        return
    first, second = runs
    for info in graph.inputs:
        graph.shapes[info.name] = info.shape or ()
        graph.dtypes[info.name] = info.dtype
        graph.seen[info.name] = (BATCHES[0], *(info.shape or ()))
    for name, a in first.items():
        b = second[name]
        graph.seen[name] = a.shape
        if name in graph.activations:
            graph.dtypes[name] = a.dtype.name
        if name not in graph.activations:
            if same(a, b):
                graph.constants[name] = a
            elif _follows_batch(a, b) and same(a, np.repeat(b[:1], BATCHES[0], 0)):
                # Zeros, say, in the shape of the batch: one sample's part stands for all.
                graph.constants[name] = a[:1]
        elif _follows_batch(a, b):
            graph.shapes[name] = a.shape[1:]
            if a.dtype.kind == "f" and not np.allclose(a, b[: BATCHES[0]], rtol=1e-3, atol=1e-3, equal_nan=True):
                graph.failure = ShapeError(f"samples of a batch must not influence each other; in {name!r} they do")


def _note_whole(graph: Graph, values: Mapping[str, Array]) -> None:
    for info in graph.inputs:
        graph.shapes[info.name] = graph.seen[info.name] = info.shape or ()
        graph.dtypes[info.name] = info.dtype
    for name, value in values.items():
        graph.seen[name] = value.shape
        if name not in graph.activations:
            graph.constants[name] = value
        else:
            graph.shapes[name], graph.dtypes[name] = value.shape, value.dtype.name


def same(a: Array, b: Array) -> bool:
    """Return whether two arrays are equal in type, shape and every number; what is no number equals its like."""
    return a.dtype == b.dtype and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _follows_batch(a: Array, b: Array) -> bool:
    return (a.shape[:1], b.shape[:1]) == ((BATCHES[0],), (BATCHES[1],)) and a.shape[1:] == b.shape[1:]


class _Probe:
    """A model that onnxruntime runs with any batch and every value as an output."""

    def __init__(self, model: ModelProto, protos: list[NodeProto], left_out: list[NodeProto], graph: Graph) -> None:
        self._model, self._protos, self._left_out, self._graph = model, protos, left_out, graph
        names = {id(p) for p in left_out}
        lost = set[str]().union(*(p.output for p in left_out))
        # What nodes left out make is fed as an input where the file tells its shape; the rest stays unknown.
        self._fed = {x.name: x.type for x in model.graph.value_info if x.name in lost and _is_static(x)}
        unknown = reach(protos, lost - self._fed.keys() - {""}, through_shape=True)
        self._kept = [p for p in protos if id(p) not in names and not unknown.intersection({*p.input, *captured(p)})]
        # Of a node the first output says what it does, also where only others are used.
        self._wanted = [x for p in self._kept for i, x in enumerate(p.output) if x in graph.used or (x and not i)]
        self._run: Callable[..., list[Any]] | None = None
        try:
            if self._wanted:
                self._run = runtime.prober(self._runnable())
        except runtime.ERRORS as error:
            raise BundleError(
                f"the file must be a model that onnxruntime accepts; it says: {runtime.reason(error)}"
            ) from None

    def run(self, batch: int | None) -> dict[str, Array]:
        """Return every value for `batch` samples, the same first samples at each call, or for None of the model whole.

        Raises:
            ShapeError: the model does not run.
        """
        lead = () if batch is None else (batch,)
        feeds = {x.name: _sample((*lead, *(x.shape or ())), x.dtype) for x in self._graph.inputs}
        for name, kind in self._fed.items():
            shape = [d.dim_value for d in kind.tensor_type.shape.dim]
            feeds[name] = _sample((*lead, *shape[len(lead) :]), "float32")
        fed = {name: feeds[name] for name in self._fed}
        if self._run is None:
            return fed
        try:
            values = self._tried(self._run, feeds)
        except runtime.TooCostly:
            raise
        except runtime.ERRORS as error:
            raise ShapeError(
                f"the model must run{'' if batch is None else f' with a batch of {batch}'}; onnxruntime says: "
                f"{runtime.reason(error)}"
            ) from None
        return fed | {k: v for k, v in zip(self._wanted, values, strict=True) if isinstance(v, np.ndarray)}

    def _tried(self, run: Callable[..., list[Any]], feeds: dict[str, Array]) -> list[Any]:
        """Return the wanted values; where that fails, for the last place of each table, which one of 1 row has too."""
        signed = [name for name, x in feeds.items() if x.dtype.kind == "i"]
        try:
            return run(self._wanted, feeds)
        except runtime.TooCostly:
            raise
        except runtime.ERRORS:
            if not signed:
                raise
        return run(self._wanted, feeds | {name: np.full_like(feeds[name], -1) for name in signed})

    def with_free_batch(self, batch: int) -> "_Probe":
        """Return a probe whose reshapes to constant shapes keep any batch where they kept the fixed one."""
        before = self.run(batch)
        rooted = reach(self._protos, {x.name for x in self._graph.inputs}, through_shape=True)
        model = ModelProto.FromString(self._model.SerializeToString())
        protos = [NodeProto.FromString(p.SerializeToString()) for p in self._protos]
        for proto in protos:
            made = before.get(proto.output[0])
            if proto.op_type != "Reshape" or proto.domain or made is None or proto.input[1] in rooted:
                continue
            if proto.output[0] in self._graph.activations and made.shape[:1] == (batch,):
                name = f"{proto.output[0]}/free_shape"
                shape = np.array([-1, *made.shape[1:]], dtype=np.int64)
                model.graph.initializer.append(onnx.numpy_helper.from_array(shape, name))
                proto.input[1] = name
        left_out = [p for p, old in zip(protos, self._protos, strict=True) if any(old is x for x in self._left_out)]
        return _Probe(model, protos, left_out, self._graph)

    def _runnable(self) -> ModelProto:
        """Build the model that is run: free batch, no claims about shapes, only what was kept."""
        copy = ModelProto(ir_version=runtime.IR_VERSION)
        copy.opset_import.extend(self._model.opset_import)
        graph = copy.graph
        graph.name = "probe"
        graph.node.extend(self._kept)
        graph.initializer.extend(self._model.graph.initializer)
        made = {x.name for x in self._model.graph.initializer}
        for x in self._model.graph.input:
            if x.name not in made:
                graph.input.append(x)
                if self._graph.whole:
                    graph.input[-1].type.tensor_type.ClearField("shape")
                else:
                    graph.input[-1].type.tensor_type.shape.dim[0].dim_param = "batch"
        for name, kind in self._fed.items():
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind.tensor_type.elem_type, None))
        graph.output.extend(ValueInfoProto(name=name) for name in self._wanted)
        return copy


def _is_static(x: ValueInfoProto) -> bool:
    dims = x.type.tensor_type.shape.dim
    return bool(dims) and all(d.dim_value > 0 for d in dims[1:]) and dtype_of(x) == "float32"


def _sample(shape: Shape, dtype: str) -> Array:
    """Return numbers to find out shapes with: sample i is the same in every batch."""
    kind = np.dtype(dtype).kind
    if not shape:
        return np.asarray(0.5 if kind == "f" else 1).astype(dtype)
    # Drawn in order: a larger batch begins with the same samples.
    numbers = np.random.default_rng(0).standard_normal(shape)
    if kind in "iu":
        # They may be places in a table, however small, or a model may divide by them.
        numbers = np.where(numbers < 0, -1 if kind == "i" else 2, 1)
    return numbers.astype(dtype)
