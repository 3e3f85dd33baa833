"""What a bundle says of itself: its fields, their rules, their text; no file is read and no model is looked at.

Every role reads manifests, so that nothing here imports onnx.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from protocols.errors import BundleError, InputError
from protocols.program.program import Shape
from protocols.running import ranges
from protocols.running.ranges import Headroom
from securemtk.support.documents import parse_json, read
from securemtk.tasks import Task

FORMAT = 1
MANIFEST, MODEL = "manifest.json", "cloud.onnx"
_FRAC_BITS = range(8, 25)
_SUM = "sha256"
# Left out of the text where they are None; so are the labels of a task.
_OPTIONAL = {"decoupling", "headroom"}

Matrix = Sequence[Sequence[float]]
Answers = Mapping[str, Mapping[str, Matrix]]


@dataclass(frozen=True)
class Manifest:
    """What a bundle says about itself; all of it is public.

    Args:
        model_id: 32 hexadecimal digits; trigger-keys name the model they belong to by it.
        tasks: one for each output of the model, in order, with the names of its classes where they have names.
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
        drawn = {task.name: task.classes for task in self.tasks if task.secured or task.name in self._sources(secured)}
        _require(set(self.answers) == set(drawn), f"answers must be those of the tasks {sorted(drawn)}")
        for name, classes in drawn.items():
            _check_answers(name, self.answers[name], classes)
        _check_headroom({} if self.headroom is None else self.headroom)

    def _sources(self, closed: Iterable[str]) -> set[str]:
        leaks: Mapping[str, Sequence[str]] = {} if self.decoupling is None else self.decoupling["leaks"]
        return {source for name in closed for source in leaks.get(name, ())}

    def opening(self, task: str, granted: Collection[str]) -> float:
        """Return the probability with which a row of a task is answered truly when these tasks' keys are granted.

        Args:
            task: name of the task.
            granted: tasks whose keys are granted.
        """
        closed = [t.name for t in self.tasks if t.secured and t.name not in granted]
        if task in closed:
            return 0.0
        decoupled = self.decoupling is not None and task in self._sources(closed)
        return float(self.decoupling["beta"]) if decoupled and self.decoupling is not None else 1.0

    def to_json(self) -> str:
        """Return the manifest as canonical JSON text; its last entry is the SHA-256 of the rest."""
        fields = asdict(self)
        for name in _OPTIONAL:
            if fields[name] is None:
                del fields[name]
        for task in fields["tasks"]:
            if task["labels"] is None:
                del task["labels"]
        digest = hashlib.sha256(_canonical(fields).encode()).hexdigest()
        return _canonical(fields | {_SUM: digest}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote; raise BundleError for anything else, edited values included."""
        try:
            raw = parse_json(text, MANIFEST)
            if not isinstance(raw, dict) or _SUM not in raw:
                raise BundleError(f"{MANIFEST} must end in its {_SUM}; it has none")
            manifest = read(cls, {name: value for name, value in raw.items() if name != _SUM}, MANIFEST)
        except InputError as error:
            raise BundleError(str(error)) from None
        if manifest.to_json() != text:
            raise BundleError(f"{MANIFEST} must be unchanged; its SHA-256 is another")
        return manifest


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
    for name, sources in raw["leaks"].items():
        fits = name in secured and isinstance(sources, list | tuple) and 0 < len(sources) == len(set(sources))
        _require(
            fits and set(sources) <= unprotected, f"leaks of {name!r} must be unprotected tasks beside a secured one"
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


def _check_headroom(room: Headroom) -> None:
    _require(set(room) <= set(ranges.STEPS), f"headroom must be of the steps {', '.join(ranges.STEPS)}")
    for layers in room.values():
        whole = all(type(bits) is int and bits <= ranges.MOST_HEADROOM for bits in layers.values())
        _require(whole, f"headroom must be whole numbers up to {ranges.MOST_HEADROOM}")
