"""The inside of a role's process, whatever the role: its talk with the starter, its end. `launch` is the outside."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from protocols.errors import SecureError
from protocols.net.frames import describe_error
from protocols.net.link import Link
from securemtk.serving.config import WATCH_PURPOSES

# A role whose peers are gone may still compute for this long before it ends itself.
GRACE_S = 2.0

# (peer, purpose) -> link.
Links = dict[tuple[str, str], Link]
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


def sort_links(links: Links) -> tuple[list[Link], dict[str, Link], dict[str, Link]]:
    """Return what a watch guards, and its own links by role: to be watched, and for beats."""
    guarded = [link for (_, purpose), link in links.items() if purpose not in WATCH_PURPOSES]
    watched, pulses = (
        {other: link for (other, own), link in links.items() if own == purpose} for purpose in WATCH_PURPOSES
    )
    return guarded, watched, pulses
