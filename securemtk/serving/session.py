"""A session: keeper and authority as processes on this machine, the user in the calling one."""

import contextlib
import gc
import itertools
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols.dealing.correlation import USER
from protocols.dealing.dealer import receive_seed
from protocols.dealing.pool import CorrelationPool, Finish
from protocols.dealing.prediction_shares import Parts, PredictionShares
from protocols.dealing.store import SealedStore
from protocols.errors import (
    InputError,
    IntegrityError,
    NeedsInputs,
    ProtocolAbort,
    RangeError,
    RangeWarning,
    SecureError,
    UnmeasuredWarning,
)
from protocols.forks import Origin
from protocols.limits import input_limit
from protocols.net.link import Link
from protocols.net.listener import connect
from protocols.net.tls import check_user, issue
from protocols.net.watch import Watch
from protocols.net.wire import TensorWire
from protocols.primitives import ring
from protocols.primitives.prg import SEED_BYTES, Stream, fresh_seed
from protocols.program.program import Program, chunk_size
from protocols.running import backend, ranges, runner
from protocols.running.runner import LayerCost, Plan, Probe
from protocols.two_party.party import Party
from securemtk.onnx.bundle import read_model
from securemtk.onnx.examine import Examiner
from securemtk.onnx.manifest import Manifest
from securemtk.onnx.model.graph import ValueInfo
from securemtk.onnx.model.inputs import KnownInputs, input_arrays
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, PURPOSES, USER_ROLE, WATCH_PURPOSES, Config
from securemtk.serving.launch import RoleProcess, stop_all
from securemtk.support.cores import own_cores
from securemtk.tasks import Task

T = TypeVar("T")
Scores = dict[str, NDArray[np.float32]]


