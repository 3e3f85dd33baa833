"""How well and at what cost functions without an exact form are computed, beside CrypTen's own approximations.

    python -m benchmarks.approximations                    all, into docs/approximations.md, .json and .png
    python -m benchmarks.approximations --only softmax --no-crypten

Each function is computed on points of its stated domain in float (the oracle of a program) and encrypted, both parties
in this process; CrypTen computes the same points between two processes. Errors are against float64 of the function.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import onnx
from matplotlib.figure import Figure
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import Progress

from benchmarks import encrypted, report
from protocols.program import functions, plain
from protocols.program.functions import CUSTOM, FUNCTIONS, ULP, Function
from protocols.program.pieces import WidePieces
from protocols.program.program import Layer, Program
from securemtk.onnx.importer import Params, load_onnx
from securemtk.planning.estimate import estimate_prediction

DOCUMENT = report.ROOT / "docs" / "approximations.md"
RESULT = report.ROOT / "benchmarks" / "results" / "approximations.json"
PICTURE = report.ROOT / "docs" / "approximations.png"
POINTS = 1500
# Between the points that a fit looks at, the error can be a little larger than its bound.
MOST_SHARE = 1.05
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """A function and the points on which it is looked at.

    Args:
        name: of the function.
        method: how it is computed.
        domain: in words.
        bound: in words, the error that is promised.
        program, params: that compute it; inputs are those of `points`.
        points: input name -> array (n, *sample).
        exact: results in float64, (n, *sample).
        allowed: largest error of each result; None where only `bound` says it.
        x: what to draw the error against, one number for each result; None for no picture.
        peer: CrypTen's name of it, "" for none.
    """

    name: str
    method: str
    domain: str
    bound: str
    program: Program
    params: Params
    points: Mapping[str, NDArray[np.float32]]
    exact: Floats
    allowed: Floats | None = None
    x: Floats | None = None
    peer: str = ""


# --- what is looked at ----------------------------------------------------------------------------------------------

_PEERS = {name: name for name in ("sigmoid", "tanh", "erf", "log", "sqrt", "rsqrt", "reciprocal")} | {
    "exp_negative": "exp",
    "reciprocal_positive": "reciprocal",
}
# Functions with numbers of their own, as operators and normalisations use them.
_CUSTOM = {
    "elu (scaled_exp 1, 1)": ("scaled_exp", (1.0, 1.0)),
    "selu (scaled_exp 1.673, 1.051)": ("scaled_exp", (1.67326319217681884765625, 1.05070102214813232421875)),
    "celu 1": ("celu", (1.0,)),
    "swish 1.702": ("swish", (1.702,)),
    "exp_of_differences 1000": ("exp_of_differences", (1000,)),
    "reciprocal_of_sum 1000": ("reciprocal_of_sum", (1000,)),
    "log_of_sum 1000": ("log_of_sum", (1000,)),
    "inverse_root 1/512 (norms)": ("inverse_root", (1 / 512,)),
    "power 1.5": ("power", (1.5,)),
    "power -1.5": ("power", (-1.5,)),
    "power_of_sum 1e-4, 1, -0.75 (LRN)": ("power_of_sum", (1e-4, 1.0, -0.75)),
}


_WIDE, _NEAR = 100.0, 2.0**-6


def _grid(function: Function) -> Floats:
    x = np.linspace(function.low, function.high, POINTS)
    if function.high > _WIDE:
        # Where functions of a wide domain bend is near 0.
        small = np.geomspace(function.low if function.low > 0 else _NEAR, function.high, POINTS // 2)
        x = np.concatenate([x[::2], small] if function.low >= 0 else [x[::4], -small, small])
    # Whole units in the last place, for that is what the parties have; the end belongs to the tail.
    return np.unique(np.floor(x / ULP) * ULP)[1:-1]


def _wide_grid(function: Function) -> Floats:
    """Arguments of every size that 16 fraction bits have, from some units on: their own errors are small there."""
    low, high = max(function.domain[0], 2.0**-12), function.high - 1
    x = np.unique(np.floor(np.geomspace(low, high, POINTS) / ULP) * ULP)[1:-1]
    return np.concatenate([-x[::-1], x]) if function.low < 0 else x


def _spline(name: str, function: Function, peer: str) -> Subject:
    pieces, op = functions.pieces_of(function), "wide_spline" if function.finer else "spline"
    x = _wide_grid(function) if function.finer else _grid(function)
    domain = f"{function.low:g} to {function.high:g}"
    degree = max(f.degree for f in ([pieces.coarse, pieces.fine] if isinstance(pieces, WidePieces) else [pieces]))
    if function.finer:
        finest = math.log2(max(function.domain[0], 2.0**-30))
        domain = f"2^{finest:.0f} to {function.high:.6g}" + (" in magnitude" if function.low < 0 else "")
    layer = Layer(op, name, ("x",), "y", x.shape, {}, asdict(pieces) | {"keep_bits": function.keep_bits})
    exact = function.exact(x)
    bound = [f"{function.absolute:g}"] * bool(function.absolute)
    bound += [f"{function.relative:g} of the value"] * bool(function.relative)
    return Subject(
        name,
        f"{len(pieces.knots)} knots, degree {degree}" + (", two scales" if function.finer else ""),
        domain,
        " + ".join(bound),
        Program({"x": x.shape}, ("y",), (layer,), {}),
        {},
        {"x": x[None].astype(np.float32)},
        exact[None],
        (function.absolute + function.relative * np.abs(exact))[None],
        x[None],
        peer,
    )


def _model(op: str, shape: Sequence[int], constants: Sequence[NDArray[np.float32]] = (), inputs: int = 1) -> bytes:
    """Return an ONNX file of one operator; samples have this shape."""
    names = [f"x{i}" for i in range(inputs)]
    weights = [numpy_helper.from_array(value, f"c{i}") for i, value in enumerate(constants)]
    node = helper.make_node(op, [*names, *(w.name for w in weights)], ["y"], name=op)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape]) for name in names],
        [onnx.ValueInfoProto(name="y")],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _subject(
    name: str, method: str, domain: str, bound: str, data: bytes, points: Sequence[Floats], exact: Floats, **more: Any
) -> Subject:
    imported = load_onnx(data)
    named = {x.name: a.astype(np.float32) for x, a in zip(imported.inputs, points, strict=True)}
    return Subject(name, method, domain, bound, imported.program, imported.params, named, exact, **more)


def _on_grid(x: Floats) -> Floats:
    return np.asarray(np.round(x / ULP) * ULP)


def logits(classes: int, rows: int, seed: int = 0) -> Floats:
    """Return rows of logits: normal, ever wider, some with one or two that stand out."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, classes)) * np.geomspace(0.1, 8, rows)[:, None]
    x[::3, 0] += 10
    x[::6, 1] += 10
    return _on_grid(x)


