"""The keeper: holds models, computes as party 0, and learns nothing of inputs, keys and outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocols.dealing.correlation import KEEPER
from protocols.dealing.dealer import receive_seed, weight_masks
from protocols.dealing.pool import CorrelationPool
from protocols.dealing.store import SealedStore
from protocols.errors import (
    InputError,
    IntegrityError,
    NeedsInputs,
    SecureError,
    UnsupportedError,
    place_of,
)
from protocols.net.frames import Heard, Message
from protocols.net.link import Link
from protocols.net.wire import TensorWire
from protocols.on_demand import Late
from protocols.primitives.prg import SEED_BYTES, Stream, fresh_seed
from protocols.program.program import Program
from protocols.running import backend, ranges, runner
from protocols.running.runner import Plan, Probe
from protocols.two_party.party import Party
from securemtk.onnx.manifest import Manifest
from securemtk.onnx.model.inputs import KnownInputs
from securemtk.serving.config import KEEPER_ROLE
from securemtk.serving.messages import Allowed, Declared, Drop, Load, NeedsMore, Predict, PublicModel, Ready
from securemtk.serving.parties.model_store import LocalModels, ModelStore
from securemtk.serving.parties.steps import Steps
from securemtk.support.cores import own_cores

# What models are read with: large, and not needed before there is one to read.
importer = Late("securemtk.onnx.importer")


@dataclass
class KeptModel:
    """A model as the keeper holds it."""

    program: Program
    manifest: Manifest | None
    protocol: str
    comparison_bits: int
    weights: Mapping[str, Tensor] = field(repr=False)

    @property
    def gated(self) -> bool:
        """Whether any task is secured."""
        return self.manifest is not None and any(task.secured for task in self.manifest.tasks)

    def plan(self, batch: int) -> Plan:
        """Return what is run for a batch."""
        return Plan(self.program, self.protocol, batch, self.gated, self.comparison_bits)


class Keeper:
    """Holds models, computes as party 0, and learns nothing of inputs, keys and outputs.

    Args:
        user, authority: links to the other roles.
        supply: link to the authority on which correlations come.
        watch: told each step, and what fails in the background.
        models: what it may serve; None for every file that it can read.
        store: folder for correlations that wait, or None.
        slots: predictions whose shares wait in memory where there is a store.
        needs_grant: whether the authority has grants: then it must say for each prediction of a model with secured
            tasks that it may run, whatever was dealt before.
    """

    def __init__(
        self,
        user: Link,
        authority: Link,
        supply: Link,
        watch: Steps,
        *,
        models: ModelStore | None = None,
        store: str | None = None,
        slots: int = 1,
        needs_grant: bool = False,
    ) -> None:
        self._user, self._authority, self._watch = user, authority, watch
        self._stored = LocalModels() if models is None else models
        self._needs_grant = needs_grant
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
            heard: Heard[Message] = self._user.hear(Load, Predict, Drop, timeout_s=None)
            match heard.message:
                case Load():
                    self._load(heard.message, heard.arrays)
                case Predict():
                    self._predict(heard.message)
                case Drop():
                    self._pool.drop(heard.message.prediction)

    def close(self) -> None:
        """End the thread that receives correlations."""
        self._pool.close()

    def _step(self, step: str) -> None:
        self._watch.step = self._user.step = self._authority.step = step

    def _load(self, request: Load, arrays: Sequence[np.ndarray]) -> None:
        self._step("load")
        if len(arrays) != request.n_arrays:
            raise IntegrityError(f"the user must send {request.n_arrays} arrays to load this; got {len(arrays)}")
        try:
            manifest, imported = self._read(request, arrays)
            ops = backend.find(request.protocol)
            weights = ops.share_weights(imported.program, imported.params, request.comparison_bits)
            ops.pack_weights(imported.program, weights)
        except NeedsInputs as error:
            self._user.say(NeedsMore(str(error), error.shapes, error.public))
            return
        except SecureError as error:
            self._user.refuse(error)
            return
        except Exception as error:
            # Of one file, whatever it is: the other models live on. Its text may hold a weight, so that it stays here.
            why = f"the model must be one that can be loaded; the keeper's process met {place_of(error)}"
            self._user.refuse(UnsupportedError(why))
            return
        program: Program = imported.program
        model = KeptModel(program, manifest, request.protocol, request.comparison_bits, weights)
        number = len(self._models)
        self._models.append(model)
        public = PublicModel(
            number,
            request.protocol,
            request.comparison_bits,
            program.to_json(),
            None if manifest is None else manifest.to_json(),
            Declared.of(imported.inputs),
            Declared.of(imported.outputs),
        )
        self._authority.say(public)
        self._user.say(public)
        masks = weight_masks(self._seed, number, program)
        names = ops.masked_names(program)
        self._user.send("weights", None, [(weights[name] - masks[name]).numpy() for name in names])

    def _read(self, request: Load, arrays: Sequence[np.ndarray]) -> tuple[Manifest | None, Any]:
        """Return the model that is asked for, understood with what is told of its inputs."""
        n_files = len(arrays) - len(request.public)
        name, models = request.model, self._stored
        manifest, data = models.accept(arrays[0].tobytes()) if name is None else models.get(name)
        known = KnownInputs.unpack(request.shapes, request.public, arrays[n_files:])
        if manifest is not None and known.given:
            raise InputError("a bundle says all that is to be known of its inputs; shapes and public must be absent")
        if manifest is not None and manifest.headroom is not None:
            ranges.require(manifest.headroom, ranges.steps_of(request.protocol), request.comparison_bits)
        imported = importer.load_onnx(data, known.shapes, known.public)
        ranges.require_width(imported.program, request.protocol, request.comparison_bits)
        return manifest, imported

    def _predict(self, request: Predict) -> None:
        prediction = request.prediction
        if request.model >= len(self._models):
            raise IntegrityError(f"the user must ask for a model that is loaded; {request.model} is not")
        model = self._models[request.model]
        self._step(f"prediction {prediction}: correlations")
        if self._needs_grant and model.gated:
            # Also where no key is used: nothing here depends on which tasks are open.
            allowed = self._authority.hear(Allowed).message.prediction
            if allowed != prediction:
                raise IntegrityError(f"the authority must allow prediction {prediction}; it allowed {allowed}")
        ready = self._pool.take(prediction, (request.model, request.batch))
        party = Party(
            KEEPER, TensorWire(self._user), ready.shares, *_zero_streams(self._zero_seeds, prediction), Stream()
        )
        probe = Probe(enter=lambda layer: self._step(f"prediction {prediction}: {layer}"))
        self._user.say(Ready(prediction, ready.bytes))
        self._user.enter("online")
        with own_cores(True, torch.get_num_threads()):
            runner.run(party, model.plan(request.batch), model.weights, dict.fromkeys(model.program.inputs), probe)
        self._user.enter("offline")
        self._pool.rest()


def _zero_streams(seeds: tuple[bytes, bytes], prediction: int) -> tuple[Stream, Stream]:
    previous, following = (Stream(seed).derive(f"prediction {prediction}") for seed in seeds)
    return previous, following
