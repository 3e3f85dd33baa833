"""A session: keeper and authority as processes on this machine, the user in the calling one."""

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from protocols.dealing.store import SealedStore
from protocols.errors import InputError, ProtocolAbort, RangeWarning, SecureError
from protocols.forks import Origin
from protocols.net.link import Link
from protocols.net.watch import Watch
from protocols.running import backend, ranges
from securemtk.onnx.model.inputs import KnownInputs
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, USER_ROLE, Config
from securemtk.serving.costs import PredictionCost
from securemtk.serving.local_start import LocalStart, Paths
from securemtk.serving.model import LoadedModel, Model, ModelSource, Scores
from securemtk.serving.parties.user import UserParty
from securemtk.serving.peers import Peers, Start, sort_links

__all__ = ["Model", "PredictionCost", "Scores", "Session"]

T = TypeVar("T")
# The user's links for data: to the keeper, to the authority, and the one on which correlations come.
_DATA = ((KEEPER_ROLE, "data"), (AUTHORITY_ROLE, "data"), (AUTHORITY_ROLE, "supply"))


class Session:
    """Keeper and authority as local processes, this process as the user.

    >>> with Session(key_files="keys/") as session:              # doctest: +SKIP
    ...     model = session.load("bundle/")
    ...     scores = model.predict(x, open_tasks=["digit"])       # {"digit": (n, 10) float32, ...}

    Args:
        config: addresses, time limits, threads.
        protocol: "fss" (comparison keys, two parties and the dealer) or "crypten" (CrypTen's protocols with our
            dealer and randomness, much slower).
        key_files: folder of `*.key` files, or a list of files and folders, that the authority may grant;
            only their paths pass through this process.
        passphrase: of the keys, where they have one.
        grants: file that says who may use which key (`securemtk keys grant`); the authority reads it for each
            prediction, and logs each use beside it. Without one everybody in this session may use every key.
        user: name of whoever asks, bound into this process's certificate; grants are given to names.
        timeout_s: overrides `config.timeout_s`.
        start: another way to come to keeper and authority; by default they are processes on this machine, that are told
            of key_files, passphrase, grants and user.

    The roles start with the first `load` or on entering the context. A session serves any number
    of predictions, one at a time. After a `ProtocolAbort` it is dead.

    A session belongs to the process that made it. In a fork of that process (a worker of gunicorn's `--preload`, of a
    torch `DataLoader`, of multiprocessing's "fork") its methods raise `WrongProcess` and `close` does nothing; the
    maker's session goes on. Make a session in each process, after the fork.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        protocol: str = "fss",
        key_files: Paths | None = None,
        passphrase: str | None = None,
        grants: str | os.PathLike[str] | None = None,
        user: str | None = None,
        timeout_s: float | None = None,
        start: Start | None = None,
    ) -> None:
        backend.require(protocol)
        given = {"key_files": key_files, "passphrase": passphrase, "grants": grants, "user": user}
        if start is not None and any(value is not None for value in given.values()):
            raise InputError(
                "key_files, passphrase, grants and user must be absent where start is given: they are its own"
            )
        self._config = config or Config()
        if timeout_s is not None:
            self._config = Config(**asdict(self._config) | {"timeout_s": timeout_s})
        self._origin = Origin()
        self._protocol = protocol
        self._how = LocalStart(key_files, passphrase, grants, user) if start is None else start
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._peers: Peers | None = None
        self._data_links: list[Link] = []
        self._watch: Watch | None = None
        self._store: SealedStore | None = None
        self._user: UserParty | None = None
        self._closed = False
        self.cost = PredictionCost()

    # --- life -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Session":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> dict[str, int]:
        """Role -> process id of the roles that this session started."""
        return {} if self._peers is None else dict(self._peers.pids)

    @property
    def step(self) -> str:
        """What this session is doing, such as "prediction 3: conv1"."""
        return "closed" if self._closed or self._watch is None else self._watch.step

    def start(self) -> None:
        """Start the roles and connect to them; does nothing when they run.

        They go on to load what they compute with, and the first request waits for that.

        Raises:
            InputError: a port is in use, a key file or the grants cannot be used.
            TransportError: a role did not start or proved to be another one.
            WrongProcess: this process is a fork of the one that made the session.
        """
        self._require_here()
        with self._starting:
            if self._closed:
                raise ProtocolAbort("the session is closed")
            if self._watch is not None:
                return
            try:
                self._start()
            except BaseException:
                self.close()
                raise

    def _start(self) -> None:
        config = self._config
        self._store = None if config.store is None else SealedStore(config.store, USER_ROLE)
        self._peers = peers = self._how.start(config, self._protocol)
        # For sessions that nobody closes: what was started ends with the interpreter or with this object.
        self._finalizer = weakref.finalize(self, peers.stop, 0.0)
        self._data_links, watched, pulses = sort_links(peers.links)
        self._watch = Watch(USER_ROLE, watched, self._data_links, silence_s=config.timeout_s, pulses=pulses)
        self._watch.start()

    def close(self) -> None:
        """End the roles; may be called any number of times, also after a failure. In a fork it does nothing."""
        if not self._origin.is_here:
            return
        # Removing a large store takes its time.
        grace_s = 3.0 if self._config.store is None else 30.0
        self._end(grace_s if self._watch is not None else 0.0)

    def _require_here(self) -> None:
        # Before any lock: one that another thread held when the fork came is never freed in the copy.
        self._origin.require("a session")

    def _end(self, grace_s: float) -> None:
        if self._closed:
            return
        self._closed = True
        if self._watch is not None and self._watch.is_alive():
            self._watch.bye()
        if self._user is not None:
            self._user.close()
        else:
            for link in self._data_links:
                link.close()
            if self._store is not None:
                self._store.close()
        if self._peers is not None:
            self._peers.stop(grace_s)
            self._finalizer.detach()

    def _abort(self, error: BaseException) -> None:
        """Tell the other roles why, and end everything."""
        if self._watch is not None and self._watch.is_alive():
            if not isinstance(error, SecureError):
                error = ProtocolAbort(f"the user's process stopped: {type(error).__name__}")
            self._watch.abort(error)
        # The others have been told or are gone; one that hangs cannot end by itself.
        self._end(grace_s=0.3)

    # --- requests ---------------------------------------------------------------------------------------------------

    def load(
        self,
        source: str | os.PathLike[str] | bytes,
        *,
        shapes: Mapping[str, Sequence[int]] | None = None,
        public: Mapping[str, Any] | None = None,
    ) -> Model:
        """Let the keeper load a bundle or ONNX file and return the model's public part.

        Args:
            source: bundle folder, path of an ONNX file, or the bytes of one. A path is opened by the
                keeper's process, so that the weights never enter this one.
            shapes: the whole shape of each input, for a model that does not keep its batch as the first axis of
                every activation, and whose file leaves sizes free.
            public: input name -> array that takes its place in the clear: shapes, axes, indices. The keeper and
                the authority see it.

        Raises:
            WrongProcess: this process is a fork of the one that made the session.
            NeedsInputs: the model may run once `shapes` or `public` are given; it says which.
            BundleError: missing, damaged or edited.
            UnsupportedError: nodes that we cannot run, all of them by name.
            RangeError: a weight that fixed point does not hold, or values that do not on the sample data of which the
                manifest tells.

        Warns:
            RangeWarning: values that reached half of what fixed point holds, on that data.
        """
        self._require_here()
        known = KnownInputs(
            None if shapes is None else {k: tuple(map(int, v)) for k, v in shapes.items()},
            {k: np.asarray(v) for k, v in (public or {}).items()},
        )
        loaded = self._load_or_abort(source, known)
        model = Model(_Predictor(self), loaded, ModelSource(source, known.shapes, known.public))
        # With nothing held: a caller may have made errors of warnings.
        if model.manifest is not None and model.manifest.headroom is not None:
            steps = ranges.steps_of(self._protocol)
            if text := ranges.warning(model.manifest.headroom, steps, self._config.comparison_bits):
                warnings.warn(text, RangeWarning, stacklevel=2)
        return model

    def _load_or_abort(self, source: str | os.PathLike[str] | bytes, known: KnownInputs) -> LoadedModel:
        with self._lock:
            user, peers = self._started()
            try:
                return user.load(source if isinstance(source, bytes) else peers.model_name(source), known)
            except InputError:
                raise
            except SecureError as error:
                if isinstance(error, ProtocolAbort):
                    self._abort(error)
                raise
            except BaseException as error:
                self._abort(error)
                raise

    def _started(self) -> tuple[UserParty, Peers]:
        self.start()
        peers, watch = self._peers, self._watch
        if peers is None or watch is None:
            raise ProtocolAbort("the session must run; it does not")
        if self._user is None:
            # Not in `start`: the roles are still loading what they compute with, and the caller may have other work.
            try:
                self._user = self._party(peers, watch)
            except BaseException as error:
                self._abort(error)
                raise
        return self._user, peers

    def _party(self, peers: Peers, watch: Watch) -> UserParty:
        keeper, authority, supply = (peers.links[key] for key in _DATA)
        how = (watch, self._config, self._protocol)
        return UserParty(keeper, authority, supply, *how, store=self._store, roles_here=len(peers.pids))

    def _ending_session_on_error(self, work: Callable[[], T]) -> T:
        threads = torch.get_num_threads()
        torch.set_num_threads(self._config.threads)
        try:
            return work()
        except InputError:
            raise  # refused before anything ran: the session lives on
        except BaseException as error:
            self._abort(error)
            raise
        finally:
            torch.set_num_threads(threads)


class _Predictor:
    """A session, as its models see it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.protocol, self.comparison_bits = session._protocol, session._config.comparison_bits

    def require_here(self) -> None:
        self._session._require_here()

    def predict(self, model: LoadedModel, inputs: Mapping[str, Tensor], open_tasks: tuple[str, ...]) -> Scores:
        session = self._session
        with session._lock:
            user, _ = session._started()
            scores, session.cost = session._ending_session_on_error(lambda: user.predict(model, inputs, open_tasks))
        return scores

    def prepare(self, model: LoadedModel, batch: int, open_tasks: tuple[str, ...], predictions: int) -> None:
        session = self._session
        with session._lock:
            user, _ = session._started()
            session._ending_session_on_error(lambda: user.prepare(model, batch, open_tasks, predictions))