def log_softmax(x: Floats) -> Floats:
    """Return the exact logarithms of softmax over the last axis."""
    less = x - x.max(-1, keepdims=True)
    return np.asarray(less - np.log(np.exp(less).sum(-1, keepdims=True)))


def _softmaxes() -> list[Subject]:
    made = []
    for classes, rows in ((10, 60), (100, 12), (1000, 4)):
        x = logits(classes, rows)
        for op, peer, exact in (
            ("Softmax", "softmax", np.exp(log_softmax(x))),
            ("LogSoftmax", "log_softmax", log_softmax(x)),
        ):
            method = "max, exp, sum, 1 / x, product" if op == "Softmax" else "max, exp, sum, log"
            data = _model(op, (classes,))
            bound = "0.005"
            title = f"{op}, {classes} classes"
            domain = "differences below 2^15"
            allowed = np.full(exact.shape, 0.005)
            made.append(_subject(title, method, domain, bound, data, [x], exact, allowed=allowed, peer=peer))
    return made


def _others() -> list[Subject]:
    generator = np.random.default_rng(1)
    rows = _on_grid(generator.standard_normal((24, 64)) * np.geomspace(0.05, 30, 24)[:, None] + 3)
    spread = rows.var(-1, keepdims=True)
    normal = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(spread + 1e-5)
    ones, noughts = np.ones(64, np.float32), np.zeros(64, np.float32)
    divisor = _wide_grid(FUNCTIONS["reciprocal"])
    dividend = _on_grid(generator.uniform(-4, 4, divisor.shape))
    exponent = _on_grid(np.linspace(-24, 20.4, POINTS))
    return [
        _subject(
            "Exp",
            "exp_half, square",
            "-24 to 20.5",
            "0.00004 + 0.0002 of the value",
            _model("Exp", exponent.shape),
            [exponent[None]],
            np.exp(exponent)[None],
            allowed=(4e-5 + 2e-4 * np.exp(exponent))[None],
            x=exponent[None],
            peer="exp",
        ),
        _subject(
            "LayerNormalization, 64 wide",
            "deviation, square, sum, root, product",
            "deviations 0.05 to 30",
            "0.005",
            _model("LayerNormalization", (64,), (ones, noughts)),
            [rows],
            normal,
            allowed=np.full(normal.shape, 0.005),
        ),
        _subject(
            "Div",
            "1 / x, product",
            "a in -4 to 4 by b of 2^-12 to 16,382 in magnitude",
            "0.0005 of the value + 0.0001",
            _model("Div", divisor.shape, inputs=2),
            [dividend[None], divisor[None]],
            (dividend / divisor)[None],
            allowed=(5e-4 * np.abs(dividend / divisor) + 1e-4)[None],
            x=divisor[None],
            peer="div",
        ),
    ]


