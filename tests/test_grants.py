"""Grants at the authority, their log, and both inside secure predictions."""

import contextlib
import json
import os
import re
import threading
from datetime import UTC, datetime, timedelta

import pytest

from protocols.errors import InputError, KeyRefused
from securemtk.mtk.audit import START, AuditLog, verify
from securemtk.mtk.grants import Asked, Grant, Ledger

MODEL, OTHER = "00112233445566778899aabbccddeeff", "ff" * 16
START_TIME = datetime(2026, 11, 21, 12, tzinfo=UTC)


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = START_TIME

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(tmp_path, clock):
    return Ledger(tmp_path / "grants.json", clock)


def asked(user="ann", tasks=("digit",), batch=1, model_id=MODEL, prediction=0) -> Asked:
    return Asked(user, model_id, tuple(tasks), batch, prediction)


def lines(ledger: Ledger) -> list[dict]:
    return [json.loads(line) for line in ledger.log_path.read_bytes().splitlines()]


# --- what a grant allows ---------------------------------------------------------------------------------------------


def test_a_granted_key_may_be_used_and_every_use_has_its_line(ledger):
    grant = ledger.grant("ann", MODEL, "digit")
    ledger.permit(asked(batch=3, prediction=7), use=True)
    *_, line = lines(ledger)
    about = {"event": "used", "user": "ann", "model_id": MODEL, "task": "digit", "grant": grant.id}
    assert about | {"batch": 3, "prediction": 7, "time": "2026-11-21T12:00:00.000000+00:00"} == {
        name: line[name] for name in (*about, "batch", "prediction", "time")
    }
    assert ledger.used() == {grant.id: 3}


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (asked(tasks=["parity"]), "absent"),
        (asked(model_id=OTHER), "absent"),
        (asked(user="bob"), "other user"),
        (asked(user=None), "no user"),
        (asked(batch=11), "used up"),
    ],
)
def test_a_key_without_a_grant_is_refused_with_the_reason_and_a_line(ledger, question, reason):
    ledger.grant("ann", MODEL, "digit", uses=10)
    with pytest.raises(KeyRefused, match=rf"the key of task '{question.tasks[0]}' must be granted to .*{reason}"):
        ledger.permit(question, use=True)
    *_, line = lines(ledger)
    assert (line["event"], line["reason"], line["user"]) == ("refused", reason, question.user)


def test_a_grant_holds_from_its_beginning_to_just_before_its_end(ledger, clock):
    ledger.grant(
        "ann", MODEL, "digit", not_before=START_TIME + timedelta(hours=1), until=START_TIME + timedelta(hours=2)
    )
    for minutes, refused in ((59, "not yet valid"), (60, None), (119, None), (120, "expired")):
        clock.now = START_TIME + timedelta(minutes=minutes)
        if refused is None:
            ledger.permit(asked(), use=True)
        else:
            with pytest.raises(KeyRefused, match=refused):
                ledger.permit(asked(), use=True)


def test_uses_are_counted_in_samples_when_the_key_is_used_over_all_ledgers_of_the_file(ledger, clock):
    ledger.grant("ann", MODEL, "digit", uses=10)
    other = Ledger(ledger.path, clock)
    for _ in range(3):
        ledger.permit(asked(batch=6), use=False)  # dealt ahead: not used yet
    ledger.permit(asked(batch=6), use=True)
    with pytest.raises(KeyRefused, match="used up"):
        other.permit(asked(batch=6), use=True)
    other.permit(asked(batch=4), use=True)
    for anyone in (ledger, other, Ledger(ledger.path, clock)):
        with pytest.raises(KeyRefused, match="used up"):
            anyone.permit(asked(), use=True)


def test_all_tasks_of_a_prediction_are_granted_or_none_is_used(ledger):
    grant = ledger.grant("ann", MODEL, "digit", uses=1)
    with pytest.raises(KeyRefused, match="parity"):
        ledger.permit(asked(tasks=["digit", "parity"]), use=True)
    assert ledger.used().get(grant.id, 0) == 0
    ledger.permit(asked(), use=True)


