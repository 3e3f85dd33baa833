"""`securemtk report`: a page that says what its JSON says, needs nothing beside it, and tells no secret."""

import base64
import io
import json
import os
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protocols.errors import InputError
from securemtk.cli import app
from securemtk.cli.commands import report as report_command
from securemtk.mtk.attacks.base import Finding
from securemtk.mtk.attacks.suite import AttackReport, Effort
from securemtk.mtk.evaluation.leaks import AnswerLeak, LabelLeak
from securemtk.mtk.keys.key import draw_keys
from securemtk.mtk.keys.key import load as load_key
from securemtk.mtk.training.decoupling import Decoupling, DecouplingConfig
from securemtk.mtk.training.train import TrainConfig
from securemtk.report import document as document_module
from securemtk.report import facts
from securemtk.report.document import ATTACK_FILE, ReportOptions, measure_report, read_attacks
from securemtk.report.page import check_target, render, write_report
from securemtk.report.threats import threat_model
from securemtk.runs import run_folder
from securemtk.support import files

VOID = {"meta", "img", "br", "link", "input", "hr"}
SECTIONS = ["summary", "run", "accuracy", "leaks", "attacks", "guarantees", "encrypted", "threats", "versions"]
PASSPHRASE = "open sesame"
QUICK = ReportOptions(samples=20, batches=(1, 4), repeats=1)
FINDING = {
    "attack": "infer",
    "task": "cultivar",
    "what": "all sampled outputs, no key: accuracy of the better attacker",
    "figure": 0.25,
    "chance": 0.2,
    "meaning": "a <b>sentence</b>",
    "details": {"rule": "sampled", "state": "no key"},
}
ATTACKS = {"format": 1, "seed": 0, "effort": {"tries": 5}, "findings": [FINDING], "seconds": {"infer": 1.0}}


class Page(HTMLParser):
    """Checks that tags balance, and keeps what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[str, list[float]]]]] = {}
        self.numbers: list[tuple[float, str]] = []
        self.text = ""
        self._table = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = found["id"]
            self.tables[self._table] = []
        if tag == "tr":
            self.tables[self._table].append([])
        if tag in ("td", "th"):
            self.tables[self._table][-1].append(("", []))
        if tag == "data":
            value = float(found["value"])
            self.numbers.append((value, ""))
            if self._table:
                self.tables[self._table][-1][-1][1].append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self._table = ""

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.text += data
        if self.open and self.open[-1] == "data":
            self.numbers[-1] = (self.numbers[-1][0], data)
        if self._table and {"td", "th"} & set(self.open):
            text, values = self.tables[self._table][-1][-1]
            self.tables[self._table][-1][-1] = (text + data, values)

    def rows(self, table):
        """Return the rows of a table's body as texts and values."""
        return [[(text.strip(), values) for text, values in row] for row in self.tables[table][1:]]

    def values(self, table):
        return [[value for _, values in row for value in values] for row in self.rows(table)]


def numbers(value):
    """Give every number in a document."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on a small table, with two secured tasks and locked keys; the passphrase is in a file beside it."""
    path = tmp_path_factory.mktemp("report") / "run"
    (path.parent / "secret").write_text(f"{PASSPHRASE}\n")
    config = TrainConfig(epochs=2)
    run_folder.train_run(path, "wine", ["cultivar", "proline"], config, options={"seed": 3}, passphrase=PASSPHRASE)
    return path


@pytest.fixture(scope="module")
def document(folder):
    return measure_report(
        folder, passphrase=PASSPHRASE, extent=QUICK, attacks=ATTACKS | {"made": "then", "stale": True}
    )


@pytest.fixture(scope="module")
def html(document):
    return render(document)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_has_every_section_with_a_heading_and_captions_and_alt_texts(page):
    ids = [found["id"] for tag, found in page.tags if tag == "section"]
    assert ids == SECTIONS
    assert all(found["aria-labelledby"] == f"{found['id']}-title" for tag, found in page.tags if tag == "section")
    names = [tag for tag, _ in page.tags]
    assert names.count("h1") == names.count("title") == names.count("main") == 1
    assert names.count("h2") == len(SECTIONS)
    assert names.count("caption") == names.count("table") == len(page.tables) > 10
    assert all(len(found["alt"]) > 20 for tag, found in page.tags if tag == "img")
    assert all("scope" in found for tag, found in page.tags if tag == "th")
    everywhere = [found["id"] for _, found in page.tags if "id" in found]
    assert len(everywhere) == len(set(everywhere))
    links = [found["href"] for tag, found in page.tags if tag == "a"]
    assert links
    assert all(link[0] == "#" and link[1:] in everywhere for link in links)


