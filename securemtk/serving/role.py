"""Keeper and authority: what each of them does when it is asked. Run as `python -m securemtk.serving.role`.

A role process reads its settings and credentials as one line of JSON from its standard input,
announces its address as one line on its standard output, connects, and serves requests until the
user leaves. It exits by itself when a peer is gone: no process outlives its session.
"""

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocols import limits
from protocols.dealing.correlation import KEEPER, Dealing, Request, Secrets
from protocols.dealing.dealer import TrustedDealer, pack, receive_seed, send_corrections, weight_masks
from protocols.dealing.pool import CorrelationPool, Deal, PlanKey
from protocols.dealing.store import SealedStore
from protocols.errors import (
    InputError,
    IntegrityError,
    KeyRefused,
    NeedsInputs,
    PeerLost,
    PeerRefused,
    ProtocolAbort,
    SecureError,
    UnsupportedError,
    place_of,
)
from protocols.net.link import Link
from protocols.net.listener import Listener, connect
from protocols.net.tls import Credentials
from protocols.net.watch import Watch
from protocols.net.wire import TensorWire
from protocols.primitives import ring
from protocols.primitives.prg import SEED_BYTES, Stream, fresh_seed
from protocols.program.program import Program
from protocols.running import backend, ranges, runner
from protocols.running.runner import Plan, Probe
from protocols.two_party.party import Party
from securemtk.mtk.keys.answers import AnswerStats, draw_answers
from securemtk.mtk.keys.distributor import KeyDistributor
from securemtk.mtk.keys.grants import KeyRequest, Ledger
from securemtk.mtk.keys.key import TriggerKey
from securemtk.mtk.keys.key import load as load_key
from securemtk.onnx.bundle import read_model
from securemtk.onnx.importer import load_onnx
from securemtk.onnx.manifest import Manifest
from securemtk.onnx.model.graph import ValueInfo
from securemtk.onnx.model.inputs import KnownInputs
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, PURPOSES, USER_ROLE
from securemtk.serving.process import Hear, Links, Say, end_timer, run, sort_links
from securemtk.support.cores import own_cores

# --- the keeper -----------------------------------------------------------------------------------------------------


@dataclass
class KeptModel:
    """A model as the keeper holds it."""

    program: Program
    gated: bool
    comparison_bits: int
    weights: Mapping[str, Tensor] = field(repr=False)

    def plan(self, protocol: str, batch: int) -> Plan:
        """Return what is run for a batch."""
        return Plan(self.program, protocol, batch, self.gated, self.comparison_bits)


