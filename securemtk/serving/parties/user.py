"""The user's side: asks keeper and authority, and computes as party 1 of each prediction."""

import contextlib
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from protocols.dealing.correlation import USER
from protocols.dealing.dealer import receive_seed
from protocols.dealing.pool import CorrelationPool, Finish
from protocols.dealing.prediction_shares import PredictionShares
from protocols.dealing.store import SealedStore
from protocols.errors import IntegrityError, NeedsInputs
from protocols.net import pulse
from protocols.net.link import Link
from protocols.net.wire import TensorWire
from protocols.primitives import ring
from protocols.primitives.prg import SEED_BYTES, Stream, fresh_seed
from protocols.program.program import Program, chunk_size
from protocols.running import backend, runner
from protocols.running.backend import Backend
from protocols.running.runner import Plan, Probe
from protocols.two_party.party import Party
from securemtk.onnx.model.inputs import KnownInputs
from securemtk.serving.config import Config
from securemtk.serving.costs import PredictionCost
from securemtk.serving.messages import AskKnown, Known, Load, NeedsMore, PublicModel, Ready
from securemtk.serving.model import LoadedModel, Scores
from securemtk.serving.parties.orders import Orders, PredictionKind, kinds_of, predict_of
from securemtk.serving.parties.steps import Steps
from securemtk.support.cores import own_cores


