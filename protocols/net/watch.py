"""Who lives: a thread that sends and expects heartbeats, and ends everything when a role is gone.

A `Watch` has connections of its own. It spreads the reason of an abort, and wakes every link when a role is gone,
silent or has failed.
"""

import contextlib
import math
import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from protocols.errors import (
    PeerLost,
    PeerTimeout,
    ProtocolAbort,
    SecureError,
)
from protocols.forks import Origin, let_go_after_fork
from protocols.net.frames import Message, decode, describe_error, read, restore_error
from protocols.net.link import Link
from protocols.net.messages import Abort, Beat, Bye
from protocols.net.pulse import Pulse

BEAT_S = 0.5
# Time between two looks of a watch that counts as silence of a peer: for longer, it was the watch that did not look.
LOOK_S = 1.0
# Beats that a watch seals ahead for each peer before it starts, and at each look: few, for a prediction may be running.
_FIRST_BEATS, _MORE_BEATS = 240, 6


class _Beats:
    """Beats to and from every peer that do not wait for the interpreter of the one that sends them.

    Args:
        role: our own role.
        links: role -> link for beats alone.
        period_s: time between two beats, in seconds.
    """

    def __init__(self, role: str, links: Mapping[str, Link], period_s: float) -> None:
        self._links = dict(links)
        self._pulse = Pulse(f"securemtk-pulse-{role}", [link.fileno() for link in links.values()], period_s)

    def start(self) -> None:
        """Begin to beat."""
        if self._links:
            self._seal(_FIRST_BEATS)
            self._pulse.start()

    def _seal(self, most: int) -> None:
        for _ in range(min(most, self._pulse.room)):
            self._pulse.add([link.seal("beat") for link in self._links.values()])

    def look(self) -> list[str]:
        """Seal more beats, and return the roles of which beats have come since the last look."""
        heard = []
        for role, link in self._links.items():
            # That a peer has left is said, and noticed, on the watch's own links.
            with contextlib.suppress(PeerLost):
                link._read_available()
            if link._inbox:
                heard.append(role)
                link._inbox.clear()
        if self._links:
            self._seal(_MORE_BEATS)
        return heard

    def stop(self) -> None:
        """End the beat and close its links."""
        self._pulse.stop()
        for link in self._links.values():
            link.close()


