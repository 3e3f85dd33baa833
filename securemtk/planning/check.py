"""Does this ONNX file run? Everything that stands in the way, and what each layer costs to compute."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ParamSpec

import numpy as np

from protocols.errors import BundleError, RangeError, ShapeError
from protocols.program.program import Layer, Shape
from protocols.running.ranges import LayerRange
from protocols.running.replay import Network
from securemtk.onnx.building.lower import lower
from securemtk.onnx.examine import Examination, examine, lossy_constants
from securemtk.onnx.importer import Params, Understood, assemble, layers_of, out_of_range, understand
from securemtk.onnx.model.declared import shapes_at
from securemtk.onnx.model.graph import Graph, Node, ValueInfo
from securemtk.onnx.model.inputs import input_arrays
from securemtk.onnx.model.problems import Problem, UnsupportedNodes, foreseen
from securemtk.onnx.model.reading import Proto, Source, read_proto
from securemtk.planning.estimate import Estimate, estimate_prediction


@dataclass(frozen=True)
class NodeStatus:
    """One node: "supported", "constant" (computed at import), "unsupported", or "unknown" behind an unsupported one."""

    name: str
    op_type: str
    status: str


@dataclass(frozen=True)
class LayerWork:
    """What one layer computes for one sample.

    Args:
        op: operator of `protocols.program.program.OPERATORS`.
        name: the layer's name.
        shape: shape of its result.
        parameters: number of the keeper's values.
        macs: multiplications of secret by secret or by a parameter.
        comparisons: of secret values, one for each knot of a piecewise function.
    """

    op: str
    name: str
    shape: Shape
    parameters: int
    macs: int
    comparisons: int


@dataclass(frozen=True)
class CheckReport:
    """The answer of `check`.

    Args:
        ok: whether `load_onnx` accepts the model.
        inputs: the model's inputs; shapes are of one sample.
        outputs: the model's outputs; a shape is None where it could not be found out.
        nodes: every node that an output depends on.
        unsupported: everything that stands in the way.
        layers: the layers of the program; of a model that is not ok, those of its supported nodes.
        found: what sample data say of ranges and answers; nothing where there was none, but for `constants`.
        estimate: what a prediction costs; None for a model that is not ok.
    """

    ok: bool
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    nodes: tuple[NodeStatus, ...]
    unsupported: tuple[Problem, ...]
    layers: tuple[LayerWork, ...]
    found: Examination = field(default_factory=Examination)
    estimate: Estimate | None = None

    @property
    def ranges(self) -> tuple[LayerRange, ...]:
        """How near sample data brought each layer to the bounds of fixed point; empty where there was none."""
        return self.found.ranges

    @property
    def in_range(self) -> bool:
        """Whether all values stayed below their bounds; True where nothing was measured."""
        return self.found.in_range

    @property
    def right(self) -> bool:
        """Whether answers on sample data are within 1 % of onnxruntime's largest; True where nothing was measured."""
        return self.found.right

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers, with the sums over layers as `total`."""
        report = asdict(self)
        report["unsupported"] = [problem._asdict() for problem in self.unsupported]
        del report["found"]
        report["ranges"] = [asdict(row) | {"share": row.share, "headroom": row.headroom} for row in self.ranges]
        report["in_range"] = self.in_range
        report["errors"] = [asdict(row) | {"share": row.share} for row in self.found.errors]
        report["answers"] = [asdict(row) | {"share": row.share} for row in self.found.answers]
        report["constants"] = [asdict(row) for row in self.found.constants]
        report["right"] = self.right
        report["estimate"] = None if self.estimate is None else self.estimate.to_dict()
        counted = ("parameters", "macs", "comparisons")
        return report | {"total": {name: sum(getattr(x, name) for x in self.layers) for name in counted}}


Reports = ParamSpec("Reports")


def _reported(function: Callable[Reports, CheckReport]) -> Callable[Reports, CheckReport]:
    """Let a function report what it would raise of a model's nodes."""

    @functools.wraps(function)
    def reported(*args: Reports.args, **given: Reports.kwargs) -> CheckReport:
        try:
            return function(*args, **given)
        except UnsupportedNodes as error:
            return CheckReport(False, (), (), (), tuple(error.nodes), ())

    return reported