def test_a_revocation_holds_from_the_next_request_on_until_a_new_grant(ledger, clock):
    grant = ledger.grant("ann", MODEL, "digit")
    ledger.permit(asked(), use=True)
    assert [g.id for g in Ledger(ledger.path, clock).revoke(user="ann", task="digit")] == [grant.id]
    with pytest.raises(KeyRefused, match="revoked"):
        ledger.permit(asked(), use=True)
    ledger.grant("ann", MODEL, "digit")
    ledger.permit(asked(), use=True)
    assert [line["event"] for line in lines(ledger)] == ["grant", "used", "revoke", "refused", "grant", "used"]


def test_nothing_is_revoked_unless_a_grant_matches_all_that_is_given(ledger):
    ledger.grant("ann", MODEL, "digit")
    for given in ({}, {"user": "bob"}, {"user": "ann", "task": "parity"}, {"id": "0" * 16}):
        with pytest.raises(InputError, match="must match"):
            ledger.revoke(**given)
    ledger.permit(asked(), use=True)


def test_a_prediction_that_asks_for_no_key_needs_no_grant_and_leaves_no_line(ledger):
    ledger.permit(asked(user=None, tasks=[]), use=True)
    assert not ledger.log_path.exists()


# --- the file --------------------------------------------------------------------------------------------------------


def test_grants_are_private_and_read_as_they_were_written(ledger, clock):
    ledger.grant("ann@site.org", MODEL, "digit", until=START_TIME + timedelta(days=1), uses=5)
    ledger.grant("bob", OTHER, "parity", not_before=START_TIME)
    assert Ledger(ledger.path).grants() == ledger.grants()
    assert [os.stat(path).st_mode & 0o777 for path in (ledger.path, ledger.log_path)] == [0o600, 0o600]
    assert {path.name for path in ledger.path.parent.iterdir()} == {"grants.json", "grants.json.log"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "short"),
        ("user", "ann smith"),
        ("user", ""),
        ("user", 3),
        ("model_id", "xyz"),
        ("task", "a/b"),
        ("until", "tomorrow"),
        ("until", "2026-12-31T18:00:00"),
        ("until", 17),
        ("not_before", "2027-01-01T00:00:00+00:00"),
        ("uses", 0),
        ("uses", True),
        ("uses", 1.5),
        ("colour", "red"),
    ],
)
def test_a_file_with_one_wrong_entry_is_refused_whole_and_opens_nothing(ledger, name, value):
    ledger.grant("ann", MODEL, "digit", until=START_TIME + timedelta(days=1))
    ledger.grant("bob", MODEL, "digit", until=START_TIME + timedelta(days=1))
    body = json.loads(ledger.path.read_text())
    body["grants"][1][name] = value
    ledger.path.write_text(json.dumps(body))
    with pytest.raises(InputError):
        ledger.grants()
    with pytest.raises(KeyRefused, match="no key is used"):
        ledger.permit(asked(), use=True)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "securemtk-grants", "version": 2, "grants": []}', "\xff"])
def test_a_file_that_is_none_of_ours_opens_nothing(ledger, text):
    ledger.grant("ann", MODEL, "digit")
    ledger.path.write_bytes(text.encode("latin1"))
    with pytest.raises(KeyRefused, match="no key is used"):
        ledger.permit(asked(), use=True)


def test_an_id_that_stands_twice_is_refused(ledger):
    ledger.grant("ann", MODEL, "digit")
    body = json.loads(ledger.path.read_text())
    body["grants"] *= 2
    ledger.path.write_text(json.dumps(body))
    with pytest.raises(InputError, match="twice"):
        ledger.grants()


