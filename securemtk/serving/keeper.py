"""The keeper: holds models, computes as party 0, and learns nothing of inputs, keys and outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocols import limits
from protocols.dealing.correlation import KEEPER
from protocols.dealing.dealer import receive_seed, weight_masks
from protocols.dealing.pool import CorrelationPool
from protocols.dealing.store import SealedStore
from protocols.errors import (
    InputError,
    IntegrityError,
    NeedsInputs,
    ProtocolAbort,
    SecureError,
    UnsupportedError,
    place_of,
)
from protocols.net.link import Link
from protocols.net.wire import TensorWire
from protocols.on_demand import Late
from protocols.primitives.prg import SEED_BYTES, Stream, fresh_seed
from protocols.program.program import Program
from protocols.running import backend, ranges, runner
from protocols.running.runner import Plan, Probe
from protocols.two_party.party import Party
from securemtk.onnx.model.graph import ValueInfo
from securemtk.onnx.model.inputs import KnownInputs
from securemtk.serving.config import KEEPER_ROLE
from securemtk.serving.steps import Steps
from securemtk.support.cores import own_cores

# What models are read with: large, and not needed before there is one to read.
bundle, importer = Late("securemtk.onnx.bundle"), Late("securemtk.onnx.importer")


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
        watch: told each step, and what fails in the background.
        store: folder for correlations that wait, or None.
        slots: hands that wait in memory where there is a store.
        needs_grant: whether the authority has grants: then it must say for each prediction of a model with secured
            tasks that it may run, whatever was dealt before.
    """

    def __init__(
        self,
        user: Link,
        authority: Link,
        supply: Link,
        watch: Steps,
        store: str | None = None,
        slots: int = 1,
        needs_grant: bool = False,
    ) -> None:
        self._user, self._authority, self._watch = user, authority, watch
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
            manifest, data = bundle.read_model(str(meta["path"])) if "path" in meta else (None, arrays[0].tobytes())
            known = KnownInputs.from_message(meta, arrays)
            if manifest is not None and known.given:
                raise InputError(
                    "a bundle says all that is to be known of its inputs; shapes and public must be absent"
                )
            if manifest is not None and manifest.headroom is not None:
                ranges.require(manifest.headroom, ranges.steps_of(str(meta["protocol"])), bits)
            imported = importer.load_onnx(data, known.shapes, known.public)
            program: Program = imported.program
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
        if self._needs_grant and model.gated:
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
