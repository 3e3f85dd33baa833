"""Keep the two computing roles of one machine from waking up on each other's core."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def own_cores(second: bool, threads: int) -> Iterator[None]:
    """Run the calling thread on one half of the cores it may use, and give it all of them back afterwards.

    A role that gets a message is often woken on the core of the one that sent it, which then has to wait although
    another core is idle: on 2 cores that took a quarter of a small prediction (decision 0016).

    Args:
        second: whether this side takes the second half.
        threads: threads that compute on this side; with more than one nothing happens, for those that start meanwhile
            would stay on this half.
    """
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    if not half or threads > 1:
        yield
        return
    os.sched_setaffinity(0, cores[half:] if second else cores[:half])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
