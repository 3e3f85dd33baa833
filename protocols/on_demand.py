"""Modules that are imported when something of them is first asked for: what is large, and not always needed.

The one place of the toolkit that imports by name. Who names a module here says so at the top of its file, where its
imports stand.
"""

import importlib
from types import ModuleType
from typing import Any


def load(name: str) -> ModuleType:
    """Return a module of ours by name, imported now unless it has been."""
    return importlib.import_module(name)


class Late:
    """A module that is imported the first time something of it is used.

    Args:
        name: of the module.

    Example:
        >>> text = Late("json")
        >>> text.dumps([1])
        '[1]'
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(load(self._name), attribute)

    def __repr__(self) -> str:
        return f"Late({self._name!r})"