@pytest.mark.parametrize("which", ["path", "log_path"])
def test_files_that_others_may_read_are_refused(ledger, which):
    ledger.grant("ann", MODEL, "digit")
    os.chmod(getattr(ledger, which), 0o640)
    with pytest.raises(KeyRefused, match="owner alone"):
        ledger.permit(asked(), use=True)


def test_without_a_file_nobody_may_use_anything(ledger):
    with pytest.raises(KeyRefused, match="absent"):
        ledger.permit(asked(), use=True)


# --- the log ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path):
    """A log of six lines."""
    log = AuditLog(tmp_path / "log")
    for i in range(6):
        with log.locked():
            log.append([{"event": "used", "i": i}])
    return log


def test_a_log_as_it_was_written_is_found_whole(log):
    verdict = verify(log.path)
    assert (verdict.ok, verdict.lines, verdict.torn, verdict.broken) == (True, 6, False, None)
    assert re.fullmatch("[0-9a-f]{64}", verdict.head)


def edited(rows: list[bytes], at: int) -> list[bytes]:
    return [row.replace(b'"i":', b'"i":1') if i == at else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        *((lambda rows, i=i: edited(rows, i), i + 1) for i in range(6)),
        *((lambda rows, i=i: rows[:i] + rows[i + 1 :], i + 1) for i in range(5)),
        (lambda rows: [rows[0], rows[2], rows[1], *rows[3:]], 2),
        (lambda rows: [rows[1], rows[0], *rows[2:]], 1),
        (lambda rows: [*rows[:3], rows[2], *rows[3:]], 4),
        (lambda rows: [*rows[:3], b"{}", *rows[3:]], 4),
        (lambda rows: [*rows[:3], rows[3][:20], *rows[4:]], 4),
        (lambda rows: [*rows[:5], rows[5][:20]], 6),
        (lambda rows: [*rows[:3], b"", *rows[3:]], 4),
        (lambda rows: [*rows[:3], rows[3].replace(b":", b": ", 1), *rows[4:]], 4),
    ],
)
def test_an_edited_removed_or_moved_line_is_found_and_nothing_is_appended_to_it(log, change, line):
    rows = log.path.read_bytes().splitlines()
    log.path.write_bytes(b"".join(row + b"\n" for row in change(rows)))
    verdict = verify(log.path)
    assert (verdict.ok, verdict.broken) == (False, line)
    before = log.path.read_bytes()
    fresh = AuditLog(log.path)
    with fresh.locked(), pytest.raises(InputError, match=f"line {line} is not"):
        fresh.append([{"event": "used"}])
    assert log.path.read_bytes() == before


def test_an_own_line_recomputed_by_a_forger_does_not_fit_the_next(log):
    forged = AuditLog(log.path.with_name("forged"))
    with forged.locked():
        forged.append([{"event": "used", "i": 99}])
    rows = log.path.read_bytes().splitlines()
    rows[0] = forged.path.read_bytes().splitlines()[0]
    log.path.write_bytes(b"".join(row + b"\n" for row in rows))
    assert verify(log.path).broken == 2


def test_lines_cut_off_at_the_end_are_found_by_a_head_noted_before(log):
    head = verify(log.path).head
    assert verify(log.path, head).known
    whole = log.path.read_bytes()
    with log.locked():
        log.append([{"event": "used"}])
    assert verify(log.path, head).ok
    log.path.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])
    assert verify(log.path).ok
    verdict = verify(log.path, head)
    assert (verdict.ok, verdict.known, verdict.lines) == (False, False, 5)
    with log.locked(), pytest.raises(InputError, match="cut"):  # a writer remembers how long it was
        log.append([{"event": "used"}])


