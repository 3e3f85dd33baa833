"""The two parties of a CrypTen program, and their dealer.

Each process reads its settings and credentials as one line of JSON from its standard input, announces its address as
one line on its standard output, hears the others' addresses, connects, and does its part until the caller leaves.
What a program prints goes to the caller's standard error.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protocols.crypten.eager import EagerParty, using
from protocols.dealing.dealer import receive_seed
from protocols.dealing.demand import DemandCorrelations, DemandDealer, DemandReceiver, NumberedWire, mask_of
from protocols.errors import InputError, ProtocolAbort, SecureError, place_of
from protocols.net import pulse
from protocols.net.frames import Heard
from protocols.net.listener import Listener, connect
from protocols.net.messages import Bye
from protocols.net.tls import Credentials
from protocols.net.watch import Watch
from protocols.primitives import kernels
from protocols.primitives.prg import SEED_BYTES, Stream, fresh_seed
from protocols.two_party.reused_masks import Weights
from securemtk.crypten_backend.messages import Addresses, Call, PartySettings, Result
from securemtk.serving.config import WATCH_PURPOSES
from securemtk.serving.peers import Links
from securemtk.serving.process import Life, Starter, live, settle
from securemtk.serving.start_messages import Listening
from securemtk.support import values

PARTIES = ("party0", "party1")
DEALER, CALLER = "dealer", "caller"
# Each role listens for those after it.
ROLES = (*PARTIES, DEALER, CALLER)
# "supply" is what the dealer sends ahead.
PURPOSES = ("data", *WATCH_PURPOSES, "supply")


def open_links(
    role: str, credentials: Credentials, addresses: Mapping[str, tuple[str, int]], timeout_s: float, opening_s: float
) -> Links:
    """Connect to every role before `role` in the order of `ROLES`; limits as of `channel.connect`."""
    return {
        (other, purpose): connect(credentials, address, other, purpose, timeout_s, opening_s=opening_s)
        for other, address in addresses.items()
        if ROLES.index(other) < ROLES.index(role)
        for purpose in PURPOSES
    }


# --- a party --------------------------------------------------------------------------------------------------------


def load_program(call: Call) -> Callable[..., Any]:
    """Return the function that the caller named: a file or module, and a name in it.

    A function that CrypTen's `run_multiprocess` decorates is taken without that decorator.

    Raises:
        InputError: there is no such function.
    """
    sys.path[:] = call.sys_path
    if call.path is None:
        module = importlib.import_module(call.module)
    else:
        # Under another name than "__main__", so that the script's own start does not run again.
        spec = importlib.util.spec_from_file_location("__securemtk_program__", call.path)
        if spec is None or spec.loader is None:
            raise InputError(f"a program must lie in a Python file; got {Path(call.path).name!r}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    found: Any = module
    for name in call.name.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        raise InputError(f"the program must be a function of its file; {call.name!r} is not")
    function: Callable[..., Any] = inspect.unwrap(found)
    return function


def _run_program(heard: Heard[Call], party: EagerParty, watch: Watch) -> Any:
    call, path = heard.message, None
    try:
        with using(party, call.protocol):
            program = load_program(call)
            path = inspect.getsourcefile(program)
            arguments = values.unpack(call.arguments, heard.arrays)
            return program(*arguments["args"], **arguments["kwargs"])
    except SecureError:
        if watch.failure is None:
            traceback.print_exc()
        raise
    except Exception as error:
        traceback.print_exc()
        raise ProtocolAbort(f"the program failed: {place_of(error, path)}") from None


def be_party(rank: int, links: Links, watch: Watch) -> None:
    """Run the caller's program as one party and send its result to the caller."""
    caller, dealer, peer = (links[role, "data"] for role in (CALLER, DEALER, PARTIES[1 - rank]))

    def enter(step: str) -> None:
        watch.step = peer.step = dealer.step = step

    seed, own = receive_seed(dealer), fresh_seed()
    peer.send("zero", None, [np.frombuffer(own, dtype=np.uint8)])
    other = peer.recv_array("zero", (SEED_BYTES,), "|u1").tobytes()
    heard = caller.hear(Call, timeout_s=None)
    for link in (peer, dealer):
        link.enter("online")
    supply = DemandReceiver(links[DEALER, "supply"], rank, seed)
    supply.start()
    wire = NumberedWire(peer)
    demand = DemandCorrelations(dealer, supply, peer, wire, enter)
    weights = Weights(functools.partial(mask_of, seed))
    enter("program")
    party = EagerParty(rank, wire, demand, Stream(other), Stream(own), Stream(), weights=weights)
    result, arrays = values.pack(_run_program(heard, party, watch), "the program's result")
    enter("end of the program")
    demand.end()
    wire.exchange("end", torch.zeros(1, dtype=torch.int64))
    caller.say(Result(result), arrays)


# --- a process ------------------------------------------------------------------------------------------------------


def _connect(settings: PartySettings, starter: Starter) -> Links:
    role, timeout_s, start_s = settings.role, settings.timeout_s, settings.start_timeout_s
    credentials = Credentials.from_json(settings.credentials)
    listener = Listener(credentials, settings.host, settings.port, timeout_s)
    try:
        starter.say(Listening(listener.address))
        links = open_links(role, credentials, starter.hear(Addresses).addresses, timeout_s, start_s)
        after = ROLES[ROLES.index(role) + 1 :]
        expected = [(other, purpose) for other in after for purpose in PURPOSES]
        return links | listener.accept(expected, start_s)
    finally:
        listener.close()


def serve(starter: Starter) -> int:
    """Be the role that the starter says until the caller leaves.

    Returns:
        The process's exit status.
    """
    settings = starter.hear(PartySettings)
    role = settings.role
    torch.set_num_threads(settings.threads)
    kernels.warm()
    pulse.warm()
    settle()
    links = _connect(settings, starter)

    def work(life: Life) -> None:
        if role == DEALER:
            wants, supplies = (
                (links[PARTIES[0], purpose], links[PARTIES[1], purpose]) for purpose in ("data", "supply")
            )
            DemandDealer(wants, supplies, functools.partial(setattr, life.watch, "step")).serve()
        else:
            be_party(PARTIES.index(role), links, life.watch)
        links[CALLER, "data"].hear(Bye, timeout_s=None)

    return live(role, links, settings.timeout_s, work)
