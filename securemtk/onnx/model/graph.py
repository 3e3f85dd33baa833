"""What is known about a model before it is translated: which values are constant, and every value's shape.

No rule folds constants or infers shapes. The graph is run by onnxruntime with batches of 2 and of 3 samples and every
value as an output: a value that does not depend on the input and is the same in both runs is a constant, whatever it
was made of, and an activation's shape is what was seen, with the batch where it was seen.

A model is understood in one of two ways. By samples: the first axis of every activation is the batch, which may be
free, and shapes are those of one sample. As a whole: every size is given, no axis is special, and the whole of each
input is the one sample of a prediction; ONNX's axis a is then our axis a + 1. `Graph.axis` and `Graph.rank` hide which.
"""

import math
import shlex
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto

from protocols.errors import BundleError, InputError, ShapeError
from protocols.program.program import Shape
from securemtk.onnx.model import runtime
from securemtk.onnx.model.inputs import NUMBERS
from securemtk.onnx.model.opsets import opset_of
from securemtk.onnx.model.problems import Problem
from securemtk.onnx.model.reading import Source, captured, initializer, interface

Array = NDArray[Any]

_BATCHES = (2, 3)
# In one input, of all samples of a run: far more than a prediction under encryption can have.
MOST_NUMBERS = 1 << 27
# Their result is another at each run: never a constant.
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


@dataclass(frozen=True)
class ValueInfo:
    """An input or output of a model.

    Args:
        name: its name.
        shape: of one sample, without the batch axis (of a model understood as a whole, of the value itself); None
            when it could not be found out.
        dtype: name of its numpy type, such as "float32".
    """

    name: str
    shape: Shape | None
    dtype: str


@dataclass(frozen=True)
class Node:
    """One ONNX node, with Python values as attributes and "" in the place of an absent input."""

    name: str
    op_type: str
    domain: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]

    def input(self, index: int) -> str:
        """Return the name of an input, "" when it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass
class Graph:
    """A model's nodes, in order, and what is known about its values.

    Args:
        inputs: the model's inputs.
        outputs: names of its outputs, in order.
        nodes: the nodes that work on activations.
        constant_nodes: the nodes that do not; their results are in `constants`.
        constants: values that are the same whatever the input and the batch.
        activations: names of the values that depend on the input's numbers.
        shapes: shape of one sample of each activation that has the batch as its first axis.
        seen: shape of each value in a run with a batch of 2, where there was one.
        dtypes: numpy type of each activation.
        used: names of values that a node or the caller uses.
        problems: what is wrong with inputs and outputs.
        failure: why the model as a whole cannot be run, if it cannot.
        batch: the batch that the file fixes, None when it is free.
        whole: whether the model is understood as a whole.
    """

    inputs: tuple[ValueInfo, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constant_nodes: tuple[Node, ...]
    constants: dict[str, Array]
    activations: set[str]
    used: set[str]
    shapes: dict[str, Shape] = field(default_factory=dict)
    seen: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    failure: InputError | None = None
    batch: int | None = None
    whole: bool = False

    def rank(self, name: str) -> int:
        """Return the number of axes that an activation has in the model."""
        return len(self.shapes[name]) + (not self.whole)

    def axis(self, axis: int, rank: int) -> int:
        """Return our axis for an axis of a node, which may be negative, of a value with `rank` axes in the model."""
        return (axis + rank if axis < 0 else axis) + self.whole

    def output_info(self) -> tuple[ValueInfo, ...]:
        """Return the model's outputs with their shapes."""
        return tuple(self._info(x) for x in self.outputs)

    def _info(self, name: str) -> ValueInfo:
        constant = None if name in self.activations else self.constants.get(name)
        if constant is not None:
            return ValueInfo(name, constant.shape[not self.whole :], constant.dtype.name)
        return ValueInfo(name, self.shapes.get(name), self.dtypes.get(name, "unknown"))


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
    inputs = _real_inputs(model)
    failure, batch = None, None
    try:
        if shapes is None:
            infos, batch = _inputs(inputs)
        else:
            infos = tuple(ValueInfo(x.name, tuple(shapes[x.name]), dtype_of(x)) for x in inputs)
        _check_size(infos, 1 if shapes is not None else max(batch or 0, *_BATCHES))
    except ShapeError as error:
        infos, failure = tuple(ValueInfo(x.name, None, dtype_of(x)) for x in inputs), error
    activations = _reach(protos, {x.name for x in inputs}, through_shape=False)
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
        _observe(graph, model, protos, runnable)
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
    if value.shape[:1] == (1,) and graph.seen.get(name, ())[:1] == _BATCHES[:1]:
        return True
    return value.shape[:1] == (graph.batch,) and _same(value, np.repeat(value[:1], len(value), 0))


def fixed_shapes(model: ModelProto, given: Mapping[str, Shape]) -> dict[str, Shape] | None:
    """Return the whole shape of each input of a model, given or from the file; None where one is not fixed.

    Raises:
        ShapeError: a given shape contradicts the file.
    """
    shapes: dict[str, Shape] = {}
    for x in _real_inputs(model):
        if x.name in given:
            shapes[x.name] = tuple(given[x.name])
            _check_shape(f"the shape of input {x.name!r}", x, shapes[x.name])
            continue
        if not _is_fixed(x):
            return None
        shapes[x.name] = tuple(d.dim_value for d in x.type.tensor_type.shape.dim)
    return shapes


