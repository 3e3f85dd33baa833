"""The README says what is so: its example runs and prints what stands there, its links and commands exist."""

import re
import subprocess
import sys

import pytest
import readme

from securemtk.cli import app

pytestmark = pytest.mark.timeout(600)

TEXT = readme.README.read_text()


def test_the_example_prints_what_the_readme_says(tmp_path):
    code, expected = readme.example_and_output()
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=560, check=False
    )
    assert done.returncode == 0, done.stderr
    assert readme.difference(expected, done.stdout) == ""


def test_the_example_has_12_lines():
    code, _ = readme.example_and_output()
    assert len([line for line in code.splitlines() if line.strip()]) == 12


def test_the_comparison_of_outputs_sees_what_differs():
    said = "open [] digits right: 0.1\nonline 1.50 s, 3.21 MB, 60 rounds\n"
    assert readme.difference(said, said.replace("1.50 s", "9.99 s").replace("0.1\n", "0.12\n")) == ""
    for other in (said.replace("0.1\n", "0.2\n"), said.replace("60", "61"), said.replace("3.21", "3.41"), said[:20]):
        assert readme.difference(said, other)


def test_the_adversary_is_in_a_table_with_every_role():
    rows = re.findall(r"^\| (\w+) \|", TEXT, flags=re.MULTILINE)
    assert {"keeper", "user", "authority"} <= set(rows)
    assert "semi-honest" in TEXT
    assert "audit" in TEXT


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", TEXT))))
def test_links_lead_to_files_that_are_there(target):
    assert target.startswith("http") or (readme.README.parent / target).exists()


def test_every_command_of_the_readme_is_one_that_the_program_has(capsys):
    named = {
        line.split()[1] for _, block in readme.blocks(TEXT) for line in block.splitlines() if "securemtk " in line[:10]
    }
    assert {"train", "evaluate", "export", "predict", "keys", "check"} <= named
    for name in named:
        assert app.run([name, "--help"]) == 0
