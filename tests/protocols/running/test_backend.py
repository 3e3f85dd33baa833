"""The table of protocols: what each consists of is imported when it is asked for, and CrypTen by `crypten` alone."""

import subprocess
import sys

import pytest
from both_parties import CASES, single
from helpers import ROOT

from protocols.errors import UnsupportedError
from protocols.program.program import OPERATORS
from protocols.running import backend

# Imported by whoever computes with the protocol that stands before them.
CODE = """
import sys
from protocols.running import {imported}
{then}
print(*sorted({{name.split(".")[0] for name in sys.modules}} & {{"crypten", "numba", "onnx", "scipy"}}))
"""


def loaded(imported: str, then: str = "") -> set[str]:
    """What of CrypTen, numba and others a fresh interpreter holds after an import and a statement."""
    ran = subprocess.run(
        [sys.executable, "-c", CODE.format(imported=imported, then=then)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(ran.stdout.split())


def test_a_protocol_is_imported_when_it_is_asked_for():
    assert loaded("backend, runner, rehearsal, ranges", "backend.require('fss')") == set()
    assert "crypten" in loaded("backend", "backend.find('crypten')")


def test_what_computes_with_keys_imports_no_crypten():
    plan = "runner.requests(runner.Plan(Program.from_json(sys.argv[0]), 'fss', 2, True))"
    for op in ("matmul", "mul", "argmax", "spline", "max_pool2d"):
        text = single(op, CASES[op][0])[0].to_json()
        then = f"from protocols.program.program import Program; sys.argv[0] = {text!r}; {plan}"
        assert not loaded("backend, runner", then) & {"crypten", "onnx"}
    assert not loaded("fss, fixed, precision, ranges, rehearsal") & {"crypten", "onnx"}


@pytest.mark.parametrize("name", sorted(backend.PROTOCOLS))
def test_a_protocol_has_every_operator(name):
    assert set(backend.find(name).operators) == set(OPERATORS)
    assert backend.find(name) is backend.find(name)


def test_an_unknown_protocol_is_refused():
    for ask in (backend.find, backend.require):
        with pytest.raises(UnsupportedError, match="protocol must be one of fss, crypten; got 'magic'"):
            ask("magic")
