"""Grants at the authority, their log, and both inside secure predictions."""

import contextlib
import fcntl
import json
import os
import re
import threading
from datetime import UTC, datetime, timedelta

import numpy as np
import onnxruntime
import pytest
import small_models

from protocols.errors import InputError, KeyRefused, ProtocolAbort
from securemtk import Session
from securemtk.mtk.keys.audit import START, AuditLog, verify
from securemtk.mtk.keys.file_stores import FileGrants
from securemtk.mtk.keys.grants import Grant, KeyRequest, Ledger
from securemtk.mtk.keys.key import stamp

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


def asked(user="ann", tasks=("digit",), batch=1, model_id=MODEL, prediction=0) -> KeyRequest:
    return KeyRequest(user, model_id, tuple(tasks), batch, prediction)


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


def test_nobody_else_decides_between_a_decision_and_its_line(ledger, monkeypatch):
    ledger.grant("ann", MODEL, "digit")
    fsync, tried = os.fsync, []

    def try_to_lock(fd):
        with open(ledger.log_path, "rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tried.append(fd)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", try_to_lock)
    ledger.permit(asked(), use=True)
    assert tried
    with open(ledger.log_path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


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


# --- inside secure predictions ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return folder, small_models.make_bundle(folder)


@pytest.fixture(scope="module")
def shared(bundle):
    """One session of ann for all tests that leave it alive, its model, and a ledger with the clock of this machine."""
    ledger = Ledger(bundle[0] / "grants.json")
    ledger.grant("ann", OTHER, "digit")
    with Session(key_files=bundle[0] / "keys", grants=ledger.path, user="ann") as session:
        yield session, session.load(bundle[0] / "bundle"), ledger


@pytest.fixture
def guarded(shared):
    """The same, with nothing granted; and the lines that a test adds."""
    session, model, ledger = shared
    for model_id in (MODEL, OTHER):
        with contextlib.suppress(InputError):
            ledger.revoke(model_id=model_id)
    before = len(lines(ledger))
    return session, model, ledger, lambda: [line for line in lines(ledger)[before:] if line["event"] != "grant"]


def samples(n: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, *small_models.SHAPE)).astype(np.float32)


def is_open(model, keys, task, x) -> bool:
    """Ask for all of `keys`, and tell whether `task` answers truly."""
    scores = model.predict(x, open_tasks=list(keys))[task]
    names = [t.name for t in small_models.TASKS]
    runtime = onnxruntime.InferenceSession(small_models.multitask()[0])
    truth = dict(zip(names, runtime.run(None, {"x": stamp(x, keys.values())}), strict=True))[task]
    return bool(np.abs(scores - truth).max() < 2e-3)


def test_a_session_honours_grants_their_end_and_their_revocation_for_each_prediction(guarded, bundle):
    _, model, ledger, added = guarded
    keys, x, now = bundle[1], samples(2), datetime.now(UTC)
    digit = {"digit": keys["digit"]}
    granted = ledger.grant("ann", MODEL, "digit", uses=7)
    assert is_open(model, digit, "digit", x)
    assert not is_open(model, {}, "digit", x)
    ledger.grant("ann", MODEL, "parity", until=now)
    with pytest.raises(KeyRefused, match=r"'parity' .*expired"):
        model.predict(x, open_tasks=["digit", "parity"])
    ledger.grant("ann", MODEL, "parity", not_before=now, until=now + timedelta(hours=1))
    assert is_open(model, keys, "parity", x)
    with pytest.raises(KeyRefused, match=r"'digit' must be granted to user 'ann'; .*used up"):
        model.predict(samples(4), open_tasks=["digit"])
    assert is_open(model, digit, "digit", x)
    ledger.revoke(id=granted.id)
    with pytest.raises(KeyRefused, match=r"'digit' .*revoked"):
        model.predict(x, open_tasks=["digit"])
    ledger.grant("ann", MODEL, "digit", not_before=now + timedelta(hours=1))
    with pytest.raises(KeyRefused, match=r"'digit' .*not yet valid"):
        model.predict(x, open_tasks=["digit"])
    assert model.predict(x)["large"].shape == (2, 2)  # what is not secured needs no grant
    rows = added()
    assert [(row["event"], row["task"], row.get("batch"), row.get("reason")) for row in rows] == [
        ("used", "digit", 2, None),
        ("refused", "parity", 2, "expired"),
        ("used", "digit", 2, None),
        ("used", "parity", 2, None),
        ("refused", "digit", 4, "used up"),
        ("used", "digit", 2, None),
        ("revoke", "digit", None, None),
        ("refused", "digit", 2, "revoked"),
        ("refused", "digit", 2, "not yet valid"),
    ]
    assert {row["user"] for row in rows} == {"ann"}
    numbers = [row["prediction"] for row in rows if row["event"] == "used"]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 3
    assert verify(ledger.log_path).ok


def test_a_file_of_grants_that_is_damaged_while_a_session_runs_opens_nothing(guarded, bundle):
    _, model, ledger, _ = guarded
    ledger.grant("ann", MODEL, "digit")
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-9])
    with pytest.raises(KeyRefused, match=r"grants\.json must be whole JSON text"):
        model.predict(samples(1), open_tasks=["digit"])
    ledger.path.write_bytes(whole)
    assert is_open(model, {"digit": bundle[1]["digit"]}, "digit", samples(1))


