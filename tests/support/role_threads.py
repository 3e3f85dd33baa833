"""Keeper and authority in threads of this process, over real links on loopback: the roles without their processes."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from links import in_thread

from protocols.errors import PeerLost, SecureError
from protocols.net.link import Link
from protocols.net.listener import Listener, connect
from protocols.net.tls import issue
from securemtk.mtk.keys.distributor import KeyDistributor
from securemtk.mtk.keys.file_stores import HeldKeys
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, PURPOSES, USER_ROLE
from securemtk.serving.parties.authority import Authority
from securemtk.serving.parties.keeper import Keeper
from securemtk.serving.parties.model_store import ModelStore

PAIRS = ((KEEPER_ROLE, USER_ROLE), (AUTHORITY_ROLE, USER_ROLE), (KEEPER_ROLE, AUTHORITY_ROLE))


class Steps:
    """Stands in for a watch: notes what it is told."""

    def __init__(self) -> None:
        self.step = "start"
        self.failures: list[SecureError] = []

    def fail(self, error: SecureError) -> None:
        self.failures.append(error)


class Roles:
    """The links of a user to a keeper and an authority, and how both ended.

    Args:
        keys, models: of the roles.
        user: name in the user's certificate.
        timeout_s: of the links.
        watched: whether there are links for a watch and its beats too.
    """

    def __init__(
        self,
        keys: KeyDistributor | None = None,
        models: ModelStore | None = None,
        user: str | None = None,
        timeout_s: float = 30.0,
        *,
        watched: bool = False,
    ) -> None:
        self.keys = KeyDistributor(HeldKeys([])) if keys is None else keys
        self.models = models
        self.errors: dict[str, BaseException | None] = {}
        self._purposes = {pair: PURPOSES[pair] if watched else PURPOSES[pair][::3] for pair in PAIRS}
        ends = self._connect(user, timeout_s)
        self.links = {
            (listens, purpose): ends[USER_ROLE, listens, purpose]
            for listens in (KEEPER_ROLE, AUTHORITY_ROLE)
            for purpose in self._purposes[listens, USER_ROLE]
        }
        self._ends = ends
        self._threads = {
            role: threading.Thread(target=self._run, args=(role, work), name=f"securemtk-test-{role}")
            for role, work in ((KEEPER_ROLE, self._keep), (AUTHORITY_ROLE, self._decide))
        }
        for thread in self._threads.values():
            thread.start()

    def _connect(self, user: str | None, timeout_s: float) -> dict[tuple[str, str, str], Link]:
        """Return (role, peer, purpose) -> that role's end."""
        credentials = issue([KEEPER_ROLE, AUTHORITY_ROLE, USER_ROLE], users={USER_ROLE: user} if user else {})
        ends = {}
        for role in (KEEPER_ROLE, AUTHORITY_ROLE):
            listener = Listener(credentials[role], "127.0.0.1", 0, timeout_s)
            callers = [
                (caller, purpose) for here, caller in PAIRS if here == role for purpose in self._purposes[here, caller]
            ]
            accepted = in_thread(lambda listener=listener, callers=callers: listener.accept(callers, 30))
            for caller, purpose in callers:
                ends[caller, role, purpose] = connect(credentials[caller], listener.address, role, purpose, timeout_s)
            ends |= {(role, caller, purpose): link for (caller, purpose), link in accepted().items()}
            listener.close()
        return ends

    def end(self, role: str, peer: str, purpose: str = "data") -> Link:
        """Return a role's end of a connection."""
        return self._ends[role, peer, purpose]

    def _run(self, role: str, work: Callable[[], None]) -> None:
        try:
            work()
        except PeerLost:
            self.errors[role] = None
        except BaseException as error:
            self.errors[role] = error
        for (own, _, _), link in self._ends.items():
            if own == role:
                link.close()

    def _keep(self) -> None:
        user, authority, supply = (
            self.end(KEEPER_ROLE, *x) for x in ((USER_ROLE,), (AUTHORITY_ROLE,), (AUTHORITY_ROLE, "supply"))
        )
        keeper = Keeper(user, authority, supply, Steps(), models=self.models, needs_grant=self.keys.needs_grant)
        with contextlib.closing(keeper):
            keeper.serve()

    def _decide(self) -> None:
        supply = (self.end(AUTHORITY_ROLE, KEEPER_ROLE, "supply"), self.end(AUTHORITY_ROLE, USER_ROLE, "supply"))
        user, keeper = self.end(AUTHORITY_ROLE, USER_ROLE), self.end(AUTHORITY_ROLE, KEEPER_ROLE)
        Authority(user, keeper, supply, Steps(), self.keys).serve()

    def stop(self, grace_s: float = 30.0) -> None:
        """Leave, and wait for the roles to end."""
        for link in self.links.values():
            link.close()
        for role in self._threads:
            self.wait(role, max(grace_s, 30.0))

    def wait(self, role: str, timeout_s: float = 30.0) -> None:
        """Wait for a role to end."""
        self._threads[role].join(timeout_s)
        assert not self._threads[role].is_alive()


@contextlib.contextmanager
def running(**how) -> Iterator[Roles]:
    """Roles that are stopped in the end."""
    roles = Roles(**how)
    try:
        yield roles
    finally:
        roles.stop()
