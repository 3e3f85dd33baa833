"""What `import securemtk` offers, to programs that run and to type checkers, is the same."""

import ast
import copy
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

import securemtk
from protocols import errors

STUB = ast.parse(Path(securemtk.__file__).with_suffix(".pyi").read_text())
IMPORTED = {
    alias.asname or alias.name: (node.module, alias.name)
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


# A change of this list is a change for users: it goes into the changelog.
PUBLIC = [
    "BundleError",
    "Config",
    "DealerError",
    "InferenceSession",
    "InputError",
    "IntegrityError",
    "KeyRefused",
    "Model",
    "NeedsInputs",
    "NodeArg",
    "PeerLost",
    "PeerRefused",
    "PeerTimeout",
    "PredictionCost",
    "ProtocolAbort",
    "RangeError",
    "RangeWarning",
    "SecureError",
    "Session",
    "ShapeError",
    "StoreError",
    "Task",
    "TransportError",
    "UnmeasuredWarning",
    "UnsupportedError",
    "WrongProcess",
]


def test_the_public_names_are_these_and_no_others():
    assert sorted(securemtk.__all__) == PUBLIC


def test_every_error_of_ours_is_public_and_shown_as_it_is_imported():
    ours = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {kind.__name__ for kind in ours} <= set(PUBLIC)
    assert {kind.__module__ for kind in ours} == {"securemtk"}


def test_a_traceback_names_what_has_to_be_caught():
    program = "import securemtk.tasks; securemtk.tasks.Task('a', 1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.stderr.splitlines()[-1].startswith("securemtk.InputError: task 'a' must have at least 2 classes")


def test_the_stub_lists_what_the_package_lists_and_nothing_else():
    assigned = [node for node in STUB.body if isinstance(node, ast.Assign)]
    assert [ast.unparse(node.targets[0]) for node in assigned] == ["__all__"]
    assert ast.literal_eval(assigned[0].value) == securemtk.__all__ == sorted(IMPORTED)
    others = [node for node in STUB.body if not isinstance(node, ast.Assign | ast.ImportFrom)]
    assert [ast.get_docstring(STUB)] == [node.value.value for node in others]


@pytest.mark.parametrize("name", securemtk.__all__)
def test_a_type_checker_and_a_program_see_one_object(name):
    module, original = IMPORTED[name]
    seen, real = getattr(importlib.import_module(module), original), getattr(securemtk, name)
    assert seen is real
    assert real.__name__ == name
    assert name in dir(securemtk)
    assert pickle.loads(pickle.dumps(real)) is real  # noqa: S301


@pytest.mark.parametrize(
    "name", [n for n in securemtk.__all__ if issubclass(getattr(securemtk, n), securemtk.SecureError)]
)
def test_errors_survive_a_pickle_and_a_copy(name):
    kind = getattr(securemtk, name)
    error = kind("why", True, ("a",)) if kind is securemtk.NeedsInputs else kind("why")
    unpickled = pickle.loads(pickle.dumps(error))  # noqa: S301
    for made in (unpickled, copy.copy(error), copy.deepcopy(error)):
        assert (type(made), str(made), vars(made)) == (kind, str(error), vars(error))


def test_all_names_come_by_a_star_without_a_warning_and_names_alone_load_no_torch():
    program = (
        "import sys, securemtk; dir(securemtk); securemtk.Config(); securemtk.InputError\n"
        "assert 'torch' not in sys.modules\n"
        "from securemtk import *\n"
        "assert set(securemtk.__all__) <= set(globals()); assert 'crypten' not in sys.modules\n"
        "try: securemtk.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=environment(), timeout=120)
