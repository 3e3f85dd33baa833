"""What securemtk offers: its names, where they come from, and how its errors are shown."""

import ast
import pickle
import subprocess
import sys

import pytest
from helpers import ROOT

import securemtk
from protocols import errors

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
ERRORS = [name for name in PUBLIC if name.endswith(("Error", "Warning")) or hasattr(errors, name)]


def test_the_public_names_are_these_and_no_others():
    assert sorted(securemtk.__all__) == PUBLIC
    assert [name for name in PUBLIC if not hasattr(securemtk, name)] == []


def test_type_checkers_see_the_same_names_from_the_same_places():
    tree = ast.parse((ROOT / "securemtk" / "__init__.pyi").read_text())
    typed = {alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == securemtk._PLACE_OF
    (listed,) = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    assert ast.literal_eval(listed) == PUBLIC


def test_every_error_of_ours_that_a_user_can_meet_is_public():
    ours = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert ours == set(ERRORS)


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_shown_as_it_is_imported_and_survives_pickle(name):
    kind = getattr(securemtk, name)
    assert (kind.__module__, kind.__qualname__) == ("securemtk", name)
    assert pickle.loads(pickle.dumps(kind)) is kind  # noqa: S301


def test_a_traceback_names_what_has_to_be_caught():
    program = "import securemtk.tasks; securemtk.tasks.Task('a', 1)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("securemtk.InputError: task 'a' must have at least 2 classes")


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        securemtk.Sesion  # noqa: B018