def subjects(only: Sequence[str] = ()) -> list[Subject]:
    """Return everything that is looked at, or what has one of these words in its name."""
    made = [_spline(name, function, _PEERS.get(name, "")) for name, function in FUNCTIONS.items()]
    made += [_spline(title, CUSTOM[name](*numbers), "") for title, (name, numbers) in _CUSTOM.items()]
    made += [*_softmaxes(), *_others()]
    return [x for x in made if not only or any(word.lower() in x.name.lower() for word in only)]


# --- measurement ----------------------------------------------------------------------------------------------------


def measure(subject: Subject) -> dict[str, Any]:
    """Return errors of the float oracle and of the encrypted run, and what an element costs."""
    (name,) = subject.program.outputs
    in_float = plain.run(subject.program, subject.params, subject.points)[name]
    secret = encrypted.run(subject.program, subject.params, subject.points)[name]
    cost = estimate_prediction(subject.program, len(secret))
    layers = [layer for layer in cost.layers if layer.op not in ("share", "reveal")]
    n = secret.size
    errors = np.abs(secret - subject.exact)
    share = None if subject.allowed is None else float((errors / (subject.allowed + 2 * ULP)).max())
    return {
        "name": subject.name,
        "method": subject.method,
        "domain": subject.domain,
        "bound": subject.bound,
        "float_error": float(np.abs(in_float - subject.exact).max()),
        "error": float(errors.max()),
        "share": share,
        "within": share is None or share <= MOST_SHARE,
        "elements": n,
        "rounds": sum(layer.rounds for layer in layers),
        "online_bytes": sum(layer.online_bytes for layer in layers) / n,
        "offline_bytes": sum(layer.offline_bytes for layer in layers) / n,
        "values": secret,
        "crypten": None,
    }


def ask_crypten(wanted: Sequence[Subject]) -> dict[str, tuple[NDArray[Any], int, int]]:
    """Return CrypTen's (values, rounds, bytes) by the subject's name; it runs in processes of its own.

    Raises:
        RuntimeError: it does not run here.
    """
    with tempfile.TemporaryDirectory() as folder:
        points, values = Path(folder) / "points.npz", Path(folder) / "values.npz"
        arrays = {
            f"{x.peer}/{i}:{name}": array for i, x in enumerate(wanted) if x.peer for name, array in x.points.items()
        }
        np.savez(points, allow_pickle=False, **arrays)
        command = [sys.executable, "-m", "benchmarks.peers.crypten_functions", str(points), str(values)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"CrypTen must run to be compared with: {done.stderr.strip().splitlines()[-1:]}")
        costs = json.loads(done.stdout.splitlines()[-1])["costs"]
        with np.load(values) as read:
            found = {name: read[name] for name in read.files}
    keys = {x.name: f"{x.peer}/{i}" for i, x in enumerate(wanted) if x.peer}
    return {name: (found[k], costs[k]["rounds"], costs[k]["bytes"]) for name, k in keys.items()}


# --- report ---------------------------------------------------------------------------------------------------------

_INTRO = """# Functions without an exact form

Made by `python -m benchmarks.approximations`: what `protocols/program/functions.py` promises, and what came out.

A function of one variable is a piecewise quadratic in fixed point, its knots found by `functions.fit` so that the
error on the domain stays below a bound; all comparisons of an element with its knots take 2 rounds together, whatever
their number ([decision 0007](decisions/0007-comparison-keys.md)), and the truncation of the result one more. Beyond
its domain a function goes on as a line, or stays where it is. Functions of *two scales* are looked up finer where
their argument is small, by a second key, and one more product chooses ([decision
0021](decisions/0021-functions-of-two-scales.md)); an argument of 16 fraction bits is 2^-16 at least, one that comes
from a product has more. e**x is the square of `exp_half`. Softmax, norms and quotients are made of such functions, of
products and sums.

Errors are the largest on the points, against float64: *in float* is the program computed in the clear, *encrypted* the
same with both parties (`fss`), fixed point and truncation included, which may add 2 units in the last place, 2^-16
each; *of the bound*: the largest share of what is allowed at a point, those units included. Rounds, and bytes for each
element of the result (both ways; offline: correlations to both parties), are of the layers themselves, without input
and revelation. CrypTen is the stock package with its own approximations, default settings and trusted first party,
between two processes on the same points; its rounds and bytes are those that it counts itself, its bytes of both
parties, for each element, without the messages of a dealer.
"""


