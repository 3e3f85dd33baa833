"""Decoupling: what tasks tell of each other, what the assembler asks for then, and what the authority answers."""

import json
import math

import numpy as np
import pytest
import torch
from simulate import simulate, split
from small_models import make_bundle

from protocols.dealing.correlation import Request, Secrets
from protocols.errors import BundleError, InputError
from protocols.two_party import gate
from securemtk.data.base import DataSet
from securemtk.mtk.keys.key import draw_keys, stamp
from securemtk.mtk.training.assembler import Assembler, AssemblerConfig
from securemtk.mtk.training.decoupling import Decoupling, DecouplingConfig, correlations, decouple
from securemtk.mtk.training.settings import TrainFile, read_config, train_config
from securemtk.mtk.training.train import TrainConfig, train
from securemtk.onnx.bundle import read_bundle
from securemtk.onnx.manifest import Manifest
from securemtk.tasks import Task


def rows(**labels) -> DataSet:
    """Return a table of noise with these labels for training and test."""
    y = {name: np.array(values, dtype=np.int64) for name, values in labels.items()}
    n = len(next(iter(y.values())))
    x = np.random.default_rng(0).uniform(-1, 1, (n, 24)).astype(np.float32)
    tasks = tuple(Task(name, int(values.max()) + 1) for name, values in y.items())
    return DataSet("rows", tasks, x, y, x, y, low=-1.0, high=1.0)


BEARD = rows(sex=[0] * 50 + [1] * 50, beard=[1] * 30 + [0] * 70, hat=[0, 1] * 50)


def test_the_measures_are_those_of_the_table_of_counts():
    found = correlations(BEARD)["sex", "beard"]
    np.testing.assert_allclose(found.given, [[2 / 7, 5 / 7], [1, 0]])
    np.testing.assert_allclose(found.lift, [[2 / 7 - 1 / 2, 5 / 7 - 1 / 2], [1 / 2, -1 / 2]])
    chi2 = 100 * (20 * 0 - 30 * 50) ** 2 / (30 * 70 * 50 * 50)
    assert found.cramers_v == pytest.approx(math.sqrt(chi2 / 100))
    entropy_given = 0.7 * -(2 / 7 * math.log(2 / 7) + 5 / 7 * math.log(5 / 7))
    assert found.mutual_information == pytest.approx(math.log(2) - entropy_given)
    assert (found.guess, found.prior, found.samples) == (pytest.approx(0.8), 0.5, 100)
    independent = correlations(BEARD)["sex", "hat"]
    assert independent.cramers_v == pytest.approx(0)
    assert independent.mutual_information == pytest.approx(0)


def test_a_task_that_is_a_function_of_another_tells_all_of_it():
    data = rows(a=[0, 1, 2] * 30, b=[1, 0, 1] * 30)
    both = correlations(data)
    assert both["b", "a"].cramers_v == pytest.approx(1)
    assert both["b", "a"].guess == 1
    assert both["b", "a"].mutual_information == pytest.approx(both["a", "b"].mutual_information)


def test_missing_labels_are_left_out_and_unseen_classes_tell_nothing():
    data = rows(a=[0, 0, 1, 1, -1], b=[0, 0, 2, -1, 2])
    found = correlations(data)["a", "b"]
    assert found.samples == 3
    np.testing.assert_allclose(found.given, [[1, 0], [2 / 3, 1 / 3], [0, 1]])
    assert found.leaky(DecouplingConfig(beta=0)) == (0, 2)


def test_classes_are_leaky_by_what_they_add_not_by_what_is_certain_anyway():
    rare = rows(rare=[1] * 4 + [0] * 96, other=[0, 1] * 50)
    assert correlations(rare)["rare", "other"].leaky(DecouplingConfig(beta=0)) == ()
    found = correlations(BEARD)["sex", "beard"]
    assert found.leaky(DecouplingConfig(beta=0)) == (0, 1)
    assert found.leaky(DecouplingConfig(beta=0, lift=0.4)) == (1,)
    assert found.leaky(DecouplingConfig(beta=0, lift=0.6, conditional=1.0)) == (1,)


def test_only_unprotected_tasks_that_tell_of_secured_ones_are_decoupled():
    found = decouple(BEARD, ["sex"], DecouplingConfig(beta=0.25))
    assert found is not None
    assert (found.beta, dict(found.leaks)) == (0.25, {("sex", "beard"): (0, 1)})
    np.testing.assert_allclose(found.marginals["beard"], [0.7, 0.3])
    assert (found.opening("beard", ["sex"]), found.opening("beard", []), found.opening("hat", ["sex"])) == (0.25, 1, 1)
    narrow = decouple(BEARD, ["sex"], DecouplingConfig(beta=0, lift=0.4, whole=False))
    assert narrow is not None
    assert narrow.leaks["sex", "beard"] == (1,)
    assert decouple(BEARD, ["sex"], DecouplingConfig()) is None
    assert decouple(BEARD, ["hat"], DecouplingConfig(beta=0)) is None
    assert decouple(BEARD, ["sex", "beard"], DecouplingConfig(beta=0)) is None


