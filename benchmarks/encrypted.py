"""A program run as two parties in one process: threads, a wire in memory, the real correlations of the dealer.

Everything of a protocol happens but processes and TLS, so that thousands of small programs take minutes.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, USER, Dealing, Request
from protocols.dealing.prediction_shares import PredictionShares
from protocols.errors import PeerLost
from protocols.primitives import ring
from protocols.primitives.prg import Stream
from protocols.program.program import Program
from protocols.running import backend, runner
from protocols.two_party.party import Party

_END = object()
_PATIENCE_S = 60.0


class _Wire:
    """One end of a wire in memory, as `protocols.two_party.party.Party` uses it."""

    def __init__(self, outgoing: queue.Queue[Any], incoming: queue.Queue[Any]) -> None:
        self._outgoing, self._incoming = outgoing, incoming

    def send(self, kind: str, tensor: Tensor) -> None:
        self._outgoing.put((kind, tensor.clone()))

    def recv(self, kind: str, shape: Sequence[int]) -> Tensor:
        got = self._incoming.get(timeout=_PATIENCE_S)
        if got is _END:
            raise PeerLost("the other party ended")
        if (got[0], tuple(got[1].shape)) != (kind, tuple(shape)):
            raise RuntimeError(f"a message must be {kind} of shape {tuple(shape)}; got {got[0]}, {tuple(got[1].shape)}")
        tensor: Tensor = got[1]
        return tensor

    def exchange(self, kind: str, tensor: Tensor) -> Tensor:
        self.send(kind, tensor)
        return self.recv(kind, tensor.shape)

    def end(self) -> None:
        self._outgoing.put(_END)


def run(
    program: Program,
    params: Mapping[str, NDArray[np.float32]],
    inputs: Mapping[str, NDArray[Any]],
    protocol: str = "fss",
) -> dict[str, NDArray[np.float32]]:
    """Run a program encrypted.

    Args:
        program: what is computed.
        params: name -> float32 array, the keeper's.
        inputs: name -> array (n, *sample), the user's.
        protocol: a name of `protocols.running.backend.PROTOCOLS`.

    Returns:
        Output name -> float32 array (n, *sample).

    Raises:
        SecureError: whatever a party raised, the first of it.
    """
    plan = runner.Plan(program, protocol, len(next(iter(inputs.values()))), False)
    module = backend.find(protocol)
    masks = {name: Stream().words(shape) for name, shape in program.params.items()}
    own = module.share_weights(program, params)
    masked = {name: own[name] - masks[name] for name in module.masked_names(program)}
    shares = {KEEPER: own, USER: module.share_weights(program, None)}
    given: dict[int, dict[str, Tensor | None]] = {
        KEEPER: dict.fromkeys(inputs),
        USER: {name: ring.encode(x, what=f"input {name!r}") for name, x in inputs.items()},
    }

    def act(party: Party) -> dict[str, Tensor | None]:
        return runner.run(party, plan, shares[party.rank], given[party.rank], runner.Probe())

    hands = _deal(runner.requests(plan), masks, lambda request, part: module.finish(request, part, masked))
    outputs = _both(act, hands)[USER]
    return {name: ring.decode(value) for name, value in outputs.items() if value is not None}


def _deal(
    requests: Sequence[Request], masks: dict[str, Tensor], finish: Callable[..., tuple[Tensor, ...]]
) -> tuple[PredictionShares, PredictionShares]:
    keeper, user = Stream(), Stream()
    k, u = keeper.derive("hand"), user.derive("hand")
    dealing = Dealing(None, masks)
    dealt = [correlation.deal(request, k, u, dealing) for request in requests]
    to_keeper = [c for own, common in dealt for c in (*own, *common)]
    to_user = [c for _, common in dealt for c in common]
    return (
        PredictionShares(KEEPER, keeper.derive("hand"), requests, to_keeper),
        PredictionShares(USER, user.derive("hand"), requests, to_user, finish=finish),
    )


def _both(
    act: Callable[[Party], dict[str, Tensor | None]], hands: Sequence[PredictionShares]
) -> dict[int, dict[str, Any]]:
    """Let each party act in a thread of its own; return what each did."""
    up: queue.Queue[Any] = queue.Queue()
    down: queue.Queue[Any] = queue.Queue()
    wires = (_Wire(down, up), _Wire(up, down))
    forth, back = Stream(), Stream()
    zeros = [(forth.derive("z"), back.derive("z")), (back.derive("z"), forth.derive("z"))]
    results: dict[int, dict[str, Any]] = {}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = act(Party(rank, wires[rank], hands[rank], *zeros[rank], Stream()))
        except BaseException as error:
            errors.append(error)
        finally:
            wires[rank].end()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in (KEEPER, USER)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=2 * _PATIENCE_S)
    if errors:
        raise errors[0]
    if len(results) < len(threads):
        raise TimeoutError(f"a party must end within {2 * _PATIENCE_S:g} s")
    return results
