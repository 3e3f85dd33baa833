"""The authority: holds the trigger-keys, decides who may use which, and deals correlations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocols.dealing.correlation import Dealing, Request, Secrets
from protocols.dealing.dealer import TrustedDealer, pack, send_corrections
from protocols.dealing.pool import Deal, PlanKey
from protocols.errors import InputError, KeyRefused, PeerRefused, ProtocolAbort
from protocols.net.link import Link
from protocols.primitives import ring
from protocols.primitives.prg import Stream
from protocols.program.program import Program
from protocols.running import backend, runner
from protocols.running.runner import Plan
from securemtk.mtk.keys.answers import AnswerStats, draw_answers
from securemtk.mtk.keys.distributor import KeyDistributor
from securemtk.mtk.keys.grants import KeyRequest
from securemtk.mtk.keys.key import TriggerKey
from securemtk.onnx.manifest import Manifest
from securemtk.serving.steps import Steps


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

    def __init__(self, user: Link, keeper: Link, supply: tuple[Link, Link], watch: Steps, keys: KeyDistributor) -> None:
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
        gated = self._models[-1].gated
        self._user.send("loaded", {"needs_grant": gated and self._keys.needs_grants})

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
