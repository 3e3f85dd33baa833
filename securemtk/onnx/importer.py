"""From an ONNX file to a public `Program` and the keeper's parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from protocols.errors import RangeError
from protocols.program import Layer, Program
from securemtk.onnx.graph import Graph, ValueInfo, analyse, unique
from securemtk.onnx.problems import UnsupportedNodes
from securemtk.onnx.reading import Source, read_proto
from securemtk.onnx.registry import LIMIT, RULES, Step
from securemtk.onnx.rules import translate
from securemtk.onnx.tidy import tidy

Params = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Imported:
    """A model in our terms.

    Args:
        program: what is computed; public.
        params: name -> float32 array, in the layout that `protocols.program.OPERATORS` documents; the keeper's secret.
        inputs: the model's inputs; shapes are of one sample, without the batch.
        outputs: the model's outputs.
        batch: the batch that the file fixes, None when it leaves it free; the program takes any.
    """

    program: Program
    params: Params = field(repr=False)
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    batch: int | None = None


def load_onnx(source: Source) -> Imported:
    """Read any ONNX model whose operators are supported.

    Constants are folded, batch normalisation and other affine layers are folded into the linear layer before them, and
    an absent bias becomes zeros. The batch may be free or fixed in the file; the program takes any.

    Args:
        source: path of a .onnx file, or its bytes.

    Returns:
        The program, its parameters, and the names, shapes and types of inputs and outputs.

    Raises:
        BundleError: the file is missing, damaged, cyclic, of an unknown opset, or no ONNX model.
        ShapeError: an axis other than the batch is free, or the model does not keep the samples of a batch apart.
        UnsupportedNodes: nodes that cannot be run, all of them (an UnsupportedError with `.nodes`).
        RangeError: parameters that are not finite or outside fixed point, all of them with their layers.
    """
    graph = analyse(read_proto(source), RULES)
    steps, problems = translate(graph)
    if problems:
        raise UnsupportedNodes(problems)
    if graph.failure is not None:
        raise graph.failure
    imported = assemble(graph, steps)
    if bad := out_of_range(imported):
        raise RangeError("; ".join(f"layer {layer!r}: {reason}" for layer, reason in bad))
    return imported


def assemble(graph: Graph, steps: Sequence[Step]) -> Imported:
    """Turn a model's steps into a validated program; its parameters may be any."""
    inputs = {x.name: x.shape or () for x in graph.inputs}
    layers, params = layers_of(tidy(steps, inputs, graph.outputs))
    program = Program(inputs, graph.outputs, layers, {name: value.shape for name, value in params.items()})
    program.validate()
    return Imported(program, params, graph.inputs, graph.output_info(), graph.batch)


def layers_of(steps: Sequence[Step]) -> tuple[tuple[Layer, ...], Params]:
    """Split steps into layers with parameter names (layer's name, dot, role) and float32 values."""
    names: set[str] = set()
    params: Params = {}
    layers: list[Layer] = []
    for step in steps:
        name = unique(step.name, names)
        roles = {role: f"{name}.{role}" for role in step.params}
        with np.errstate(all="ignore"):
            params |= {roles[role]: np.array(value, np.float32, order="C") for role, value in step.params.items()}
        layers.append(Layer(step.op, name, step.inputs, step.output, step.shape, roles, dict(step.attrs)))
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
