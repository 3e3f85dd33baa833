"""Modules that are imported when something of them is first asked for."""

import sys
import threading

import pytest

from protocols.on_demand import Late, load

TEXT = "made = True\ndef answer():\n    return 42\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that nobody has imported."""
    (tmp_path / "late_for_test.py").write_text(TEXT)
    monkeypatch.syspath_prepend(tmp_path)
    yield "late_for_test"
    sys.modules.pop("late_for_test", None)


def test_a_module_is_imported_when_it_is_used_and_once(module):
    late = Late(module)
    assert module in repr(late)
    assert module not in sys.modules
    assert late.answer() == 42
    assert sys.modules[module] is load(module)
    sys.modules[module].made = "changed"
    assert late.made == "changed"


def test_what_a_module_lacks_is_an_attribute_error_and_an_absent_module_an_import_error(module):
    with pytest.raises(AttributeError, match="absent"):
        _ = Late(module).absent
    with pytest.raises(ModuleNotFoundError):
        _ = Late("no_such_module_for_test").absent


def test_threads_that_ask_at_once_get_one_module(module):
    late, found = Late(module), []
    threads = [threading.Thread(target=lambda: found.append(late.answer)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(f) for f in found}) == 1
