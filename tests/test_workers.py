"""Several workers: a file's tests stay together, and those that start roles on one worker while there are others."""

import subprocess
import sys
from pathlib import Path

import conftest
import pytest

TESTS = Path(__file__).resolve().parent
CONFTEST = """
from workers import Files

def pytest_xdist_make_scheduler(config, log):
    return Files(config, log, first=["test_b.py", "test_d.py"], long=["test_e.py"])
"""
FILE = """
import os, time, pytest

@pytest.fixture(scope="module")
def made():
    with open("log", "a") as log:
        log.write(f"{os.environ['PYTEST_XDIST_WORKER']} {__name__}\\n")

@pytest.mark.parametrize("i", range(4))
def test_it(made, i):
    time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """What two workers made for files a to e, in order: {worker: files}."""
    folder = tmp_path_factory.mktemp("workers")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "conftest.py").write_text(CONFTEST)
    for letter in "abcde":
        (folder / f"test_{letter}.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", "--numprocesses", "2", "-p", "no:cacheprovider", "-c", "pytest.ini"]
    done = subprocess.run(
        [*command, "--rootdir", folder, folder],
        cwd=folder,
        env={"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found: dict[str, list[str]] = {"gw0": [], "gw1": []}
    for line in (folder / "log").read_text().splitlines():
        worker, name = line.split()
        found[worker].append(name.removeprefix("test_"))
    return found


def test_a_file_goes_to_one_worker_which_makes_once_what_its_tests_share(log):
    assert sorted(log["gw0"] + log["gw1"]) == list("abcde")


def test_the_first_worker_takes_its_own_files_first_and_the_others_the_long_ones(log):
    assert log["gw0"][:2] == ["b", "d"]
    assert log["gw1"][:2] == ["e", "a"]


def test_the_lists_name_files_that_are_there():
    for name in (*conftest.STARTS_ROLES, *conftest.LONG):
        assert (TESTS / f"{name}.py").exists()


def test_every_file_whose_tests_open_sessions_is_in_the_list():
    opening = {path.stem for path in TESTS.glob("test_*.py") if " Session(" in path.read_text()}
    assert opening - {"test_workers"} <= set(conftest.STARTS_ROLES)
