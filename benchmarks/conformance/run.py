"""Run every operator that the importer is asked for, encrypted, and compare with onnxruntime.

    python -m benchmarks.conformance

writes docs/conformance.md and benchmarks/results/conformance.json; `--help` tells of parts. Exit status 1 when a case
differs from onnxruntime or fails, 0 otherwise: a refusal is an answer.
"""

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto
from rich.console import Console
from rich.progress import Progress

from benchmarks import encrypted, report
from benchmarks.conformance.cases import LISTED, SOURCES, Array, Case
from protocols.errors import InputError, SecureError
from protocols.program import plain
from protocols.running.backend import PROTOCOLS
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.model import runtime
from securemtk.onnx.model.declared import bound
from securemtk.onnx.model.problems import UnsupportedNodes
from securemtk.onnx.model.public import public_inputs
from securemtk.onnx.model.reading import read_proto
from securemtk.serving.onnxruntime_api import InferenceSession

DOCUMENT = report.ROOT / "docs" / "conformance.md"
AGREES, DIFFERS, REFUSED, SKIPPED = "agrees", "differs", "refused", "skipped"
ABSOLUTE, RELATIVE = 0.005, 0.01
# Values of fixed point stay below this in magnitude.
LARGEST = 2.0**14
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
# Operator -> (position of an input, smallest and largest magnitude on which its approximation is stated).
DOMAINS: Mapping[str, tuple[int, float, float]] = {
    "Div": (1, 2.0**-4, 2.0**11),
    "Log": (0, 2.0**-8, 2.0**12),
    "Reciprocal": (0, 2.0**-4, 2.0**11),
}


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Args:
        name, op, source: of the case.
        status: "agrees", "differs", "refused" or "skipped".
        error: largest absolute difference, None where nothing was compared.
        relative: the same by the size of what was expected where that is above 1.
        reason: why it differs, was refused or was skipped.
        constants: inputs of the case that were given as constants in the model's file.
        reference: "onnxruntime" or "case", whose expected output the result was compared with; "" for none.
    """

    name: str
    op: str
    source: str
    status: str
    error: float | None = None
    relative: float | None = None
    reason: str = ""
    constants: tuple[str, ...] = ()
    reference: str = ""


class Skip(Exception):
    """A case is about something that is not computed here."""


Execute = Callable[[ModelProto, Mapping[str, Array], Mapping[str, Array]], dict[str, Array]]


# --- one case --------------------------------------------------------------------------------------------------------


def judge(case: Case, execute: Execute) -> Result:
    """Run a case and compare it."""

    def result(status: str, **more: Any) -> Result:
        return Result(case.name, case.op, case.source, status, **more)

    try:
        model = read_proto(case.model)
        reference, expected = _expected(case, model)
        _check_values(case, model, expected)
    except Skip as skip:
        return result(SKIPPED, reason=str(skip))
    except SecureError as error:
        return result(REFUSED, reason=_said(error))
    names = public_inputs(model)
    constants = {name: x for name, x in case.inputs.items() if name in names}
    secrets = {name: x for name, x in case.inputs.items() if name not in names}
    if not secrets:
        return result(SKIPPED, reason="nothing is secret: every input says shapes or places")
    try:
        got = execute(model, secrets, constants)
    except (UnsupportedNodes, InputError) as error:
        return result(REFUSED, reason=_said(error))
    except Exception as error:
        return result(DIFFERS, reason=f"{type(error).__name__}: {error}"[:300], constants=tuple(constants))
    return result(constants=tuple(constants), reference=reference, **_compared(got, expected))


def _expected(case: Case, model: ModelProto) -> tuple[str, dict[str, Array]]:
    """Return who says it, onnxruntime or else whoever made the case, and the outputs."""
    values = {name: _array(x, f"an input is {_kind(x)}") for name, x in case.inputs.items()}
    names = [x.name for x in model.graph.output]
    try:
        every = ModelProto.FromString(runtime.runnable(model).SerializeToString())
        every.ir_version = min(every.ir_version, runtime.IR_VERSION)
        inner = {x for node in every.graph.node for x in node.output} - {"", *names}
        every.graph.output.extend(ValueInfoProto(name=x) for x in sorted(inner))
        known = [*names, *sorted(inner)]
        found = dict(zip(known, runtime.start(every.SerializeToString()).run(known, values), strict=True))
        reference = "onnxruntime"
    except (*runtime.ERRORS, TypeError):
        if case.expected is None:
            raise
        found, inner, reference = dict(case.expected), set(), "case"
    for x in inner:
        if isinstance(found[x], np.ndarray) and found[x].dtype.kind == "f":
            _check_range(found[x], "a value on the way")
    _check_domains(model, {**values, **found})
    return reference, {name: _array(found[name], f"an output is {_kind(found[name])}") for name in names}


def _array(x: Any, otherwise: str) -> Array:
    if isinstance(x, (np.ndarray, np.generic)) and np.asarray(x).dtype.kind in "fiub":
        return np.asarray(x)
    raise Skip(otherwise)


def _kind(x: Any) -> str:
    return f"an array of {x.dtype}" if isinstance(x, (np.ndarray, np.generic)) else f"a {type(x).__name__}"


def _check_values(case: Case, model: ModelProto, expected: Mapping[str, Array]) -> None:
    """Raise Skip for what fixed point cannot hold and for what is another at each run."""
    shapes = public_inputs(model)
    for name, x in case.inputs.items():
        value = np.asarray(x)
        if name in shapes:
            continue
        _check_range(value, "an input")
    for value in expected.values():
        _check_range(value, "an expected output")
    for node in model.graph.node:
        if node.op_type in _RANDOM or (node.op_type == "Dropout" and _trains(node.input, case.inputs)):
            raise Skip("its result is random")


def _check_domains(model: ModelProto, values: Mapping[str, Any]) -> None:
    for node in model.graph.node:
        if node.op_type not in DOMAINS:
            continue
        position, low, high = DOMAINS[node.op_type]
        size = np.abs(np.asarray(values.get(node.input[position], low), dtype=np.float64))
        if size.size and (size.min() < low or size.max() > high):
            raise Skip(f"{node.op_type} is stated for {low:g} <= |x| <= {high:g}")


def _check_range(value: Array, what: str) -> None:
    numbers = value.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise Skip(f"{what} is not finite")
    if numbers.size and np.abs(numbers).max() >= LARGEST:
        raise Skip(f"{what} is 2**14 or more in magnitude")


def _trains(names: Sequence[str], inputs: Mapping[str, Any]) -> bool:
    mode = inputs.get(names[2]) if len(names) > 2 else None
    ratio = inputs.get(names[1], 0.5) if len(names) > 1 else 0.5
    return mode is not None and bool(np.all(mode)) and bool(np.any(ratio))


def _compared(got: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, Any]:
    error = relative = 0.0
    for name, wanted in expected.items():
        value, target = np.asarray(got[name], dtype=np.float64), wanted.astype(np.float64)
        if value.shape != target.shape:
            return {"status": DIFFERS, "reason": f"shape {value.shape} instead of {target.shape}"}
        # The user's side knows the type of each output and rounds to it.
        is_whole = wanted.dtype.kind != "f"
        value = np.rint(value) if is_whole else value
        apart = np.abs(value - target)
        error = max(error, float(apart.max(initial=0.0)))
        relative = max(relative, float((apart / np.maximum(np.abs(target), 1.0)).max(initial=0.0)))
        if is_whole and apart.any():
            wrong = f"{int(np.count_nonzero(apart))} of {apart.size} whole numbers differ"
            return {"status": DIFFERS, "error": error, "relative": relative, "reason": wrong}
        if not (apart <= np.maximum(ABSOLUTE, RELATIVE * np.abs(target))).all():
            return {"status": DIFFERS, "error": error, "relative": relative, "reason": f"off by {error:.3g}"}
    return {"status": AGREES, "error": error, "relative": relative}


def _said(error: Exception) -> str:
    """Return why a model was refused, without the names of its nodes."""
    if isinstance(error, UnsupportedNodes):
        return "; ".join(dict.fromkeys(f"{p.op_type}: {p.reason}" for p in error.nodes))
    return " ".join(str(error).split())[:300]


# --- ways to run a model ---------------------------------------------------------------------------------------------


def in_process(protocol: str) -> Execute:
    """Run a model as two parties in this process."""

    def run(imported: Imported, inputs: Mapping[str, Array]) -> Mapping[str, NDArray[Any]]:
        return encrypted.run(imported.program, imported.params, inputs, protocol)

    return _imported(run)


def in_float() -> Execute:
    """Run a model's program in float64, not encrypted: what is left of an error is the importer's."""
    return _imported(lambda imported, inputs: plain.run(imported.program, imported.params, inputs))


def _imported(run: Callable[[Imported, Mapping[str, Array]], Mapping[str, NDArray[Any]]]) -> Execute:
    def execute(
        model: ModelProto, inputs: Mapping[str, Array], constants: Mapping[str, Array]
    ) -> dict[str, NDArray[Any]]:
        # Of a model without a free batch the refusal as a whole is told: it is the last that stands in the way.
        shapes = None if _is_free(model) else {name: np.shape(x) for name, x in inputs.items()}
        imported = load_onnx(model.SerializeToString(), shapes=shapes, public=constants)
        whole = imported.program.whole
        given = {name: np.asarray(x)[None] if whole else np.asarray(x) for name, x in inputs.items()}
        got = run(imported, {name: given[name].astype(np.float64) for name in imported.program.inputs})
        return {name: got[name][0] if whole else got[name] for name in imported.program.outputs}

    return execute


def _is_free(model: ModelProto) -> bool:
    return any(not d.HasField("dim_value") for x in model.graph.input for d in x.type.tensor_type.shape.dim)


def in_session(protocol: str) -> Execute:
    """Run a model in a session of three processes, as users do."""

    def execute(model: ModelProto, inputs: Mapping[str, Array], constants: Mapping[str, Array]) -> dict[str, Array]:
        data = bound(model, constants).SerializeToString()
        with InferenceSession(data, protocol=protocol) as session:
            names = [x.name for x in session.get_outputs()]
            return dict(zip(names, session.run(None, dict(inputs)), strict=True))

    return execute


# --- tables ----------------------------------------------------------------------------------------------------------


def document(content: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    results = [Result(**{**x, "constants": tuple(x["constants"])}) for x in content["cases"]]
    machine, settings = content["machine"], content["settings"]
    counts = Counter(x.status for x in results)
    by_cases = sum(x.reference == "case" for x in results)
    return "\n".join(
        [
            "# Conformance",
            "",
            f"Written by `{content['command']}` on {content['date']}, commit {content['commit']}, "
            f"{machine['cpu']}, {machine['cores']} cores.",
            "",
            f"Each case is an ONNX model that is imported and run {settings['way']}, and compared with onnxruntime on "
            f"the same input (in {by_cases} cases that it does not run, with the case's own expected output). "
            f"A case *agrees* when no value is further off than {ABSOLUTE:g}, or {RELATIVE:.0%} of a value above "
            f"{ABSOLUTE / RELATIVE:g}; whole numbers and truth values, once rounded to their type, must be exact. "
            "Values are fixed point with 16 bits of fraction.",
            "",
            "Cases are onnx's own tests of operators (`node`), the same with operators written out by their "
            "definitions (`expanded`), onnx's tests of torch modules (`torch`), and models generated for the "
            "attributes that exports use (`generated`), these once more with each weight an input (`weights`). "
            "Inputs that only say shapes, axes, counts, places or exponents are constants "
            "(`securemtk/onnx/model/public.py`); all others are secret, weights too.",
            "",
            f"{len(results)} cases: "
            + ", ".join(f"{counts[s]} {s}" for s in (AGREES, DIFFERS, REFUSED, SKIPPED))
            + ".",
            "",
            "## By operator",
            "",
            operators_table(results),
            *_listing("Differing", [x for x in results if x.status == DIFFERS]),
            *_grouped("Refused", [x for x in results if x.status == REFUSED]),
            *_grouped("Skipped", [x for x in results if x.status == SKIPPED]),
            "",
        ]
    )


def operators_table(results: Sequence[Result]) -> str:
    """Return the number of cases of each operator by what came of them, and the largest error where it agrees."""
    by_op = defaultdict(list)
    for x in results:
        by_op[x.op].append(x)
    order = {op: i for i, op in enumerate(LISTED)}
    rows = []
    for op in sorted(by_op, key=lambda op: (order.get(op, len(order)), op)):
        counts = Counter(x.status for x in by_op[op])
        agreeing = [x for x in by_op[op] if x.status == AGREES]
        errors = [_digits(max((getattr(x, k) or 0.0 for x in agreeing), default=math.nan)) for k in _ERRORS]
        known = sum(n for status, n in counts.items() if status != SKIPPED)
        rows.append([op, str(known), *(str(counts[s] or "") for s in (AGREES, DIFFERS, REFUSED, SKIPPED)), *errors])
    return report.table(
        ["operator", "cases", "agree", "differ", "refused", "(skipped)", "largest error", "largest relative"], rows
    )


_ERRORS = ("error", "relative")


def _digits(value: float) -> str:
    return "" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


def _listing(title: str, results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    rows = [[x.op, f"`{x.name}`", _cell(x.reason)] for x in results]
    return ["", f"## {title}", "", report.table(["operator", "case", "how"], rows)]


def _grouped(title: str, results: Sequence[Result]) -> list[str]:
    """Return a section with one line for each operator and reason."""
    if not results:
        return []
    names = defaultdict(list)
    for x in results:
        names[x.op, x.reason].append(x.name)
    rows = [[op, _cell(why), str(len(cases)), f"`{cases[0]}`"] for (op, why), cases in sorted(names.items())]
    return ["", f"## {title}", "", report.table(["operator", "reason", "cases", "for instance"], rows)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# --- command ---------------------------------------------------------------------------------------------------------


def chosen(sources: Iterable[str], ops: Sequence[str], match: str, every: int, everything: bool) -> list[Case]:
    """Return the cases to run.

    Args:
        sources: names of `SOURCES`.
        ops: operators; none for all of `LISTED`.
        match: text that a case's name must contain.
        every: take one case of so many of each operator.
        everything: operators that are not listed as well.
    """
    wanted = set(ops or LISTED)
    found = [case for source in sources for case in SOURCES[source]() if match in case.name]
    found = [case for case in found if case.op in wanted or (everything and not ops)]
    seen: Counter[str] = Counter()
    kept = []
    for case in found:
        if seen[case.op] % every == 0:
            kept.append(case)
        seen[case.op] += 1
    return kept


def run(cases: Sequence[Case], execute: Execute, console: Console) -> list[Result]:
    """Judge all cases."""
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("cases", total=len(cases))
        for case in cases:
            progress.update(task, description=case.op)
            results.append(judge(case, execute))
            progress.advance(task)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conformance", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--protocol", default="fss", choices=sorted(PROTOCOLS))
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--session", action="store_true", help="in sessions of three processes instead of in this one")
    way.add_argument("--float", action="store_true", help="the imported program in float64 instead of encrypted")
    parser.add_argument("--sources", default=",".join(SOURCES), help=f"of {', '.join(SOURCES)}; default all")
    parser.add_argument("--ops", default="", help="operators, with commas between; default all that are listed")
    parser.add_argument("--match", default="", help="text in the name of the case")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one case of N of each operator")
    parser.add_argument("--everything", action="store_true", help="operators that are not listed, too")
    parser.add_argument("--show", action="store_true", help="tell of each case that does not agree; write no files")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="the Markdown file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    sources = options.sources.split(",")
    if strange := set(sources) - set(SOURCES):
        parser.error(f"--sources must be among {', '.join(SOURCES)}; got {', '.join(sorted(strange))}")
    if not options.show:
        report.check_outputs(options.output / "conformance.json", options.document)
    torch.set_num_threads(1)
    console = Console(stderr=True)
    if options.float:
        way, execute = "in float64, not encrypted", in_float()
    elif options.session:
        way, execute = f"encrypted by protocol {options.protocol} in a session", in_session(options.protocol)
    else:
        way, execute = f"encrypted by protocol {options.protocol} as two parties", in_process(options.protocol)
    with console.status("making the cases"):
        ops = [op for op in options.ops.split(",") if op]
        cases = chosen(sources, ops, options.match, options.every, options.everything)
    results = run(cases, execute, console)
    if options.show:
        for x in results:
            if x.status != AGREES:
                print(f"{x.status}\t{x.op}\t{x.name}\t{x.reason}")
    else:
        command = " ".join(["python -m benchmarks.conformance", *(sys.argv[1:] if arguments is None else arguments)])
        settings = {"way": way, "protocol": options.protocol, "sources": sources, "every": options.every}
        content = report.header(command, settings) | {"cases": [asdict(x) for x in results]}
        report.write_json(options.output / "conformance.json", content)
        report.write(options.document, document(content))
    counts = Counter(x.status for x in results)
    print(", ".join(f"{counts[s]} {s}" for s in (AGREES, DIFFERS, REFUSED, SKIPPED)))
    return 1 if counts[DIFFERS] else 0


if __name__ == "__main__":
    sys.exit(main())
