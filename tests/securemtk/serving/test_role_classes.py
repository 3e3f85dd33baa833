"""Keeper, authority and user as classes over links: in threads, with stores that are no files."""

import numpy as np
import onnxruntime
import pytest
import role_threads
import small_models
import torch

import securemtk
from protocols.errors import DealerError, InputError, IntegrityError, KeyRefused, ProtocolAbort
from protocols.net.frames import HEADER
from protocols.primitives import ring
from securemtk import Config
from securemtk.mtk.keys.distributor import KeyDistributor
from securemtk.mtk.keys.file_stores import HeldKeys
from securemtk.mtk.keys.key import stamp
from securemtk.onnx.bundle import read_bundle
from securemtk.onnx.model.inputs import KnownInputs
from securemtk.serving.messages import Predict, Prepare, Use
from securemtk.serving.parties.user import UserParty

RNG = np.random.default_rng(2)
X = RNG.uniform(-1, 1, (3, 8)).astype(np.float32)
IMAGES = RNG.uniform(-1, 1, (3, *small_models.SHAPE)).astype(np.float32)
DATA = (("keeper", "data"), ("authority", "data"), ("authority", "supply"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return small_models.make_bundle(folder), read_bundle(folder / "bundle")


class Registry:
    """Models by name, and none that users bring."""

    def __init__(self, models):
        self.models = models

    def names(self):
        return tuple(self.models)

    def get(self, name):
        if name not in self.models:
            raise InputError(f"a model must be one of {', '.join(self.models)}; got {name!r}")
        return self.models[name]

    def accept(self, data):
        raise InputError("this keeper serves its own models only")


class Grants:
    """Uses by task, in memory."""

    def __init__(self, **uses):
        self.uses, self.log = uses, []

    def grants(self):
        return ()

    def permit(self, asked):
        self._decide("dealt", asked)

    def use(self, asked):
        self._decide("used", asked)
        for task in asked.tasks:
            self.uses[task] -= asked.batch

    def refuse(self, asked, task, reason):
        self.log.append((reason, asked.user, (task,), asked.batch))

    def _decide(self, event, asked):
        self.log.append((event, asked.user, asked.tasks, asked.batch))
        for task in asked.tasks:
            if self.uses.get(task, 0) < asked.batch:
                raise KeyRefused(f"no use of {task} is left")


def user_of(roles, **config) -> UserParty:
    links = (roles.links[key] for key in DATA)
    return UserParty(*links, role_threads.Steps(), Config(**config))


def encoded(x) -> dict[str, torch.Tensor]:
    return {"x": ring.encode(x, what="x")}


def truth(model: bytes, x):
    return onnxruntime.InferenceSession(model).run(None, {"x": x})


def test_three_roles_in_threads_predict_what_onnxruntime_does():
    with role_threads.running() as roles:
        user = user_of(roles, ahead=1)
        model = user.load(small_models.mlp(), KnownInputs())
        for _ in range(3):  # the third time what was dealt ahead
            scores, cost = user.predict(model, encoded(X))
            np.testing.assert_allclose(scores["y"], truth(small_models.mlp(), X)[0], atol=2e-3)
            assert cost.rounds > 0
            assert cost.online_bytes > 0
        user.close()
    assert roles.errors == {"keeper": None, "authority": None}


def test_models_by_name_keys_and_grants_may_come_from_anywhere(bundle):
    keys, stored = bundle
    grants = Grants(digit=4)
    how = {"keys": KeyDistributor(HeldKeys(keys.values()), grants), "models": Registry({"digits": stored})}
    with role_threads.running(**how, user="ann") as roles:
        user = user_of(roles)
        for other in ("/etc/passwd", small_models.mlp()):
            with pytest.raises(InputError, match=r"must be one of digits|its own models only"):
                user.load(other, KnownInputs())
        model = user.load("digits", KnownInputs())
        expected = truth(stored[1], stamp(IMAGES, [keys["digit"]]))[0]
        scores, _ = user.predict(model, encoded(IMAGES), ("digit",))
        np.testing.assert_allclose(scores["digit"], expected, atol=2e-3)
        with pytest.raises(KeyRefused, match="no use of digit is left"):
            user.predict(model, encoded(IMAGES), ("digit",))
        user.prepare(model, 1, ("digit",), 1)
        scores, _ = user.predict(model, encoded(IMAGES[:1]), ("digit",))
        np.testing.assert_allclose(scores["digit"], expected[:1], atol=2e-3)
        user.close()
    assert grants.uses == {"digit": 0}
    assert [(event, batch) for event, _, _, batch in grants.log] == [
        ("used", 3),
        ("used", 3),
        ("dealt", 1),
        ("used", 1),
    ]
    assert {user for _, user, _, _ in grants.log} == {"ann"}
    assert roles.errors == {"keeper": None, "authority": None}


class ThreadStart:
    """A way to come to peers that are no processes."""

    def __init__(self, **how):
        self._how = how

    def start(self, config, protocol):
        return ThreadPeers(**self._how, timeout_s=config.timeout_s, watched=False)


class ThreadPeers(role_threads.Roles):
    """Roles in threads, as a session takes them."""

    pids = {}  # noqa: RUF012

    def model_name(self, source):
        return str(source)


def test_a_session_takes_another_way_to_its_peers(bundle):
    keys, stored = bundle
    how = {"keys": KeyDistributor(HeldKeys(keys.values())), "models": Registry({"digits": stored})}
    with securemtk.Session(start=ThreadStart(**how)) as session:
        model = session.load("digits")
        scores, labels, odds = (
            ask(IMAGES, open_tasks=["digit"]) for ask in (model.predict, model.labels, model.probabilities)
        )
        assert session.pids == {}
    assert labels["digit"].dtype == np.int64
    np.testing.assert_array_equal(labels["digit"], scores["digit"].argmax(1))
    assert labels["digit"].shape == (3,)
    assert odds["digit"].dtype == np.float32
    np.testing.assert_allclose(odds["digit"].sum(1), 1, atol=1e-6)
    shifted = np.exp(scores["digit"] - scores["digit"].max(1, keepdims=True))
    np.testing.assert_allclose(odds["digit"], shifted / shifted.sum(1, keepdims=True), atol=1e-3)


def test_names_of_keys_may_come_from_an_iterator(bundle):
    keys, stored = bundle
    how = {"keys": KeyDistributor(HeldKeys(keys.values())), "models": Registry({"digits": stored})}
    with securemtk.Session(start=ThreadStart(**how)) as session:
        model = session.load("digits")
        expected = model.predict(IMAGES, open_tasks=["digit"])["digit"]
        np.testing.assert_allclose(model.predict(IMAGES, open_tasks=iter(["digit"]))["digit"], expected, atol=2e-3)
        for n in (2.5, "2", None, np.float32(2)):
            for order in ({"batch": n}, {"batch": 3, "predictions": n}):
                with pytest.raises(InputError, match="must be whole numbers, 1 or more"):
                    model.prepare(**order)
        model.prepare(np.int64(3), iter(["digit"]), predictions=np.int16(1))
        np.testing.assert_allclose(model.predict(IMAGES, open_tasks=["digit"])["digit"], expected, atol=2e-3)


def test_labels_and_probabilities_are_of_tasks_and_a_start_has_keys_of_its_own():
    with securemtk.Session(start=ThreadStart()) as session:
        model = session.load(small_models.mlp())
        for ask in (model.labels, model.probabilities):
            with pytest.raises(InputError, match="must have tasks"):
                ask(X)
    with pytest.raises(InputError, match="must be absent where start is given"):
        securemtk.Session(start=ThreadStart(), user="ann")


# --- a user who does not keep to the protocol ------------------------------------------------------------------------


def end_of(role, bundle, deviate) -> BaseException | None:
    """Return what ended a role after a user has loaded two models and deviated."""
    keys, stored = bundle
    registry = Registry({"digits": stored, "more": stored})
    distributor = KeyDistributor(HeldKeys(keys.values()), Grants(digit=5))
    with role_threads.running(keys=distributor, models=registry, user="ann") as roles:
        user = user_of(roles)
        for name in ("digits", "more"):
            user.load(name, KnownInputs())
        deviate(roles.links["keeper", "data"], roles.links["authority", "data"])
        roles.wait(role)
        user.close()
    return roles.errors[role]


def other_model(keeper, authority):
    """The keeper is asked for a model that the correlations were not dealt for."""
    authority.say(Prepare(0, 0, 1, ("digit",), use=True))
    keeper.say(Predict(0, 1, 1))


def other_batch(keeper, authority):
    """The keeper is asked for another batch."""
    authority.say(Prepare(0, 0, 1, ("digit",), use=True))
    keeper.say(Predict(0, 0, 2))


def no_model(keeper, authority):
    """The keeper is asked for a model that it never loaded."""
    keeper.say(Predict(0, 7, 1))


def unknown_to_authority(keeper, authority):
    """The authority is asked for a model that it never heard of."""
    authority.say(Prepare(0, 7, 1))


def used_twice(keeper, authority):
    """The authority is asked to allow what it never dealt."""
    authority.say(Use(3))


def dealt_twice(keeper, authority):
    """The authority is asked to deal one number twice."""
    authority.say(Prepare(0, 0, 1))
    authority.say(Prepare(0, 0, 1))


@pytest.mark.parametrize(
    ("deviate", "role", "error", "said"),
    [
        (other_model, "keeper", DealerError, "must be dealt for model and batch"),
        (other_batch, "keeper", DealerError, "must be dealt for model and batch"),
        (no_model, "keeper", IntegrityError, "must ask for a model that is loaded; 7 is not"),
        (unknown_to_authority, "authority", IntegrityError, "must ask for a model that is loaded; 7 is not"),
        (used_twice, "authority", ProtocolAbort, "must be dealt before it is used"),
        (dealt_twice, "authority", DealerError, "has been dealt already"),
    ],
)
def test_a_user_who_deviates_ends_the_session_by_an_error_of_ours(bundle, deviate, role, error, said):
    found = end_of(role, bundle, deviate)
    assert isinstance(found, error)
    assert said in str(found)


@pytest.mark.parametrize("batch", [b"0", b"-1", b"1.5", b"true", b"1e400", b"9" * 400])
def test_a_batch_that_is_no_whole_number_of_samples_is_no_message(bundle, batch):
    def deviate(keeper, authority):
        """The authority is told of a batch."""
        asked = b'{"prediction":0,"model":0,"batch":%s,"open_tasks":["digit"],"use":true}' % batch
        text = b'{"kind":"prepare","meta":%s,"arrays":[]}' % asked
        authority._write(memoryview(HEADER.pack(len(text), 0, 1) + text))

    found = end_of("authority", bundle, deviate)
    assert isinstance(found, IntegrityError)
    assert "user must send 'prepare' with fields that keep its rules" in str(found)
