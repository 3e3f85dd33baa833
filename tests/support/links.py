"""Links between two roles in one process, over real sockets."""

import contextlib
import threading

from helpers import PATIENCE_S

from protocols.net.listener import Listener, connect
from protocols.net.tls import issue


def in_thread(work):
    """Start `work()` in a thread; return a function that joins it and returns or raises its outcome."""
    box: list = []

    def body():
        try:
            box.append((work(), None))
        except Exception as error:
            box.append((None, error))

    thread = threading.Thread(target=body, name="securemtk-test")
    thread.start()

    def outcome():
        thread.join(timeout=PATIENCE_S)
        result, error = box[0]
        if error is not None:
            raise error
        return result

    return outcome


@contextlib.contextmanager
def pair(timeout_s=60.0, purposes=("data",)):
    """Two connected ends for each purpose: [(keeper's link, user's link), ...]."""
    credentials = issue(["keeper", "user"])
    listener = Listener(credentials["keeper"], "127.0.0.1", 0, timeout_s)
    accepted = in_thread(lambda: listener.accept([("user", p) for p in purposes], 60))
    users = [connect(credentials["user"], listener.address, "keeper", p, timeout_s) for p in purposes]
    keepers = accepted()
    listener.close()
    ends = [(keepers["user", p], u) for p, u in zip(purposes, users, strict=True)]
    try:
        yield ends
    finally:
        for a, b in ends:
            a.close()
            b.close()
