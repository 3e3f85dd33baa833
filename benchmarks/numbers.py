"""Right numbers: cases in which fixed point is easily wrong, beside onnxruntime, in both protocols.

    python -m benchmarks.numbers                      remakes docs/numbers.md and results/numbers.json
    python -m benchmarks.numbers --only dump F.json   what this checkout answers, into a file

`results/numbers_before.json` is what commit 24b5a8b answers, made there with the second command (this file alone was
copied into that checkout). Each case is one prediction as two parties in one process, TLS apart; errors are those of
the worst of its values, relative to the largest right one.
"""

import argparse
import io
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks import encrypted, report
from protocols.errors import SecureError
from securemtk.onnx.importer import load_onnx
from securemtk.planning.check import check

BEFORE = report.RESULTS / "numbers_before.json"
DOCUMENT = report.ROOT / "docs" / "numbers.md"
PROTOCOLS = ("fss", "crypten")
Array = NDArray[Any]
HEAD = """# Right numbers, or a word

Made by `python -m benchmarks.numbers`. Each case is a small model on which fixed point with 16 fraction bits is easily
wrong: small constants, arguments outside a domain, values near the resolution, overflow, rewrites. *error* is the
largest difference from onnxruntime (float32), as a share of its largest answer; *before* is commit 24b5a8b. *told* is
what `securemtk check --sample` says of the same data: nothing ("right"), or that answers are wrong, with exit status 4,
or a warning. An answer that is more than 1 % off and not told would be an error of ours.
"""


def _f(*values: float) -> Array:
    return np.array(values, np.float32)


def _model(nodes: Sequence[Any], shape: Sequence[int], opset: int = 18, **constants: Array) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])
    y = onnx.ValueInfoProto(name="y")
    weights = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(list(nodes), "case", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10).SerializeToString()


_node = helper.make_node
_RNG = np.random.default_rng(7)


def _norm(op: str, shape: Sequence[int], x: Array, **attrs: Any) -> tuple[bytes, Array]:
    channels = shape[0] if op == "InstanceNormalization" else shape[-1]
    model = _model(
        [_node(op, ["x", "s", "b"], ["y"], **attrs)],
        shape,
        s=np.ones(channels, np.float32),
        b=np.zeros(channels, np.float32),
    )
    return model, x.astype(np.float32)


def _one(op: str, x: Array, inputs: Sequence[str] = ("x",), **constants: Array) -> tuple[bytes, Array]:
    rows = np.atleast_2d(np.asarray(x, np.float32))
    return _model([_node(op, inputs, ["y"])], rows.shape[1:], **constants), rows


def _scaler() -> tuple[bytes, Array]:
    mean, std = np.array([4000.0, 0.01, 50.0]), np.array([900.0, 0.003, 20.0])
    nodes = [
        _node("Sub", ["x", "m"], ["d"]),
        _node("Mul", ["d", "s"], ["e"]),
        _node("Gemm", ["e", "w", "c"], ["f"]),
        _node("Sigmoid", ["f"], ["y"]),
    ]
    x = mean + std * _RNG.standard_normal((16, 3))
    model = _model(
        nodes,
        (3,),
        m=mean.astype(np.float32),
        s=(1 / std).astype(np.float32),
        w=_f(1.0, -2.0, 0.5).reshape(3, 1),
        c=_f(0.1),
    )
    return model, x.astype(np.float32)


def _formula_norm(width: int, x: Array) -> tuple[bytes, Array]:
    """LayerNorm as older exporters write it."""
    nodes = [
        _node("ReduceMean", ["x", "a"], ["m"]),
        _node("Sub", ["x", "m"], ["d"]),
        _node("Pow", ["d", "two"], ["q"]),
        _node("ReduceMean", ["q", "a"], ["v"]),
        _node("Add", ["v", "e"], ["w"]),
        _node("Sqrt", ["w"], ["s"]),
        _node("Div", ["d", "s"], ["y"]),
    ]
    more = {"two": np.array(2, np.float32), "e": np.array(1e-5, np.float32)}
    return _model(nodes, (width,), a=np.array([1]), **more), x.astype(np.float32)


def _variance() -> tuple[bytes, Array]:
    nodes = [
        _node("Mul", ["x", "x"], ["q"]),
        _node("ReduceMean", ["q", "a"], ["s"]),
        _node("ReduceMean", ["x", "a"], ["m"]),
        _node("Mul", ["m", "m"], ["t"]),
        _node("Sub", ["s", "t"], ["y"]),
    ]
    return _model(nodes, (100,), a=np.array([1])), (1000 + _RNG.standard_normal((1, 100))).astype(np.float32)


