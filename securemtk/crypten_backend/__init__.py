"""CrypTen programs as their users wrote them, on our protocols, links and dealer, by one call.

    import securemtk.crypten_backend
    import crypten

    def program(x, w):
        secret = crypten.cryptensor(x, src=0).matmul(crypten.cryptensor(w, src=1))
        return secret.relu().get_plain_text()

    if __name__ == "__main__":
        of_party0, of_party1 = securemtk.crypten_backend.run(program, x, w)

Import this module before `crypten`: CrypTen 0.4.1 does not import on current torch by itself.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from protocols.crypten.door import PartyCommunicator
from protocols.crypten.eager import TYPES
from protocols.errors import InputError, ProtocolAbort, SecureError
from protocols.net.link import Link
from protocols.net.tls import issue
from protocols.net.watch import Watch
from securemtk.crypten_backend.messages import Addresses, Call, PartySettings, Result
from securemtk.crypten_backend.roles import CALLER, DEALER, PARTIES, ROLES, open_links
from securemtk.serving.config import Config
from securemtk.serving.launch import RoleProcess, stop_all
from securemtk.serving.peers import sort_links
from securemtk.support import values

_MODULE = "securemtk.crypten_backend.process"


def run(
    program: Callable[..., Any], *args: Any, protocol: str = "fss", config: Config | None = None, **kwargs: Any
) -> list[Any]:
    """Run a CrypTen program at two parties, each a process of its own, with a dealer as a third.

    Inside, `crypten.cryptensor` gives tensors of the type "securemtk": comparisons, ReLU and maxima by distributed
    comparison functions, products with weights by masks that are opened once, truncation that errs by one unit in
    the last place; the rest is CrypTen's own, with triples from the dealer. `crypten.init()` does nothing.

    Args:
        program: a function at the top of a file, called by both parties as by `crypten.mpc.run_multiprocess`,
            whose decorator it may have. A script that calls `run` does so under `if __name__ == "__main__"`.
        args, kwargs: given to both parties: numbers, text, arrays, tensors, and lists, tuples, dicts of these. What
            one party alone may know it must read itself.
        protocol: "fss", or "crypten" for CrypTen's own operations over the same links and dealer.
        config: limits and threads; the defaults where None.

    Returns:
        What the program returned at rank 0 and at rank 1: values of the same kinds.

    Raises:
        InputError: the program or an argument cannot be handed to another process; a wrong protocol.
        ProtocolAbort: a party or the dealer failed, or the parties ran different programs; says who, and where.

    Security: semi-honest, at most one of parties and dealer corrupted; mutual TLS 1.3 between all roles. What the
        program reveals, and what it decides on revealed values, is its own affair. This process starts all roles and
        sees all arguments and results, so that it protects nobody from itself: it is for one's own machine.
    """
    config = config or Config()
    if PartyCommunicator.is_initialized():
        raise InputError("run must be called under `if __name__ == '__main__'`; it was called inside a party")
    if protocol not in TYPES:
        raise InputError(f"protocol must be one of {', '.join(TYPES)}; got {protocol!r}")
    arguments, arrays = values.pack({"args": args, "kwargs": kwargs}, "an argument")
    call = Call(**_reference(program), protocol=protocol, arguments=arguments)
    with _Run(config) as roles:
        for link in roles.parties:
            link.say(call, arrays)
        answers = [link.hear(Result, timeout_s=None) for link in roles.parties]
    return [values.unpack(answer.message.result, answer.arrays) for answer in answers]


def _reference(program: Callable[..., Any]) -> dict[str, Any]:
    """Return where another process finds a function."""
    module, name = getattr(program, "__module__", None), getattr(program, "__qualname__", "<>")
    if module is None or "<" in name:
        raise InputError(f"the program must be a function at the top of a file; got {name!r}")
    path = None
    if module == "__main__":
        path = getattr(sys.modules["__main__"], "__file__", None)
        if path is None:
            raise InputError(f"the program must lie in a file; {name!r} was typed in")
        path = os.path.abspath(path)
    return {"module": module, "path": path, "name": name, "sys_path": tuple(os.path.abspath(p) for p in sys.path)}


@dataclass
class _Run:
    """The processes of one run, and this process's links to them."""

    config: Config
    parties: list[Link] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._processes: list[RoleProcess] = []
        self._links: list[Link] = []
        self._watch: Watch | None = None

    def __enter__(self) -> "_Run":
        try:
            self._start()
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end(error)

    def _start(self) -> None:
        config, credentials = self.config, issue(ROLES)
        for role in (*PARTIES, DEALER):
            settings = PartySettings(
                role=role,
                credentials=credentials[role].to_json(),
                host=config.host,
                timeout_s=float(config.timeout_s),
                start_timeout_s=float(config.start_timeout_s),
                threads=config.threads,
            )
            self._processes.append(RoleProcess(role, settings, module=_MODULE, talks=role != DEALER))
        addresses = {process.role: process.address(config.start_timeout_s) for process in self._processes}
        for process in self._processes:
            process.tell(Addresses(addresses))
        links = open_links(CALLER, credentials[CALLER], addresses, config.timeout_s, config.start_timeout_s)
        self._links, watched, pulses = sort_links(links)
        self.parties = [links[role, "data"] for role in PARTIES]
        self._watch = Watch(CALLER, watched, self._links, silence_s=config.timeout_s, pulses=pulses)
        self._watch.step = "run"
        self._watch.start()

    def _end(self, error: BaseException | None) -> None:
        """Tell the roles that all is over, and why; returns when their processes are gone."""
        if self._watch is not None and self._watch.is_alive():
            if error is None:
                self._watch.bye()
            else:
                known = isinstance(error, SecureError)
                self._watch.abort(
                    error if known else ProtocolAbort(f"the caller stopped: {type(error).__name__}")  # type: ignore[arg-type]
                )
        for link in self._links:
            link.close()
        stop_all(self._processes, 3.0 if error is None else 0.3)