def shapes_remedy(model: ModelProto) -> str:
    """Return how the sizes that a model's file leaves free are given, in words."""
    return _told(_real_inputs(model))


def _told(inputs: list[ValueInfoProto]) -> str:
    """Return what gives the shapes of inputs, on the command line and in Python: N for each size that is free."""
    open_ones = [x for x in inputs if x.type.HasField("tensor_type") and not _is_fixed(x)] or inputs
    forms = {x.name: [str(d.dim_value or "N") for d in x.type.tensor_type.shape.dim] for x in open_ones}
    options = " ".join("--shape " + shlex.quote(f"{name}={','.join(sizes)}") for name, sizes in forms.items())
    shapes = ", ".join(f"{name!r}: ({', '.join(sizes)}{',' * (len(sizes) == 1)})" for name, sizes in forms.items())
    return f"give them with check {options}, in Python with shapes={{{shapes}}}, a number for each N"


def _is_fixed(x: ValueInfoProto) -> bool:
    kind = x.type.tensor_type
    return bool(kind.HasField("shape")) and all(d.HasField("dim_value") and d.dim_value > 0 for d in kind.shape.dim)


def shapes_at(model: ModelProto, batch: int) -> dict[str, Shape] | None:
    """Return the whole shape of each input for a batch; None where the file leaves more than the first axis free."""
    shapes: dict[str, Shape] = {}
    for x in _real_inputs(model):
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in x.type.tensor_type.shape.dim]
        rest = tuple(n for n in sizes[1:] if n is not None)
        if not sizes or len(rest) < len(sizes) - 1 or 0 in sizes:
            return None
        shapes[x.name] = (batch if sizes[0] is None else sizes[0], *rest)
    return shapes


def bound(model: ModelProto, values: Mapping[str, Array]) -> ModelProto:
    """Return the model with some of its inputs made constants.

    Raises:
        InputError: a value's type or shape is not that of the input.
    """
    copy: ModelProto = ModelProto.FromString(model.SerializeToString())
    made = [_as_declared(x, values[x.name]) for x in _real_inputs(model) if x.name in values]
    kept = [x for x in copy.graph.input if x.name not in values]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    copy.graph.initializer.extend(made)
    return copy


def _real_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """Return the inputs that no initializer fills."""
    weights = {t.name for t in model.graph.initializer}
    return [x for x in model.graph.input if x.name not in weights]


def _as_declared(x: ValueInfoProto, value: Array) -> onnx.TensorProto:
    array, dtype = np.asarray(value), dtype_of(x)
    if dtype == "unknown" or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise InputError(f"public input {x.name!r} must be an array of {dtype}; got {array.dtype}")
    _check_shape(f"the shape of public input {x.name!r}", x, array.shape, least=0)
    return onnx.numpy_helper.from_array(array.astype(dtype), x.name)


def _check_shape(what: str, x: ValueInfoProto, shape: Shape, least: int = 1) -> None:
    """Raise ShapeError unless a shape has the sizes that the file fixes, each at least `least`."""
    kind = x.type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    fits = not kind.HasField("shape") or len(sizes) == len(shape)
    others = any(n not in (None, m) for n, m in zip(sizes, shape, strict=False))
    if not fits or min(shape, default=least) < least or others:
        names = [d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in kind.shape.dim]
        form = ", ".join(map(str, names))
        raise ShapeError(f"{what} must be of the form ({form}), at least {least}; got {tuple(shape)}")


def _inputs(inputs: list[ValueInfoProto]) -> tuple[tuple[ValueInfo, ...], int | None]:
    """Return the inputs without their batch axis, and the batch if the model fixes it."""
    if not inputs:
        raise ShapeError("a model must have at least one input; got none")
    infos: list[ValueInfo] = []
    batches: set[int] = set()
    for x in inputs:
        kind = x.type.tensor_type
        if dtype_of(x) == "unknown" or not kind.HasField("shape") or not kind.shape.dim:
            raise ShapeError(f"input {x.name!r} must be an array of known type and rank, batch first")
        first, *rest = kind.shape.dim
        if first.HasField("dim_value"):
            batches.add(first.dim_value)
        for axis, dim in enumerate(rest, 1):
            if not dim.HasField("dim_value") or dim.dim_value < 1:
                what = dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?")
                raise ShapeError(
                    f"axis {axis} of input {x.name!r} must have a fixed size of at least 1; got {what!r}; only the "
                    f"batch may be free: {_told(inputs)}, or export again with fixed sizes"
                )
        infos.append(ValueInfo(x.name, tuple(d.dim_value for d in rest), dtype_of(x)))
    if len(batches) > 1 or batches & {0}:
        raise ShapeError(f"the first axis of every input must be the batch, free or the same; got {sorted(batches)}")
    return tuple(infos), next(iter(batches), None)


Declared = tuple[str, list[int | str], str]


