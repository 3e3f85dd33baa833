"""The experiments with trigger-keys run and say what they must, and the page of their results is up to date."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, alive, wait_until

from benchmarks import report
from benchmarks.mtk import experiments, page
from benchmarks.mtk import run as mtk
from benchmarks.mtk.experiments import CASES, EXPERIMENTS, Bench
from securemtk.mtk.training.train import TrainConfig

STORED = sorted(report.RESULTS.glob("mtk_*_*.json"))


@pytest.fixture(scope="module")
def bench():
    patch = pytest.MonkeyPatch()
    light = replace(CASES["wine"], config=TrainConfig(epochs=2, batch=32), sizes=(4,), betas=(0.0, 1.0))
    patch.setitem(CASES, "wine", light)
    patch.setattr(experiments, "TRIES", 100)
    patch.setattr(experiments, "ANSWERS", 90)
    patch.setattr(experiments, "ASKED", 20)
    yield Bench("wine", 0)
    patch.undo()


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("states", ["baseline", "right key", "all keys", "no key", "wrong random", "wrong other", "chance"]),
        ("released", ["cultivar, no key, sampled", "cultivar, no key, rounded", "cultivar, other keys, sampled"]),
        ("guess", ["cultivar", "proline"]),
        ("beta", ["0.0", "1.0"]),
        ("error", ["right", "noise 0.02", "noise 0.05", "noise 0.1", "noise 0.2", "5% wrong"]),
        ("similarity", ["0% wrong", "5% wrong"]),
        ("encrypted", ["no key", "cultivar", "proline", "cultivar + proline"]),
    ],
)
def test_an_experiment_gives_a_table_of_figures(bench, name, labels, tmp_path):
    points = list(EXPERIMENTS[name](bench))
    assert [label for label, _ in points][: len(labels)] == labels
    assert all(math.isfinite(value) for _, figures in points for value in figures.values())
    rows = mtk.gathered([points, points])
    assert len(mtk.table(rows).splitlines()) == 2 + len(points)
    mtk.draw(rows, name, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_is_trained_once_for_all_that_look_at_it(bench):
    assert bench.keyed() is bench.keyed()
    assert bench.keyed(config=replace(bench.case.config, key_side=4)) is not bench.keyed()


def test_an_undamaged_key_gives_what_the_right_key_gives(bench):
    model = bench.keyed()
    damages = dict(experiments._damages(model.data, 0))
    for key in model.keys.values():
        right = damages["right"](model.data.x_test, key)
        assert (damages["50% wrong"](model.data.x_test, key) != right)[:, key.mask].mean() == pytest.approx(0.5)
        assert (damages["shift 1"](model.data.x_test, key) != right).any()
        assert (damages["noise 0.05"](model.data.x_test, key) != right)[:, ~key.mask].sum() == 0


def test_a_worker_that_fails_ends_the_run():
    program = "from benchmarks.mtk import run; list(run.run('no such data', ['states'], 1, 1))"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "KeyError: 'no such data'" in ended.stderr


def children(pid: int) -> set[int]:
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found |= {int(child) for child in (task / "children").read_text().split()}
    return found


def cpu_s(pid: int) -> float:
    """Return how many seconds of a core a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_workers_end_with_a_run_that_was_killed():
    # 100 seeds: the one worker would be busy for an hour.
    program = "from benchmarks.mtk import run; list(run.run('wine', ['states'], 100, 1))"
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    # The other one is multiprocessing's own, which tracks resources. Imports take 4 s of a core.
    wait_until(
        lambda: len(children(run.pid)) == 2 and max(map(cpu_s, children(run.pid))) > 6,
        "the worker is at work",
        running=run,
    )
    workers = children(run.pid)
    run.kill()
    run.wait()
    wait_until(lambda: not any(alive(pid) for pid in workers), "the workers have ended")


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_in_docs_is_what_the_command_writes():
    assert page.PAGE.read_text() == page.page()


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_results_are_of_five_seeds_and_of_a_commit(path):
    content = json.loads(path.read_text())
    assert content["settings"]["seeds"] == 5
    assert not content["commit"].endswith("-dirty")
    assert all(len(values) == 5 for _, row in content["rows"] for values in row.values())


def stored(folder: Path, experiment: str, rows: dict) -> None:
    text = json.dumps({"rows": [[label, row] for label, row in rows.items()], "command": "by hand"})
    mtk.paths(experiment, "digits", folder)[0].write_text(text)


def states(right: float, wrong: float, large: float) -> dict:
    names = ("baseline", "right key", "all keys", "no key", "wrong random", "wrong other")
    closed = {"no key": 0.1, "wrong random": wrong, "wrong other": 0.1}
    return {
        n: {"digit": [closed.get(n, right if n != "baseline" else 0.99)] * 2, "parity": [closed.get(n, 0.99)] * 2,
            "large": [0.99 if n != "right key" else large] * 2}
        for n in names
    }  # fmt: skip


@pytest.mark.parametrize(
    ("right", "wrong", "large", "kept"),
    [
        (0.985, 0.1, 0.985, [True, True, True, True]),
        (0.96, 0.1, 0.985, [False, True, True, True]),
        (0.985, 0.12, 0.985, [True, True, False, True]),
        (0.985, 0.1, 0.97, [True, True, True, False]),
    ],
)
def test_a_demand_is_kept_or_not_as_the_figures_say(tmp_path, right, wrong, large, kept):
    stored(tmp_path, "states", states(right, wrong, large))
    assert [line.kept for line in page.lines("digits", tmp_path)] == kept


def test_demands_on_guesses_leaks_and_encryption_are_judged(tmp_path):
    stored(tmp_path, "guess", {"digit": {"tries": [60000.0] * 5, "opened": [0.0, 0.0, 0.0, 2.0, 0.0]}})
    assert [line.kept for line in page.lines("digits", tmp_path)] == [True]
    stored(tmp_path, "guess", {"digit": {"tries": [60000.0] * 5, "opened": [0.0, 1.0, 0.0, 2.0, 0.0]}})
    label = "2,000 closed answers: p of independence from the label"
    stored(tmp_path, "encrypted", {"no key": {"digit": [0.1]}, label: {"digit": [1e-9, 0.5]}})
    leak = {"attacker's gain on digit": [0.04], "large without keys": [0.5]}
    less = {"attacker's gain on digit": [0.01], "large without keys": [0.6]}
    stored(tmp_path, "beta", {"0.0": leak, "1.0": less})
    lines = list(page.lines("digits", tmp_path))
    assert [line.kept for line in lines] == [False] * 4
    assert "3 of 300,000" in lines[0].measured