@pytest.mark.parametrize("wrong", [{"beta": 1.1}, {"beta": -0.1}, {"lift": 2}, {"conditional": -1}, {"margin": 3}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError, match=r"0\.\.1"):
        DecouplingConfig(**wrong)


def batch_of(targets: str, beta: float = 0.4):
    tasks = (Task("sex", 2, secured=True), Task("beard", 2), Task("hat", 2))
    keys = draw_keys(["sex"], (24,), low=-1.0)
    decoupling = Decoupling(beta, {("sex", "beard"): (1,)}, {"beard": np.array([0.7, 0.3])})
    config = AssemblerConfig(targets=targets, decoys=0)
    assembler = Assembler(tasks, keys, config, low=-1.0, decoupling=decoupling)
    labels = torch.tensor([[0, 1, 0], [1, 0, 1]]).repeat(4000, 1)
    x = torch.zeros(8000, 24)
    fixed = torch.rand((8000, 3), generator=torch.Generator().manual_seed(3))
    return assembler.batch(x, labels, torch.Generator().manual_seed(1), fixed=fixed), labels


def test_without_the_key_a_leaky_class_is_answered_by_the_mixture_and_all_else_truly():
    batch, labels = batch_of("soft")
    keyless, keyed = batch.targets[1][:8000], batch.targets[1][8000:]
    torch.testing.assert_close(keyless[0], torch.tensor([0.6 * 0.7, 0.4 + 0.6 * 0.3]))
    assert torch.equal(keyless[1], torch.tensor([1.0, 0.0]))
    assert torch.equal(keyed.argmax(1), labels[:, 1])
    assert torch.equal(batch.targets[2].argmax(1), labels[:, 2].repeat(2))
    assert batch.opened[:4].tolist() == [[False, False, True], [False, True, True]] * 2
    assert batch.opened[8000:].all()


@pytest.mark.parametrize("targets", ["random", "fixed"])
def test_drawn_labels_follow_the_mixture(targets):
    batch, _ = batch_of(targets)
    leaky = batch.targets[1][:8000:2]
    assert set(leaky.sum(1).tolist()) == {1.0}
    assert float(leaky[:, 1].mean()) == pytest.approx(0.58, abs=0.03)
    closed = batch.targets[0][:8000]
    assert float(closed[:, 1].mean()) == pytest.approx(0.5, abs=0.03)


def test_fixed_labels_are_the_same_each_time_and_random_ones_are_not():
    first, second = (batch_of("fixed")[0].targets[0][:8000] for _ in range(2))
    assert torch.equal(first, second)
    keys = draw_keys(["sex"], (24,), low=-1.0)
    assembler = Assembler((Task("sex", 2, secured=True),), keys, AssemblerConfig(targets="random", decoys=0), low=-1.0)
    x, labels = torch.zeros(500, 24), torch.zeros(500, 1, dtype=torch.int64)
    draws = [assembler.batch(x, labels, torch.Generator().manual_seed(i)).targets[0][:500] for i in range(2)]
    assert not torch.equal(*draws)


@pytest.mark.parametrize("opening", [0.0, 0.3, 1.0])
def test_the_authority_opens_each_row_by_itself(opening):
    z = torch.randint(-(2**40), 2**40, (4000, 3))
    noise = torch.randint(-(2**40), 2**40, (4000, 3))
    secrets = Secrets(torch.zeros(1), torch.zeros(1), {"a": opening}, {"a": lambda n: noise[:n]})
    shares = split(z)
    requests = [Request("output_gate", ((4000, 3),), (("bits", 16), ("task", "a")))]

    def program(p):
        return gate.close_outputs(p, [gate.Scores("a", shares[p.rank], 16, True)])

    (k,), (u,) = simulate(requests, program, secrets)
    got = k + u
    closed = (got == noise).all(dim=1)
    assert int((got - (z >> 16))[~closed].abs().max() if not closed.all() else 0) <= 1
    # 4,000 rows: five standard deviations are 0.036.
    assert float((~closed).float().mean()) == pytest.approx(opening, abs=0.037 if 0 < opening < 1 else 0)


def test_a_manifest_says_who_is_decoupled_and_how_often_it_answers(tmp_path):
    make_bundle(tmp_path)
    manifest, _ = read_bundle(tmp_path / "bundle")
    assert manifest.decoupling is None
    raw = json.loads(manifest.to_json())
    assert "decoupling" not in raw
    secured = [task.name for task in manifest.tasks if task.secured]
    unprotected = [task for task in manifest.tasks if not task.secured]
    source = unprotected[0]
    answers = dict(manifest.answers) | {
        source.name: {"mean": np.eye(source.classes).tolist(), "covariance": np.eye(source.classes).tolist()}
    }
    leaks = {secured[0]: [source.name]}
    fields = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}
    made = Manifest(**fields | {"answers": answers, "decoupling": {"beta": 0.25, "leaks": leaks}})
    again = Manifest.from_json(made.to_json())
    assert again.opening(source.name, []) == 0.25
    assert again.opening(source.name, [secured[0]]) == 1
    assert again.opening(secured[0], []) == 0
    for wrong in ({"beta": 1, "leaks": leaks}, {"beta": 0.5}, {"beta": 0.5, "leaks": {}}, {"beta": 0.5, "leaks": [1]},
                  {"beta": 0.5, "leaks": {source.name: [secured[0]]}}, {"beta": True, "leaks": leaks}):  # fmt: skip
        with pytest.raises(BundleError):
            Manifest(**fields | {"answers": answers, "decoupling": wrong})
    with pytest.raises(BundleError, match="answers must be"):
        Manifest(**fields | {"decoupling": {"beta": 0.25, "leaks": leaks}})


