"""The command line. Results on stdout, progress and logs on stderr; one function turns errors into messages.

Exit status: 0 done; 1 an error of ours (please report it); 2 wrong usage; 3 bad input; 4 an unsupported model;
5 the protocol was aborted; 6 the disk or system refused; 130 Ctrl-C.
"""

import errno
import getpass
import io
import json
import logging
import math
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import typer
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from protocols.errors import (
    BundleError,
    InputError,
    KeyRefused,
    ProtocolAbort,
    RangeWarning,
    SecureError,
    UnsupportedError,
)
from protocols.running.precision import MOST_ERROR
from protocols.running.ranges import LayerRange, headroom, warning
from securemtk.data import DATA_SETS
from securemtk.demo import DETAILS, FIGURES, PICTURE, Figures, run_demo
from securemtk.mtk.attacks.base import Victim
from securemtk.mtk.attacks.suite import ATTACKS, AttackReport, Effort, check_attacks, run_attacks
from securemtk.mtk.evaluation.evaluate import opening_rate
from securemtk.mtk.keys.audit import read as read_log
from securemtk.mtk.keys.grants import Grant, Ledger
from securemtk.mtk.keys.key import load as load_key
from securemtk.mtk.training.settings import TrainFile, read_config
from securemtk.onnx.bundle import check_bundle_target, read_model
from securemtk.onnx.fix import fix as fix_model
from securemtk.planning.check import CheckReport as Report
from securemtk.planning.check import LayerWork
from securemtk.planning.check import check as check_model
from securemtk.planning.estimate import NETWORKS, LayerEstimate, parse_network
from securemtk.report.document import ATTACK_FILE, ReportOptions, measure_report, read_attacks
from securemtk.report.page import PAGE, check_drawing, check_target, write_report
from securemtk.report.pictures import draw_attacks
from securemtk.runs.run_folder import KEY_SUFFIX, KEYS, Trained, export, open_run, read_run, task_figures, train_run
from securemtk.serving.config import Config
from securemtk.serving.session import Model, PredictionCost, Scores, Session
from securemtk.support.files import check_file, whole_file, write_whole
from securemtk.support.progress import progress_bar

INTERNAL, USAGE, INPUT, UNSUPPORTED, ABORTED, SYSTEM, INTERRUPTED, TERMINATED = 1, 2, 3, 4, 5, 6, 130, 143
SHOWN_ROWS = 10
_NUMERALS = ("", *"-.0123456789")
# A bundle's writer reports the disk's refusal as an error of the bundle: by these the two are told apart.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}

log = logging.getLogger("securemtk")
app = typer.Typer(
    name="securemtk",
    help="Ask a model about your data without showing the data; let it answer, task by task, only to key holders.",
    epilog="Start with:  securemtk demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(
    no_args_is_help=True,
    help="List and lock trigger-keys; say who may use them, and see who did.",
    epilog="Example:  securemtk keys list RUN/keys",
)
app.add_typer(keys_app, name="keys")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="File whose first line is the passphrase of the keys; asked for when absent.")
]
GrantsFile = Annotated[
    Path, typer.Argument(metavar="GRANTS", help="File that an authority reads; its log stands beside it.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `securemtk train` has written.")]


# --- the way in and out ---------------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Run the command line of this process."""
    # As an exception, so that folders in the making are removed and roles are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status; no error leaves it as a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RangeWarning)
            warnings.showwarning = _show_warning
            app(list(arguments), prog_name="securemtk")
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0
    except BaseException as error:
        return report(error)
    return 0