def test_every_row_has_as_many_cells_as_the_table_has_heads(page):
    for name, rows in page.tables.items():
        assert {len(row) for row in rows} == {len(rows[0])}, name


def test_every_number_on_the_page_is_one_of_the_document_and_is_shown_rounded(page, document):
    known = set(numbers(document))
    assert len(page.numbers) > 150
    for value, shown in page.numbers:
        assert value in known
        bare = float(shown.replace(",", ""))
        assert any(bare == pytest.approx(scale * value, rel=0.006, abs=0.0501) for scale in (1, 100, 1e3, 1e-6))


def test_tables_say_of_each_task_what_the_document_says(page, document):
    states = ["chance", "no_key", "wrong_random", "wrong_other", "right_key", "all_keys"]
    for row, (name, task) in zip(page.rows("accuracy-table"), document["accuracy"].items(), strict=True):
        assert row[0][0] == name
        assert [values for _, values in row[2:]] == [[task[state]] for state in states]
    columns = ["samples", "prior", "labels", "best", "gain", "beyond_labels", "standard_error"]
    for row, leak in zip(page.rows("answer-leaks"), document["leaks"]["answers"], strict=True):
        assert [text for text, _ in row[:4]] == [
            leak["target"], " + ".join(leak["sources"]), " + ".join(leak["held"]) or "none", leak["rule"],
        ]  # fmt: skip
        assert [values for _, values in row[5:]] == [[leak[column]] for column in columns]
    for row, (name, found) in zip(page.rows("guarantee-table"), document["guarantees"].items(), strict=True):
        assert row[0][0] == name
        assert [values[0] for _, values in row[1:]] == [found[k] for k in ("kl", "bound", "advantage", "key_bits")]
    for row, state in zip(page.rows("encrypted-table"), document["encrypted"]["states"], strict=True):
        assert [values for _, values in row[1:4]] == [[share] for share in state["accuracy"].values()]
        assert row[4][1] == list(state["agreement"].values())
    costs = ["batch", "online_s", "offline_s", "online_bytes", "offline_bytes", "rounds", "repeats"]
    assert page.values("cost-table") == [[cost[name] for name in costs] for cost in document["encrypted"]["costs"]]


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs(page, html):
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    for _, found in page.tags:
        assert not [name for name in found if name.startswith("on")]
        assert all(found.get(name, "data:").startswith(("data:", "#")) for name in ("src", "href", "srcset", "data"))
    assert "url(" not in html
    assert "@import" not in html
    policies = [found["content"] for tag, found in page.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_pictures_are_whole(page):
    pictures = [found["src"].partition(";base64,") for tag, found in page.tags if tag == "img"]
    kinds = [kind for kind, _, _ in pictures]
    assert kinds == ["data:image/svg+xml", "data:image/svg+xml", "data:image/png"]
    for kind, _, data in pictures:
        raw = base64.b64decode(data, validate=True)
        if kind.endswith("png"):
            assert Image.open(io.BytesIO(raw)).size > (100, 100)
        else:
            assert raw.strip().endswith(b"</svg>")
            assert b"<script" not in raw


def test_it_is_readable_in_dark_and_in_print(html):
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


# --- secrets and hostile texts --------------------------------------------------------------------------------------


def test_neither_page_nor_json_tell_a_key_a_path_or_a_host(folder, document, html):
    texts = html + json.dumps(document)
    shown = set(numbers(document))
    for name in ("cultivar", "proline"):
        key = load_key(folder / run_folder.KEYS / f"{name}.key", PASSPHRASE)
        values = key.pattern[key.mask]
        encoded = base64.b64encode(key.pattern.tobytes()).decode()
        assert encoded[48:80] not in texts
        assert key.model_id not in texts
        assert PASSPHRASE not in texts
        assert not {float(value) for value in values} & shown - {0.0, 1.0, -1.0}
    assert str(folder) not in texts
    assert not [name for name in (os.uname().nodename, str(Path.home())) if len(name) > 5 and name in texts]
    assert not re.search(r'["\s>](/[\w.-]+){2,}', texts)


def test_paths_among_the_options_of_a_data_set_are_left_out():
    assert facts.data_facts(
        run_folder.data.load("wine"),
        {"path": "/home/me/faces", "tasks": ["a", "b/c"], "n": 3, "deep": {"x": "C:\\faces"}},
    )["options"] == {"path": facts.LEFT_OUT, "tasks": ["a", facts.LEFT_OUT], "n": 3, "deep": {"x": facts.LEFT_OUT}}


def test_the_place_of_a_key_in_an_image_is_its_rows_and_columns():
    digits = run_folder.data.load("digits")
    key = draw_keys(["digit"], digits.shape, side=4)["digit"]
    found = facts.key_facts(key, digits)
    assert found == {"values": 16, "of": 256, "bits": 128, "rows": [12, 15], "columns": [12, 15]}


def test_texts_from_data_and_from_attacks_are_escaped(document):
    hostile = json.loads(json.dumps(document))
    hostile["tasks"][0]["class_names"][0] = "<b>bold</b>"
    hostile["data"]["name"] = "</title><script>alert(1)</script>"
    hostile["data"]["options"] = {'"><i>': "<u>"}
    hostile["keys"]["cultivar"]["features"] = ["<em>one</em>"]
    html = render(hostile)
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert "a &lt;b&gt;sentence&lt;/b&gt;" in html
    assert not {"b", "i", "u", "script"} & {tag for tag, _ in Page(html).tags}
    assert "<em>one" not in html


# --- what is there and what is not ----------------------------------------------------------------------------------


def test_findings_of_attacks_are_shown_and_old_ones_marked(page, document):
    assert page.rows("attack-table") == [
        [
            ("infer", []), ("cultivar", []), (FINDING["what"], []), ("0.25", [0.25]), ("0.2", [0.2]),
            ("a <b>sentence</b>", []),
        ]
    ]  # fmt: skip
    assert "older than the run's weights" in page.text
    without = Page(render(document | {"attacks": None}))
    assert "attack-table" not in without.tables
    assert "securemtk attack RUN" in without.text


def test_what_was_not_measured_is_said_plainly(document):
    found = Page(render(document | {"encrypted": None}))
    assert "cost-table" not in found.tables
    assert "--no-encrypted" in found.text


def test_a_run_with_nothing_secured_has_a_report_too(tmp_path):
    folder = tmp_path / "run"
    run_folder.train_run(folder, "wine", [], TrainConfig(epochs=1))
    document = measure_report(folder, extent=replace(QUICK, encrypted=False))
    found = Page(render(document))
    assert "No task of this run is secured" in found.text
    assert (document["keys"], document["summary"], document["guarantees"]) == ({}, [], {})
    assert "class_1" in found.text
    with pytest.raises(InputError, match="a run must have a secured task to be attacked"):
        measure_report(folder, extent=ReportOptions(encrypted=False, attacks=Effort()))


def test_a_table_shows_which_features_a_key_takes(folder, page, document):
    mask = load_key(folder / run_folder.KEYS / "proline.key", PASSPHRASE).mask
    columns = [f"key {i + 1}" for i in np.flatnonzero(mask) - len(run_folder.data.load("wine").columns.names)]
    assert document["keys"]["proline"]["features"] == columns
    assert ", ".join(columns) in page.text
    assert document["data"]["options"] == {"seed": 3}


def test_decoupling_is_told(tmp_path):
    folder = tmp_path / "run"
    config = TrainConfig(epochs=1, decoupling=DecouplingConfig(beta=0.25))
    run_folder.train_run(folder, "wine", ["cultivar"], config)
    document = measure_report(folder, extent=replace(QUICK, encrypted=False))
    found = Page(render(document))
    assert document["leaks"]["beta"] == 0.25
    assert "Decoupled, with beta 0.25" in found.text
    assert any("decoupling" in line["why"] for line in document["threats"]["protected"])


def test_encrypted_answers_agree_with_plain_ones(document):
    for state in document["encrypted"]["states"]:
        assert set(state["agreement"].values()) == {1.0}
        assert state["max_difference"] < 0.01
    assert [state["keys"] for state in document["encrypted"]["states"]] == [
        [], ["cultivar"], ["proline"], ["cultivar", "proline"],
    ]  # fmt: skip
    assert [cost["batch"] for cost in document["encrypted"]["costs"]] == [1, 4]


def test_the_matrix_shows_the_gains_of_the_table(document):
    leaks = document["leaks"]
    matrix = leaks["matrix"]
    assert matrix["rows"] == ["cultivar", "proline"]
    assert matrix["columns"] == ["colour", "cultivar (its key)", "proline (its key)", "all others, with keys"]
    gains = {(leak["target"], tuple(leak["sources"]), leak["rule"]): leak["gain"] for leak in leaks["answers"]}
    assert matrix["gains"]["released scores"] == [
        [gains["cultivar", ("colour",), "scores"], None, gains["cultivar", ("proline",), "scores"],
         gains["cultivar", ("colour", "proline"), "scores"]],
        [gains["proline", ("colour",), "scores"], gains["proline", ("cultivar",), "scores"], None,
         gains["proline", ("colour", "cultivar"), "scores"]],
    ]  # fmt: skip


# --- the threat model -----------------------------------------------------------------------------------------------

LABELS = LabelLeak("sex", "beard", 100, 0.5, 0.8, 0.2, 0.6, 1, 0, 1.0, 0.5, True)
SEEN = AnswerLeak("sex", ("beard",), (), "label", {"beard": 1.0}, 100, 0.5, 0.8, 0.8, 0.79)


def lines_of(model):
    return [line for line in model.unprotected if line.what == "sex while it is closed"]


def test_the_threat_model_says_who_tells_of_a_closed_task():
    (line,) = lines_of(threat_model(["sex"], [LABELS], [SEEN], None))
    assert line.whom == "whoever sees beard"
    assert "not decoupled" in line.why
    assert "80 % of test labels" in line.why
    (line,) = lines_of(threat_model(["sex", "beard"], [LABELS], [SEEN], None))
    assert line.whom == "whoever holds the key of beard"


def test_the_threat_model_follows_decoupling_and_what_attackers_have_found():
    quarter = Decoupling(0.25, {("sex", "beard"): (0, 1)}, {"beard": np.array([0.5, 0.5])})
    (line,) = lines_of(threat_model(["sex"], [LABELS], [replace(SEEN, logistic=0.5, boosting=0.5)], quarter))
    assert "lets 25 %" in line.why
    silent = replace(quarter, beta=0.0)
    assert lines_of(threat_model(["sex"], [LABELS], [replace(SEEN, logistic=0.5, boosting=0.52)], silent)) == []
    assert len(lines_of(threat_model(["sex"], [LABELS], [SEEN], silent))) == 1
    assert lines_of(threat_model(["sex"], [replace(LABELS, leaky=False)], [], None)) == []
    protected = threat_model(["sex"], [LABELS], [SEEN], silent).protected
    assert any("beard would tell of sex" in line.what for line in protected)


def test_the_threat_model_of_fixed_labels_and_of_no_keys_is_another():
    fixed, soft, none = (threat_model(s, [], [], None, t) for s, t in (("a", "fixed"), ("a", "soft"), ("", "fixed")))
    assert set(fixed.unprotected) - set(soft.unprotected)
    assert set(soft.protected) > set(none.protected)
    assert any("no task of this run is secured" in line.why for line in none.unprotected)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch, document):
    """Count calls that would measure, and answer with the document."""
    calls = []

    def answer(*_, **options):
        calls.append(options)
        return document

    monkeypatch.setattr(report_command, "measure_report", answer)
    return calls