def declared(source: Source) -> tuple[list[Declared], list[Declared]]:
    """Return name, shape and dtype of a model's inputs and outputs as its file declares them; free sizes are names.

    Raises:
        BundleError: the file is missing or no ONNX model.
    """

    def said(x: ValueInfoProto) -> Declared:
        return x.name, sizes_of(x), dtype_of(x)

    inputs, outputs = interface(source)
    return [said(x) for x in inputs], [said(x) for x in outputs]


def sizes_of(x: ValueInfoProto) -> list[int | str]:
    """Return the sizes that a value is declared with; a name, or "?", for one that is free."""
    sizes = x.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in sizes]


def dtype_of(x: ValueInfoProto) -> str:
    """Return the name of a value's numpy type, "unknown" where there is none."""
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(x.type.tensor_type.elem_type)).name
    except KeyError:
        return "unknown"


def _needed(model: ModelProto) -> list[NodeProto]:
    """Return the nodes that some output depends on."""
    wanted = {x.name for x in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted |= {*node.input, *captured(node)} - {""}
    return kept[::-1]


def _reach(nodes: Iterable[NodeProto], sources: set[str], *, through_shape: bool) -> set[str]:
    """Return the values that depend on `sources`: on their numbers, or `through_shape` on their shapes too."""
    reached = set(sources)
    for node in nodes:
        inputs = list(node.input)
        if node.domain == "" and not through_shape:
            # Of these only shape and type count: of all inputs, or of those behind the first one.
            inputs = {"Shape": [], "Size": [], "CastLike": inputs[:1]}.get(node.op_type, inputs)
        if node.op_type in _RANDOM or reached.intersection(inputs) or reached & captured(node):
            reached |= set(node.output)
    return reached - {""}


def _name(protos: list[NodeProto]) -> None:
    """Give every node a name of its own; the standard asks for none, onnxruntime does."""
    names: set[str] = set()
    for i, proto in enumerate(protos):
        proto.name = unique(proto.name or f"{proto.op_type}_{i}", names)


def _node(proto: NodeProto, opset: int) -> Node:
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
    attrs = {k: v.decode(errors="replace") if isinstance(v, bytes) else v for k, v in attrs.items()}
    return Node(proto.name, proto.op_type, proto.domain, opset, tuple(proto.input), tuple(proto.output), attrs)


def unique(name: str, taken: set[str]) -> str:
    """Return `name`, or `name` with the first number that makes it new, and take it."""
    candidate, i = name, 2
    while candidate in taken:
        candidate, i = f"{name}_{i}", i + 1
    taken.add(candidate)
    return candidate


def _observe(graph: Graph, model: ModelProto, protos: list[NodeProto], runnable: Container[str]) -> None:
    """Run the model and note constants, shapes and types in `graph`, or why it cannot be run."""
    opset = opset_of(model)
    strange = [p for p in protos if p.domain != "" or not onnx.defs.has(p.op_type, opset, "")]
    without_rule = [p for p in protos if graph.activations.intersection(p.output) and p.op_type not in runnable]
    for left_out in (strange, strange + without_rule):
        try:
            probe = _Probe(model, protos, left_out, graph)
            if graph.batch is not None:
                probe = probe.with_free_batch(graph.batch)
            runs = [probe.run(b) for b in ((None,) if graph.whole else _BATCHES)]
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
        graph.seen[info.name] = (_BATCHES[0], *(info.shape or ()))
    for name, a in first.items():
        b = second[name]
        graph.seen[name] = a.shape
        if name in graph.activations:
            graph.dtypes[name] = a.dtype.name
        if name not in graph.activations:
            if _same(a, b):
                graph.constants[name] = a
            elif _follows_batch(a, b) and _same(a, np.repeat(b[:1], _BATCHES[0], 0)):
                # Zeros, say, in the shape of the batch: one sample's part stands for all.
                graph.constants[name] = a[:1]
        elif _follows_batch(a, b):
            graph.shapes[name] = a.shape[1:]
            if a.dtype.kind == "f" and not np.allclose(a, b[: _BATCHES[0]], rtol=1e-3, atol=1e-3, equal_nan=True):
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


def _same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _follows_batch(a: Array, b: Array) -> bool:
    return (a.shape[:1], b.shape[:1]) == ((_BATCHES[0],), (_BATCHES[1],)) and a.shape[1:] == b.shape[1:]


class _Probe:
    """A model that onnxruntime runs with any batch and every value as an output."""

    def __init__(self, model: ModelProto, protos: list[NodeProto], left_out: list[NodeProto], graph: Graph) -> None:
        self._model, self._protos, self._left_out, self._graph = model, protos, left_out, graph
        names = {id(p) for p in left_out}
        lost = set[str]().union(*(p.output for p in left_out))
        # What nodes left out make is fed as an input where the file tells its shape; the rest stays unknown.
        self._fed = {x.name: x.type for x in model.graph.value_info if x.name in lost and _is_static(x)}
        unknown = _reach(protos, lost - self._fed.keys() - {""}, through_shape=True)
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
        rooted = _reach(self._protos, {x.name for x in self._graph.inputs}, through_shape=True)
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