@pytest.mark.parametrize("kept", [1, 30, -2])
def test_a_line_that_a_crash_cut_off_is_no_tampering_and_counts_for_nothing(log, kept):
    rows = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(rows[:5]) + rows[5][:kept])
    verdict = verify(log.path)
    assert (verdict.ok, verdict.torn, verdict.lines) == (True, True, 5)
    seen = []
    fresh = AuditLog(log.path, seen.append)
    with fresh.locked():
        fresh.append([{"event": "used", "i": 6}, {"event": "used", "i": 7}])
    assert [entry["i"] for entry in seen] == [0, 1, 2, 3, 4, 6, 7]
    assert (verify(log.path).ok, verify(log.path).torn) == (True, False)
    torn = log.path.read_bytes()
    log.path.write_bytes(torn.replace(rows[5][:kept] + b"\n", b"x\n"))  # what was cut is bound, too
    assert not verify(log.path).ok


def test_one_crash_after_the_other_is_no_tampering(log):
    size = log.path.stat().st_size
    for _ in range(2):
        with open(log.path, "ab") as file:
            file.write(b'\n{"n":7' if log.path.stat().st_size > size else b'{"n":7')
    assert verify(log.path).ok
    with log.locked():
        log.append([{"event": "used"}])
    assert (verify(log.path).ok, verify(log.path).lines) == (True, 7)


def test_an_empty_log_starts_from_zeros(tmp_path):
    (tmp_path / "log").touch(0o600)
    assert (verify(tmp_path / "log").ok, verify(tmp_path / "log").head) == (True, START)


def test_a_log_that_cannot_be_written_refuses_the_key(ledger, monkeypatch):
    ledger.grant("ann", MODEL, "digit")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(KeyRefused, match="logged first; No space left"):
        ledger.permit(asked(), use=True)


def test_a_full_disk_refuses_the_key_and_what_it_took_of_the_line_counts_for_nothing(ledger, monkeypatch):
    grant = ledger.grant("ann", MODEL, "digit", uses=1)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
    with pytest.raises(KeyRefused, match="only a part"):
        ledger.permit(asked(), use=True)
    monkeypatch.undo()
    assert (verify(ledger.log_path).ok, verify(ledger.log_path).torn) == (True, True)
    ledger.permit(asked(), use=True)
    assert ledger.used() == {grant.id: 1}


def test_an_edited_log_refuses_every_key_but_no_revocation(ledger, clock):
    ledger.grant("ann", MODEL, "digit", uses=1)
    ledger.permit(asked(), use=True)
    ledger.log_path.write_bytes(ledger.log_path.read_bytes().replace(b'"batch":1', b'"batch":0'))
    fresh = Ledger(ledger.path, clock)
    with pytest.raises(KeyRefused, match="line 2 is not"):
        fresh.permit(asked(), use=True)
    with pytest.raises(InputError, match="line 2 is not"):
        fresh.revoke(user="ann")
    assert fresh.grants()[0].revoked == START_TIME


def test_a_line_is_on_the_disk_before_the_key_may_be_used(ledger, monkeypatch):
    ledger.grant("ann", MODEL, "digit")
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), synced.append(os.readlink(f"/proc/self/fd/{fd}"))))
    ledger.permit(asked(), use=True)
    assert synced == [str(ledger.log_path)]
    assert lines(ledger)[-1]["event"] == "used"


def test_ledgers_that_write_at_the_same_time_keep_one_chain_and_one_count(ledger, clock):
    grant = ledger.grant("ann", MODEL, "digit", uses=40)

    def work():
        own = Ledger(ledger.path, clock)
        for i in range(25):
            with contextlib.suppress(KeyRefused):
                own.permit(asked(prediction=i), use=True)

    # A lock belongs to an open file: two ledgers of one process hold each other off as those of two do.
    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    events = [line["event"] for line in lines(ledger)]
    assert (events.count("used"), events.count("refused")) == (40, 10)
    assert ledger.used() == {grant.id: 40}
    assert verify(ledger.log_path).ok


def test_a_grant_tells_its_fields_as_json_and_back(ledger):
    grant = ledger.grant("ann", MODEL, "digit", until=START_TIME)
    assert Grant.from_dict(json.loads(json.dumps(grant.to_dict()))) == grant