def _sized(value: float) -> str:
    return f"{value:.2g}" if value < 1000 else f"{value:.0e}"


def document(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return docs/approximations.md."""
    head = ["function", "how", "domain", "bound", "in float", "encrypted", "of the bound"]
    head += ["rounds", "online, B", "offline, B"]
    head += ["CrypTen's error", "rounds", "bytes"]
    lines = []
    for row in rows:
        cells = [row["name"], row["method"], row["domain"], row["bound"]]
        share = "" if row["share"] is None else f"{100 * row['share']:.0f} %"
        cells += [_sized(row["float_error"]), _sized(row["error"]), share + ("" if row["within"] else " (!)")]
        cells += [str(row["rounds"]), f"{row['online_bytes']:,.0f}", f"{row['offline_bytes']:,.0f}"]
        peer = row["crypten"]
        cells += ["", "", ""] if peer is None else [_sized(peer["error"]), str(peer["rounds"]), f"{peer['bytes']:,.0f}"]
        lines.append(cells)
    text = f"{_INTRO}\n{report.table(head, lines)}\n\n"
    text += (
        "No entry of CrypTen: it has no such function. Its largest errors, of 10^3 and more, are those of iterations "
    )
    text += "that diverge on a\npart of the domain (its settings can be tuned to a domain). "
    text += "(!): beyond the bound.\n\n"
    return text + "![error against x: encrypted, bound, CrypTen](approximations.png)\n"


def draw(wanted: Sequence[Subject], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a picture of the errors against x, a panel for each function of one variable."""
    drawn = [(s, row) for s, row in zip(wanted, rows, strict=True) if s.x is not None]
    if not drawn:
        return
    columns = min(5, len(drawn))
    lines = -(-len(drawn) // columns)
    with mpl.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(2.6 * columns, 1.75 * lines + 0.4), dpi=130, layout="constrained")
        panels = np.atleast_1d(figure.subplots(lines, columns)).ravel()
        for axes in panels[len(drawn) :]:
            axes.axis("off")
        for axes, (subject, row) in zip(panels, drawn, strict=False):
            _panel(axes, subject, row)
        seen = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(seen.values(), seen.keys(), loc="outside upper center", ncols=3, frameon=False)
        report.write_picture(PICTURE, figure)


def _panel(axes: Any, subject: Subject, row: Mapping[str, Any]) -> None:
    if subject.x is None:
        return
    x, least = subject.x.ravel(), ULP / 16
    if row["crypten"] is not None:
        error = np.abs(row["crypten"]["values"] - subject.exact).ravel()
        axes.plot(x, np.maximum(error, least), lw=0.6, color="tab:orange", label="CrypTen")
    axes.plot(x, np.maximum(np.abs(row["values"] - subject.exact).ravel(), least), lw=0.6, label="ours, encrypted")
    if subject.allowed is not None:
        axes.plot(x, subject.allowed.ravel() + 2 * ULP, lw=0.9, color="black", ls="--", label="stated bound")
    axes.set_yscale("log")
    axes.set_ylim(least, 10.0)
    if x.min() > 0:
        axes.set_xscale("log")
    elif x.max() > _WIDE:
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xticks([-100, -1, 0, 1, 100] if x.min() < -_WIDE else [0, 1, 100])
    axes.set_title(subject.name, fontsize=7)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="words of names; prints, and writes nothing")
    parser.add_argument("--no-crypten", action="store_true")
    options = parser.parse_args()
    wanted, rows = subjects(options.only), []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("functions", total=len(wanted) + 1)
        for subject in wanted:
            bar.update(task, description=subject.name)
            rows.append(measure(subject))
            bar.advance(task)
        bar.update(task, description="CrypTen")
        answers = {} if options.no_crypten else ask_crypten(wanted)
        bar.advance(task)
    for subject, row in zip(wanted, rows, strict=True):
        if subject.name in answers:
            values, rounds, n_bytes = answers[subject.name]
            error = float(np.abs(values - subject.exact).max())
            row["crypten"] = {"error": error, "rounds": rounds, "bytes": n_bytes / values.size, "values": values}
    if options.only:
        print(document(rows))
        return 0
    draw(wanted, rows)
    report.write(DOCUMENT, document(rows))
    shown = [
        {k: v for k, v in row.items() if k not in ("values", "crypten")}
        | {"crypten": row["crypten"] and {k: v for k, v in row["crypten"].items() if k != "values"}}
        for row in rows
    ]
    report.write_json(RESULT, report.header("approximations", {"points": POINTS}) | {"functions": shown})
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