def _share_of_sum() -> tuple[bytes, Array]:
    nodes = [_node("ReduceSum", ["x", "a"], ["s"]), _node("Div", ["x", "s"], ["y"])]
    return _model(nodes, (4,), a=np.array([1])), _f(0.001, 0.002, 0.003, 0.004)[None]


def _masked() -> tuple[bytes, Array]:
    """Scores and a mask of 0 and 1, (1 - mask) * -65504 added: one input, halves."""
    nodes = [
        _node("Split", ["x"], ["scores", "mask"], axis=1, num_outputs=2),
        _node("Sub", ["one", "mask"], ["no"]),
        _node("Mul", ["no", "far"], ["away"]),
        _node("Add", ["scores", "away"], ["z"]),
        _node("Softmax", ["z"], ["y"], axis=1),
    ]
    model = _model(nodes, (8,), one=np.array(1, np.float32), far=np.array(-65504, np.float32))
    return model, _f(1, 2, 3, 4, 1, 1, 0, 0)[None]


def _large_constant() -> tuple[bytes, Array]:
    nodes = [_node("Mul", ["x", "a"], ["z"]), _node("Div", ["z", "b"], ["y"])]
    return _model(nodes, (1,), a=np.array(1e9, np.float32), b=np.array(1e6, np.float32)), _f(0.1005)[None]


def _cube() -> tuple[bytes, Array]:
    return _model([_node("Mul", ["x", "x"], ["q"]), _node("Mul", ["q", "x"], ["y"])], (1,)), _f(100)[None]


def _tiny_feature() -> tuple[bytes, Array]:
    nodes = [_node("Mul", ["x", "s"], ["z"]), _node("ReduceSum", ["z", "a"], ["y"])]
    return _model(nodes, (2,), s=_f(3e5, 1), a=np.array([1])), np.array([[3e-6, 0.5], [1e-6, 0.2]], np.float32)


def _average(size: int) -> tuple[bytes, Array]:
    return _model([_node("GlobalAveragePool", ["x"], ["y"])], (1, size, size)), np.ones((1, 1, size, size), np.float32)


def _mean(n: int) -> tuple[bytes, Array]:
    return _model([_node("ReduceMean", ["x", "a"], ["y"])], (n,), a=np.array([1])), np.ones((1, n), np.float32)


def _l2(x: Array) -> tuple[bytes, Array]:
    return _model([_node("LpNormalization", ["x"], ["y"], axis=1, p=2)], x.shape[1:]), x.astype(np.float32)


_PAGE = np.full((1, 1, 6, 6), 100.0)
# kind, name, model and data
CASES: tuple[tuple[int, str, Callable[[], tuple[bytes, Array]]], ...] = (
    (1, "GlobalAveragePool of 224x224 ones", lambda: _average(224)),
    (1, "ReduceMean of 150,000 ones", lambda: _mean(150_000)),
    (1, "16000 / 10000, a constant", lambda: _one("Div", _f(16000), ("x", "c"), c=_f(10_000))),
    (1, "16000 / 200000, a constant", lambda: _one("Div", _f(16000), ("x", "c"), c=_f(200_000))),
    (1, "16000 * 1e-7, a constant", lambda: _one("Mul", _f(16000), ("x", "c"), c=_f(1e-7))),
    (1, "InstanceNorm of a 6x6 page of 100", lambda: _norm("InstanceNormalization", (1, 6, 6), _PAGE)),
    (
        1,
        "LayerNorm, 768 of 5 +- 0.1",
        lambda: _norm("LayerNormalization", (768,), 5 + 0.1 * _RNG.normal(size=(2, 768))),
    ),
    (
        1,
        "InstanceNorm, 64x64 of 100 +- 0.1",
        lambda: _norm("InstanceNormalization", (1, 64, 64), 100 + 0.1 * _RNG.normal(size=(1, 1, 64, 64))),
    ),
    (1, "LayerNorm, 64 of 10000 +- 1", lambda: _norm("LayerNormalization", (64,), 1e4 + _RNG.normal(size=(2, 64)))),
    (1, "LayerNorm as a formula, 768 of 5 +- 0.1", lambda: _formula_norm(768, 5 + 0.1 * _RNG.normal(size=(2, 768)))),
    (1, "a scaler of features in the thousands and thousandths, logistic", _scaler),
    (2, "Exp(11), Exp(20)", lambda: _one("Exp", _f(11, 20, -3))),
    (2, "Reciprocal(0.01), (-0.001), (8000)", lambda: _one("Reciprocal", _f(0.01, -0.001, 8000))),
    (2, "[.001 .002 .003 .004] / sum", _share_of_sum),
    (2, "F.normalize of a vector of size 0.03", lambda: _l2(np.array([[0.01, 0.02, -0.01, 0.015]]))),
    (2, "F.normalize of a vector of size 5000", lambda: _l2(np.array([[1000, 2000, -500, 4200]]))),
    (2, "Log(0.001), Log(16000)", lambda: _one("Log", _f(0.001, 16000, 1.5))),
    (2, "Sqrt(0.0005), Sqrt(16000)", lambda: _one("Sqrt", _f(0.0005, 16000))),
    (2, "x**-1.5 of 0.01 and 100", lambda: _one("Pow", _f(0.01, 100), ("x", "c"), c=np.array(-1.5, np.float32))),
    (2, "Exp(25): more than fixed point holds", lambda: _one("Exp", _f(25))),
    (3, "LayerNorm, 768 of +- 0.003", lambda: _norm("LayerNormalization", (768,), 0.003 * _RNG.normal(size=(2, 768)))),
    (3, "a feature of size 3e-6 behind a scaler", _tiny_feature),
    (4, "100 * 100 * 100", _cube),
    (4, "E[x^2] - E[x]^2 around 1000", _variance),
    (4, "LayerNorm, 64 of +- 1000", lambda: _norm("LayerNormalization", (64,), 1000 * _RNG.normal(size=(2, 64)))),
    (4, "scores + (1 - mask) * -65504, softmax", _masked),
    (5, "1e9 x / 1e6", _large_constant),
)


