"""Formulas that exporters write for well-known functions: found, agreeing with onnxruntime, and never made up."""

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx_models import agrees, build, ops, torchscript
from torch import Tensor, nn

from securemtk.onnx.building.registry import RULES, Step
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.model.analyse import analyse
from securemtk.onnx.passes.formulas import known_functions
from securemtk.onnx.passes.net import Net
from securemtk.onnx.passes.simplify import drop_dead, shorten_reshapes
from securemtk.onnx.rules.all_rules import translate

OP = onnx.helper.make_node


class Formula(nn.Module):
    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x)


def exported(formula: Callable[[Tensor], Tensor], opset: int = 17) -> bytes:
    return torchscript(Formula(formula), (torch.randn(2, 40),), opset, ["y"], free=True)


def found(data: bytes) -> list[Step]:
    """The steps of a model when nothing but formulas has been looked for."""
    graph = analyse(onnx.load_from_string(data), RULES)
    steps, problems = translate(graph)
    assert not problems
    net = Net(tuple(steps), {x.name: x.shape for x in graph.inputs}, graph.outputs)
    return list(drop_dead(known_functions(shorten_reshapes(net))).steps)


ROOT = math.sqrt(2 / math.pi)
FORMULAS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "gelu": [
        nn.functional.gelu,
        lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
        lambda x: 0.5 * (x * (torch.erf(x * math.sqrt(0.5)) + 1.0)),
        lambda x: x * ((torch.erf(x / math.sqrt(2.0)) + 1.0) * 0.5),
        lambda x: 0.5 * x + 0.5 * x * torch.erf(x / math.sqrt(2.0)),
    ],
    "gelu_tanh": [
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    ],
    "sigmoid": [lambda x: torch.reciprocal(torch.exp(-x) + 1.0), lambda x: torch.reciprocal(1.0 + torch.exp(x * -1.0))],
    "silu": [nn.functional.silu, lambda x: torch.sigmoid(x) * x],
    "mish": [nn.functional.mish, lambda x: x * torch.tanh(nn.functional.softplus(x))],
    "hard_swish": [
        nn.functional.hardswish,
        lambda x: x * nn.functional.hardsigmoid(x),
        lambda x: x * (nn.functional.relu6(x + 3.0) / 6.0),
        lambda x: x * nn.functional.relu6(x + 3.0) / 6.0,
        lambda x: x * torch.clamp(x / 6.0 + 0.5, 0.0, 1.0),
    ],
    "function": [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: nn.functional.relu6(x + 3.0) / 6.0,
        lambda x: torch.clamp(x / 6.0 + 0.5, 0.0, 1.0),
        nn.functional.hardsigmoid,
    ],
}
CASES = [(op, i) for op, formulas in FORMULAS.items() for i in range(len(formulas))]


@pytest.mark.parametrize(("op", "number"), CASES)
def test_a_formula_of_torch_is_one_function_and_agrees_with_onnxruntime(op, number):
    data = exported(FORMULAS[op][number])
    steps = found(data)
    assert steps[-1].op == op
    assert len(steps) == 1
    imported: Imported = agrees(data, atol=3e-4)
    assert ops(imported) == ["spline"]


def test_a_formula_is_found_behind_a_layer_and_before_another_one():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3), nn.SiLU())
    imported = agrees(torchscript(network, (torch.randn(2, 8),), 17, ["y"], free=True), atol=5e-4)
    assert ops(imported) == ["matmul", "spline", "matmul", "spline"]


NEARLY = {
    "another number": lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.5)),
    "another factor": lambda x: x * 0.4 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "another addend": lambda x: x * 0.5 * (1.1 + torch.erf(x / math.sqrt(2.0))),
    "another variable": lambda x: x * torch.sigmoid(x.flip(1)),
    "another slope": lambda x: x * torch.sigmoid(1.5 * x),
    "squared": lambda x: x * x * torch.sigmoid(x),
    "other bounds": lambda x: x * torch.clamp(x + 3.0, 0.0, 5.0) / 6.0,
    "another sum": lambda x: 1.0 / (2.0 + torch.exp(-x)),
    "another sign": lambda x: 1.0 / (1.0 + torch.exp(x)),
    "the heart squared": lambda x: torch.sigmoid(x) * torch.sigmoid(x),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_only_nearly_a_formula_stays(name):
    graph = analyse(onnx.load_from_string(exported(NEARLY[name], 17)), {*RULES, "Slice"})
    net = Net(tuple(translate(graph)[0]), {x.name: x.shape for x in graph.inputs}, graph.outputs)
    assert known_functions(net).layout() == net.layout()


def test_constants_for_each_channel_are_no_formula():
    nodes = [OP("Mul", ["x", "a"], ["b"]), OP("Erf", ["b"], ["c"]), OP("Add", ["c", "one"], ["d"])]
    nodes += [OP("Mul", ["d", "x"], ["e"]), OP("Mul", ["e", "half"], ["y"])]
    weights = {"a": np.full(4, math.sqrt(0.5), np.float32), "one": np.float32(1), "half": np.float32(0.5)}
    imported = agrees(build(nodes, {"x": ["n", 4]}, ["y"], weights))
    assert "mul" in ops(imported)


@pytest.mark.parametrize("also", ["c", "d"])
def test_a_formula_stays_when_its_parts_are_wanted_too(also):
    nodes = [OP("Sigmoid", ["x"], ["c"]), OP("Mul", ["c", "two"], ["d"]), OP("Mul", ["d", "x"], ["e"])]
    nodes += [OP("Mul", ["e", "half"], ["y"])]
    weights = {"two": np.float32(2), "half": np.float32(0.5)}
    model = build(nodes, {"x": ["n", 4]}, ["y", also], weights)
    assert "mul" in ops(agrees(model))
    assert ops(load_onnx(build(nodes, {"x": ["n", 4]}, ["y"], weights).SerializeToString())) == ["spline"]
