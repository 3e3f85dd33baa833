"""`securemtk check`."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from protocols.errors import InputError
from protocols.running.precision import MOST_ERROR
from protocols.running.ranges import LayerRange, headroom, warning
from securemtk.cli.exits import UNSUPPORTED
from securemtk.cli.inputs import read_input
from securemtk.cli.options import Json
from securemtk.cli.tables import SHOWN_ROWS, emit, rows_table, say
from securemtk.onnx.bundle import read_model
from securemtk.onnx.fix import fix as fix_model
from securemtk.planning.check import CheckReport as Report
from securemtk.planning.check import LayerWork
from securemtk.planning.check import check as check_model
from securemtk.planning.estimate import NETWORKS, LayerEstimate, parse_network
from securemtk.support.files import check_file, write_whole

log = logging.getLogger("securemtk")
app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk check model.onnx --sample x.npy")
def check(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="This is an ONNX file or the folder of a bundle.")],
    sample: Annotated[
        Path | None,
        typer.Option(
            help="Run the model in the clear on this data, given as predict takes it, and measure its values."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Estimate the cost of a prediction of so many samples.")] = 1,
    protocol: Annotated[str, typer.Option(help="Estimate for these protocols, fss or crypten.")] = "fss",
    network: Annotated[
        str | None, typer.Option(help=f"{', '.join(NETWORKS)}: estimate the time over such a network as well.")
    ] = None,
    rtt: Annotated[
        str | None, typer.Option(help="Estimate for a network with this round-trip time, such as 40ms.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Estimate for a network with this bandwidth in each direction, such as 100mbit.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N,N,...",
            help="Say the whole shape of an input whose sizes the file leaves free; once for each, where asked for.",
        ),
    ] = None,
    fix: Annotated[
        Path | None, typer.Option(help="Write the model to this file, rewritten where that keeps its function.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell whether a model runs under encryption, and what a prediction costs.

    Names every unsupported node at once, and constants that fixed point does not hold well. With --sample also how
    near the values of each layer come to the bounds of fixed point, how far each layer is from float arithmetic, and
    the answers from onnxruntime's. With --network, --rtt or --bandwidth also the time that a prediction takes; that
    runs each party's side on this machine. With --fix all this is told of the rewritten model. Exit status 4 where a
    node is not supported, a value reaches its bound, or an answer is more than 1 % of the largest from onnxruntime's;
    then --fix writes nothing.
    """
    data = None if sample is None else read_input(sample)
    manifest, source = read_model(model) if model.is_dir() else (None, model)
    limits: dict[str, Any] = {} if manifest is None else {"low": manifest.low, "high": manifest.high}
    limits["gated"] = manifest is not None and any(task.secured for task in manifest.tasks)
    connection = parse_network(network, rtt, bandwidth)
    rewrites: list[str] | None = None
    if fix is not None:
        check_file(fix, "--fix")
        fixed = fix_model(source)
        source, rewrites = fixed.data, list(fixed.rewrites)
    shapes = _shapes(shape) if shape else None
    found = check_model(source, data, batch=batch, protocol=protocol, network=connection, shapes=shapes, **limits)
    document = found.to_dict()
    runs = found.ok and found.in_range and found.right
    if rewrites is not None:
        document["rewrites"] = rewrites
    if fix is not None and runs and isinstance(source, bytes):
        write_whole(fix, source)

    def show() -> None:
        if rewrites is not None:
            where = f"written to {fix}" if runs else "not written: the model does not run"
            rows_table(f"rewrites, {where}", [{"": text} for text in rewrites or ["nothing to do"]])
        _layers_table(found)
        most = f", the {SHOWN_ROWS} nearest to their bounds" if len(found.ranges) > SHOWN_ROWS else ""
        rows_table(f"largest values on the sample{most}", _range_rows(found))
        rows_table("largest errors of single layers on the sample", _error_rows(found))
        rows_table("answers on the sample, against onnxruntime's", _answer_rows(found))
        rows_table("unsupported", [dict(row) for row in document["unsupported"]])
        stdout = Console()
        wrong = found.found.wrong()
        verdict = f"does not run right: {wrong}" if wrong else "runs under encryption"
        if not found.found.answers:
            verdict += "" if wrong else ", how right nobody knows: measure with --sample"
        said = verdict if found.ok else f"does not run: {len(found.unsupported)} in the way"
        stdout.print(said, markup=False, highlight=False, soft_wrap=True)

    emit(as_json, document, show)
    if found.in_range and (text := warning(headroom(found.ranges))):
        log.warning(text)
    for text in found.found.hints():
        log.warning(text)
    if not runs:
        raise typer.Exit(UNSUPPORTED)


