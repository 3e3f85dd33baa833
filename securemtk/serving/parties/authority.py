"""The authority: holds the trigger-keys, decides who may use which, and deals correlations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from protocols.dealing.correlation import Dealing, Request, Secrets
from protocols.dealing.dealer import TrustedDealer, send_corrections
from protocols.dealing.messages import Deal, pack
from protocols.dealing.pool import PlanKey
from protocols.errors import InputError, IntegrityError, KeyRefused, PeerRefused, ProtocolAbort
from protocols.net.frames import Message
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
from securemtk.serving.messages import Allowed, AskKnown, Granted, Known, Prepare, PublicModel, Use
from securemtk.serving.parties.steps import Steps


@dataclass
class KnownModel:
    """What the authority knows of a model: its public parts."""

    program: Program
    manifest: Manifest | None
    protocol: str
    comparison_bits: int
    masks: Mapping[str, Tensor] = field(repr=False)

    def plan(self, batch: int) -> Plan:
        """Return what is run for a batch."""
        return Plan(self.program, self.protocol, batch, self.gated, self.comparison_bits)

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
            message: Message = self._user.hear(AskKnown, Prepare, Use, timeout_s=None).message
            match message:
                case AskKnown():
                    self._load()
                case Prepare():
                    self._prepare(message)
                case Use():
                    self._use(message.prediction)

    def _step(self, step: str) -> None:
        self._watch.step = self._user.step = self._keeper.step = step

    def _load(self) -> None:
        self._step("load")
        public = self._keeper.hear(PublicModel).message
        if public.model != len(self._models):
            raise IntegrityError(f"the keeper must number its models as they come; got {public.model}")
        program, manifest = public.read_program(), public.read_manifest()
        masks = self._dealer.masks(public.model, program)
        backend.find(public.protocol).pack_weights(program, masks)
        model = KnownModel(program, manifest, public.protocol, public.comparison_bits, masks)
        self._models.append(model)
        self._user.say(Known(model.gated and self._keys.needs_grant))

    def _prepare(self, order: Prepare) -> None:
        self._step(f"prediction {order.prediction}: correlations")
        if order.model >= len(self._models):
            raise IntegrityError(f"the user must ask for a model that is loaded; {order.model} is not")
        model = self._models[order.model]
        try:
            secrets = self._grant(model, order)
        except InputError as error:
            self._user.refuse(error)
            return
        self._user.say(Granted(order.prediction))
        key = (order.model, order.batch)
        packed = None
        if key not in self._plans:
            self._plans[key] = runner.requests(model.plan(order.batch))
            packed = pack(self._plans[key])
        for link in self._supply:
            link.say(Deal(order.prediction, key, packed))
        dealt = self._dealer.deal(order.prediction, self._plans[key], Dealing(secrets, model.masks))
        send_corrections(*self._supply, order.prediction, self._plans[key], dealt)

    def _grant(self, model: KnownModel, order: Prepare) -> Secrets | None:
        """Return what the dealer needs of the keys asked for, once they may be used or, ahead, could be."""
        if model.manifest is None or not model.gated:
            return None
        # The user from the certificate: what the message says, anybody could say.
        asked = KeyRequest(self._user.user, model.manifest.model_id, order.open_tasks, order.batch, order.prediction)
        secrets = self._secrets(model, model.manifest, self._keys.find(asked))
        if self._keys.needs_grant:
            self._keys.permit(asked, use=order.use)
            if order.use:
                self._keeper.say(Allowed(asked.prediction))
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
        self._keeper.say(Allowed(prediction))
        self._user.say(Granted(prediction))

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
