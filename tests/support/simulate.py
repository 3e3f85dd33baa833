"""Two parties and a dealer in one process: threads, a wire in memory, the real correlations.

Every error of a party reaches the test; the root cause comes first.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from helpers import PATIENCE_S
from torch import Tensor

from protocols.dealing import correlation
from protocols.dealing.correlation import Dealing, Request, Secrets
from protocols.dealing.prediction_shares import PredictionShares
from protocols.errors import PeerLost
from protocols.primitives.prg import Stream
from protocols.two_party.party import Party

T = TypeVar("T")
END = object()


class MemoryWire:
    """One end of a wire in memory; notes what it sends, counts payload bytes and keeps a logical clock."""

    def __init__(self, outgoing: queue.Queue, incoming: queue.Queue) -> None:
        self.outgoing, self.incoming = outgoing, incoming
        self.sent: list[tuple[str, Tensor]] = []
        self.bytes = 0
        self.clock = 0

    def send(self, kind: str, tensor: Tensor) -> None:
        self.sent.append((kind, tensor.clone()))
        self.bytes += tensor.numel() * tensor.element_size()
        self.outgoing.put((kind, self.clock + 1, tensor.clone()))

    def recv(self, kind: str, shape: Sequence[int]) -> Tensor:
        got = self.incoming.get(timeout=PATIENCE_S)
        if got is END:
            raise PeerLost("the other party ended")
        assert (got[0], tuple(got[2].shape)) == (kind, tuple(shape))
        self.clock = max(self.clock, got[1])
        return got[2]

    def exchange(self, kind: str, tensor: Tensor) -> Tensor:
        self.send(kind, tensor)
        return self.recv(kind, tensor.shape)


def dealt_shares(
    requests: Sequence[Request], dealing: Dealing | None = None, finish=None
) -> tuple[PredictionShares, PredictionShares]:
    """Deal `requests` afresh: the keeper's and the user's shares; `finish` is the user's work ahead."""
    keeper, user = Stream(), Stream()
    k, u = keeper.derive("hand"), user.derive("hand")
    dealt = [correlation.deal(q, k, u, dealing or Dealing()) for q in requests]
    to_keeper = [c for own, common in dealt for c in (*own, *common)]
    to_user = [c for _, common in dealt for c in common]
    more = {} if finish is None else {"finish": finish}
    return PredictionShares(0, keeper.derive("hand"), requests, to_keeper), PredictionShares(
        1, user.derive("hand"), requests, to_user, **more
    )


def simulate(
    requests: Sequence[Request], program: Callable[[Party], T], secrets: Secrets | None = None, masks=None, finish=None
) -> list[T]:
    """Run `program(party)` as both parties with the correlations of `requests`; return both results."""
    up, down = queue.Queue(), queue.Queue()
    wires = [MemoryWire(down, up), MemoryWire(up, down)]
    forth, back = Stream(), Stream()
    zeros = [(forth.derive("z"), back.derive("z")), (back.derive("z"), forth.derive("z"))]
    both = dealt_shares(requests, Dealing(secrets, masks or {}), finish)
    parties = [Party(rank, wires[rank], hand, *zeros[rank], Stream()) for rank, hand in enumerate(both)]
    results: list = [None, None]
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = program(parties[rank])
        except BaseException as error:
            errors.append(error)
        finally:
            wires[rank].outgoing.put(END)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE_S)
    if errors:
        raise errors[0]
    return results


def split(x: Tensor, stream: Stream | None = None) -> tuple[Tensor, Tensor]:
    """Share a tensor between two parties."""
    mask = (stream or Stream()).words(x.shape)
    return x - mask, mask


def combine(shares: Sequence[Tensor]) -> Tensor:
    """Return the value that the shares add up to."""
    return torch.stack(list(shares)).sum(0)