def measure(number: int) -> dict[str, Any]:
    """Return what a case answers: right and got (the value that is furthest off), errors by protocol, what is told."""
    kind, name, make = CASES[number]
    data, x = make()
    wanted = np.asarray(onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])
    found: dict[str, Any] = {"kind": kind, "case": name, "got": {}, "error": {}}
    imported = load_onnx(data)
    largest = float(np.abs(wanted).max())
    for protocol in PROTOCOLS:
        (got,) = encrypted.run(imported.program, imported.params, {"x": x}, protocol).values()
        got = got[0] if imported.program.whole else got
        error = np.abs(got.reshape(wanted.shape) - wanted)
        at = np.unravel_index(int(error.argmax()), error.shape)
        found["got"][protocol] = float(got.reshape(wanted.shape)[at])
        found["error"][protocol] = float(error.max()) / largest if largest else float(error.max())
        if protocol == PROTOCOLS[0]:
            found["right"] = float(wanted[at])
    found["told"] = _told(data, x)
    return found


def _told(data: bytes, x: Array) -> str:
    seen = check(data, x)
    if not hasattr(seen, "found"):
        return "wrong" if not seen.in_range else "right"
    if not (seen.in_range and seen.right):
        return "wrong"
    return "warned" if any(seen.found.hints()) else "right"


def table(now: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    earlier = {row["case"]: row for row in before}
    rows = []
    for row in now:
        old = earlier.get(row["case"], {})
        rows.append(
            [
                str(row["kind"]),
                row["case"],
                f"{row['right']:.5g}",
                *(_cell(old, protocol) for protocol in PROTOCOLS),
                old.get("told", ""),
                *(_cell(row, protocol) for protocol in PROTOCOLS),
                row["told"],
            ]
        )
    head = ["kind", "case", "onnxruntime", "before: fss", "crypten", "told", "now: fss", "crypten", "told"]
    return report.table(head, rows)


def _cell(row: dict[str, Any], protocol: str) -> str:
    if "failed" in row:
        return str(row["failed"])
    if protocol not in row.get("got", {}):
        return ""
    error = row["error"][protocol]
    off = "any" if error > 10 else f"{100 * error:.2g} %"
    return f"{row['got'][protocol]:.5g} ({off})"


def _all() -> list[dict[str, Any]]:
    rows = []
    for i, (kind, name, _) in enumerate(CASES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rows.append(measure(i))
            except SecureError as error:
                rows.append(
                    {"kind": kind, "case": name, "failed": type(error).__name__, "right": 0.0, "told": "refused"}
                )
        print(f"{i + 1} of {len(CASES)}: {name}", file=sys.stderr)
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numbers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs=2, metavar=("dump", "FILE"), help="write what this checkout answers")
    options = parser.parse_args()
    if options.only:
        Path(options.only[1]).write_text(json.dumps(_all(), indent=1) + "\n")
        return
    content = report.header("python -m benchmarks.numbers", {}) | {"rows": _all()}
    report.write_json(report.RESULTS / "numbers.json", content)
    text = io.StringIO()
    text.write(f"{HEAD}\n{table(content['rows'], json.loads(BEFORE.read_text()))}\n")
    part = DOCUMENT.with_suffix(".part")
    part.write_text(text.getvalue())
    part.replace(DOCUMENT)


if __name__ == "__main__":
    main()