def report(error: BaseException) -> int:
    """Say on stderr what went wrong, and return the exit status for it."""
    if isinstance(error, KeyboardInterrupt):
        return _complain("stopped by Ctrl-C", INTERRUPTED)
    cause = error.__context__
    refused = isinstance(error, BundleError) and isinstance(cause, OSError) and cause.errno in _DISK
    if isinstance(error, InputError) and not refused:
        return _complain(str(error), INPUT)
    if isinstance(error, UnsupportedError):
        return _complain(str(error), UNSUPPORTED)
    if isinstance(error, ProtocolAbort):
        return _complain(f"aborted, nothing was revealed: {error}", ABORTED)
    if isinstance(error, OSError | SecureError):
        return _complain(str(error), SYSTEM)
    if isinstance(error, MemoryError):
        return _complain("this machine has too little memory for what was asked", SYSTEM)
    log.debug("%s", "".join(traceback.format_exception(error)))
    # Its text may hold a value: place and kind are what a report of it needs.
    place = traceback.extract_tb(error.__traceback__)[-1]
    kind = type(error).__name__
    return _complain(
        f"internal error, please report it: {kind} in {Path(place.filename).name}:{place.lineno}", INTERNAL
    )


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Show a warning of ours as a message, without the line of code; others with -v."""
    log.log(logging.WARNING if issubclass(category, RangeWarning) else logging.DEBUG, "%s", message)


def _complain(message: str, status: int) -> int:
    print(f"securemtk: {message}", file=sys.stderr)
    return status


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More on stderr, tracebacks included.")] = False,
) -> None:
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_level=False, show_path=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False


# --- commands -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example:  securemtk demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results; an older demo there is replaced.")] = Path(
        "runs/demo"
    ),
    as_json: Json = False,
) -> None:
    """Train, release and ask under encryption, on handwritten digits: everything in one go, in about a minute."""
    figures = run_demo(out)
    _emit(as_json, asdict(figures), lambda: _demo_table(figures, out))


@app.command(epilog="Example:  securemtk train digits --secure digit --secure parity --out runs/digits")
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run, new or empty: checkpoint, keys, accuracies.")],
    dataset: Annotated[
        str | None, typer.Argument(help=f"{', '.join(DATA_SETS)}; docs/data.md tells what they are.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML or JSON file of all settings (docs/mtk.md); options here come before it.")
    ] = None,
    secure: Annotated[list[str] | None, typer.Option(help="Task that gets a key; may be given several times.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Option of the data set, such as path=FOLDER; may be given several times."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training samples.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Greatest learning rate.")] = None,
    beta: Annotated[
        float | None, typer.Option(help="How often open tasks that tell of a closed one answer truly, 0 to 1.")
    ] = None,
    decoys: Annotated[int | None, typer.Option(help="Copies of each sample with a wrong key.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and decoys; keys come from the system.")] = None,
    lock: Annotated[bool, typer.Option("--lock", help="Lock the keys under a passphrase.")] = False,
    passphrase_file: PassphraseFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same call.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model whose secured tasks answer truly only to their keys."""
    wanted = TrainFile() if config is None else read_config(config)
    name = dataset or wanted.dataset
    if name is None:
        raise InputError("a data set must be named, as argument or in the configuration file")
    given: dict[str, Any] = {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed}
    settings = replace(wanted.train, **{k: v for k, v in given.items() if v is not None})
    if decoys is not None:
        settings = replace(settings, assembler=replace(settings.assembler, decoys=decoys))
    if beta is not None:
        settings = replace(settings, decoupling=replace(settings.decoupling, beta=beta))
    passphrase = _passphrase(passphrase_file, needed=lock, fresh=not resume)
    with progress_bar(f"train on {name}") as bar:
        trained = train_run(
            out,
            name,
            tuple(secure or wanted.secured),
            settings,
            options=dict(wanted.options) | _data_options(data or ()),
            passphrase=passphrase,
            resume=resume,
            progress=bar,
        )
    _show_evaluation(as_json, trained)
    log.info("written: %s", out)


