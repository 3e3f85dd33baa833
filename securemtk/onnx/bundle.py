"""A released model: a folder with `manifest.json` and `cloud.onnx`, complete or absent.

The manifest says which files belong to the bundle, with size and SHA-256, and ends in a SHA-256 of itself. That finds
damage and careless edits; whoever can write the folder can also write the sums, so it is no signature. Trigger-keys are
never part of a bundle.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import stat
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.errors import BundleError, InputError, RangeError, RangeWarning
from protocols.program.program import Shape
from protocols.running import ranges
from protocols.running.ranges import Headroom
from securemtk.onnx.examine import examine
from securemtk.onnx.export import writing
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.model.inputs import input_arrays
from securemtk.onnx.model.reading import MAX_BYTES, read_proto, self_contained
from securemtk.support.files import replaced_folder, write_whole
from securemtk.tasks import Task

FORMAT = 1
MANIFEST, MODEL = "manifest.json", "cloud.onnx"
_MAX_MANIFEST_BYTES = 1 << 26
_FRAC_BITS = range(8, 25)
_LIBRARIES = ("securemtk", "torch", "onnx", "onnxruntime", "numpy")
_SUM = "sha256"
# Left out of the text where they are None.
_OPTIONAL = {"decoupling", "headroom"}

Matrix = Sequence[Sequence[float]]
Answers = Mapping[str, Mapping[str, Matrix]]


@dataclass(frozen=True)
class Manifest:
    """What a bundle says about itself; all of it is public.

    Args:
        model_id: 32 hexadecimal digits; trigger-keys name the model they belong to by it.
        tasks: one for each output of the model, in order.
        input_name: name of the model's input.
        input_shape: shape of one sample.
        low: least allowed input value.
        high: greatest allowed input value.
        answers: for each secured or decoupled task of C classes "mean", a (C, C) matrix whose row c is the mean score
            vector of answer c, and "covariance", a (C, C) matrix around it: the authority draws a closed task's scores
            from them.
        files: name -> {"sha256": 64 hexadecimal digits, "bytes": size} of each file beside the manifest.
        versions: name -> version of what wrote the bundle.
        frac_bits: fraction bits of fixed point.
        decoupling: "beta" and "leaks", secured task -> unprotected tasks that tell of it: while it is closed, each row
            of theirs is answered with probability beta and is noise otherwise. None where all of them always answer.
        headroom: step -> layer -> how many times its values on sample data may double within fixed point, as
            `protocols.running.ranges.headroom` says; None where nobody measured.
        format: version of this format.

    Raises:
        BundleError: a field breaks its rule.
    """

    model_id: str
    tasks: tuple[Task, ...]
    input_name: str
    input_shape: Shape
    low: float
    high: float
    answers: Answers
    files: Mapping[str, Mapping[str, str | int]]
    versions: Mapping[str, str] = field(default_factory=dict)
    frac_bits: int = 16
    decoupling: Mapping[str, Any] | None = None
    headroom: Headroom | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        _require(type(self.format) is int and self.format == FORMAT, f"format must be {FORMAT}; got {self.format!r}")
        _require(_is_hex(self.model_id, 32), "model_id must be 32 hexadecimal digits")
        names = [task.name for task in self.tasks]
        _require(bool(names) and len(set(names)) == len(names), f"tasks must have distinct names; got {names}")
        _require(isinstance(self.input_name, str) and bool(self.input_name), "input_name must not be empty")
        _require(all(_is_count(n) for n in self.input_shape), "input_shape must hold sizes of at least 1")
        _require(
            _is_number(self.low) and _is_number(self.high) and self.low < self.high,
            f"low must be a number below high; got {self.low!r} and {self.high!r}",
        )
        _require(
            type(self.frac_bits) is int and self.frac_bits in _FRAC_BITS,
            f"frac_bits must lie in {_FRAC_BITS.start}..{_FRAC_BITS.stop - 1}; got {self.frac_bits!r}",
        )
        _require(set(self.files) == {MODEL}, f"files must be {MODEL!r}; got {sorted(self.files)}")
        for name, facts in self.files.items():
            whole = set(facts) == {"sha256", "bytes"} and _is_hex(facts["sha256"], 64) and _is_count(facts["bytes"])
            _require(whole, f"files: {name!r} must have a SHA-256 and a size")
        texts = (*self.versions, *self.versions.values())
        _require(all(isinstance(x, str) for x in texts), "versions must map names to texts")
        secured = {task.name: task.classes for task in self.tasks if task.secured}
        _check_decoupling(self.decoupling, set(secured), set(names) - set(secured))
        drawn = {task.name: task.classes for task in self.tasks if task.secured or task.name in self._tellers(secured)}
        _require(set(self.answers) == set(drawn), f"answers must be those of the tasks {sorted(drawn)}")
        for name, classes in drawn.items():
            _check_answers(name, self.answers[name], classes)
        _check_headroom({} if self.headroom is None else self.headroom)

    def _tellers(self, closed: Iterable[str]) -> set[str]:
        leaks: Mapping[str, Sequence[str]] = {} if self.decoupling is None else self.decoupling["leaks"]
        return {teller for name in closed for teller in leaks.get(name, ())}

    def opening(self, task: str, granted: Collection[str]) -> float:
        """Return the probability with which a row of a task is answered truly when these tasks' keys are granted."""
        closed = [t.name for t in self.tasks if t.secured and t.name not in granted]
        if task in closed:
            return 0.0
        decoupled = self.decoupling is not None and task in self._tellers(closed)
        return float(self.decoupling["beta"]) if decoupled and self.decoupling is not None else 1.0

    def to_json(self) -> str:
        """Return the manifest as canonical JSON text; its last entry is the SHA-256 of the rest."""
        fields = asdict(self)
        for name in _OPTIONAL:
            if fields[name] is None:
                del fields[name]
        digest = hashlib.sha256(_canonical(fields).encode()).hexdigest()
        return _canonical(fields | {_SUM: digest}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote; raise BundleError for anything else, edited values included."""
        try:
            raw = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise BundleError(f"{MANIFEST} must be JSON text as written by this program") from None
        fields = set(cls.__dataclass_fields__)
        if isinstance(raw, dict):
            fields -= _OPTIONAL - set(raw)
        if not isinstance(raw, dict) or set(raw) != fields | {_SUM}:
            found = sorted(set(raw) ^ (fields | {_SUM})) if isinstance(raw, dict) else type(raw).__name__
            raise BundleError(f"{MANIFEST} must have exactly its entries; missing or unknown: {found}")
        del raw[_SUM]
        try:
            tasks = tuple(_task(entry) for entry in _list(raw.pop("tasks")))
            manifest = cls(tasks=tasks, input_shape=tuple(_list(raw.pop("input_shape"))), **raw)
        except (TypeError, KeyError, AttributeError):
            raise BundleError(f"{MANIFEST} must have entries of the right type") from None
        except BundleError:
            raise
        except InputError as error:
            raise BundleError(f"{MANIFEST}: {error}") from None
        if manifest.to_json() != text:
            raise BundleError(f"{MANIFEST} must be unchanged; its SHA-256 is another")
        return manifest


def write_bundle(
    folder: str | os.PathLike[str],
    onnx_bytes: bytes,
    *,
    model_id: str,
    tasks: Sequence[Task],
    input_name: str,
    input_shape: Shape,
    low: float,
    high: float,
    answers: Mapping[str, Mapping[str, Any]] | None = None,
    decoupling: Mapping[str, Any] | None = None,
    frac_bits: int = 16,
    samples: Iterable[NDArray[np.float32]] = (),
    overwrite: bool = False,
) -> Manifest:
    """Write a bundle whole or not at all.

    Args:
        folder: the bundle's folder; its parent must exist.
        onnx_bytes: the model, with one output for each task, named like it.
        model_id, tasks, input_name, input_shape, low, high, decoupling, frac_bits: as in `Manifest`.
        answers: as in `Manifest`; arrays are allowed.
        samples: batches of what the model will be asked, (n, *input_shape) each, for the manifest's headroom.
        overwrite: replace a bundle that is there. Anything else that is there is never replaced.

    Returns:
        The manifest that was written.

    Raises:
        BundleError: a field breaks its rule, the model does not fit the tasks, the folder exists, or the disk refuses.
        UnsupportedNodes: the model cannot be run under encryption.
        RangeError: a parameter, or on the samples a value, is outside fixed point.

    Warns:
        RangeWarning: on the samples, values reach half of what fixed point holds.
    """
    target = check_bundle_target(folder, overwrite=overwrite)
    manifest = Manifest(
        model_id=model_id,
        tasks=tuple(tasks),
        input_name=input_name,
        input_shape=tuple(int(n) for n in input_shape),
        low=float(low),
        high=float(high),
        answers={
            task: {kind: np.asarray(matrix, dtype=np.float64).tolist() for kind, matrix in kinds.items()}
            for task, kinds in (answers or {}).items()
        },
        files={MODEL: {"sha256": hashlib.sha256(onnx_bytes).hexdigest(), "bytes": len(onnx_bytes)}},
        versions={name: _version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
        frac_bits=frac_bits,
        decoupling=decoupling,
    )
    imported = _check_model(manifest, onnx_bytes)
    manifest = replace(manifest, headroom=_measured(manifest, imported, onnx_bytes, samples))
    # Weights are the keeper's secret: nobody else may enter.
    with writing(folder), replaced_folder(target, private=True) as fresh:
        write_whole(fresh / MODEL, onnx_bytes)
        write_whole(fresh / MANIFEST, manifest.to_json().encode())
        check_bundle_target(folder, overwrite=overwrite)
    return manifest


def check_bundle_target(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Return the absolute path of a folder that `write_bundle` may make, or replace; for use before the work.

    Raises:
        BundleError: something is there that may not be replaced, or its parent takes no new folder.
    """
    target = Path(os.path.abspath(folder))
    if os.path.lexists(target) and not overwrite:
        raise BundleError(f"{os.fspath(folder)!r} must not exist yet; say overwrite to replace a bundle")
    if os.path.lexists(target) and not _looks_like_bundle(target):
        raise BundleError(f"{os.fspath(folder)!r} must be a bundle to be replaced; it holds something else")
    with writing(folder), tempfile.TemporaryFile(dir=target.parent):
        return target


def read_bundle(folder: str | os.PathLike[str]) -> tuple[Manifest, bytes]:
    """Read and verify a bundle.

    Args:
        folder: the bundle's folder.

    Returns:
        The manifest and the bytes of `cloud.onnx`.

    Raises:
        BundleError: a file is missing, extra, edited or no regular file, or the model does not fit the manifest; the
            message names the file.
        UnsupportedNodes: the model cannot be run under encryption.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"bundle {os.fspath(folder)!r} cannot be opened: {error.strerror}") from None
    try:
        present = set(os.listdir(handle))
        if extra := sorted(present - {MANIFEST, MODEL}):
            raise BundleError(f"a bundle must hold {MANIFEST} and {MODEL} only; it also holds {extra[0]!r}")
        if missing := sorted({MANIFEST, MODEL} - present):
            raise BundleError(f"a bundle must hold {MANIFEST} and {MODEL}; {missing[0]!r} is missing")
        manifest = Manifest.from_json(_text(_member(handle, MANIFEST, _MAX_MANIFEST_BYTES)))
        data = _member(handle, MODEL, MAX_BYTES)
    finally:
        os.close(handle)
    facts = manifest.files[MODEL]
    if len(data) != facts["bytes"]:
        raise BundleError(f"{MODEL} must have {facts['bytes']} bytes; got {len(data)}")
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise BundleError(f"{MODEL} must be unchanged; its SHA-256 is another")
    _check_model(manifest, data)
    return manifest, data


def read_model(path: str | os.PathLike[str]) -> tuple[Manifest | None, bytes]:
    """Read a bundle's folder or a plain ONNX file, external data included.

    Returns:
        The manifest, None for a plain file, and the bytes of the model.

    Raises:
        BundleError: as `read_bundle`, or the file cannot be read.
    """
    return read_bundle(path) if os.path.isdir(path) else (None, self_contained(os.fspath(path)))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise BundleError(f"{MANIFEST}: {message}")


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _check_decoupling(raw: Mapping[str, Any] | None, secured: set[str], unprotected: set[str]) -> None:
    if raw is None:
        return
    whole = isinstance(raw, Mapping) and set(raw) == {"beta", "leaks"} and isinstance(raw["leaks"], Mapping)
    _require(whole, "decoupling must have beta and leaks")
    _require(_is_number(raw["beta"]) and 0 <= raw["beta"] < 1, f"beta must be in [0, 1); got {raw['beta']!r}")
    for name, tellers in raw["leaks"].items():
        fits = name in secured and isinstance(tellers, list | tuple) and 0 < len(tellers) == len(set(tellers))
        _require(
            fits and set(tellers) <= unprotected, f"leaks of {name!r} must be unprotected tasks beside a secured one"
        )
    _require(bool(raw["leaks"]), "decoupling must have leaks; leave it out where there are none")


def _check_answers(task: str, answers: Mapping[str, Matrix], classes: int) -> None:
    _require(set(answers) == {"mean", "covariance"}, f"answers of {task!r} must be a mean and a covariance")
    for kind, matrix in answers.items():
        rows = [row for row in matrix if isinstance(row, list) and len(row) == classes and all(map(_is_number, row))]
        _require(
            isinstance(matrix, list) and len(matrix) == len(rows) == classes,
            f"{kind} of {task!r} must be {classes} x {classes} numbers",
        )
    covariance = np.asarray(answers["covariance"], dtype=np.float64)
    slack = 1e-6 * max(float(np.abs(covariance).max()), 1e-30)
    _require(bool((np.abs(covariance - covariance.T) <= slack).all()), f"covariance of {task!r} must be symmetric")
    least = float(np.linalg.eigvalsh(covariance).min())
    _require(least >= -slack * classes, f"covariance of {task!r} must have no negative eigenvalue")


def _canonical(fields: Mapping[str, Any]) -> str:
    head = {name: value for name, value in fields.items() if name != _SUM}
    text = json.dumps(head, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=True)
    return text if _SUM not in fields else text[:-2] + f',\n "{_SUM}": "{fields[_SUM]}"\n}}'


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _task(entry: Mapping[str, Any]) -> Task:
    if not isinstance(entry, dict) or set(entry) != {"name", "classes", "secured"}:
        raise TypeError("not a task")
    if type(entry["name"]) is not str or type(entry["classes"]) is not int or type(entry["secured"]) is not bool:
        raise TypeError("not a task")
    return Task(**entry)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _check_headroom(room: Headroom) -> None:
    _require(set(room) <= set(ranges.STEPS), f"headroom must be of the steps {', '.join(ranges.STEPS)}")
    for layers in room.values():
        whole = all(type(bits) is int and bits <= ranges.MOST_HEADROOM for bits in layers.values())
        _require(whole, f"headroom must be whole numbers up to {ranges.MOST_HEADROOM}")


def _measured(
    manifest: Manifest, imported: Imported, data: bytes, samples: Iterable[NDArray[np.float32]]
) -> Headroom | None:
    """Return the headroom on samples, None without any; refuse a model that leaves the range, or errs, on them."""
    first: list[NDArray[np.floating]] = []

    def batches() -> Iterator[Mapping[str, NDArray[np.floating]]]:
        for x in samples:
            arrays = input_arrays(imported.program.inputs, x, manifest.low, manifest.high)
            if len(first) < _EXAMINED_BATCHES:
                first.append(arrays[manifest.input_name][:_EXAMINED])
            yield arrays

    room = ranges.headroom(ranges.measure(imported.program, imported.params, batches()))
    ranges.require(room)
    texts = [ranges.warning(room)]
    if first:
        # Answers of some samples of each kind tell as much as those of all; each takes a pass in integers.
        found = examine(read_proto(data), imported, {manifest.input_name: np.concatenate(first)})
        if wrong := found.wrong():
            raise RangeError("; ".join([wrong, *found.hints()]))
        texts += found.hints()
    for text in filter(None, texts):
        warnings.warn(text, RangeWarning, stacklevel=3)
    return room or None


# Samples of each batch, and batches, of which the answers are compared with onnxruntime's when a bundle is written.
_EXAMINED, _EXAMINED_BATCHES = 32, 8


def _check_model(manifest: Manifest, data: bytes) -> Imported:
    """Return the imported model; raise BundleError unless its input and outputs are those of the manifest."""
    imported = load_onnx(data)
    inputs = {x.name: x.shape for x in imported.inputs}
    if inputs != {manifest.input_name: manifest.input_shape}:
        want = f"{manifest.input_name!r} of shape {manifest.input_shape}"
        raise BundleError(f"{MODEL} must have one input {want}; got {inputs}")
    if imported.batch is not None:
        raise BundleError(f"{MODEL} must leave the batch free; it fixes {imported.batch}")
    outputs = [(x.name, x.shape) for x in imported.outputs]
    tasks = [(task.name, (task.classes,)) for task in manifest.tasks]
    if outputs != tasks:
        raise BundleError(f"{MODEL} must have one output for each task, {tasks}; got {outputs}")
    return imported


def _looks_like_bundle(target: Path) -> bool:
    if target.is_symlink() or not target.is_dir():
        return False
    return MANIFEST in (present := set(os.listdir(target))) and present <= {MANIFEST, MODEL}


def _member(handle: int, name: str, limit: int) -> bytes:
    """Return the bytes of a regular file in an open folder, following no link."""
    try:
        member = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
        with open(member, "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise BundleError(f"{name} must be a regular file")
            if facts.st_size > limit:
                raise BundleError(f"{name} must be at most {limit} bytes; got {facts.st_size}")
            return file.read(limit)
    except OSError as error:
        raise BundleError(f"{name} must be a regular file, no link: {error.strerror}") from None


def _text(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise BundleError(f"{MANIFEST} must be JSON text as written by this program") from None