@dataclass
class PredictionCost:
    """What one prediction cost.

    Args:
        online_s: seconds from the first message that depends on the input to the revealed scores.
        offline_s: seconds spent before, on agreeing what is run and on waiting for correlations; where they were
            ordered ahead, next to none.
        waiting_s: of online_s, seconds in which the user's process waited for the keeper.
        online_bytes, offline_bytes: bytes of frames sent by all roles together, without TLS records.
        rounds: messages or simultaneous exchanges that had to wait for the one before, reveal included.
        layers: the same by layer, as the user's process saw it (seconds include waiting for the keeper).
    """

    online_s: float = 0.0
    offline_s: float = 0.0
    waiting_s: float = 0.0
    online_bytes: int = 0
    offline_bytes: int = 0
    rounds: int = 0
    layers: list[LayerCost] = field(default_factory=list)

    def add(self, other: "PredictionCost") -> None:
        """Add the cost of another chunk of the same prediction."""
        for name in ("online_s", "offline_s", "waiting_s", "online_bytes", "offline_bytes", "rounds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if not self.layers:
            self.layers = other.layers
            return
        self.layers = [
            LayerCost(a.name, a.op, a.seconds + b.seconds, a.bytes + b.bytes, a.rounds + b.rounds)
            for a, b in zip(self.layers, other.layers, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"online {self.online_s:.3f} s, {self.online_bytes / 1e6:.2f} MB, {self.rounds} rounds; "
            f"offline {self.offline_s:.3f} s, {self.offline_bytes / 1e6:.2f} MB"
        )


class Model:
    """A loaded model: what the user may know of it, and `predict`.

    Made by `Session.load`.
    """

    def __init__(
        self,
        session: "Session",
        number: int,
        program: Program,
        manifest: Manifest | None,
        inputs: Sequence[ValueInfo],
        outputs: Sequence[ValueInfo],
        source: "_ModelSource",
    ) -> None:
        self._session = session
        self._number = number
        self._weights = backend.find(session._protocol).share_weights(program, None)
        self.program = program
        self.manifest = manifest
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._source = source
        self._examiner: Examiner | None = None
        self._measured = manifest is not None and manifest.headroom is not None

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of a bundle; empty for a plain ONNX file."""
        return () if self.manifest is None else self.manifest.tasks

    @property
    def gated(self) -> bool:
        """Whether any task is secured."""
        return any(task.secured for task in self.tasks)

    def predict(self, x: Any, keys: Sequence[str] = (), *, check: bool = False) -> Scores:
        """Return the scores of every output, computed without showing the input, the weights or the keys.

        Args:
            x: float array or tensor of shape (n, *sample), n >= 1; for a model with several inputs a
                mapping of names to such arrays with the same n. A model that was understood as a whole
                (`program.whole`) takes arrays of its own shapes, and returns such.
            keys: names of secured tasks to open with the authority's keys.
            check: whether this process reads the model's file and runs it on x in the clear first, to see whether the
                answers will be right: for the owner of the model. Trigger-keys are not part of that.

        Returns:
            Output name -> float32 array of shape (n, ...). A secured task without its key gives noise
            drawn by the authority.

        Raises:
            ShapeError, RangeError: the input does not fit or, with `check`, answers would be wrong: values beyond
                what fixed point holds, or an output more than 1 % of its largest value from onnxruntime's. Nothing
                was sent.
            InputError: an unknown or unprotected task in `keys`; nothing was sent.
            WrongProcess: this process is a fork of the one that made the session; nothing was sent.
            KeyRefused: the authority holds no fitting key or, with grants, this user may not use it now; the session
                lives on. Of a batch that runs in chunks the first ones may have been counted as used.
            ProtocolAbort: a role failed; the session is dead.

        Warns:
            UnmeasuredWarning: at the first prediction of a model of whose values nobody has measured any; once.
            RangeWarning: with `check`, layers of which few bits are left.

        Values inside the network are not checked otherwise, for nobody sees them: see docs/ranges.md.

        Cost: see `Session.cost` afterwards.
        Security: the keeper sees neither input nor scores nor which tasks are open; the authority sees
            the batch size and which keys were asked for; the user sees the scores.
        """
        self._session._require_here()
        self._check_keys(keys)
        arrays = self._arrays(x)
        if check:
            self._examine(x)
        elif not self._measured:
            warnings.warn(self._source.unmeasured(), UnmeasuredWarning, stacklevel=2)
        self._measured = True
        scores = self._session._predict(self, arrays, tuple(dict.fromkeys(keys)))
        return {name: value[0] for name, value in scores.items()} if self.program.whole else scores

    def prepare(self, batch: int, keys: Sequence[str] = (), predictions: int = 1) -> None:
        """Order the correlations of coming predictions, and return at once; they are made in the background.

        A prediction that is asked next with the same batch and keys finds them ready. Any other request throws them
        away, for correlations are dealt for one plan.

        Args:
            batch: number of samples.
            keys: as in `predict`.
            predictions: how many predictions; each costs memory at keeper and user, or with `Config.store` disk.

        Raises:
            InputError: a number below 1, an unknown or unprotected task in `keys`; nothing was sent.
            WrongProcess: as `predict`.
            ProtocolAbort: a role failed; the session is dead.

        Security: the keeper sees the batch sizes, and whether what was ordered is used or thrown away; so order for
            other keys only where the keeper may know that they changed.
        """
        self._session._require_here()
        self._check_keys(keys)
        if batch < 1 or predictions < 1:
            raise InputError(f"batch and predictions must be 1 or more; got {batch} and {predictions}")
        self._session._prepare_ahead(self, batch, tuple(dict.fromkeys(keys)), predictions)

    def _check_keys(self, keys: Sequence[str]) -> None:
        if isinstance(keys, str):
            raise InputError(f"keys must be a sequence of task names; got the text {keys!r}")
        tasks = {task.name: task for task in self.tasks}
        for name in keys:
            if name not in tasks:
                known = ", ".join(tasks) or "none: this model has no tasks"
                raise InputError(f"a key must be of one of the model's tasks ({known}); got {name!r}")
            if not tasks[name].secured:
                raise InputError(f"task {name!r} is unprotected and takes no key")

    def _examine(self, x: Any) -> None:
        """Raise RangeError unless the model's file says that answers on x will be right; warn where bits are few."""
        config = self._session._config
        if self._examiner is None:
            source = self._source.source
            data = source if isinstance(source, bytes) else read_model(source)[1]
            self._examiner = Examiner(data, self._source.shapes, self._source.public)
        found = self._examiner.examine(self._inputs(x), self._session._protocol, config.comparison_bits)
        if wrong := found.wrong():
            raise RangeError("; ".join([wrong, *found.hints()]))
        for text in found.hints():
            warnings.warn(text, RangeWarning, stacklevel=3)

    def _arrays(self, x: Any) -> dict[str, Tensor]:
        return {name: ring.encode(array, what=f"input {name!r}") for name, array in self._inputs(x).items()}

    def _inputs(self, x: Any) -> dict[str, NDArray[np.floating]]:
        bounds = {} if self.manifest is None else {"low": self.manifest.low, "high": self.manifest.high}
        bounds["limit"] = input_limit(self._session._config.comparison_bits)
        return input_arrays(self.program.inputs, x, **bounds, whole=self.program.whole)


class Session:
    """Keeper and authority as local processes, this process as the user.

    >>> with Session(keys="keys/") as session:              # doctest: +SKIP
    ...     model = session.load("bundle/")
    ...     scores = model.predict(x, keys=["digit"])       # {"digit": (n, 10) float32, ...}

    Args:
        config: addresses, time limits, threads.
        protocol: "fss" (comparison keys, two parties and the dealer) or "crypten" (CrypTen's protocols with our
            dealer and randomness, much slower).
        keys: folder of `*.key` files, or a list of files and folders, that the authority may grant;
            only their paths pass through this process.
        passphrase: of the keys, where they have one.
        grants: file that says who may use which key (`securemtk keys grant`); the authority reads it for each
            prediction, and logs each use beside it. Without one everybody in this session may use every key.
        user: name of whoever asks, bound into this process's certificate; grants are given to names.
        timeout_s: overrides `config.timeout_s`.

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
        keys: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        passphrase: str | None = None,
        grants: str | os.PathLike[str] | None = None,
        user: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        backend.require(protocol)
        if user is not None:
            check_user(user)
        self._config = config or Config()
        if timeout_s is not None:
            self._config = Config(**asdict(self._config) | {"timeout_s": timeout_s})
        self._origin = Origin()
        self._protocol = protocol
        paths = [] if keys is None else [keys] if isinstance(keys, str | os.PathLike) else list(keys)
        self._key_paths = [str(Path(p).resolve()) for p in paths]
        self._passphrase = passphrase
        self._grants = None if grants is None else os.path.abspath(grants)
        self._user = user
        # Models of which the authority must allow each prediction when it is made.
        self._guarded_models: set[int] = set()
        self._lock = threading.Lock()
        self._processes: list[RoleProcess] = []
        self._watch: Watch | None = None
        self._closed = False
        self._masked: dict[int, Mapping[str, Tensor]] = {}
        self._pool: CorrelationPool | None = None
        self._ordered: deque[PreparedPrediction] = deque()
        self._unanswered: deque[PreparedPrediction] = deque()
        self._refused: dict[int, InputError] = {}
        self._last: PredictionKind | None = None
        self._numbers = itertools.count()
        # For sessions that nobody closes: the processes end with the interpreter or with this object.
        self._finalizer = weakref.finalize(self, stop_all, self._processes)
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
        return {process.role: process.pid for process in self._processes}

    @property
    def step(self) -> str:
        """What this session is doing, such as "prediction 3: conv1"."""
        return "closed" if self._closed or self._watch is None else self._watch.step

    def start(self) -> None:
        """Start the roles and connect to them; does nothing when they run.

        Raises:
            InputError: a port is in use, a key file or the grants cannot be used.
            TransportError: a role did not start or proved to be another one.
            WrongProcess: this process is a fork of the one that made the session.
        """
        self._require_here()
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
        names = {} if self._user is None else {USER_ROLE: self._user}
        credentials = issue([KEEPER_ROLE, USER_ROLE, AUTHORITY_ROLE], users=names)
        common = {
            "host": config.host,
            "timeout_s": config.timeout_s,
            "start_timeout_s": config.start_timeout_s,
            "threads": config.threads,
            "protocol": self._protocol,
            "keys": self._key_paths,
            "passphrase": None,
            "grants": None,
            "guarded": self._grants is not None,
            "store": None if config.store is None else os.path.abspath(config.store),
            "slots": max(config.ahead, 1),
        }
        store = None if config.store is None else SealedStore(config.store, USER_ROLE)
        ports = {KEEPER_ROLE: config.keeper_port, AUTHORITY_ROLE: config.authority_port}
        secret = {AUTHORITY_ROLE: {"passphrase": self._passphrase, "grants": self._grants}}
        for role, port in ports.items():
            own = {"port": port, "credentials": credentials[role].to_json()} | secret.get(role, {})
            self._processes.append(RoleProcess(role, common | own))
        backend.find(self._protocol).warm()
        addresses = {process.role: process.address(config.start_timeout_s) for process in self._processes}
        self._processes[1].tell({"keeper_port": addresses[KEEPER_ROLE][1]})
        limits = {"timeout_s": config.timeout_s, "opening_s": config.start_timeout_s}
        links = {
            (role, purpose): connect(credentials[USER_ROLE], addresses[role], role, purpose, **limits)
            for role in ports
            for purpose in PURPOSES[role, USER_ROLE]
        }
        self._keeper, self._authority = links[KEEPER_ROLE, "data"], links[AUTHORITY_ROLE, "data"]
        guarded = [link for (_, purpose), link in links.items() if purpose not in WATCH_PURPOSES]
        watched, pulses = ({role: links[role, purpose] for role in ports} for purpose in WATCH_PURPOSES)
        self._watch = Watch(USER_ROLE, watched, guarded, silence_s=config.timeout_s, pulses=pulses)
        self._watch.start()
        self._step("start")
        # The pool's thread must not hold this object, or nobody could forget it.
        finish = backend.find(self._protocol).finish
        self._pool = CorrelationPool(
            links[AUTHORITY_ROLE, "supply"],
            USER,
            receive_seed(self._authority),
            partial(_finish_of, finish, self._masked),
            store=store,
            slots=max(config.ahead, 1),
            on_failure=self._watch.fail,
        )
        self._pool.start()
        own_seed = fresh_seed()
        self._keeper.send("zero", None, [np.frombuffer(own_seed, dtype=np.uint8)])
        other = self._keeper.recv_array("zero", (SEED_BYTES,), "|u1").tobytes()
        self._zero_seeds = (other, own_seed)

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
        if self._watch is not None:
            if self._watch.is_alive():
                self._watch.bye()
            self._keeper.close()
            self._authority.close()
        if self._pool is not None:
            self._pool.close()
        stop_all(self._processes, grace_s)
        self._finalizer.detach()

    def _abort(self, error: BaseException) -> None:
        """Tell the other roles why, and end everything."""
        if self._watch is not None and self._watch.is_alive():
            if not isinstance(error, SecureError):
                error = ProtocolAbort(f"the user's process stopped: {type(error).__name__}")
            self._watch.abort(error)
        # The others have been told or are gone; one that hangs cannot end by itself.
        self._end(grace_s=0.3)

    def _step(self, step: str) -> None:
        if self._watch is not None:
            self._watch.step = self._keeper.step = self._authority.step = step

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
        model = self._load_or_abort(source, known)
        # With nothing held: a caller may have made errors of warnings.
        if model.manifest is not None and model.manifest.headroom is not None:
            steps = ranges.steps_of(self._protocol)
            if text := ranges.warning(model.manifest.headroom, steps, self._config.comparison_bits):
                warnings.warn(text, RangeWarning, stacklevel=2)
        return model

    def _load_or_abort(self, source: str | os.PathLike[str] | bytes, known: KnownInputs) -> Model:
        with self._lock:
            self.start()
            self._step("load")
            try:
                return self._load(source, known)
            except InputError:
                raise
            except SecureError as error:
                if isinstance(error, ProtocolAbort):
                    self._abort(error)
                raise
            except BaseException as error:
                self._abort(error)
                raise

    def _load(self, source: str | os.PathLike[str] | bytes, known: KnownInputs) -> Model:
        about, arrays = known.to_message()
        self._drop_ordered()
        self._take_grants(None)
        request = {"task": "load", "protocol": self._protocol, "comparison_bits": self._config.comparison_bits} | about
        if isinstance(source, bytes):
            self._keeper.send("request", request, [np.frombuffer(source, dtype=np.uint8), *arrays])
        else:
            self._keeper.send("request", request | {"path": str(Path(source).resolve())}, arrays)
        meta = self._keeper.recv("model").meta
        if "needs" in meta:
            needs = meta["needs"]
            raise NeedsInputs(str(needs["why"]), bool(needs["shapes"]), [str(x) for x in needs["public"]])
        self._authority.send("request", {"task": "load"})
        self._authority.recv("loaded")
        manifest = None if meta["manifest"] is None else Manifest.from_json(str(meta["manifest"]))
        program = Program.from_json(str(meta["program"]))
        number = int(meta["model"])
        self._masked[number] = self._masked_weights(program)
        if self._grants is not None and manifest is not None and any(task.secured for task in manifest.tasks):
            self._guarded_models.add(number)
        self._forget_traffic()
        given = _ModelSource(source, known.shapes, known.public)
        return Model(self, number, program, manifest, _infos(meta["inputs"]), _infos(meta["outputs"]), given)

    def _forget_traffic(self) -> None:
        for link in (self._keeper, self._authority):
            link.enter("offline")
            link.reset_counters()

    def _masked_weights(self, program: Program) -> dict[str, Tensor]:
        names = backend.find(self._protocol).masked_names(program)
        arrays = self._keeper.recv("weights").arrays
        if [a.shape for a in arrays] != [program.params[name] for name in names]:
            raise IntegrityError("the keeper must send the masked weights of its program; their shapes differ")
        masked = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
        backend.find(self._protocol).pack_weights(program, masked)
        return masked

    def _predict(self, model: Model, inputs: Mapping[str, Tensor], keys: tuple[str, ...]) -> Scores:
        n = len(next(iter(inputs.values())))
        size = chunk_size(model.program, n, self._config.chunk_elements)
        outputs: list[Scores] = []
        total = PredictionCost()
        with self._lock:
            self.start()
            wishes = [PredictionKind(model._number, min(size, n - begin), keys) for begin in range(0, n, size)]
            for i, wish in enumerate(wishes):
                chunk = {name: x[i * size : (i + 1) * size] for name, x in inputs.items()}
                scores, cost = self._guarded(partial(self._chunk, model, chunk, wish, wishes[i + 1 : i + 2]))
                outputs.append(scores)
                total.add(cost)
            self.cost = total
        return {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}

    def _guarded(self, work: Callable[[], T]) -> T:
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

    def _chunk(
        self, model: Model, inputs: Mapping[str, Tensor], wish: "PredictionKind", following: Sequence["PredictionKind"]
    ) -> tuple[Scores, PredictionCost]:
        start = time.perf_counter()
        prediction, hand, offline_bytes = self._hand(wish)
        if not self._ordered and len(os.sched_getaffinity(0)) > len(self._processes):
            # Dealt while this one runs. With a core less, the dealer would take it from the prediction that it serves.
            self._order_all(following)
        probe = Probe(
            traffic=lambda: (_total(self._keeper), self._keeper.clock),
            enter=lambda layer: self._step(f"prediction {prediction}: {layer}"),
        )
        zeros = [Stream(seed).derive(f"prediction {prediction}") for seed in self._zero_seeds]
        party = Party(USER, TensorWire(self._keeper), hand, zeros[0], zeros[1], Stream())
        plan = Plan(model.program, self._protocol, wish.batch, model.gated, self._config.comparison_bits)
        self._keeper.enter("online")
        self._keeper.reset_counters()
        self._keeper.waited_s = 0.0
        ready = time.perf_counter()
        with _no_collection(), own_cores(False, self._config.threads):
            revealed = runner.run(party, plan, model._weights, inputs, probe)
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
        if wish == self._last and not model.gated:
            # Only now: nothing shall compete with a prediction that somebody waits for. And not for secured tasks:
            # throwing a hand away, when other keys come, would tell the keeper that they are others.
            self._order_all([wish] * (self._config.ahead - len(self._ordered)))
        self._last = wish
        if self._pool is not None:
            self._pool.rest()
        self._step("wait")
        return scores, cost

    def _hand(self, wish: "PredictionKind") -> tuple[int, PredictionShares, int]:
        """Return a prediction's number, our hand and the bytes of all roles; orders it unless it is ordered."""
        pool = self._pool
        if pool is None:
            raise ProtocolAbort("the session must run; it does not")
        is_ahead = bool(self._ordered) and self._ordered[0].wish == wish
        if not is_ahead:
            self._drop_ordered()
            self._order(wish, use=True)
        order = self._ordered.popleft()
        prediction = order.prediction
        self._step(f"prediction {prediction}: correlations")
        self._take_grants(order)
        if is_ahead and wish.model in self._guarded_models:
            self._ask_use(order)
        about = {"prediction": prediction, "model": wish.model, "protocol": self._protocol, "batch": wish.batch}
        self._keeper.send("request", {"task": "predict"} | about)
        own = pool.take(prediction)
        ready = self._keeper.recv("ready")
        n_bytes = _total(self._keeper) + _total(self._authority) + own.bytes + int(ready.meta["bytes"])
        return prediction, own.hand, n_bytes

    def _prepare_ahead(self, model: Model, batch: int, keys: tuple[str, ...], predictions: int) -> None:
        size = chunk_size(model.program, batch, self._config.chunk_elements)
        wishes = [PredictionKind(model._number, min(size, batch - begin), keys) for begin in range(0, batch, size)]
        with self._lock:
            self.start()
            self._guarded(lambda: self._order_all(wishes * predictions))

    def _order_all(self, wishes: Sequence["PredictionKind"]) -> None:
        for wish in wishes:
            self._order(wish)

    def _order(self, wish: "PredictionKind", *, use: bool = False) -> None:
        """Have the authority deal a prediction, to use at once or later; its answer comes later."""
        order = PreparedPrediction(next(self._numbers), wish)
        about = {"prediction": order.prediction, "model": wish.model, "protocol": self._protocol, "batch": wish.batch}
        if wish.model in self._guarded_models:
            about["use"] = use
        self._authority.send("request", {"task": "prepare", "keys": list(wish.keys)} | about)
        self._ordered.append(order)
        self._unanswered.append(order)

    def _ask_use(self, order: "PreparedPrediction") -> None:
        """Have the authority allow a prediction that it dealt ahead; throw its hand away where it does not."""
        self._take_grants(None)
        self._authority.send("request", {"task": "use", "prediction": order.prediction})
        try:
            self._authority.recv("granted")
        except InputError:
            self._drop(order)
            raise

    def _take_grants(self, order: "PreparedPrediction | None") -> None:
        """Take the authority's answers up to that on an order, all for None; raise the refusal of this order."""
        while self._unanswered and (order is None or order in self._unanswered):
            answered = self._unanswered.popleft()
            try:
                self._authority.recv("granted")
            except InputError as error:
                self._refused[answered.prediction] = error
        if order is not None:
            refusal = self._refused.get(order.prediction)
            # Nobody wants the ones before any more.
            self._refused = {number: e for number, e in self._refused.items() if number > order.prediction}
            if refusal is not None:
                raise refusal

    def _drop_ordered(self) -> None:
        while self._ordered:
            self._drop(self._ordered.popleft())

    def _drop(self, order: "PreparedPrediction") -> None:
        self._keeper.send("request", {"task": "drop", "prediction": order.prediction})
        if self._pool is not None:
            self._pool.drop(order.prediction)


@dataclass(frozen=True)
class _ModelSource:
    """What a model was loaded from, and what was told of its inputs: for whoever wants to see it in the clear."""

    source: str | os.PathLike[str] | bytes = field(repr=False)
    shapes: Mapping[str, Sequence[int]] | None = None
    public: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def unmeasured(self) -> str:
        """Return what to say of a model of whose values nobody knows."""
        name = "MODEL" if isinstance(self.source, bytes) else os.fspath(self.source)
        return (
            "no sample of this model's data was ever measured: where a value leaves the range of fixed point its "
            f"answer is wrong, and nothing shows it. Run: securemtk check {name} --sample x.npy, or predict(x, "
            "check=True)"
        )


def _infos(raw: Sequence[Any]) -> list[ValueInfo]:
    return [
        ValueInfo(str(name), None if shape is None else tuple(map(int, shape)), str(dtype))
        for name, shape, dtype in raw
    ]


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


def _finish_of(finish: Callable[..., Parts], masked: Mapping[int, Mapping[str, Tensor]], model: int) -> Finish:
    """Return what a hand for a model does ahead."""
    return partial(finish, masked=masked[model])


@dataclass(frozen=True)
class PredictionKind:
    """What correlations are made for: a model by number, a batch, and the keys that open its tasks."""

    model: int
    batch: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class PreparedPrediction:
    """A prediction's number, and what it was ordered for."""

    prediction: int
    wish: PredictionKind


def _total(link: Link) -> int:
    counts = link.counters[link.phase]
    return counts.sent + counts.received
