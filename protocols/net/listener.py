"""Opening connections between roles: who listens accepts known roles only, who calls knows whom it calls."""

import socket
import time
from collections.abc import Iterable

from protocols import errors
from protocols.errors import (
    PeerLost,
    PeerRefused,
    PeerTimeout,
    SecureError,
)
from protocols.forks import let_go_after_fork
from protocols.net.link import Link, log
from protocols.net.messages import Hello, Welcome
from protocols.net.tls import Credentials, SecureSocket, context_of


class Listener:
    """Accepts the connections of known roles.

    Args:
        credentials: this role's.
        host: address to listen on.
        port: 0 lets the system choose.
        timeout_s: passed to each link.
    """

    def __init__(self, credentials: Credentials, host: str, port: int, timeout_s: float) -> None:
        self._context = context_of(credentials, server=True)
        self._timeout_s = timeout_s
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._sock.bind((host, port))
        except OSError as error:
            self._sock.close()
            raise errors.InputError(
                f"{credentials.role}: the address {host}:{port} must be free; {error.strerror}"
            ) from None
        self._sock.listen(16)
        let_go_after_fork(self)
        self.address: tuple[str, int] = self._sock.getsockname()[:2]

    def accept(self, expected: Iterable[tuple[str, str]], timeout_s: float) -> dict[tuple[str, str], Link]:
        """Return one link for each expected (role, purpose); strangers are refused and waited past.

        Raises:
            PeerTimeout: not all came within `timeout_s`.
        """
        missing, links = set(expected), {}
        deadline = time.monotonic() + timeout_s
        while missing:
            left = deadline - time.monotonic()
            if left <= 0:
                names = ", ".join(sorted({role for role, _ in missing}))
                raise PeerTimeout(f"{names} must connect within {timeout_s:g} s; did not")
            self._sock.settimeout(left)
            try:
                raw, _ = self._sock.accept()
            except TimeoutError:
                continue
            link = self._admit(raw, missing, min(left, 5.0))
            if link is not None:
                key, accepted = link
                links[key] = accepted
                missing.discard(key)
        return links

    def _admit(
        self, raw: socket.socket, missing: set[tuple[str, str]], timeout_s: float
    ) -> tuple[tuple[str, str], Link] | None:
        raw.settimeout(timeout_s)
        _tune(raw, self._timeout_s)
        try:
            sock = SecureSocket(raw, self._context, server=True)
        except (OSError, PeerRefused) as error:
            log.warning("refused a connection: %s", type(error).__name__)
            return None
        role, link = sock.role, Link(sock, self._timeout_s)
        try:
            purpose = link.hear(Hello, timeout_s=timeout_s).message.purpose
            if (role, purpose) not in missing:
                link.refuse(PeerRefused(f"no connection of {role!r} for {purpose!r} is expected here"))
                raise PeerRefused(role)
            link.say(Welcome())
        except SecureError as error:
            log.warning("refused %s: %s", role, type(error).__name__)
            link.close()
            return None
        return (role, purpose), link

    def close(self) -> None:
        """Stop listening; accepted links stay."""
        self._sock.close()

    def let_go(self) -> None:
        """Close a copy's descriptor."""
        self._sock.close()


def _tune(raw: socket.socket, timeout_s: float) -> None:
    """Send small messages at once, and have the system notice after about `timeout_s` that the network was cut.

    The system's probes are answered by the peer's system, whatever its process does. No limit on data that is not
    acknowledged (TCP_USER_TIMEOUT): that would end a connection to a peer that computes and does not read.
    """
    pause_s = max(1, round(min(timeout_s, 3600.0) / 5))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, pause_s), (socket.TCP_KEEPINTVL, pause_s), (socket.TCP_KEEPCNT, 4)):
        raw.setsockopt(socket.IPPROTO_TCP, option, value)


def connect(
    credentials: Credentials,
    address: tuple[str, int],
    role: str,
    purpose: str,
    timeout_s: float,
    *,
    opening_s: float | None = None,
) -> Link:
    """Return a link to `role` at `address`.

    Args:
        credentials: this role's.
        address: host and port.
        role: who must be there.
        purpose: what the link is for; the peer must expect it.
        timeout_s: passed to the link.
        opening_s: longest wait while it is opened, in seconds; `timeout_s` where None.

    Raises:
        PeerRefused: the peer is not `role` under our authority, or does not accept us.
        PeerLost: nobody answers.
        PeerTimeout: the peer has been silent for `opening_s`.
    """
    opening_s = timeout_s if opening_s is None else opening_s
    try:
        raw = socket.create_connection(address, timeout=opening_s)
    except OSError as error:
        raise PeerLost(f"{role} must answer at {address[0]}:{address[1]}; {type(error).__name__}") from None
    _tune(raw, timeout_s)
    try:
        sock = SecureSocket(raw, context_of(credentials, server=False), server=False)
    except TimeoutError:
        raise PeerTimeout(f"{role} must answer within {opening_s:g} s; it has not") from None
    except (OSError, PeerRefused) as error:
        raise PeerRefused(f"{role} must prove its role under this run's authority; {type(error).__name__}") from None
    if sock.role != role:
        sock.close()
        raise PeerRefused(f"the peer at {address[0]}:{address[1]} must be {role!r}; its certificate says {sock.role!r}")
    link = Link(sock, timeout_s)
    try:
        link.say(Hello(purpose))
        link.hear(Welcome, timeout_s=opening_s)
    except PeerLost:
        link.close()
        raise PeerRefused(f"{role} did not accept our certificate") from None
    except SecureError:
        link.close()
        raise
    return link