class UserParty:
    """Asks a keeper and an authority over links, and computes as party 1: learns the outputs, nothing of the weights.

    Args:
        keeper, authority: links to the other roles.
        supply: link to the authority on which correlations come.
        watch: told each step, and what fails in the background.
        config: limits.
        protocol: by name, as in `Session`.
        store: where correlations wait that have no room in memory, closed with this object; None for none.
        roles_here: how many other roles compute on this machine.

    For one thread. An error that is no `InputError` ends what both sides know of each other: use no more of it.
    """

    def __init__(
        self,
        keeper: Link,
        authority: Link,
        supply: Link,
        watch: Steps,
        config: Config,
        protocol: str = "fss",
        *,
        store: SealedStore | None = None,
        roles_here: int = 0,
    ) -> None:
        self._keeper, self._authority, self._watch = keeper, authority, watch
        self._config, self._protocol, self._roles_here = config, protocol, roles_here
        self._masked: dict[int, Mapping[str, Tensor]] = {}
        self._weights: dict[int, Mapping[str, Tensor]] = {}
        self._last: PredictionKind | None = None
        self._step("start")
        self._pool = CorrelationPool(
            supply,
            USER,
            receive_seed(authority),
            # The pool's thread must not hold this object, or nobody could forget it.
            partial(_finish_of, protocol, self._masked),
            store=store,
            slots=max(config.ahead, 1),
            on_failure=watch.fail,
        )
        self.orders = Orders(keeper, authority, self._pool)
        self._pool.start()
        try:
            self._zero_seeds = _exchange_seeds(keeper)
        except BaseException:
            self._pool.close()
            raise

    def close(self) -> None:
        """Close the links to both roles, and forget what was dealt ahead; may be called any number of times."""
        self._keeper.close()
        self._authority.close()
        self._pool.close()

    @property
    def _ops(self) -> Backend:
        return backend.find(self._protocol)

    def _step(self, step: str) -> None:
        self._watch.step = self._keeper.step = self._authority.step = step

    # --- models -----------------------------------------------------------------------------------------------------

    def load(self, model: str | bytes, known: KnownInputs) -> LoadedModel:
        """Let the keeper load a model, and return its public part.

        Args:
            model: name by which the keeper knows it, or the bytes of an ONNX file.
            known: what is told of its inputs.

        Raises:
            As `Session.load`; after an `InputError` or `UnsupportedError` more may be asked.
        """
        self._step("load")
        shapes, public, arrays = known.pack()
        self.orders.drop_all()
        self.orders.take_answers(None)
        name = None if isinstance(model, bytes) else model
        file = [np.frombuffer(model, dtype=np.uint8)] if isinstance(model, bytes) else []
        self._keeper.say(Load(self._protocol, self._config.comparison_bits, name, shapes, public), [*file, *arrays])
        # While the keeper reads the model, so that no prediction waits for it.
        self._ops.warm()
        pulse.warm()
        answer = self._keeper.hear(PublicModel, NeedsMore).message
        if isinstance(answer, NeedsMore):
            raise NeedsInputs(answer.why, answer.shapes, answer.public)
        if (answer.protocol, answer.comparison_bits) != (self._protocol, self._config.comparison_bits):
            raise IntegrityError("the keeper must load a model for the protocol and comparisons asked for; it has not")
        self._authority.say(AskKnown())
        known_there = self._authority.hear(Known).message
        program = answer.read_program()
        inputs, outputs = (tuple(x.info() for x in listed) for listed in (answer.inputs, answer.outputs))
        loaded = LoadedModel(answer.model, program, answer.read_manifest(), inputs, outputs)
        self._masked[loaded.number] = self._masked_weights(program)
        self._weights[loaded.number] = self._ops.share_weights(program, None)
        if known_there.needs_grant:
            self.orders.needs_grant.add(loaded.number)
        self._forget_traffic()
        return loaded

    def _forget_traffic(self) -> None:
        for link in (self._keeper, self._authority):
            link.enter("offline")
            link.reset_counters()

    def _masked_weights(self, program: Program) -> dict[str, Tensor]:
        names = self._ops.masked_names(program)
        arrays = self._keeper.recv("weights").arrays
        expected = [("<i8", program.params[name]) for name in names]
        if [(a.dtype.str, a.shape) for a in arrays] != expected:
            raise IntegrityError("the keeper must send the masked weights of its program; their shapes differ")
        masked = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
        self._ops.pack_weights(program, masked)
        return masked

    # --- predictions ------------------------------------------------------------------------------------------------

    def prepare(self, model: LoadedModel, batch: int, open_tasks: tuple[str, ...], predictions: int) -> None:
        """Order the correlations of coming predictions, as `Model.prepare`."""
        self.orders.order(kinds_of(model.number, batch, self._chunk_size(model, batch), open_tasks) * predictions)

    def predict(
        self, model: LoadedModel, inputs: Mapping[str, Tensor], open_tasks: tuple[str, ...] = ()
    ) -> tuple[Scores, PredictionCost]:
        """Return the scores of a batch, and what they cost.

        Args:
            model: loaded here.
            inputs: name -> int64 at scale 2**f, shape (n, *sample) with one n >= 1.
            open_tasks: names of the tasks to open.

        Raises:
            InputError: the authority refuses; more may be asked.
            ProtocolAbort: a role failed.

        Cost: the second result.
        Security: as `Model.predict`.
        """
        n = len(next(iter(inputs.values())))
        size = self._chunk_size(model, n)
        outputs: list[Scores] = []
        total = PredictionCost()
        kinds = kinds_of(model.number, n, size, open_tasks)
        for i, kind in enumerate(kinds):
            chunk = {name: x[i * size : (i + 1) * size] for name, x in inputs.items()}
            scores, cost = self._predict(model, chunk, kind, kinds[i + 1 : i + 2])
            outputs.append(scores)
            total.add(cost)
        return {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}, total

    def _chunk_size(self, model: LoadedModel, batch: int) -> int:
        return chunk_size(model.program, batch, self._config.chunk_elements)

    def _predict(
        self,
        model: LoadedModel,
        inputs: Mapping[str, Tensor],
        kind: PredictionKind,
        following: Sequence[PredictionKind],
    ) -> tuple[Scores, PredictionCost]:
        start = time.perf_counter()
        prediction, shares, offline_bytes = self._shares(kind)
        if not self.orders.ahead and len(os.sched_getaffinity(0)) > self._roles_here:
            # Dealt while this one runs. With a core less, the dealer would take it from the prediction that it serves.
            self.orders.order(following)
        probe = Probe(
            traffic=lambda: (_total(self._keeper), self._keeper.clock),
            enter=lambda layer: self._step(f"prediction {prediction}: {layer}"),
        )
        zeros = [Stream(seed).derive(f"prediction {prediction}") for seed in self._zero_seeds]
        party = Party(USER, TensorWire(self._keeper), shares, zeros[0], zeros[1], Stream())
        plan = Plan(model.program, self._protocol, kind.batch, model.gated, self._config.comparison_bits)
        self._keeper.enter("online")
        self._keeper.reset_counters()
        self._keeper.waited_s = 0.0
        ready = time.perf_counter()
        with _no_collection(), own_cores(False, self._config.threads):
            revealed = runner.run(party, plan, self._weights[model.number], inputs, probe)
        scores = {name: ring.decode(value) for name, value in revealed.items() if value is not None}
        end = time.perf_counter()
        cost = PredictionCost(
            end - ready,
            ready - start,
            self._keeper.waited_s,
            _total(self._keeper),
            offline_bytes,
            self._keeper.clock,
            probe.layers,
        )
        self._forget_traffic()
        if kind == self._last and not model.gated:
            # Only now: nothing shall compete with a prediction that somebody waits for. And not for secured tasks:
            # throwing shares away, when other keys come, would tell the keeper that they are others.
            self.orders.order([kind] * (self._config.ahead - len(self.orders.ahead)))
        self._last = kind
        self._pool.rest()
        self._step("wait")
        return scores, cost

    def _shares(self, kind: PredictionKind) -> tuple[int, PredictionShares, int]:
        """Return a prediction's number, our shares and the bytes of all roles; orders it unless it is ordered."""
        order, is_ahead = self.orders.take(kind)
        prediction = order.prediction
        self._step(f"prediction {prediction}: correlations")
        self.orders.confirm(order, is_ahead=is_ahead)
        self._keeper.say(predict_of(order))
        own = self._pool.take(prediction, (kind.model, kind.batch))
        ready = self._keeper.hear(Ready).message
        if ready.prediction != prediction:
            raise IntegrityError(f"the keeper must be ready for prediction {prediction}; it is for {ready.prediction}")
        n_bytes = _total(self._keeper) + _total(self._authority) + own.bytes + ready.bytes
        return prediction, own.shares, n_bytes


def _exchange_seeds(keeper: Link) -> tuple[bytes, bytes]:
    """Return the keeper's seed of shares of zero, and ours."""
    own = fresh_seed()
    keeper.send("zero", None, [np.frombuffer(own, dtype=np.uint8)])
    return keeper.recv_array("zero", (SEED_BYTES,), "|u1").tobytes(), own


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for garbage: among torch's objects that takes longer than a small prediction."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _finish_of(protocol: str, masked: Mapping[int, Mapping[str, Tensor]], model: int) -> Finish:
    """Return what prediction shares for a model do ahead."""
    return partial(backend.find(protocol).finish, masked=masked[model])


def _total(link: Link) -> int:
    counts = link.counters[link.phase]
    return counts.sent + counts.received