def test_a_hand_dealt_before_a_revocation_opens_nothing_after_it(guarded, bundle):
    session, model, ledger, added = guarded
    digit, x = {"digit": bundle[1]["digit"]}, samples(2)
    ledger.grant("ann", MODEL, "digit", uses=6)
    model.prepare(2, open_tasks=["digit"], predictions=4)
    assert is_open(model, digit, "digit", x)
    assert is_open(model, digit, "digit", x)
    ledger.revoke(user="ann", model_id=MODEL)
    with pytest.raises(KeyRefused, match="revoked"):
        model.predict(x, open_tasks=["digit"])
    ledger.grant("ann", MODEL, "digit", uses=2)
    assert is_open(model, digit, "digit", x)  # the last of those dealt ahead
    assert not session._user.orders.ahead
    with pytest.raises(KeyRefused, match="used up"):
        model.predict(x, open_tasks=["digit"])
    assert not session._user._pool._ready
    events = [line["event"] for line in added()]
    assert events == ["dealt"] * 4 + ["used", "used", "revoke", "refused", "used", "refused"]


def test_orders_refused_when_they_are_dealt_are_refused_when_they_are_asked_for(guarded, bundle):
    _, model, ledger, _ = guarded
    ledger.grant("ann", MODEL, "parity")
    model.prepare(1, open_tasks=["parity"])
    model.prepare(1, open_tasks=["digit"], predictions=2)
    model.predict(samples(1), open_tasks=["parity"])
    for _ in range(2):
        with pytest.raises(KeyRefused, match=r"'digit' must be granted"):
            model.predict(samples(1), open_tasks=["digit"])
    ledger.grant("ann", MODEL, "digit")
    assert is_open(model, {"digit": bundle[1]["digit"]}, "digit", samples(1))


def test_a_key_that_the_authority_lacks_is_logged_as_refused(guarded, tmp_path):
    session, _, ledger, added = guarded
    small_models.make_bundle(tmp_path, OTHER)
    ledger.grant("ann", OTHER, "digit")
    model = session.load(tmp_path / "bundle")
    with pytest.raises(KeyRefused, match="must be of this model"):
        model.predict(samples(1), open_tasks=["digit"])
    assert [(line["event"], line["reason"]) for line in added()] == [("refused", "no key")]


def test_neither_log_nor_grants_hold_a_value_of_a_key(guarded, bundle):
    _, model, ledger, _ = guarded
    ledger.grant("ann", MODEL, "digit")
    model.predict(samples(1), open_tasks=["digit"])
    written = ledger.path.read_text() + ledger.log_path.read_text()
    key = bundle[1]["digit"]
    assert json.loads((bundle[0] / "keys" / "digit.key").read_text())["pattern"] not in written
    assert not any(str(value) in written for value in key.pattern[key.mask] if 0 < value < 1)


def test_the_certificate_says_who_asks(bundle, tmp_path):
    ledger = Ledger(tmp_path / "grants.json")
    ledger.grant("ann", MODEL, "digit")
    with Session(key_files=bundle[0] / "keys", grants=ledger.path, user="bob") as session:
        model = session.load(bundle[0] / "bundle")
        with pytest.raises(KeyRefused, match="granted to user 'bob'; only others"):
            model.predict(samples(1), open_tasks=["digit"])
        assert model.predict(samples(1))["large"].shape == (1, 2)
    assert lines(ledger)[-1]["user"] == "bob"


@pytest.fixture
def two_ahead(bundle, tmp_path):
    """A session that a test may end, with two predictions dealt ahead."""
    ledger = Ledger(tmp_path / "grants.json")
    ledger.grant("ann", MODEL, "digit")
    with Session(key_files=bundle[0] / "keys", grants=ledger.path, user="ann") as session:
        model = session.load(bundle[0] / "bundle")
        model.prepare(1, open_tasks=["digit"], predictions=2)
        yield session, model


def test_the_keeper_runs_no_guarded_prediction_but_the_one_that_the_authority_allowed(two_ahead, monkeypatch):
    session, model = two_ahead
    ask, second = session._user.orders.ask_use, session._user.orders.ahead[1]
    monkeypatch.setattr(session._user.orders, "ask_use", lambda order: ask(second))
    with pytest.raises(ProtocolAbort, match="must allow prediction 0; it allowed 1"):
        model.predict(samples(1), open_tasks=["digit"])


def test_a_hand_is_allowed_once(two_ahead):
    session, model = two_ahead
    first = session._user.orders.ahead[0]
    model.predict(samples(1), open_tasks=["digit"])
    with pytest.raises(ProtocolAbort, match="used once; 0 is not"):
        session._ending_session_on_error(lambda: session._user.orders.ask_use(first))


def test_an_authority_does_not_start_with_a_log_that_was_edited(tmp_path):
    ledger = Ledger(tmp_path / "grants.json")
    ledger.grant("ann", MODEL, "digit")
    ledger.log_path.write_bytes(ledger.log_path.read_bytes().replace(b"digit", b"parity"))
    with pytest.raises(InputError, match="line 1 is not"):
        FileGrants(Ledger(ledger.path))


def test_grants_that_are_not_there_and_names_that_no_certificate_carries_are_refused(tmp_path):
    with pytest.raises(InputError, match="grants file must exist"), Session(grants=tmp_path / "none.json", user="ann"):
        pass
    with pytest.raises(InputError, match="user's name must be"):
        Session(user="ann\nbob")