class Keeper:
    """Holds models, computes as party 0, and learns nothing of inputs, keys and outputs.

    Args:
        user, authority: links to the other roles.
        supply: link to the authority on which correlations come.
        watch: told each step.
        store: folder for correlations that wait, or None.
        slots: hands that wait in memory where there is a store.
        guarded: whether the authority has grants: then it must say for each prediction of a model with secured tasks
            that it may run, whatever was dealt before.
    """

    def __init__(
        self,
        user: Link,
        authority: Link,
        supply: Link,
        watch: Watch,
        store: str | None = None,
        slots: int = 1,
        guarded: bool = False,
    ) -> None:
        self._user, self._authority, self._watch = user, authority, watch
        self._guarded = guarded
        self._models: list[KeptModel] = []
        self._seed = receive_seed(authority)
        own = fresh_seed()
        user.send("zero", None, [np.frombuffer(own, dtype=np.uint8)])
        other = user.recv_array("zero", (SEED_BYTES,), "|u1").tobytes()
        self._zero_seeds = (other, own)
        # Last: what is made here is closed by `close`, and nothing may fail before somebody can call it.
        kept = None if store is None else SealedStore(store, KEEPER_ROLE)
        self._pool = CorrelationPool(supply, KEEPER, self._seed, store=kept, slots=slots, on_failure=watch.fail)
        self._pool.start()

    def serve(self) -> None:
        """Answer the user's requests until the session ends."""
        while True:
            self._step("wait")
            message = self._user.recv("request", timeout_s=None)
            task = message.meta.get("task")
            if task == "load":
                self._load(message.meta, message.arrays)
            elif task == "predict":
                self._predict(message.meta)
            elif task == "drop":
                self._pool.drop(int(message.meta["prediction"]))
            else:
                raise ProtocolAbort(f"the keeper loads, predicts or drops; the user asked for {task!r}")

    def close(self) -> None:
        """End the thread that receives correlations."""
        self._pool.close()

    def _step(self, step: str) -> None:
        self._watch.step = self._user.step = self._authority.step = step

    def _load(self, meta: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> None:
        self._step("load")
        bits = int(meta["comparison_bits"])
        if not limits.FEWEST_COMPARISON_BITS <= bits <= limits.MOST_COMPARISON_BITS:
            raise IntegrityError(f"the user must ask for comparisons of a width that keys have; got {bits} bits")
        try:
            manifest, data = read_model(str(meta["path"])) if "path" in meta else (None, arrays[0].tobytes())
            known = KnownInputs.from_message(meta, arrays)
            if manifest is not None and known.given:
                raise InputError(
                    "a bundle says all that is to be known of its inputs; shapes and public must be absent"
                )
            if manifest is not None and manifest.headroom is not None:
                ranges.require(manifest.headroom, ranges.steps_of(str(meta["protocol"])), bits)
            imported = load_onnx(data, known.shapes, known.public)
            program = imported.program
            ranges.require_width(program, str(meta["protocol"]), bits)
            protocol = backend.find(str(meta["protocol"]))
            weights = protocol.share_weights(program, imported.params, bits)
            protocol.pack_weights(program, weights)
        except NeedsInputs as error:
            self._user.send("model", {"needs": {"why": str(error), "shapes": error.shapes, "public": error.public}})
            return
        except SecureError as error:
            self._user.refuse(error)
            return
        except Exception as error:
            # Of one file, whatever it is: the other models live on. Its text may hold a weight, so that it stays here.
            why = f"the model must be one that can be loaded; the keeper's process met {place_of(error)}"
            self._user.refuse(UnsupportedError(why))
            return
        gated = manifest is not None and any(task.secured for task in manifest.tasks)
        number = len(self._models)
        self._models.append(KeptModel(program, gated, bits, weights))
        public = {
            "model": number,
            "protocol": str(meta["protocol"]),
            "comparison_bits": bits,
            "program": program.to_json(),
            "manifest": None if manifest is None else manifest.to_json(),
        }
        self._authority.send("model", public)
        self._user.send("model", public | {"inputs": _infos(imported.inputs), "outputs": _infos(imported.outputs)})
        names = protocol.masked_names(program)
        masks = weight_masks(self._seed, number, program)
        self._user.send("weights", None, [(weights[name] - masks[name]).numpy() for name in names])

    def _predict(self, meta: Mapping[str, Any]) -> None:
        prediction, number = int(meta["prediction"]), int(meta["model"])
        protocol, batch = str(meta["protocol"]), int(meta["batch"])
        model = self._models[number]
        self._step(f"prediction {prediction}: correlations")
        if self._guarded and model.gated:
            # Also where no key is used: nothing here depends on which tasks are open.
            allowed = int(self._authority.recv("allowed").meta["prediction"])
            if allowed != prediction:
                raise IntegrityError(f"the authority must allow prediction {prediction}; it allowed {allowed}")
        ready = self._pool.take(prediction)
        party = Party(
            KEEPER, TensorWire(self._user), ready.hand, *_zero_streams(self._zero_seeds, prediction), Stream()
        )
        probe = Probe(enter=lambda layer: self._step(f"prediction {prediction}: {layer}"))
        plan = model.plan(protocol, batch)
        self._user.send("ready", {"prediction": prediction, "bytes": ready.bytes})
        self._user.enter("online")
        with own_cores(True, torch.get_num_threads()):
            runner.run(party, plan, model.weights, dict.fromkeys(model.program.inputs), probe)
        self._user.enter("offline")
        self._pool.rest()


def _infos(values: Sequence[ValueInfo]) -> list[list[Any]]:
    return [[x.name, x.shape, x.dtype] for x in values]


def _zero_streams(seeds: tuple[bytes, bytes], prediction: int) -> tuple[Stream, Stream]:
    previous, following = (Stream(seed).derive(f"prediction {prediction}") for seed in seeds)
    return previous, following


# --- the authority --------------------------------------------------------------------------------------------------


@dataclass
class KnownModel:
    """What the authority knows of a model: its public parts."""

    program: Program
    manifest: Manifest | None
    comparison_bits: int
    masks: Mapping[str, Tensor] = field(repr=False)

    @property
    def gated(self) -> bool:
        """Whether any task is secured."""
        return self.manifest is not None and any(task.secured for task in self.manifest.tasks)


class Authority:
    """Holds the trigger-keys, decides who may use which, and deals correlations.

    Args:
        user, keeper: links to the other roles.
        supply: links to keeper and user on which correlations go.
        watch: told each step.
        keys: the keys, and who may use them.

    Raises:
        PeerRefused: the user's links are not of one user.
    """

    def __init__(self, user: Link, keeper: Link, supply: tuple[Link, Link], watch: Watch, keys: KeyDistributor) -> None:
        if supply[1].user != user.user:
            raise PeerRefused("all links of the user must be of one user; their certificates name several")
        self._user, self._keeper, self._supply, self._watch = user, keeper, supply, watch
        self._keys = keys
        # Predictions that were dealt ahead under grants, and are not used yet.
        self._dealt: dict[int, KeyRequest] = {}
        self._models: list[KnownModel] = []
        self._plans: dict[PlanKey, list[Request]] = {}
        self._dealer = TrustedDealer()
        self._dealer.seed_parties(keeper, user)
        runner.warm_recorder()

    def serve(self) -> None:
        """Answer the user's requests until the session ends."""
        while True:
            self._step("wait")
            message = self._user.recv("request", timeout_s=None)
            task = message.meta.get("task")
            if task == "load":
                self._load()
            elif task == "prepare":
                self._prepare(message.meta)
            elif task == "use":
                self._use(int(message.meta["prediction"]))
            else:
                raise ProtocolAbort(f"the authority loads, prepares or allows; the user asked for {task!r}")

    def _step(self, step: str) -> None:
        self._watch.step = self._user.step = self._keeper.step = step

    def _load(self) -> None:
        self._step("load")
        meta = self._keeper.recv("model").meta
        manifest = None if meta["manifest"] is None else Manifest.from_json(str(meta["manifest"]))
        program = Program.from_json(str(meta["program"]))
        masks = self._dealer.masks(int(meta["model"]), program)
        backend.find(str(meta["protocol"])).pack_weights(program, masks)
        self._models.append(KnownModel(program, manifest, int(meta["comparison_bits"]), masks))
        self._user.send("loaded")

    def _prepare(self, meta: Mapping[str, Any]) -> None:
        prediction, number = int(meta["prediction"]), int(meta["model"])
        protocol, batch = str(meta["protocol"]), int(meta["batch"])
        self._step(f"prediction {prediction}: correlations")
        model = self._models[number]
        try:
            secrets = self._grant(model, meta)
        except InputError as error:
            self._user.refuse(error)
            return
        self._user.send("granted", {"prediction": prediction})
        key = (number, protocol, batch)
        packed = None
        if key not in self._plans:
            self._plans[key] = runner.requests(Plan(model.program, protocol, batch, model.gated, model.comparison_bits))
            packed = pack(self._plans[key])
        for link in self._supply:
            link.send("deal", Deal(prediction, key, packed).to_json())
        dealt = self._dealer.deal(prediction, self._plans[key], Dealing(secrets, model.masks))
        send_corrections(*self._supply, prediction, self._plans[key], dealt)

    def _grant(self, model: KnownModel, meta: Mapping[str, Any]) -> Secrets | None:
        """Return what the dealer needs of the keys asked for, once they may be used or, ahead, could be."""
        if model.manifest is None or not model.gated:
            return None
        asked = KeyRequest(
            # From the certificate: what the message says, anybody could say.
            self._user.user,
            model.manifest.model_id,
            tuple(str(task) for task in meta["keys"]),
            int(meta["batch"]),
            int(meta["prediction"]),
        )
        secrets = self._secrets(model, model.manifest, self._keys.find(asked))
        if self._keys.needs_grants:
            use = bool(meta["use"])
            self._keys.permit(asked, use=use)
            if use:
                self._keeper.send("allowed", {"prediction": asked.prediction})
            else:
                self._dealt[asked.prediction] = asked
        return secrets

    def _use(self, prediction: int) -> None:
        """Decide again on a prediction that was dealt ahead: its grant may be gone."""
        self._step(f"prediction {prediction}: grants")
        asked = self._dealt.get(prediction)
        if asked is None:
            raise ProtocolAbort(f"a prediction must be dealt before it is used, and used once; {prediction} is not")
        # They are used in their order: those before were thrown away.
        self._dealt = {number: other for number, other in self._dealt.items() if number > prediction}
        try:
            self._keys.permit(asked, use=True)
        except InputError as error:
            self._user.refuse(error)
            return
        self._keeper.send("allowed", {"prediction": prediction})
        self._user.send("granted", {"prediction": prediction})

    def _secrets(self, model: KnownModel, manifest: Manifest, keys: Sequence[TriggerKey]) -> Secrets:
        granted = {key.task for key in keys}
        shape = next(iter(model.program.inputs.values()))
        for key in keys:
            if key.mask.shape != shape:
                raise KeyRefused(
                    f"the key of task {key.task!r} must fit inputs of shape {shape}; it is made for {key.mask.shape}"
                )
        mask = torch.zeros(shape, dtype=torch.int64)
        pattern = torch.zeros(shape, dtype=torch.int64)
        for key in keys:
            m = torch.from_numpy(np.asarray(key.mask).astype(np.int64))
            if bool((mask & m).any()):
                raise KeyRefused("the keys of one request must have disjoint masks; two of them overlap")
            mask |= m
            pattern += m * ring.encode(key.pattern, what=f"the pattern of task {key.task!r}")
        return Secrets(
            mask,
            pattern,
            {task.name: manifest.opening(task.name, granted) for task in manifest.tasks},
            {name: partial(_noise, AnswerStats.from_dict(raw)) for name, raw in manifest.answers.items()},
        )


def _noise(stats: AnswerStats, n: int) -> Tensor:
    return ring.encode(draw_answers(stats, n, Stream()), what="an answer")


def read_keys(paths: Sequence[str], passphrase: str | None) -> list[TriggerKey]:
    """Return the keys of files, and of all `*.key` files of folders."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise KeyRefused(f"a key file or folder must exist; {path.name!r} does not")
        files += sorted(path.glob("*.key")) if path.is_dir() else [path]
    return [load_key(file, passphrase) for file in files]


def _distributor(settings: Mapping[str, Any]) -> KeyDistributor:
    keys = read_keys(settings["keys"], settings["passphrase"])
    if settings["grants"] is None:
        return KeyDistributor(keys)
    ledger = Ledger(settings["grants"])
    if not ledger.path.exists():
        raise InputError(f"a grants file must exist; {ledger.path.name!r} does not: see securemtk keys grant")
    # Both are read here, so that what is wrong with them is told before anything runs.
    ledger.grants()
    ledger.used()
    return KeyDistributor(keys, ledger)


# --- a role as a process --------------------------------------------------------------------------------------------


def _connect(role: str, settings: Mapping[str, Any], say: Say, hear: Hear) -> Links:
    """Open this role's connections: (peer, purpose) -> link."""
    credentials = Credentials.from_json(settings["credentials"])
    timeout_s, start_s = float(settings["timeout_s"]), float(settings["start_timeout_s"])
    listener = Listener(credentials, settings["host"], int(settings["port"]), timeout_s)
    say({"address": listener.address})
    links: Links = {}
    try:
        expected = [(USER_ROLE, purpose) for purpose in PURPOSES[role, USER_ROLE]]
        if role == AUTHORITY_ROLE:
            keeper = (settings["host"], int(hear()["keeper_port"]))
            for purpose in PURPOSES[KEEPER_ROLE, AUTHORITY_ROLE]:
                links[KEEPER_ROLE, purpose] = connect(
                    credentials, keeper, KEEPER_ROLE, purpose, timeout_s, opening_s=start_s
                )
        else:
            expected += [(AUTHORITY_ROLE, purpose) for purpose in PURPOSES[role, AUTHORITY_ROLE]]
        return links | listener.accept(expected, start_s)
    finally:
        listener.close()


def serve(settings: Mapping[str, Any], say: Say, hear: Hear) -> int:
    """Be a role until the user leaves.

    Args:
        settings: role, addresses, credentials and limits, as `Session` writes them.
        say: tells the starter where this role listens.
        hear: returns what the starter says later.

    Returns:
        The process's exit status.
    """
    role = str(settings["role"])
    torch.set_num_threads(int(settings["threads"]))
    backend.find(str(settings["protocol"])).warm()
    distributor = _distributor(settings) if role == AUTHORITY_ROLE else None
    links = _connect(role, settings, say, hear)
    guarded, watched, pulses = sort_links(links)
    end = end_timer()
    silence_s = float(settings["timeout_s"])
    watch = Watch(role, watched, guarded, lambda error: end.start(), silence_s=silence_s, pulses=pulses)
    watch.start()
    # What is here now stays: looking for garbage among all of torch's objects takes longer than a small prediction.
    gc.freeze()
    keeper: Keeper | None = None
    user = links[USER_ROLE, "data"]
    try:
        if role == KEEPER_ROLE:
            authority = {purpose: links[AUTHORITY_ROLE, purpose] for purpose in ("data", "supply")}
            stored = (settings["store"], settings["slots"])
            keeper = Keeper(user, authority["data"], authority["supply"], watch, *stored, bool(settings["guarded"]))
            try:
                keeper.serve()
            finally:
                if settings["store"] is not None:
                    end.cancel()  # what is stored shall go, however long that, and to part from the others, takes
        elif distributor is not None:
            supply = (links[KEEPER_ROLE, "supply"], links[USER_ROLE, "supply"])
            Authority(user, links[KEEPER_ROLE, "data"], supply, watch, distributor).serve()
    except PeerLost:
        watch.abort(watch.failure or ProtocolAbort("a peer is gone"))
        return 0
    except SecureError as error:
        watch.abort(error)
        return 5
    except Exception as error:
        watch.abort(ProtocolAbort(f"internal error: {place_of(error)}"))
        return 5
    finally:
        if keeper is not None:
            keeper.close()
        for link in guarded:
            link.close()
    return 0


if __name__ == "__main__":
    # Nothing is left to save: do not wait for the interpreter to take torch apart.
    os._exit(run(serve, sys.stdin, sys.stdout))
