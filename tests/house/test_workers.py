"""Several workers: a file's tests stay together, and those that start roles on one worker while there are others."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT, SUPPORT

from tests import conftest

CONFTEST = """
from workers import Files

def pytest_xdist_make_scheduler(config, log):
    return Files(config, log, first="roles", long=["test_d", "test_e"])
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
    (folder / "roles").mkdir()
    for letter in "abcde":
        (folder / ("roles" if letter in "bd" else ".") / f"test_{letter}.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", "--numprocesses", "2", "-p", "no:cacheprovider", "-c", "pytest.ini"]
    done = subprocess.run(
        [*command, "--rootdir", folder, folder],
        cwd=folder,
        env={"PYTHONPATH": str(SUPPORT)},
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
    # The first worker is the one that was ready first: on a busy machine any of them.
    assert sorted(files[:2] for files in log.values()) == [["d", "b"], ["e", "a"]]


def test_the_list_names_files_that_are_there():
    there = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(conftest.LONG) <= there


def test_every_file_whose_tests_open_sessions_is_in_the_folder_of_roles():
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if conftest.ROLES not in path.parts]
    assert [path.name for path in files if re.search(r"(?<![.\w])Session\(", path.read_text())] == []
