"""Nothing tells of our users: what is said to a library that would otherwise keep records of them.

onnxruntime 1.32 on Linux, as soon as it is imported, gives the user a device number and opens a database of events
below the user's cache. It asks the environment once, while it is imported; nothing that is called later stops it.
docs/privacy.md says what is set, where and for how long.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SILENT: Mapping[str, str] = {"ORT_DISABLE_TELEMETRY": "1"}
"""The environment in which every process of ours is started."""


@contextmanager
def silently(library: str) -> Iterator[None]:
    """Give a block in which `library` is imported, so that it keeps no record; then the environment is as before.

    This process is the user's: where the library has been imported already, or the user has said what is wanted in the
    environment, nothing is changed.

    Args:
        library: name of a module.

    Example:
        >>> with silently("json"):
        ...     import json
    """
    ours = {} if library in sys.modules else {name: SILENT[name] for name in SILENT if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
