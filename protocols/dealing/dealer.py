"""The dealer: makes the correlations of a prediction and hands them to both parties.

At the start of a session the dealer draws one seed for each party. Prediction number i uses the
streams derived from those seeds for i alone; numbers only grow, so that no correlation is dealt
twice. Only corrections travel afterwards: shares to the keeper alone, comparison keys to both.

Source: docs/protocols.md#what-the-dealer-sends.
"""

import math
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, USER, Dealing, Dealt, Request
from protocols.dealing.messages import Corrections
from protocols.errors import DealerError
from protocols.net.link import Link
from protocols.primitives.prg import SEED_BYTES, Stream, fresh_seed
from protocols.program.program import Program

# Corrections are sent as they are made, in frames of about this size.
FRAME_BYTES = 1 << 21


def stream_of(seed: bytes, prediction: int) -> Stream:
    """Return the stream of one party for one prediction."""
    return Stream(seed).derive(f"prediction {prediction}")


@dataclass
class TrustedDealer:
    """Makes correlations; knows every mask, and sees no message between the parties.

    Security: the parties trust the dealer not to collude with either of them; it learns the
    public plan, and for models with secured tasks it supplies the keys.
    """

    _seeds: tuple[bytes, bytes] = field(default_factory=lambda: (fresh_seed(), fresh_seed()), repr=False)
    _last: int = -1

    def seed_parties(self, keeper: Link, user: Link) -> None:
        """Give each party its seed."""
        for link, seed in ((keeper, self._seeds[KEEPER]), (user, self._seeds[USER])):
            link.send("seed", None, [np.frombuffer(seed, dtype=np.uint8)])

    def masks(self, model: int, program: Program) -> dict[str, Tensor]:
        """Return the masks of a model's weights, which the keeper draws as well."""
        return weight_masks(self._seeds[KEEPER], model, program)

    def deal(self, prediction: int, listed: Sequence[Request], dealing: Dealing) -> Iterator[Dealt]:
        """Make the corrections of one prediction, request by request.

        Raises:
            DealerError: the number has been dealt, or a later one has.
        """
        if prediction <= self._last:
            raise DealerError(f"prediction {prediction} has been dealt already: correlations are never dealt twice")
        self._last = prediction
        keeper, user = (stream_of(seed, prediction) for seed in self._seeds)
        return (correlation.deal(q, keeper, user, dealing) for q in listed)


def weight_masks(seed: bytes, model: int, program: Program) -> dict[str, Tensor]:
    """Return a mask for each parameter, drawn from the keeper's seed: known to keeper and dealer alone."""
    return {name: Stream(seed).derive(f"weights {model} {name}").words(shape) for name, shape in program.params.items()}


def correction_bytes(listed: Sequence[Request], rank: int) -> int:
    """Return how many bytes of corrections a party gets for a plan."""
    return sum(8 * math.prod(shape) for q in listed for shape in correlation.correction_shapes(q, rank))


def send_corrections(
    keeper: Link, user: Link, prediction: int, listed: Sequence[Request], dealt: Iterator[Dealt]
) -> None:
    """Send the corrections of a plan to both parties while they are made.

    Where they fill more than a frame, making and sending overlap: this thread makes them, one thread for each link
    sends. A link is used by its sender alone until this returns.
    """
    if correction_bytes(listed, KEEPER) <= FRAME_BYTES:
        # Starting threads would take longer.
        made = list(dealt)
        both = [c for _, common in made for c in common]
        everything = [c for own, common in made for c in (*own, *common)]
        for link, corrections in ((keeper, everything), (user, both)):
            link.say(Corrections(prediction, last=True), [c.numpy() for c in corrections])
        return
    queues: list[queue.Queue[list[Tensor] | None]] = [queue.Queue(maxsize=8), queue.Queue(maxsize=8)]
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="securemtk-sender") as pool:
        senders = [
            pool.submit(_send_frames, link, prediction, tensors, stop)
            for link, tensors in zip((keeper, user), queues, strict=True)
        ]
        try:
            for own, common in dealt:
                _put(queues[0], [*own, *common], stop)
                _put(queues[1], common, stop)
        except BaseException:
            stop.set()
            raise
        finally:
            for tensors in queues:
                _put(tensors, None, stop)
        for sender in senders:
            sender.result()


def _put(tensors: "queue.Queue[list[Tensor] | None]", item: list[Tensor] | None, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            tensors.put(item, timeout=0.1)
            return
        except queue.Full:
            continue


def _send_frames(
    link: Link, prediction: int, tensors: "queue.Queue[list[Tensor] | None]", stop: threading.Event
) -> None:
    frame: list[np.ndarray] = []
    try:
        while not stop.is_set():
            try:
                item = tensors.get(timeout=0.1)
            except queue.Empty:
                continue
            frame += [t.numpy() for t in item or []]
            if item is None or sum(a.nbytes for a in frame) >= FRAME_BYTES:
                link.say(Corrections(prediction, last=item is None), frame)
                frame = []
            if item is None:
                return
    except BaseException:
        stop.set()
        raise


def receive_corrections(link: Link, rank: int, prediction: int, listed: Sequence[Request]) -> list[Tensor]:
    """Return a party's corrections of one prediction, once all are here."""
    corrections: list[Tensor] = []
    last = False
    while not last:
        heard = link.hear(Corrections)
        if heard.message.prediction != prediction:
            raise DealerError(f"the dealer must deal prediction {prediction}; got another number")
        corrections += [torch.from_numpy(a) for a in heard.arrays]
        last = heard.message.last
    shapes = [shape for q in listed for shape in correlation.correction_shapes(q, rank)]
    if [tuple(c.shape) for c in corrections] != shapes or any(c.dtype != torch.int64 for c in corrections):
        raise DealerError(f"the dealer's corrections of prediction {prediction} must fit the plan; they do not")
    return corrections


def receive_seed(link: Link) -> bytes:
    """Return this party's seed."""
    return link.recv_array("seed", (SEED_BYTES,), "|u1").tobytes()
