"""Grants: who may use which task's key of which model, from when, until when, how often; and the log of each use.

The authority reads the grants anew for each request and decides while it holds the log, so that a revocation holds
from the next request on, for every authority that reads the same file. How often a grant was used is counted from the
log: no use without its line on the disk.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from protocols.errors import InputError, KeyRefused
from protocols.net.tls import check_user
from protocols.primitives.prg import Stream
from securemtk.mtk.keys.audit import AuditLog
from securemtk.mtk.keys.key import MODEL_ID_BYTES, is_hex
from securemtk.support.documents import Document, parse_json, read
from securemtk.support.files import check_file, read_private, write_whole
from securemtk.tasks import Task

LOG_SUFFIX = ".log"

_FORMAT, _VERSION = "securemtk-grants", 1
_ID_BYTES = 8
_BYTES_MOST = 1 << 24


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Grant:
    """The permission to open one task of one model.

    Args:
        id: 16 hexadecimal digits, unique within a file; uses are counted under it.
        user: name in the certificate of whoever asks.
        model_id: of the model, 32 hexadecimal digits.
        task: name of the task.
        not_before: from when on; None for at once.
        until: not at this moment any more; None for no end.
        uses: samples that may be asked in all; None for any number.
        revoked: since when it holds no more; None while it does.

    Raises:
        InputError: a field does not fit this description. Times must tell their zone.
    """

    id: str
    user: str
    model_id: str
    task: str
    not_before: datetime | None = None
    until: datetime | None = None
    uses: int | None = None
    revoked: datetime | None = None

    def __post_init__(self) -> None:
        texts = (self.id, self.user, self.model_id, self.task)
        if not all(isinstance(text, str) for text in texts):
            raise InputError("a grant's id, user, model_id and task must be texts; got something else")
        if not is_hex(self.id, _ID_BYTES) or not is_hex(self.model_id, MODEL_ID_BYTES):
            raise InputError(f"a grant's id must be {2 * _ID_BYTES} hexadecimal digits, its model_id 32; got others")
        check_user(self.user)
        Task(self.task, classes=2)
        times = (self.not_before, self.until, self.revoked)
        if any(t is not None and (not isinstance(t, datetime) or t.utcoffset() is None) for t in times):
            raise InputError("a grant's times must be ISO 8601 with their zone, such as 2026-12-31T18:00:00+00:00")
        if self.not_before is not None and self.until is not None and not self.not_before < self.until:
            raise InputError("a grant's not_before must be earlier than its until; it is not")
        if self.uses is not None and (type(self.uses) is not int or self.uses < 1):
            raise InputError(f"a grant's uses must be a whole number of samples, 1 or more; got {self.uses!r}")

    def refusal(self, now: datetime, used: int, batch: int) -> str | None:
        """Return why it does not allow `batch` samples now, after `used` of them; None where it does.

        Args:
            now: the time, with its zone.
            used: samples asked under it so far.
            batch: samples asked now.
        """
        if self.revoked is not None:
            return "revoked"
        if self.not_before is not None and now < self.not_before:
            return "not yet valid"
        if self.until is not None and now >= self.until:
            return "expired"
        if self.uses is not None and used + batch > self.uses:
            return "used up"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {name: v.isoformat() if isinstance(v, datetime) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Grant":
        """Read what `to_dict` returned; raise InputError for anything else."""
        times = {name: _time(raw.get(name)) for name in ("not_before", "until", "revoked")}
        return read(cls, {**raw, **times}, "a grant")


@dataclass(frozen=True)
class KeyRequest:
    """A prediction for which keys are asked: all that is decided on and logged, and no key.

    Args:
        user: name in the certificate of whoever asks; None where it has none.
        model_id: of the model.
        tasks: names of the tasks to open.
        batch: samples.
        prediction: its number in this session.
    """

    user: str | None
    model_id: str
    tasks: tuple[str, ...]
    batch: int
    prediction: int


class Ledger:
    """A file of grants, and the log beside it (the file's name and `LOG_SUFFIX`).

    Args:
        path: the grants; JSON, mode 0600. It may be absent: then nobody may use anything.
        now: tells the time; for tests.

    For one thread. Several processes may use the same files.
    """

    def __init__(self, path: str | os.PathLike[str], now: Callable[[], datetime] = _now) -> None:
        self.path = Path(os.path.abspath(path))
        self._used: Counter[str] = Counter()
        self._log = AuditLog(self.path.with_name(self.path.name + LOG_SUFFIX), self._count)
        self._now = now
        # Predictions are numbered by session: the log must tell one session from another.
        self._session = Stream().bytes(_ID_BYTES).hex()

    @property
    def log_path(self) -> Path:
        """Where the log is."""
        return self._log.path

    def grants(self) -> tuple[Grant, ...]:
        """Return all grants, revoked and expired ones too.

        Raises:
            InputError: the file is not one of ours, or others than its owner may read or write it.
        """
        return _read(self.path)

    def used(self) -> Mapping[str, int]:
        """Return how many samples were asked under each grant's id.

        Raises:
            InputError: the log is not as it was written.
            OSError: the disk refuses.
        """
        with self._log.locked():
            self._log.refresh()
        return dict(self._used)

    def grant(
        self,
        user: str,
        model_id: str,
        task: str,
        *,
        not_before: datetime | None = None,
        until: datetime | None = None,
        uses: int | None = None,
    ) -> Grant:
        """Add a grant, with a line in the log.

        Args:
            user, model_id, task, not_before, until, uses: as in `Grant`.

        Raises:
            InputError: as `Grant`, or a file that is not as it was written; nothing is changed.
            OSError: the disk refuses; nothing is granted.
        """
        new = Grant(Stream().bytes(_ID_BYTES).hex(), user, model_id, task, not_before, until, uses)
        check_file(self.path, "grants")  # before the log says that there is one
        with self._log.locked():
            present = self.grants()
            about = {name: value for name, value in new.to_dict().items() if name not in ("id", "revoked")}
            self._log.append([{"time": self._time(), "event": "grant", "grant": new.id} | about])
            _write(self.path, (*present, new))
        return new

    def require(self) -> None:
        """Raise InputError unless the file of grants is there: without one, nothing was ever granted."""
        if not self.path.exists():
            raise InputError(f"a grants file must exist; {self.path.name!r} does not: see securemtk keys grant")

    def revoke(
        self, *, id: str | None = None, user: str | None = None, model_id: str | None = None, task: str | None = None
    ) -> tuple[Grant, ...]:
        """Revoke all grants that match everything given; they hold no more from an authority's next request on.

        Args:
            id, user, model_id, task: as in `Grant`; what is None matches every grant.

        Returns:
            Those revoked now.

        Raises:
            InputError: nothing given, or nothing left to revoke matches; or the log is not as it was written: then the
                grants are revoked all the same.
            OSError: the disk refuses.
        """
        wanted = {"id": id, "user": user, "model_id": model_id, "task": task}
        given = {name: value for name, value in wanted.items() if value is not None}
        none = InputError(f"a grant to revoke must match {given or 'something'}; none does")
        # Before the lock, which makes a log where there is none.
        if not given or not self.grants():
            raise none
        with self._log.locked():
            present = self.grants()
            gone = {g.id for g in present if g.revoked is None and all(getattr(g, k) == v for k, v in given.items())}
            if not gone:
                raise none
            now = self._now()
            after = tuple(replace(g, revoked=now) if g.id in gone else g for g in present)
            _write(self.path, after)
            revoked = tuple(g for g in after if g.id in gone)
            self._log.append([self._line("revoke", g.user, g.model_id, g.task) | {"grant": g.id} for g in revoked])
        return revoked

    def permit(self, asked: KeyRequest, *, use: bool) -> None:
        """Decide on a prediction and log it: when this returns, the lines are on the disk and the keys may be used.

        Args:
            asked: what for; without tasks nothing is decided nor logged.
            use: whether the keys are used now, and the samples counted; False where correlations are dealt ahead.

        Raises:
            KeyRefused: a task has no valid grant, the grants cannot be read, or the log cannot be written.
        """
        if not asked.tasks:
            return
        with self._refusing(), self._log.locked():
            self._log.refresh()
            grants = self.grants()
            found = {task: self._judge(grants, asked, task) for task in asked.tasks}
            refused = {task: why for task, why in found.items() if isinstance(why, str)}
            if refused:
                self._log.append([self._row("refused", asked, task, reason=why) for task, why in refused.items()])
                task, why = next(iter(refused.items()))
                raise KeyRefused(f"the key of task {task!r} must be granted to {_who(asked)}; {_SAID[why]}")
            event = "used" if use else "dealt"
            rows = [self._row(event, asked, t, grant=g.id) for t, g in found.items() if isinstance(g, Grant)]
            self._log.append(rows)

    def refuse(self, asked: KeyRequest, task: str, reason: str) -> None:
        """Log that a key was refused for another reason.

        Args:
            asked: what for.
            task: whose key was refused.
            reason: in a few words.

        Raises:
            KeyRefused: the log cannot be written.
        """
        with self._refusing(), self._log.locked():
            self._log.append([self._row("refused", asked, task, reason=reason)])

    def _judge(self, grants: Sequence[Grant], asked: KeyRequest, task: str) -> Grant | str:
        """Return the first grant that allows a task, or why there is none."""
        of_task = [g for g in grants if (g.model_id, g.task) == (asked.model_id, task)]
        own = [g for g in of_task if asked.user is not None and g.user == asked.user]
        if not own:
            return "no user" if asked.user is None else "other user" if of_task else "absent"
        whys = [g.refusal(self._now(), self._used[g.id], asked.batch) for g in own]
        for grant, why in zip(own, whys, strict=True):
            if why is None:
                return grant
        return str(whys[-1])  # of the grant that was given last

    def _row(self, event: str, asked: KeyRequest, task: str, **more: str) -> dict[str, Any]:
        about = {"batch": asked.batch, "prediction": asked.prediction, "session": self._session}
        return self._line(event, asked.user, asked.model_id, task) | more | about

    def _line(self, event: str, user: str | None, model_id: str, task: str) -> dict[str, Any]:
        return {"time": self._time(), "event": event, "user": user, "model_id": model_id, "task": task}

    def _time(self) -> str:
        return self._now().isoformat(timespec="microseconds")

    def _count(self, entry: Mapping[str, Any]) -> None:
        if entry.get("event") == "used":
            self._used[str(entry.get("grant"))] += int(entry.get("batch", 0))

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Refuse the key where grants or log fail: in doubt nothing opens."""
        try:
            yield
        except KeyRefused:
            raise
        except InputError as error:
            raise KeyRefused(f"no key is used: {error}") from None
        except OSError as error:
            raise KeyRefused(f"no key is used: its use must be logged first; {error.strerror or error}") from None


_SAID = {
    "no user": "its certificate names no user: Session(user=...)",
    "absent": "there is no grant (absent)",
    "other user": "only others have a grant (other user)",
    "revoked": "the grant is revoked",
    "not yet valid": "the grant is not yet valid",
    "expired": "the grant has expired",
    "used up": "fewer uses are left than samples are asked (used up)",
}


def _who(asked: KeyRequest) -> str:
    return "who asks" if asked.user is None else f"user {asked.user!r}"


def _time(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        raise InputError("a grant's times must be ISO 8601, such as 2026-12-31T18:00:00+00:00; got another") from None


class _GrantsFile(Document, frozen=True):
    format: Literal["securemtk-grants"]
    version: Literal[1]
    grants: list[dict[str, Any]]


def _read(path: Path) -> tuple[Grant, ...]:
    try:
        found = read(_GrantsFile, parse_json(read_private(path, _BYTES_MOST), path.name), path.name)
    except FileNotFoundError:
        return ()
    grants = tuple(Grant.from_dict(raw) for raw in found.grants)
    if len({grant.id for grant in grants}) != len(grants):
        raise InputError(f"{path.name} must name each grant once; an id stands there twice")
    return grants


def _write(path: Path, grants: Sequence[Grant]) -> None:
    body = {"format": _FORMAT, "version": _VERSION, "grants": [grant.to_dict() for grant in grants]}
    write_whole(path, json.dumps(body, indent=1).encode() + b"\n", private=True)
