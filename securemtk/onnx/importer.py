"""From an ONNX file to a public `Program` and the keeper's parameters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from protocols.errors import BundleError, InputError, NeedsInputs, RangeError
from protocols.program.program import OPERATORS, Layer, Program, Shape
from protocols.running.precision import Exact
from securemtk.onnx.building.lower import lower
from securemtk.onnx.building.registry import LIMIT, RULES, Step, affine, param, reshaped
from securemtk.onnx.building.scales import weight_bits
from securemtk.onnx.model.analyse import analyse
from securemtk.onnx.model.declared import bound, fixed_shapes, shapes_remedy
from securemtk.onnx.model.graph import Array, Graph, ValueInfo, unique
from securemtk.onnx.model.problems import Problem, UnsupportedNodes, foreseen, is_unforeseen
from securemtk.onnx.model.public import public_inputs
from securemtk.onnx.model.reading import Source, read_proto
from securemtk.onnx.passes.all_passes import run_passes
from securemtk.onnx.rules.all_rules import translate

Params = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Imported:
    """A model in our terms.

    Args:
        program: what is computed; public.
        params: name -> float32 array, in the layout that `program.OPERATORS` documents; the keeper's secret.
        inputs: the model's inputs; shapes are of one sample, without the batch.
        outputs: the model's outputs.
        batch: the batch that the file fixes, None when it leaves it free; the program takes any.
        exact: layer -> the function of one variable, on float64 arrays, that it approximates.
    """

    program: Program
    params: Params = field(repr=False)
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    batch: int | None = None
    exact: Mapping[str, Exact] = field(default_factory=dict, repr=False)


def load_onnx(
    source: Source, shapes: Mapping[str, Shape] | None = None, public: Mapping[str, Array] | None = None
) -> Imported:
    """Read any ONNX model whose operators are supported.

    Constants are folded, batch normalisation and other affine layers are folded into the linear layer before them, and
    an absent bias becomes zeros. The batch may be free or fixed in the file; the program takes any.

    Args:
        source: path of a .onnx file, or its bytes.
        shapes: the whole shape of each input, for a model whose activations do not have the batch as their first axis
            and whose file leaves sizes free; those that the file fixes may be left out.
        public: input name -> value that takes the input's place in the clear.

    Returns:
        The program, its parameters, and the names, shapes and types of inputs and outputs.

    Raises:
        InputError: `shapes` or `public` do not fit the model's inputs.
        BundleError: the file is missing, damaged, cyclic, of an unknown opset, or no ONNX model.
        ShapeError: an axis other than the batch is free, or the model does not keep the samples of a batch apart.
        UnsupportedNodes: nodes that cannot be run, all of them (an UnsupportedError with `.nodes`); also in the place
            of any error that nobody foresaw.
        NeedsInputs: `shapes` or `public` might help.
        InputError: `shapes` or `public` name no inputs of the model.
        RangeError: parameters that are not finite or outside fixed point, all of them with their layers.
    """
    model = read_proto(source)
    understood = understand(model, shapes, public)
    with foreseen():
        _ask_for_inputs(model, understood, shapes, public or {})
    if understood.problems:
        raise UnsupportedNodes(understood.problems)
    if understood.graph.failure is not None:
        raise understood.graph.failure
    imported = assemble(understood.graph, understood.steps)
    if bad := out_of_range(imported):
        raise RangeError("; ".join(f"layer {layer!r}: {reason}" for layer, reason in bad))
    return imported


def _ask_for_inputs(
    model: ModelProto, understood: "Understood", shapes: Mapping[str, Shape] | None, public: Mapping[str, Array]
) -> None:
    """Raise NeedsInputs where a model that cannot be understood might be, if more were known of its inputs."""
    if understood.ok:
        return
    missing = [name for name in public_inputs(model) if name not in public]
    needs_shapes = shapes is None and fixed_shapes(model, {}) is None
    unknown = any(p.op_type not in RULES and p.op_type not in ("input", "output") for p in understood.problems)
    unknown = unknown or any(map(is_unforeseen, understood.problems))
    is_broken = isinstance(understood.graph.failure, BundleError) and not understood.problems
    if unknown or is_broken or not (missing or needs_shapes):
        return
    why = str(understood.graph.failure) if not understood.problems else str(UnsupportedNodes(understood.problems))
    remedy = shapes_remedy(model)
    asked = ["the whole shape of each input" + f" ({remedy})" * (remedy not in why)] * needs_shapes
    asked += [f"the values of {', '.join(map(repr, missing))} in the clear"] * bool(missing)
    raise NeedsInputs(f"{why}\nwith {' and '.join(asked)} it may run", needs_shapes, missing, understood.problems)


@dataclass(frozen=True)
class Understood:
    """What is known of a model: its graph, its nodes as steps, and all that stands in the way."""

    graph: Graph
    steps: list[Step]
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.problems and self.graph.failure is None


def understand(
    model: ModelProto, shapes: Mapping[str, Shape] | None = None, public: Mapping[str, Array] | None = None
) -> Understood:
    """Translate a model by samples or, where its inputs have fixed shapes and that fails, as a whole.

    Args:
        model: as `read_proto` returns it.
        shapes: the whole shape of each input whose sizes the file leaves free; None for those that the file fixes, if
            it does.
        public: input name -> value that takes the input's place in the clear.

    Raises:
        InputError: `shapes` or `public` do not fit the model's inputs.
        BundleError: as `analyse`.
    """
    if public:
        _check_names("a public input", public, model)
        model = bound(model, public)
    _check_names("a shape", shapes or {}, model)
    whole_shapes = fixed_shapes(model, shapes or {})
    if shapes is not None and whole_shapes is None:
        raise InputError("the shapes must be given of all inputs whose sizes the file leaves free")
    by_samples = _translated(model)
    if by_samples.ok or not whole_shapes:
        return by_samples
    whole = _translated(model, whole_shapes)
    # Of two refusals the one by samples is told, unless shapes were asked for or it did not come to the nodes: it names
    # what a free batch needs.
    return whole if whole.ok or shapes is not None or by_samples.graph.failure is not None else by_samples


def _translated(model: ModelProto, shapes: Mapping[str, Shape] | None = None) -> Understood:
    with foreseen():
        graph = analyse(model, RULES, shapes)
        return Understood(graph, *translate(graph))


def _check_names(what: str, given: Mapping[str, object], model: ModelProto) -> None:
    weights = {t.name for t in model.graph.initializer}
    known = [x.name for x in model.graph.input if x.name not in weights]
    strange = sorted(set(given) - set(known))
    if strange:
        raise InputError(f"{what} must be for one of the inputs {', '.join(known) or 'none'}; got {', '.join(strange)}")


def assemble(graph: Graph, steps: Sequence[Step]) -> Imported:
    """Turn a model's steps into a validated program; its parameters may be any.

    Raises:
        UnsupportedNodes: nobody foresaw what stands in the way.
    """
    with foreseen():
        return _assembled(graph, steps)


def _assembled(graph: Graph, steps: Sequence[Step]) -> Imported:
    inputs = {x.name: x.shape or () for x in graph.inputs}
    steps = [*steps, *_constant_outputs(graph)]

    def build(*, merging: bool) -> Imported:
        lowered = lower(run_passes(steps, inputs, graph.outputs, merging=merging))
        layers, params = layers_of(lowered)
        exact = {layer.name: s.exact for layer, s in zip(layers, lowered, strict=True) if s.exact is not None}
        shapes = {name: value.shape for name, value in params.items()}
        program = Program(inputs, graph.outputs, layers, shapes, whole=graph.whole)
        program.validate()
        return Imported(program, params, graph.inputs, graph.output_info(), graph.batch, exact)

    imported = build(merging=True)
    # A product of parameters may be too large where none of them is.
    return build(merging=False) if out_of_range(imported) else imported


def _constant_outputs(graph: Graph) -> list[Step]:
    """Return steps that make the outputs that are the same whatever the input: nothing of it, plus the constant."""
    steps: list[Step] = []
    for name in graph.outputs:
        if name in graph.activations or name not in graph.constants:
            continue
        source = graph.inputs[0]
        value = graph.constants[name].astype(np.float64)
        value = value if graph.whole else value[:1].reshape(value.shape[1:])
        size, flat, one, none = max(value.size, 1), f"{name}/flat", f"{name}/one", f"{name}/none"
        count = math.prod(source.shape or ())
        steps += [
            reshaped(f"{name}/flatten", source.name, flat, (count,)),
            Step("take", f"{name}/pick", (flat,), one, (1,), attrs={"axis": 1, "indices": (0,), "fill": 0}),
            Step("scale", f"{name}/forget", (one,), none, (1,), attrs={"factor": 0, "offset": 0}),
            Step("expand", f"{name}/widen", (none,), f"{name}/wide", (size,), attrs={"shape": (size,)}),
            affine(f"{name}/constant", f"{name}/wide", f"{name}/values", (size,), shift=value.reshape(1, size)),
            reshaped(f"{name}/shape", f"{name}/values", name, value.shape),
        ]
    return steps


def layers_of(steps: Sequence[Step]) -> tuple[tuple[Layer, ...], Params]:
    """Split steps into layers with parameter names (layer's name, dot, role) and float32 values."""
    names: set[str] = set()
    params: Params = {}
    layers: list[Layer] = []
    for step in steps:
        name = unique(step.name, names)
        roles = {role: f"{name}.{role}" for role in OPERATORS[step.op][1]}
        with np.errstate(all="ignore"):
            params |= {key: np.array(param(step, role), np.float32, order="C") for role, key in roles.items()}
            bits = weight_bits(step)
        layers.append(Layer(step.op, name, step.inputs, step.output, step.shape, roles, dict(step.attrs), bits))
    return tuple(layers), params


def out_of_range(imported: Imported) -> list[tuple[str, str]]:
    """Return (layer, what is wrong) for every parameter that is not finite or outside fixed point."""
    found = []
    for layer in imported.program.layers:
        for name in layer.params.values():
            largest = float(np.abs(imported.params[name]).max(initial=0.0))
            if not math.isfinite(largest):
                found.append((layer.name, f"parameter {name!r} must be finite; got nan or infinity"))
            elif largest >= LIMIT:
                rule = f"parameter {name!r} must stay below {LIMIT:g} in magnitude"
                found.append((layer.name, f"{rule}; its largest is {largest:g}"))
    return found
