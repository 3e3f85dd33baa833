"""The inside of a role's process, whatever the role: its talk with the starter, its life, its end.

`launch` is the outside.
"""

import contextlib
import gc
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol, overload

from protocols.errors import PeerLost, ProtocolAbort, SecureError, place_of
from protocols.net.frames import M, Message, N, describe_error, from_line, to_line
from protocols.net.watch import Watch
from securemtk.serving.peers import Links, sort_links

# A role whose peers are gone may still compute for this long before it ends itself.
GRACE_S = 2.0


class Starter(Protocol):
    """Who started a role, as the role sees it."""

    def say(self, message: Message) -> None:
        """Tell the starter something."""

    @overload
    def hear(self, first: type[M], /) -> M: ...
    @overload
    def hear(self, first: type[M], second: type[N], /) -> M | N: ...
    def hear(self, *kinds: type[Any]) -> Any:
        """Return what the starter says next, one of `kinds`; raise IntegrityError for anything else."""


class PipeStarter:
    """A starter at the other end of two pipes; each line is one message.

    Args:
        stdin, stdout: of this process.
    """

    def __init__(self, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self._stdin, self._stdout = stdin, stdout

    def say(self, message: Message) -> None:
        """Write a line."""
        self._stdout.write(to_line(message))
        self._stdout.flush()

    @overload
    def hear(self, first: type[M], /) -> M: ...
    @overload
    def hear(self, first: type[M], second: type[N], /) -> M | N: ...
    def hear(self, *kinds: type[Any]) -> Any:
        """Read a line."""
        return from_line(self._stdin.readline(), "the starter", *kinds)


def run(serve: Callable[[Starter], int], starter: Starter) -> int:
    """Be a role: hear its settings, let it announce itself, serve.

    Args:
        serve: starter -> exit status.
        starter: who is told why nothing is served.

    Returns:
        The process's exit status; 3 for an error before anything was served, which the starter is told.
    """

    try:
        return serve(starter)
    except SecureError as error:
        starter.say(describe_error(error))
        return 3
    except Exception as error:
        # Its text may hold a secret: of keys, or of credentials.
        starter.say(describe_error(ProtocolAbort(f"internal error before it served: {place_of(error)}")))
        return 3


def end_timer() -> threading.Timer:
    """Return a timer, not started, that ends this process after `GRACE_S`: for a role's watch when a peer is gone."""
    # The main thread may be inside a long computation that notices nothing.
    timer = threading.Timer(GRACE_S, os._exit, args=(5,))
    timer.daemon = True
    return timer


def settle() -> None:
    """Begin to look for garbage, in what is made from now on: call it once all that a role needs is loaded.

    What is here stays: looking for garbage among all of torch's objects takes longer than a small prediction.
    """
    gc.freeze()
    gc.enable()


@dataclass
class Life:
    """A role that has its links.

    Args:
        watch: over them.
        end: started when a peer is gone; ends the process.
        closing: what is to be closed once the peers know why this role leaves.
    """

    watch: Watch
    end: threading.Timer
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


def live(role: str, links: Links, silence_s: float, work: Callable[[Life], None]) -> int:
    """Do a role's work under a watch until its peers leave, and tell them why where it fails.

    Args:
        role: our own.
        links: to the others, closed in the end.
        silence_s: longest silence of a peer, in seconds.
        work: what the role does; returns, or raises PeerLost, when it is done.

    Returns:
        The process's exit status.
    """
    data_links, watched, pulses = sort_links(links)
    end = end_timer()
    watch = Watch(role, watched, data_links, lambda error: end.start(), silence_s=silence_s, pulses=pulses)
    watch.start()
    life = Life(watch, end)
    try:
        work(life)
    except PeerLost:
        watch.abort(watch.failure or ProtocolAbort("a peer is gone"))
    except SecureError as error:
        watch.abort(error)
        return 5
    except Exception as error:
        watch.abort(ProtocolAbort(f"internal error: {place_of(error)}"))
        return 5
    finally:
        life.closing.close()
        for link in data_links:
            link.close()
    return 0
