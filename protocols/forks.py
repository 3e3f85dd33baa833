"""Which process made an object: some must never be used in a copy of that process.

A fork copies the memory of a process. Two processes with one session would seal TLS records under the same nonces, draw
the same masks, and end the same roles. So whatever holds a connection, a random stream or a process has an `Origin`,
which is asked at every door; and what a copy holds of the system's things (descriptors, files to remove at the end) it
lets go right after the fork, so that the maker's peers still see when the maker ends.
"""

import contextlib
import os
import weakref
from typing import Protocol

from protocols.errors import WrongProcess

# Forks between the first process and this one. A process's number alone could be given again.
_forks = 0


class Origin:
    """The process that runs now, remembered by what it makes."""

    __slots__ = ("_forks", "_pid")

    def __init__(self) -> None:
        self._forks, self._pid = _forks, os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is still that process."""
        return self._forks == _forks and self._pid == os.getpid()

    def require(self, what: str) -> None:
        """Raise WrongProcess unless this is still that process.

        Args:
            what: is used here; for the message.
        """
        if not self.is_here:
            raise WrongProcess(
                f"{what} must be used in the process that made it ({self._pid}); this one ({os.getpid()}) is a fork of "
                "it: make a new one after the fork, in each process"
            )


class Copied(Protocol):
    """What knows what to do with itself in a fork's copy of its process."""

    def let_go(self) -> None:
        """Give back what this copy holds of the system's; nothing may reach the maker or its peers."""


_owners: "weakref.WeakSet[Copied]" = weakref.WeakSet()


def let_go_after_fork(owner: Copied) -> None:
    """Have `owner.let_go` called in each copy of this process, right after the fork; keeps no reference."""
    _owners.add(owner)


def _enter_copy() -> None:
    global _forks
    _forks += 1
    for owner in list(_owners):
        # Nobody could catch an error here, and the others must be let go all the same.
        with contextlib.suppress(OSError, ValueError):
            owner.let_go()
    _owners.clear()


os.register_at_fork(after_in_child=_enter_copy)