@app.command(epilog="Example:  securemtk evaluate runs/digits --tries 1000")
def evaluate(
    folder: RunFolder,
    tries: Annotated[int, typer.Option(min=0, help="Random patterns to try in each key's place.")] = 0,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Measure a run on its test part: no key, right key, wrong keys, all keys; and guesses of the keys."""
    trained = open_run(folder, _passphrase_of([folder / KEYS], passphrase_file))
    _show_evaluation(as_json, trained, tries)


@app.command(epilog="Example:  securemtk attack runs/digits --only guess,invert --tries 100000")
def attack(
    folder: RunFolder,
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(ATTACKS)}, with commas; all when absent.")] = "",
    tries: Annotated[int, typer.Option(min=1, help="Random patterns in each key's place.")] = Effort.tries,
    queries: Annotated[int, typer.Option(min=1, help="Of each key inversion by queries.")] = Effort.queries,
    steps: Annotated[int, typer.Option(min=1, help="Of each key inversion by gradient.")] = Effort.steps,
    restarts: Annotated[int, typer.Option(min=1, help="Random starts of each of them.")] = Effort.restarts,
    seed: Annotated[int, typer.Option(min=0, help="Of guesses, starts and samples.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="File of the results, .json; a .png beside it. In RUN by default.")
    ] = (None),
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Attack a run: guess and invert keys, infer closed tasks, fine-tune the stolen trunk, tell members.

    Writes attack.json and attack.png. What each attack shows and does not show: docs/attacks.md.
    """
    target = folder / ATTACK_FILE if out is None else out
    if target.suffix != ".json":
        raise InputError(f"--out must name a .json file; got {str(target)!r}")
    picture = target.with_suffix(".png")
    names = [name.strip() for name in only.split(",") if name.strip()]
    effort = Effort(tries, queries, steps, restarts)
    check_attacks(names)
    if out is None:
        read_run(folder)
    for file in (target, picture):
        check_file(file, "--out" if out is not None else file.name)
    trained = open_run(folder, _passphrase_of([folder / KEYS], passphrase_file))
    victim = Victim(trained.result.model, trained.dataset, trained.result.keys)
    with progress_bar("attack") as bar:
        found = run_attacks(victim, names, effort=effort, seed=seed, progress=bar)
    document = found.to_dict()
    with whole_file(target) as first, whole_file(picture) as second:
        first.write((json.dumps(document, indent=1) + "\n").encode())
        second.write(draw_attacks(document["findings"]))
    _emit(as_json, document, lambda: _attack_tables(found))
    log.info("written: %s and %s", target, picture.name)


@app.command("report", epilog="Example:  securemtk report runs/digits --output digits.html")
def report_run(
    folder: RunFolder,
    output: Annotated[
        Path | None, typer.Option(help="The page, .html; its .json goes beside it. In RUN by default.")
    ] = None,
    attack: Annotated[
        bool, typer.Option("--attack", help="Attack the run anew (minutes); else what `securemtk attack` left in RUN.")
    ] = False,
    encrypted: Annotated[
        bool, typer.Option("--encrypted/--no-encrypted", help="Ask the run under encryption, or leave that out.")
    ] = True,
    samples: Annotated[
        int, typer.Option(min=1, help="Test samples to ask under encryption in each state of the keys.")
    ] = ReportOptions.samples,
    seed: Annotated[int, typer.Option(min=0, help="Of attackers, and of the noise that they meet.")] = 0,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Report on a run in one HTML page and its JSON: accuracy, leaks, attacks, guarantees, costs, threat model.

    Nothing of a key but its size and place is in it: docs/report.md.
    """
    page = folder / PAGE if output is None else output
    read_run(folder)
    beside = check_target(page)
    found = None if attack else read_attacks(folder)
    if found is not None:
        check_drawing(found)
    extent = ReportOptions(encrypted, samples, attacks=Effort() if attack else None, seed=seed)
    passphrase = _passphrase_of([folder / KEYS], passphrase_file)
    with progress_bar("report") as bar:
        document = measure_report(folder, passphrase=passphrase, extent=extent, attacks=found, progress=bar)
    write_report(document, page)
    _emit(as_json, document, lambda: _report_tables(document))
    log.info("written: %s and %s", page, beside.name)


@app.command("export", epilog="Example:  securemtk export runs/digits digits.bundle")
def export_bundle(
    folder: RunFolder,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder to write; the keys stay out of it.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Release a run's model as a bundle: manifest.json and cloud.onnx."""
    read_run(folder)
    check_bundle_target(bundle, overwrite=overwrite)
    trained = open_run(folder, _passphrase_of([folder / KEYS], passphrase_file))
    manifest = export(trained, bundle, overwrite=overwrite)
    public = json.loads(manifest.to_json())
    facts = {name: public[name] for name in ("model_id", "tasks", "input_name", "input_shape", "files")}
    _emit(as_json, {"bundle": str(bundle)} | facts, lambda: _facts_table("bundle", {"bundle": bundle} | facts))


@keys_app.command("list", epilog="Example:  securemtk keys list runs/digits/keys")
def list_keys(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Key files, or folders of them.")],
    as_json: Json = False,
) -> None:
    """Show of each key its task, its model and whether it is locked; never what it is."""
    found = [_header(file) for file in _key_files(paths)]
    _emit(as_json, {"keys": found}, lambda: _rows_table("keys", found))


@keys_app.command("lock", epilog="Example:  securemtk keys lock runs/digits/keys")
def lock_keys(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Key files, or folders of them.")],
    passphrase_file: Annotated[Path | None, typer.Option(help="File with the present passphrase.")] = None,
    new_passphrase_file: Annotated[Path | None, typer.Option(help="File with the new passphrase.")] = None,
    as_json: Json = False,
) -> None:
    """Encrypt keys under a new passphrase (scrypt, AES-256-GCM), each file whole or not at all."""
    files = _key_files(paths)
    present = _passphrase_of(files, passphrase_file)
    # All are opened before the first is written: a wrong passphrase changes none.
    opened = [(file, load_key(file, present)) for file in files]
    new = _passphrase(new_passphrase_file, needed=True, fresh=True, what="new passphrase")
    for file, key in opened:
        key.save(file, new)
    found = [_header(file) for file in files]
    _emit(as_json, {"keys": found}, lambda: _rows_table("keys", found))


@keys_app.command("grant", epilog="Example:  securemtk keys grant grants.json runs/digits/keys --user ann --uses 100")
def grant_keys(
    grants: GrantsFile,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Key files, or folders of them.")],
    user: Annotated[str, typer.Option(help="Name in the certificate of whoever asks: Session(user=...).")],
    not_before: Annotated[
        str | None, typer.Option(help="ISO 8601; without a zone it is UTC. At once if absent.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="ISO 8601; without a zone it is UTC. No end if absent.")] = None,
    uses: Annotated[int | None, typer.Option(help="Samples that may be asked in all; any number if absent.")] = None,
    as_json: Json = False,
) -> None:
    """Let a user open the tasks of keys; running authorities honour it from their next request on."""
    ledger = Ledger(grants)
    found = [_header(file) for file in _key_files(paths)]
    limits: dict[str, Any] = {"not_before": _moment(not_before), "until": _moment(until), "uses": uses}
    given = [ledger.grant(user, str(key["model_id"]), str(key["task"]), **limits) for key in found]
    _show_grants(as_json, given, ledger)


@keys_app.command("revoke", epilog="Example:  securemtk keys revoke grants.json --user ann --task digit")
def revoke_grants(
    grants: GrantsFile,
    grant: Annotated[str | None, typer.Option("--id", help="Of one grant.")] = None,
    user: Annotated[str | None, typer.Option(help="All grants of this user.")] = None,
    task: Annotated[str | None, typer.Option(help="All grants of this task.")] = None,
    model_id: Annotated[str | None, typer.Option(help="All grants of this model.")] = None,
    as_json: Json = False,
) -> None:
    """Revoke the grants that match all that is given; they hold no more from an authority's next request on."""
    ledger = Ledger(grants)
    _show_grants(as_json, ledger.revoke(id=grant, user=user, model_id=model_id, task=task), ledger)


@keys_app.command("grants", epilog="Example:  securemtk keys grants grants.json")
def list_grants(grants: GrantsFile, as_json: Json = False) -> None:
    """Show all grants, those past included, and how many samples were asked under each."""
    ledger = Ledger(grants)
    _show_grants(as_json, ledger.grants(), ledger)


@keys_app.command("log", epilog="Example:  securemtk keys log grants.json --verify")
def show_log(
    grants: GrantsFile,
    verify: Annotated[bool, typer.Option("--verify", help="Tell only whether it is as it was written.")] = False,
    head: Annotated[str | None, typer.Option(help="A head noted before, which must still be there.")] = None,
    as_json: Json = False,
) -> None:
    """Show who used which key when, and what was refused. Exit status 3 where the log is not as it was written."""
    path = Ledger(grants).log_path
    try:
        entries, verdict = read_log(path, head)
    except FileNotFoundError:
        raise InputError(f"there must be a log of these grants, {path.name!r}; there is none") from None
    if verdict.broken is not None:
        raise InputError(
            f"the log {path.name!r} must be as it was written; line {verdict.broken} is not, those before it are"
        )
    if not verdict.known:
        raise InputError(f"the log {path.name!r} must hold the head that was noted before; lines are gone")
    if verdict.torn:
        log.warning("the last line was cut off, as by a crash; it counts for nothing")
    document: dict[str, Any] = {"log": str(path)} | asdict(verdict)
    # What fits beside each other; --json has the rest.
    columns = ("time", "event", "user", "task", "reason", "batch")

    def show() -> None:
        if not verify:
            rows = [{name: str(entry.get(name, "")) for name in columns} for entry in entries]
            _rows_table("log", [row | {"time": row["time"][:19]} for row in rows])
        _facts_table("as it was written", document)

    _emit(as_json, document if verify else document | {"entries": entries}, show)


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"a time must be ISO 8601, such as 2026-12-31T18:00; got {text!r}") from None
    return read if read.tzinfo is not None else read.replace(tzinfo=UTC)


def _show_grants(as_json: bool, grants: Sequence[Grant], ledger: Ledger) -> None:
    used = ledger.used()
    rows = [grant.to_dict() | {"used": used.get(grant.id, 0)} for grant in grants]
    _emit(as_json, {"grants": rows}, lambda: _rows_table("grants", rows))


@app.command(epilog="Example:  securemtk predict digits.bundle x.npy --key runs/digits/keys/digit.key --json")
def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Bundle folder, or an ONNX file.")],
    x: Annotated[Path, typer.Argument(metavar="X", help=".npy of float32 (n, ...); .npz by input name for several.")],
    key: Annotated[list[Path] | None, typer.Option(help="Key file whose task to open; may be given several times.")] = (
        None
    ),
    out: Annotated[Path | None, typer.Option(help="Write all scores to this .npz file.")] = None,
    passphrase_file: PassphraseFile = None,
    grants: Annotated[Path | None, typer.Option(help="Who may use which key, as keys grant wrote it.")] = None,
    user: Annotated[str | None, typer.Option(help="Name to ask under, where there are grants.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Protocols to compute with; the default is Session's.")] = None,
    keeper_port: Annotated[int, typer.Option(help="0: any free port.")] = Config.keeper_port,
    authority_port: Annotated[int, typer.Option(help="0: any free port.")] = Config.authority_port,
    timeout_s: Annotated[float, typer.Option(help="Longest silence of a role, in seconds.")] = Config.timeout_s,
    check_first: Annotated[
        bool, typer.Option("--check", help="For the model's owner: run it on X here first, and stop if answers err.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask a model under encryption: this process sees X and the scores, and neither weights nor keys."""
    if not model.exists():
        raise InputError(f"the model must be a bundle or ONNX file that is there; got {str(model)!r}")
    arrays = _read_input(x)
    files = list(key or ())
    opened = [str(_header(file)["task"]) for file in files]
    passphrase = _passphrase_of(files, passphrase_file)
    if out is not None:
        check_file(out, "--out")
    config = Config(keeper_port=keeper_port, authority_port=authority_port, timeout_s=timeout_s)
    choice: dict[str, Any] = {} if protocol is None else {"protocol": protocol}
    with Session(config, keys=files, passphrase=passphrase, grants=grants, user=user, **choice) as session:
        with _status("load the model"):
            loaded = session.load(model)
        with _status("predict under encryption"):
            scores = loaded.predict(arrays, keys=opened, check=check_first)
    if out is not None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **scores)
        write_whole(out, buffer.getvalue())
    answer = _answer(loaded, scores, opened, session.cost)
    _emit(as_json, answer, lambda: _answer_tables(answer, session.cost))


@app.command(epilog="Example:  securemtk check model.onnx --sample x.npy")
def check(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file, or bundle folder.")],
    sample: Annotated[
        Path | None,
        typer.Option(help="Data as predict takes it: run the model on it in the clear, and measure its values."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of the prediction whose cost is estimated.")] = 1,
    protocol: Annotated[str, typer.Option(help="Protocols that the prediction computes with.")] = "fss",
    network: Annotated[
        str | None, typer.Option(help=f"{', '.join(NETWORKS)}: estimate the time over such a network as well.")
    ] = None,
    rtt: Annotated[str | None, typer.Option(help="Round-trip time of the network, such as 40ms.")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Of each direction, such as 100mbit.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N,N,...",
            help="Whole shape of an input whose sizes the file leaves free; for each of them, where it is asked for.",
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
    data = None if sample is None else _read_input(sample)
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
            _rows_table(f"rewrites, {where}", [{"": text} for text in rewrites or ["nothing to do"]])
        _layers_table(found)
        most = f", the {SHOWN_ROWS} nearest to their bounds" if len(found.ranges) > SHOWN_ROWS else ""
        _rows_table(f"largest values on the sample{most}", _range_rows(found))
        _rows_table("largest errors of single layers on the sample", _error_rows(found))
        _rows_table("answers on the sample, against onnxruntime's", _answer_rows(found))
        _rows_table("unsupported", [dict(row) for row in document["unsupported"]])
        stdout = Console()
        wrong = found.found.wrong()
        verdict = f"does not run right: {wrong}" if wrong else "runs under encryption"
        if not found.found.answers:
            verdict += "" if wrong else ", how right nobody knows: measure with --sample"
        said = verdict if found.ok else f"does not run: {len(found.unsupported)} in the way"
        stdout.print(said, markup=False, highlight=False, soft_wrap=True)

    _emit(as_json, document, show)
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
        _rows_table("layers", rows, _layer_row("total", total, None))
        return
    nothing = None if cost.online_s is None else 0.0
    frames = cost.offline_bytes - sum(layer.offline_bytes for layer in cost.layers)
    rows = [_layer_row(layer.name, computed.get(layer.name), layer) for layer in cost.layers]
    rows.append(_layer_row("requests, frames", None, LayerEstimate("", "", 0, 0, frames, nothing)))
    whole = LayerEstimate("", "", cost.rounds, cost.online_bytes, cost.offline_bytes, cost.online_s)
    chunks = f", in {cost.chunks} chunks" if cost.chunks > 1 else ""
    _rows_table(f"a prediction of {cost.batch}, {cost.protocol}{chunks}", rows, _layer_row("total", total, whole))
    _print(
        f"{cost.online_bytes:,} bytes in {cost.rounds} rounds online; {cost.offline_bytes:,} bytes before, "
        f"{cost.repeat_bytes:,} for the next of this batch; {cost.load_bytes:,} once, for the weights"
    )
    if cost.network is not None and cost.online_s is not None and cost.offline_s is not None:
        wide = cost.network.bits_per_s
        over = f"{cost.network.rtt_s * 1e3:g} ms there and back"
        over += "" if math.isinf(wide) else f", {wide / 1e6:g} Mbit/s"
        _print(f"about {cost.online_s:.3g} s online and {cost.offline_s:.3g} s before, over {over}")


def _print(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True)


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


# --- input ----------------------------------------------------------------------------------------------------------


def _data_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read options NAME=VALUE: VALUE as JSON where it is such, as names where it has commas, else as a text."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals) or name in options:
            raise InputError(f"--data must be NAME=VALUE, each name once; got {text!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value.split(",") if "," in value else value
    return options


def _read_input(path: Path) -> Any:
    try:
        read = np.load(path, allow_pickle=False)
        arrays: Any = {name: read[name] for name in read} if isinstance(read, Mapping) else read
    except OSError as error:
        raise InputError(f"{str(path)!r} must be a readable .npy file; {error.strerror or 'it is none'}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{str(path)!r} must be a .npy file of numbers; it is none ({type(error).__name__})") from None
    for name, array in arrays.items() if isinstance(arrays, dict) else [(path.name, arrays)]:
        _check_numbers(name, array)
    return arrays


def _check_numbers(name: str, array: NDArray[Any]) -> None:
    """Refuse early what every model would refuse: starting a session takes seconds."""
    if array.dtype.kind != "f":
        raise InputError(f"{name!r} must hold floating-point numbers; got {array.dtype}")
    if not np.isfinite(array).all():
        raise InputError(f"{name!r} must be finite; got nan or infinity")


def _key_files(paths: Sequence[Path]) -> list[Path]:
    """Return the key files among paths: files, folders of them, and folders of runs."""
    files: list[Path] = []
    for path in paths:
        folder = path / KEYS if (path / KEYS).is_dir() else path
        files += sorted(folder.glob(f"*{KEY_SUFFIX}")) if folder.is_dir() else [folder]
    if not files:
        raise KeyRefused(f"there must be key files in {', '.join(map(str, paths))}; there are none")
    return files


def _header(file: Path) -> dict[str, str | bool]:
    """Return what a key file says openly; its secret is not looked at, and its integrity not checked."""
    try:
        body = json.loads(file.read_bytes())
        task, model_id = body["task"], body["model_id"]
        if not (isinstance(task, str) and isinstance(model_id, str)):
            raise TypeError
    except OSError as error:
        raise KeyRefused(f"key file {str(file)!r} must be readable; {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeyRefused(f"{str(file)!r} must be a key file; it is none") from None
    return {"file": str(file), "task": task, "model_id": model_id, "locked": "cipher" in body}


def _passphrase_of(paths: Sequence[Path], file: Path | None) -> str | None:
    """Return the passphrase of keys where any of them is locked."""
    present = [path for path in paths if path.is_file() or any(path.glob(f"*{KEY_SUFFIX}"))]
    locked = [found["file"] for found in map(_header, _key_files(present) if present else []) if found["locked"]]
    return _passphrase(file, needed=bool(locked), fresh=False)


def _passphrase(file: Path | None, *, needed: bool, fresh: bool, what: str = "passphrase") -> str | None:
    """Read a passphrase from a file or, hidden, from the terminal; never from the command line."""
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            raise InputError(f"the passphrase's file {str(file)!r} must be readable text") from None
        if not lines or not lines[0]:
            raise InputError(f"the passphrase's file {str(file)!r} must have it in its first line; that is empty")
        return lines[0]
    if not needed:
        return None
    if not sys.stdin.isatty():
        raise InputError(f"a {what} must be typed at a terminal or be in a file (--passphrase-file); got neither")
    typed = getpass.getpass(f"{what}: ", stream=sys.stderr)
    if fresh and getpass.getpass(f"{what}, again: ", stream=sys.stderr) != typed:
        raise InputError(f"both entries of the {what} must be equal; they differ")
    if not typed:
        raise InputError(f"a {what} must not be empty")
    return typed


# --- output ---------------------------------------------------------------------------------------------------------


def _emit(as_json: bool, document: Mapping[str, Any], show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(document))
    else:
        show()


@contextmanager
def _status(text: str) -> Iterator[None]:
    with Console(stderr=True).status(text):
        yield


def _rows_table(title: str, rows: Sequence[Mapping[str, Any]], last: Mapping[str, Any] | None = None) -> None:
    """Print rows of one form, numbers to the right; a last one is set apart."""
    if not rows:
        return
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name in rows[0]:
        is_number = all(str(row[name])[:1] in _NUMERALS for row in rows) and any(row[name] for row in rows)
        right = is_number and name != "shape"
        table.add_column(name, overflow="fold", justify="right" if right else "left", no_wrap=right)
    for row in rows:
        table.add_row(*(_shown(str(value)) for value in row.values()))
    if last is not None:
        table.add_section()
        table.add_row(*(_shown(str(value)) for value in last.values()))
    Console().print(table)


def _shown(text: str) -> Text:
    """Return a text as it is: what a model calls its nodes must neither be markup nor steer the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))


def _facts_table(title: str, facts: Mapping[str, Any]) -> None:
    _rows_table(title, [{"": name, "value": value} for name, value in facts.items()])


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _accuracy_table(tasks: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    rows = [
        {"task": name, "": "secured" if task["secured"] else "open"}
        | {title: _percent(task[column]) for column, title in columns.items()}
        for name, task in tasks.items()
    ]
    _rows_table("right answers on the test part, %", rows)


def _demo_table(figures: Figures, out: Path) -> None:
    columns = {"chance": "chance", "baseline": "baseline", "no_key": "no key", "right_key": "right key"}
    columns |= {"wrong_key": "wrong key", "encrypted": "encrypted"}
    _accuracy_table({name: asdict(task) for name, task in figures.tasks.items()}, columns)
    lines = [
        f"encrypted  {figures.samples} questions at once, each secured task with its key",
        f"online     {figures.online_s:.2f} s, {figures.online_bytes / 1e6:.1f} MB, {figures.rounds} rounds",
        f"offline    {figures.offline_s:.2f} s, {figures.offline_bytes / 1e6:.1f} MB, before the questions are known",
        f"agreement  {_percent(figures.agreement)} % of labels as from onnxruntime,"
        f" scores within {figures.max_difference:.5f}",
        f"written    {out}/: {FIGURES}, {DETAILS}, {PICTURE}, bundle/, keys/",
    ]
    print("\n".join(lines))


def _show_evaluation(as_json: bool, trained: Trained, tries: int = 0) -> None:
    result = trained.result
    tasks = {name: task_figures(figures) for name, figures in trained.metrics.items()}
    document: dict[str, Any] = {"tasks": tasks}
    if tries:
        document["random_patterns"] = {
            name: asdict(opening_rate(result.model, trained.dataset, key, tries=tries))
            for name, key in result.keys.items()
        }

    def show() -> None:
        names = ("chance", "no_key", "right_key", "wrong_random", "wrong_other", "all_keys")
        _accuracy_table(tasks, {name: name.replace("_", " ") for name in names})
        guesses = document.get("random_patterns", {})
        _rows_table("random patterns in a key's place", [{"task": name} | rate for name, rate in guesses.items()])

    _emit(as_json, document, show)


def _attack_tables(found: AttackReport) -> None:
    for name, seconds in found.seconds.items():
        rows = [
            {"task": f.task, "what": f.what, "figure": f"{f.figure:.3g}", "chance": f"{f.chance:.3g}", "": f.meaning}
            for f in found.findings
            if f.attack == name
        ]
        _rows_table(f"{name}, {seconds:.0f} s", rows)


def _report_tables(document: Mapping[str, Any]) -> None:
    names = ("chance", "no_key", "right_key", "wrong_random", "wrong_other", "all_keys")
    _accuracy_table(document["accuracy"], {name: name.replace("_", " ") for name in names})
    rows = [
        {"closed": leak["target"], "open": ", ".join(leak["sources"]), "released": leak["rule"]}
        | {"prior": _percent(leak["prior"]), "attacker": _percent(leak["best"]), "gain": _percent(leak["gain"])}
        for leak in document["leaks"]["answers"]
    ]
    _rows_table("what open tasks tell of closed ones, %", rows)
    if document["encrypted"] is not None:
        costs = [
            {"at once": cost["batch"], "online, ms": f"{1e3 * cost['online_s']:.1f}"}
            | {"offline, ms": f"{1e3 * cost['offline_s']:.1f}", "online, MB": f"{cost['online_bytes'] / 1e6:.2f}"}
            | {"offline, MB": f"{cost['offline_bytes'] / 1e6:.1f}", "rounds": cost["rounds"]}
            for cost in document["encrypted"]["costs"]
        ]
        _rows_table("encrypted predictions with all keys", costs)


def _answer(model: Model, scores: Scores, opened: Sequence[str], cost: PredictionCost) -> dict[str, Any]:
    closed = {task.name for task in model.tasks if task.secured and task.name not in opened}
    outputs = {
        name: {
            "open": name not in closed,
            "labels": values.argmax(axis=1).tolist() if values.ndim == 2 else None,
            "scores": values.tolist(),
        }
        for name, values in scores.items()
    }
    return {"outputs": outputs, "cost": cost.to_dict()}


def _answer_tables(answer: Mapping[str, Any], cost: PredictionCost) -> None:
    outputs = answer["outputs"]
    titles = {name: name if output["open"] else f"{name} (closed: noise)" for name, output in outputs.items()}
    labelled = {name: output["labels"] for name, output in outputs.items() if output["labels"] is not None}
    n = max((len(labels) for labels in labelled.values()), default=0)
    rows = [
        {"sample": i} | {titles[name]: labels[i] for name, labels in labelled.items()}
        for i in range(min(n, SHOWN_ROWS))
    ]
    _rows_table("labels", rows)
    if n > SHOWN_ROWS:
        Console().print(f"and {n - SHOWN_ROWS} more: --json or --out gives all of them, with scores")
    Console().print(str(cost), highlight=False)


if __name__ == "__main__":
    main()
