"""The protocols that a session can run: the one place in this package that knows where they stand."""

from types import ModuleType

from protocols.running import runner

PROTOCOLS = tuple(runner.PROTOCOLS)


def backend(name: str) -> ModuleType:
    """Return a protocol by name; raise UnsupportedError for an unknown one."""
    return runner.protocol_module(name)