def call(capfd, command, folder, *options):
    secret = folder.parent / "secret"
    given = ["--passphrase-file", secret] if secret.exists() and "--passphrase-file" not in options else []
    status = app.run([str(a) for a in (command, folder, *given, *options)])
    out, err = capfd.readouterr()
    return status, out, " ".join(err.split())


def test_the_command_writes_both_files_and_prints_the_document(folder, tmp_path, capfd, measured, document):
    target = tmp_path / "digits.html"
    status, out, _ = call(capfd, "report", folder, "--output", target, "--json", "--no-encrypted", "--samples", 7)
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "digits.json").read_text()) == document
    assert target.read_text() == render(document)
    (options,) = measured
    assert options["extent"] == ReportOptions(encrypted=False, samples=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.html", "digits.json"]
    status, out, err = call(capfd, "report", folder, "--output", target)
    assert status == 0
    assert "what open tasks tell" in out
    assert "written" in err


def test_the_command_measures_a_run_and_leaves_the_report_in_its_folder(folder, capfd):
    status, out, _ = call(capfd, "report", folder, "--no-encrypted", "--json")
    assert status == 0
    assert json.loads(out)["encrypted"] is None
    assert json.loads((folder / "report.json").read_text())["kind"] == "securemtk report"
    Page((folder / "report.html").read_text())


def test_attacks_are_run_only_when_asked_for(folder, tmp_path, capfd, measured):
    call(capfd, "report", folder, "--output", tmp_path / "a.html")
    call(capfd, "report", folder, "--output", tmp_path / "a.html", "--attack")
    assert [options["extent"].attacks for options in measured] == [None, Effort()]


def test_attacks_with_the_report_take_the_place_of_findings_that_are_there(folder, monkeypatch):
    calls = []

    def attacks(victim, *, effort, seed, progress):
        calls.append((sorted(victim.keys), effort, seed))
        return AttackReport(seed, effort, (Finding(**FINDING),), {"infer": 2.0})

    monkeypatch.setattr(document_module, "run_attacks", attacks)
    older = ATTACKS | {"made": "then", "stale": True}
    extent = ReportOptions(encrypted=False, attacks=Effort(tries=9))
    found = measure_report(folder, passphrase=PASSPHRASE, extent=extent, attacks=older)["attacks"]
    assert calls == [(["cultivar", "proline"], Effort(tries=9), 0)]
    assert (found["effort"]["tries"], found["stale"], found["findings"]) == (9, False, [FINDING])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "{tmp}/page.txt"], "must be a .html file"),
        (["--output", "{tmp}"], "must be a .html file"),
        (["--output", "{tmp}/absent/page.html"], "a folder that is there"),
        (["--output", "{run}/run.html"], "must not replace another file"),
        (["--output", "{tmp}/other.html"], "must not replace another file"),
        (["--passphrase-file", "{tmp}/absent"], "passphrase"),
    ],
)
def test_bad_options_are_refused_before_any_work(folder, tmp_path, capfd, measured, options, message):
    (tmp_path / "other.json").write_text("[1, 2]")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    filled = [text.format(tmp=tmp_path, run=folder) for text in options]
    status, out, err = call(capfd, "report", folder, *filled)
    assert (status, out) == (app.INPUT, "")
    assert message in err
    assert measured == []
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_folder_that_may_not_be_written_is_refused(folder, tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuses)
    with pytest.raises(PermissionError):
        check_target(tmp_path / "page.html")