class Watch(threading.Thread):
    """Heartbeats with every peer, and the spreading of failures.

    A peer that has ended is noticed at once, by the end of its connections. One that is stopped, or cut off, is given
    up after `silence_s`. One that computes is neither, for its beats are sent by a thread that needs no interpreter.

    Args:
        role: our own role.
        links: role -> link that belongs to this thread from now on.
        data_links: links of other threads, failed when a peer fails.
        on_failure: called once, in this thread, with the root cause.
        silence_s: longest silence of a peer, in seconds.
        pulses: role -> link for beats alone, of this thread too; without, this thread beats as the interpreter lets it.
    """

    def __init__(
        self,
        role: str,
        links: Mapping[str, Link],
        data_links: Sequence[Link],
        on_failure: Callable[[SecureError], None] = lambda error: None,
        *,
        silence_s: float,
        pulses: Mapping[str, Link] | None = None,
    ) -> None:
        super().__init__(name=f"securemtk-watch-{role}", daemon=True)
        self.role = role
        self.step = "start"
        self._links = dict(links)
        self._data_links = list(data_links)
        self._on_failure = on_failure
        self._silence_s = silence_s
        # Several beats in the time after which a peer is given up.
        self._period_s = min(BEAT_S, silence_s / 4)
        self._beats = _Beats(role, pulses or {}, self._period_s)
        self._failure: SecureError | None = None
        self._failed = threading.Event()
        self._parting: Message | None = None
        self._origin = Origin()
        self._wake_r, self._wake_w = os.pipe()
        let_go_after_fork(self)
        self._steps = dict.fromkeys(links, "start")
        for link in data_links:
            link.guard(self._reason, self.is_alive)

    @property
    def failure(self) -> SecureError | None:
        """The root cause, once there is one."""
        return self._failure

    def abort(self, error: SecureError) -> None:
        """Tell all peers that this role failed, and stop."""
        self._part(Abort(self.step, describe_error(error)))

    def fail(self, error: SecureError) -> None:
        """End the session because another thread of this role failed: tell all peers, wake every link by `error`."""
        self._fail(error, tell=True)
        self._wake()

    def bye(self) -> None:
        """Tell all peers that this role leaves in good order, and stop."""
        self._part(Bye())

    def let_go(self) -> None:
        """Close a copy's ends of the pipe that wakes this thread."""
        wake, self._wake_r, self._wake_w = (self._wake_r, self._wake_w), -1, -1
        for descriptor in wake:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _part(self, message: Message) -> None:
        self._parting = self._parting or message
        self._wake()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=2.0)

    def _wake(self) -> None:
        # A fork has the same pipe, and must not wake its maker's watch.
        if self._origin.is_here:
            with contextlib.suppress(OSError):
                os.write(self._wake_w, b"x")

    def _reason(self) -> SecureError | None:
        # A broken connection is often noticed before the message that says why.
        self._failed.wait(timeout=1.0)
        return self._failure

    def run(self) -> None:
        """Beat and listen until this role or a peer leaves."""
        try:
            self._beats.start()
            self._listen()
        except SecureError as error:
            self._fail(self._describe(error), tell=True)
        except Exception as error:
            # Without a watch the links would wait for ever. The error's text could hold a value.
            self._fail(ProtocolAbort(f"internal error: {type(error).__name__} in the watch"), tell=True)
        finally:
            self._leave()

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        for link in self._links.values():
            poll.register(link.fileno(), select.POLLIN)
        looked = time.monotonic()
        heard = dict.fromkeys(self._links, looked)
        beat = -math.inf
        while self._parting is None:
            if time.monotonic() - beat >= self._period_s:
                beat = time.monotonic()
                for link in self._links.values():
                    link.say(Beat(self.step))
            poll.poll(max(1.0, self._period_s * 500))
            now = time.monotonic()
            # While this process was stopped, or its interpreter busy, nobody looked: that was not the peers' silence.
            blind_s, looked = max(0.0, now - looked - LOOK_S), now
            heard = {role: at + blind_s for role, at in heard.items()}
            for role, link in self._links.items():
                link._read_available()
                while link._inbox:
                    heard[role] = now
                    if not self._hear(role, link):
                        return
            heard.update(dict.fromkeys(self._beats.look(), now))
            for role, at in heard.items():
                if now - at > self._silence_s:
                    raise PeerTimeout(
                        f"{role} has been silent for {self._silence_s:g} s (its last step: {self._steps[role]}; "
                        f"ours: {self.step})"
                    )

    def _describe(self, error: SecureError) -> SecureError:
        if isinstance(error, PeerLost):
            role = next((r for r, link in self._links.items() if link._failure is error), "a peer")
            return PeerLost(f"{role} is gone (its last step: {self._steps.get(role, '?')}; ours: {self.step})")
        return error

    def _hear(self, role: str, link: Link) -> bool:
        """Take one message; return whether to go on."""
        _, text, body = link._inbox.popleft()
        message = read(decode(text, body, role), role, Beat, Bye, Abort, step=self.step).message
        if isinstance(message, Beat):
            self._steps[role] = message.step
            return True
        if not isinstance(message, Abort):
            self._fail(PeerLost(f"{role} has left the session"), tell=False)
            return False
        error = restore_error(message.error)
        said = f"{role} failed at {message.step}: {error} (we were at {self.step})"
        self._fail(type(error)(said), tell=True)
        return False

    def _fail(self, error: SecureError, *, tell: bool) -> None:
        if self._parting is not None:
            return
        self._failure = error
        if tell:
            # Whoever sees us go shall hear of the root cause, not of our end.
            self._parting = Abort(self.step, describe_error(error))
        self._failed.set()
        for link in self._data_links:
            link.fail(error)
        self._on_failure(error)

    def _leave(self) -> None:
        self._beats.stop()
        for link in self._links.values():
            with contextlib.suppress(SecureError):
                if self._parting is not None:
                    link.timeout_s = 1.0
                    link.say(self._parting)
        for link in self._links.values():
            link.finish(0.5 if self._parting is not None else 0.0)
        self.let_go()