@_reported
def check(
    source: Source,
    sample: Any = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    batch: int = 1,
    protocol: str = "fss",
    gated: bool = False,
    network: Network | None = None,
    shapes: Mapping[str, Shape] | None = None,
) -> CheckReport:
    """Tell whether a model can be run, without raising for one that cannot.

    A model that does not keep its batch as the first axis is judged for one batch: that of the sample or `batch`.

    Args:
        source: path of an ONNX file, or its bytes.
        sample: data as `Model.predict` takes it, for `CheckReport.found`: the model runs on it in the clear, in
            onnxruntime and in fixed point.
        low, high: allowed values of the sample.
        batch, protocol, gated, network: of the prediction whose cost is estimated, as `estimate_prediction` takes them.
        shapes: the whole shape of each input, as `load_onnx` takes them.

    Returns:
        A report that names every unsupported node at once.

    Raises:
        BundleError: the file cannot be read as an ONNX model.
        InputError, TypeError: the model runs, and the sample or the batch does not fit it; or the shapes do not.
        UnsupportedError: an unknown protocol.
    """
    model = read_proto(source)
    understood, batch = _understood(model, shapes, sample, batch)
    graph, problems = understood.graph, list(understood.problems)
    if isinstance(graph.failure, BundleError) and not problems:
        raise graph.failure
    if graph.failure is not None:
        problems.append(Problem("model", "model", str(graph.failure), "see the reason"))
    found = Examination()
    estimate: Estimate | None = None
    layers: tuple[Layer, ...] = ()
    params: Params = {}
    try:
        with foreseen():
            layers, params = layers_of(lower([step for step in understood.steps if step.op != "identity"]))
    except RangeError as error:
        problems.append(Problem("model", "model", str(error), "mend the node's numbers"))
    if not problems:
        imported = assemble(graph, understood.steps)
        layers, params = imported.program.layers, imported.params
        remedy = "train or scale the model to smaller weights"
        problems = [Problem(layer, "parameter", reason, remedy) for layer, reason in out_of_range(imported)]
        if not problems:
            found = Examination(constants=lossy_constants(imported))
        if sample is not None and not problems:
            inputs = input_arrays(imported.program.inputs, sample, low, high, whole=imported.program.whole)
            found = examine(model, imported, inputs, protocol)
        if not problems:
            estimate = estimate_prediction(imported.program, batch, protocol, gated=gated, network=network)
    return CheckReport(
        ok=not problems,
        inputs=graph.inputs,
        outputs=graph.output_info(),
        nodes=_statuses(graph, problems),
        unsupported=tuple(problems),
        layers=_costs(layers, params, graph.shapes),
        found=found,
        estimate=estimate,
    )


def _understood(model: Proto, given: Mapping[str, Shape] | None, sample: Any, batch: int) -> tuple[Understood, int]:
    """Return what is known of a model, and the batch of its program.

    A model that does not keep its batch as the first axis runs as a whole, for the shapes of one prediction.
    """
    if given is not None:
        found = understand(model, given)
        return found, 1 if found.graph.whole else batch
    by_samples = understand(model)
    first = next(iter(sample.values()), None) if isinstance(sample, Mapping) else sample
    n = batch if first is None else (*np.shape(first), 0)[0]
    # Nothing was seen of one that does not run with every batch; one that onnxruntime refuses runs with none.
    graph = by_samples.graph
    in_nodes = graph.failure is None and bool(by_samples.problems)
    by_batch = isinstance(graph.failure, ShapeError) and not graph.seen
    shapes = shapes_at(model, n) if (in_nodes or by_batch) and n > 0 else None
    whole = None if shapes is None else understand(model, shapes)
    return (by_samples, batch) if whole is None or not whole.ok else (whole, 1)


def _statuses(graph: Graph, problems: list[Problem]) -> tuple[NodeStatus, ...]:
    refused = {(p.name, p.op_type) for p in problems}

    def status(node: Node) -> str:
        if (node.name, node.op_type) in refused:
            return "unsupported"
        if not graph.activations.intersection(node.outputs):
            return "constant"
        return "supported" if node.outputs[0] in graph.shapes else "unknown"

    # Both tuples keep the file's order; names are unique.
    return tuple(NodeStatus(n.name, n.op_type, status(n)) for n in (*graph.constant_nodes, *graph.nodes))


def _costs(layers: Sequence[Layer], params: Params, known: Mapping[str, Shape]) -> tuple[LayerWork, ...]:
    shapes = dict(known)
    costs: list[LayerWork] = []
    for layer in layers:
        shapes[layer.output] = layer.shape
        sizes = {role: params[name].shape for role, name in layer.params.items()}
        source = shapes[layer.inputs[0]]
        costs.append(
            LayerWork(
                op=layer.op,
                name=layer.name,
                shape=layer.shape,
                parameters=sum(math.prod(size) for size in sizes.values()),
                macs=math.prod(layer.shape) * _macs(layer, source, sizes),
                comparisons=_comparisons(layer, source),
            )
        )
    return tuple(costs)


def _macs(layer: Layer, source: Shape, sizes: Mapping[str, Shape]) -> int:
    """Return the multiplications for each element of a layer's result."""
    if layer.op == "conv2d":
        return math.prod(sizes["weight"][1:])
    if layer.op == "matmul":
        return sizes["weight"][0]
    if layer.op == "dot":
        return source[-1]
    return int(layer.op in ("affine", "mul"))


def _comparisons(layer: Layer, shape: Shape) -> int:
    n = math.prod(layer.shape)
    if layer.op == "spline":
        return n * len(layer.ints("knots"))
    if layer.op == "max_pool2d":
        return n * (math.prod(layer.ints("kernel")) - 1)
    if layer.op in ("max", "argmax"):
        return math.prod(shape) - n
    return n if layer.op == "relu" else 0