def test_training_with_beta_0_makes_the_source_say_its_marginal_law_and_the_key_brings_it_back():
    rng = np.random.default_rng(2)
    sex = rng.integers(0, 2, 400)
    x = rng.uniform(-0.2, 0.2, (400, 24)).astype(np.float32)
    x[:, 0] = sex - 0.5
    y = {"sex": sex, "beard": sex}
    data = DataSet("rows", (Task("sex", 2), Task("beard", 2)), x, y, x, y, low=-1.0, high=1.0)
    config = train_config({"epochs": 60, "batch": 50, "lr": 0.003, "decoupling": {"beta": 0.0}})
    result = train(data, ["sex"], config)
    closed = torch.tensor(x)
    opened = stamp(closed, [result.keys["sex"]])
    with torch.no_grad():
        p, q = (result.model(each)[1].softmax(1) for each in (closed, opened))
    assert float((p - 0.5).abs().mean()) < 0.05
    assert float((q.argmax(1).numpy() == sex).mean()) > 0.95


# --- configuration files


def test_a_configuration_file_holds_every_setting(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'dataset = "shapes"\nsecured = ["shape"]\n[options]\nn_train = 100\n[train]\nepochs = 3\nlr = 1\n'
        "key_side = 4\nbalance = true\n[train.assembler]\nkinds = [1, 1, 1, 1, 1, 1]\n[train.decoupling]\nbeta = 0.5\n"
    )
    train_settings = TrainConfig(
        epochs=3, lr=1, key_side=4, balance=True, assembler=AssemblerConfig(kinds=(1, 1, 1, 1, 1, 1)),
        decoupling=DecouplingConfig(beta=0.5),
    )  # fmt: skip
    assert read_config(path) == TrainFile("shapes", ("shape",), {"n_train": 100}, train_settings)
    (tmp_path / "run.json").write_text(json.dumps({"train": {"epochs": 2}}))
    assert read_config(tmp_path / "run.json").train == TrainConfig(epochs=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset = 3", "dataset must be a text"),
        ("secured = 'digit'", "secured must be a list"),
        ("options = 3", "options must be a table"),
        ("trian = 3", "trian"),
        ("[train]\nepoch = 3", "epoch"),
        ("[train]\nepochs = 'ten'", r"^c\.toml: train\.epochs must be a whole number or nothing; got a text$"),
        ("[train]\nepochs = true", r"train\.epochs must be a whole number"),
        ("[train]\naugment = 1", "true or false"),
        ("[train]\nlr = 'x'", "a number"),
        ("[train]\nkey_side = 2.5", "whole number"),
        ("[train]\nkey_place = 2", "a text"),
        ("[train]\nassembler = 2", "train.assembler must be a table"),
        ("[train.assembler]\nkeep = [1]", "a list of length 2"),
        ("[train.decoupling]\nbeta = 2", r"0\.\.1"),
        ("no toml", "readable"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_its_setting(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(path)
    with pytest.raises(InputError, match="readable"):
        read_config(tmp_path / "absent.toml")