def test_what_is_no_run_or_has_not_ended_is_refused(folder, tmp_path, capfd):
    status, _, err = call(capfd, "report", tmp_path)
    assert status == app.INPUT
    assert "must be the folder of a run" in err
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    text = replace(run_folder.read_run(folder), metrics=None).to_json()
    (unfinished / run_folder.RUN).write_text(text)
    status, _, err = call(capfd, "report", unfinished)
    assert status == app.INPUT
    assert "must be a run that has ended" in err
    assert not (unfinished / "report.html").exists()


def broken(**changes):
    return json.dumps(ATTACKS | changes)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        broken(format=9),
        broken(findings=[]),
        broken(findings=[{"attack": "infer"}]),
        broken(findings=[FINDING | {"figure": "x"}]),
        broken(findings=[FINDING | {"details": {}}]),
        broken(findings=[FINDING | {"details": None}]),
        json.dumps(ATTACKS).replace("0.25", "NaN"),
    ],
)
def test_findings_that_attack_did_not_write_are_refused_before_any_work(folder, capfd, measured, text):
    path = folder / ATTACK_FILE
    path.write_text(text)
    try:
        status, _, err = call(capfd, "report", folder)
    finally:
        path.unlink()
    assert status == app.INPUT
    assert "attack" in err
    assert measured == []


def test_findings_of_other_tasks_are_refused(folder):
    other = ATTACKS | {"findings": [FINDING | {"task": "absent"}], "made": "then", "stale": False}
    with pytest.raises(InputError, match="must be of the run's tasks"):
        measure_report(folder, passphrase=PASSPHRASE, extent=QUICK, attacks=other)


def test_findings_are_read_with_their_age(folder):
    path = folder / ATTACK_FILE
    assert read_attacks(folder) is None
    path.write_text(json.dumps(ATTACKS))
    try:
        assert read_attacks(folder)["stale"] is False
        os.utime(path, (time.time() - 1e6,) * 2)
        assert read_attacks(folder)["stale"] is True
    finally:
        path.unlink()


def test_a_disk_that_refuses_leaves_the_older_report_whole(document, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    write_report(document, target)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_report(document | {"created": "later"}, target)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_passphrase_is_refused(folder, tmp_path, capfd):
    secret = tmp_path / "secret"
    secret.write_text("another\n")
    status, out, err = call(capfd, "report", folder, "--passphrase-file", secret, "--output", tmp_path / "page.html")
    assert (status, out) == (app.INPUT, "")
    assert "passphrase" in err
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
