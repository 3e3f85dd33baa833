"""The inside of a role's process, whatever the role: its talk with the starter, its life, its end.

`launch` is the outside.
"""

import contextlib
import gc
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from protocols.errors import PeerLost, ProtocolAbort, SecureError, place_of
from protocols.net.frames import describe_error
from protocols.net.watch import Watch
from securemtk.serving.peers import Links, sort_links

# A role whose peers are gone may still compute for this long before it ends itself.
GRACE_S = 2.0

Say = Callable[[Mapping[str, Any]], None]
Hear = Callable[[], Mapping[str, Any]]


def run(serve: Callable[[Mapping[str, Any], Say, Hear], int], stdin: TextIO, stdout: TextIO) -> int:
    """Be a role: read its settings from stdin, let it announce itself on stdout, serve.

    Args:
        serve: settings, what tells the starter something, what returns the starter's next line -> exit status.
        stdin, stdout: of the process; each line is one JSON object.

    Returns:
        The process's exit status; 3 for an error before anything was served, which the starter is told.
    """

    def hear() -> Mapping[str, Any]:
        line: Mapping[str, Any] = json.loads(stdin.readline())
        return line

    def say(line: Mapping[str, Any]) -> None:
        stdout.write(json.dumps(line) + "\n")
        stdout.flush()

    try:
        return serve(hear(), say, hear)
    except SecureError as error:
        say(describe_error(error))
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
