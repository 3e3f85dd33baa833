"""Settings of a session; the defaults are the safe ones."""

import os
from dataclasses import dataclass
from typing import Any, SupportsFloat

from protocols.errors import InputError
from protocols.limits import COMPARISON_BITS, FEWEST_COMPARISON_BITS, MOST_COMPARISON_BITS

KEEPER_ROLE, USER_ROLE, AUTHORITY_ROLE = "keeper", "user", "authority"

# (who listens, who calls) -> a connection for each purpose, for each belongs to one thread.
PURPOSES = {
    (KEEPER_ROLE, USER_ROLE): ("data", "watch", "pulse"),
    (KEEPER_ROLE, AUTHORITY_ROLE): ("data", "watch", "pulse", "supply"),
    (AUTHORITY_ROLE, USER_ROLE): ("data", "watch", "pulse", "supply"),
}
# What the watch has for itself; it guards the others.
WATCH_PURPOSES = ("watch", "pulse")

_WHOLE = ("keeper_port", "authority_port", "threads", "chunk_elements", "ahead", "comparison_bits")
_MOST = (1 << 53) - 1
# 30 years stand for infinity, which neither the system's clocks nor messages to a role can hold.
_FOR_EVER_S = 1e9


@dataclass(frozen=True)
class Config:
    """How a session runs its roles.

    Args:
        host: address on which keeper and authority listen; loopback.
        keeper_port, authority_port: 0 lets the system choose.
        timeout_s: longest silence of a role, in seconds. A role that has ended is noticed at once. One that is stopped
            (as by Ctrl-Z), or cut off, ends the session after this time. One that computes is waited for, however
            long that takes, for it beats meanwhile, also while its interpreter is busy. The beats are twice a second
            or four in this time: below some 2 s a busy machine may look silent.
        start_timeout_s: longest wait for a role to start and for its connections, in seconds. Both may be infinite.
        threads: torch threads of each role during a prediction.
        chunk_elements: comparisons (counted as elements of a chunk's largest comparison layers together)
            that one run of the program may hold; larger batches run in chunks.
        ahead: predictions for which correlations are made in advance once a model without secured tasks was asked
            for the same batch twice in a row; each costs memory at all roles. 0 for none. See also `Model.prepare`.
        store: folder in which correlations made in advance wait at keeper and user, sealed, while those of `ahead`
            predictions (at least one) wait in memory; made when absent. What a session writes there is gone when the
            session closes or, where it was killed, when the next one starts. None keeps everything in memory.
        comparison_bits: bits k of comparisons by keys, 20 to 40: whatever is compared stays below 2**(k - 17) in
            magnitude, and an input below 2**(k - 18). Fewer are quicker, each by 16 bytes of key; `check --sample` and
            a bundle's headroom tell how many a model needs.
    """

    host: str = "127.0.0.1"
    keeper_port: int = 0
    authority_port: int = 0
    timeout_s: float = 60.0
    start_timeout_s: float = 120.0
    threads: int = 1
    chunk_elements: int = 5 << 17
    ahead: int = 1
    store: str | os.PathLike[str] | None = None
    comparison_bits: int = COMPARISON_BITS

    def __post_init__(self) -> None:
        for name in _WHOLE:
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        for name in ("timeout_s", "start_timeout_s"):
            object.__setattr__(self, name, _seconds(name, getattr(self, name)))
        for name in ("keeper_port", "authority_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise InputError(f"{name} must lie in 0..65535; got {getattr(self, name)}")
        if self.store is not None and not isinstance(self.store, str | os.PathLike):
            raise InputError(f"store must be a folder's path or None; got a {type(self.store).__name__}")
        if self.ahead < 0:
            raise InputError(f"ahead must be 0 or more; got {self.ahead}")
        if not FEWEST_COMPARISON_BITS <= self.comparison_bits <= MOST_COMPARISON_BITS:
            fewest_most = f"{FEWEST_COMPARISON_BITS}..{MOST_COMPARISON_BITS}"
            raise InputError(f"comparison_bits must lie in {fewest_most}; got {self.comparison_bits}")
        for name in ("threads", "chunk_elements"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive; got {getattr(self, name)}")


def _whole(name: str, value: Any) -> int:
    """Return a setting as a plain integer: numpy's, say, cannot be told to a role."""
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or isinstance(value, str) or whole != value or whole > _MOST:
        raise InputError(f"{name} must be a whole number up to {_MOST}; got {value!r}")
    return whole


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool | str) or not isinstance(value, SupportsFloat):
        raise InputError(f"{name} must be a number of seconds; got a {type(value).__name__}")
    if not float(value) > 0:
        raise InputError(f"{name} must be positive; got {value}")
    return min(float(value), _FOR_EVER_S)