def _shapes(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for text in given:
        name, _, sizes = text.partition("=")
        parts = sizes.split(",") if sizes else []
        if not name or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise InputError(f"a shape must be NAME=N,N,... with sizes of at least 1; got {text!r}")
        shapes[name] = tuple(int(part) for part in parts)
    return shapes


def _layers_table(found: Report) -> None:
    """Print what each layer computes and costs, the sums last; what is nothing is left blank."""
    computed, cost = {layer.name: layer for layer in found.layers}, found.estimate
    counted = {name: sum(getattr(x, name) for x in found.layers) for name in ("parameters", "macs", "comparisons")}
    total = LayerWork("", "total", (), **counted)
    if cost is None:
        rows = [_layer_row(layer.name, layer, None) for layer in found.layers]
        rows_table("layers", rows, _layer_row("total", total, None))
        return
    nothing = None if cost.online_s is None else 0.0
    frames = cost.offline_bytes - sum(layer.offline_bytes for layer in cost.layers)
    rows = [_layer_row(layer.name, computed.get(layer.name), layer) for layer in cost.layers]
    rows.append(_layer_row("requests, frames", None, LayerEstimate("", "", 0, 0, frames, nothing)))
    whole = LayerEstimate("", "", cost.rounds, cost.online_bytes, cost.offline_bytes, cost.online_s)
    chunks = f", in {cost.chunks} chunks" if cost.chunks > 1 else ""
    rows_table(f"a prediction of {cost.batch}, {cost.protocol}{chunks}", rows, _layer_row("total", total, whole))
    say(
        f"{cost.online_bytes:,} bytes in {cost.rounds} rounds online; {cost.offline_bytes:,} bytes before, "
        f"{cost.repeat_bytes:,} for the next of this batch; {cost.load_bytes:,} once, for the weights"
    )
    if cost.network is not None and cost.online_s is not None and cost.offline_s is not None:
        wide = cost.network.bits_per_s
        over = f"{cost.network.rtt_s * 1e3:g} ms there and back"
        over += "" if math.isinf(wide) else f", {wide / 1e6:g} Mbit/s"
        say(f"about {cost.online_s:.3g} s online and {cost.offline_s:.3g} s before, over {over}")


def _layer_row(name: str, computed: LayerWork | None, spent: LayerEstimate | None) -> dict[str, str]:
    row = {"layer": name, "": computed.op if computed else spent.op if spent else ""}
    row["shape"] = " ".join(map(str, computed.shape)) if computed else ""
    for title, key in (("products", "macs"), ("compared", "comparisons")):
        row[title] = _short(getattr(computed, key)) if computed else ""
    if spent is not None:
        row |= {"rounds": _short(spent.rounds), "online": _short(spent.online_bytes, "B")}
        row["offline"] = _short(spent.offline_bytes, "B")
        if spent.online_s is not None:
            row["ms"] = f"{spent.online_s * 1e3:.1f}" if spent.online_s else ""
    return row


def _short(number: int, unit: str = "") -> str:
    """Return a count with three digits, blank for none."""
    value, thousands = float(number), 0
    while value >= 999.5:
        value, thousands = value / 1000, thousands + 1
    return f"{value:.3g}{['', 'k', 'M', 'G', 'T'][thousands]}{unit}" if number else ""


def _range_rows(found: Report) -> list[dict[str, str]]:
    """Return the layers that came nearest to their bounds, nearest first."""
    return [_range_row(row) for row in sorted(found.ranges, key=lambda row: -row.share)[:SHOWN_ROWS]]


def _error_rows(found: Report) -> list[dict[str, str]]:
    """Return the layers and features with the largest errors of their own, largest first; none below a thousandth."""
    rows = sorted((row for row in found.found.errors if row.share > 1e-3), key=lambda row: -row.share)
    return [
        {"name": row.name, "op": row.op, "error": f"{row.error:.2g}", "largest": f"{row.largest:.4g}"}
        | {"share": _share(row.share), "": "wrong" if row.share > MOST_ERROR else ""}
        for row in rows[:SHOWN_ROWS]
    ]


def _answer_rows(found: Report) -> list[dict[str, str]]:
    return [
        {"output": row.name, "error": f"{row.error:.2g}", "largest": f"{row.largest:.4g}"}
        | {"share": _share(row.share), "": "wrong" if row.share > MOST_ERROR else ""}
        for row in found.found.answers
    ]


def _share(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 10 else "any"


def _range_row(row: LayerRange) -> dict[str, str]:
    verdict = "too large" if row.headroom < 0 else "close" if row.headroom == 0 else ""
    figures = {"largest": f"{row.largest:.4g}", "bound": f"{row.bound:.10g}", "share": f"{100 * row.share:.3g} %"}
    return {"name": row.name, "op": row.op, "step": row.step} | figures | {"": verdict}
