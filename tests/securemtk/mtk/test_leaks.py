"""What open tasks tell of closed ones, on laws whose exact optimum is known."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from protocols.errors import InputError, KeyRefused
from protocols.primitives.prg import SEED_BYTES, Stream
from securemtk.data.base import DataSet
from securemtk.mtk.evaluation.leaks import AnswerLeak, answer_leaks, label_leaks
from securemtk.mtk.keys.key import TriggerKey, draw_keys
from securemtk.mtk.training.decoupling import DecouplingConfig, decouple
from securemtk.mtk.training.model import MultiTaskModel
from securemtk.tasks import Task

N = 1000
AGREE = 0.8
STREAM = bytes(SEED_BYTES)


class Read(nn.Module):
    """Answers with the class that a column of the sample says, and with the same certainty for all."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column
        self.loud = nn.Parameter(torch.tensor(6.0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        loud = self.loud * features[:, self.column].sign()
        return torch.stack([-loud, loud], dim=1)


def table(n: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows whose first columns say the labels: `friend` is `secret` in 8 of 10, `other` and `stranger` hang on none."""
    rng = np.random.default_rng(seed)
    secret, other, stranger = rng.integers(0, 2, (3, n))
    friend = np.where(rng.random(n) < AGREE, secret, 1 - secret)
    x = np.zeros((n, 40), dtype=np.float32)
    y = {"secret": secret, "other": other, "friend": friend, "stranger": stranger}
    for column, labels in enumerate(y.values()):
        x[:, column] = np.where(labels, 0.5, -0.5)
    return x, y


def victim(secured=("secret", "other")) -> tuple[MultiTaskModel, DataSet, dict[str, TriggerKey]]:
    x_train, y_train = table(N, 1)
    x_test, y_test = table(N, 2)
    names = list(y_train)
    dataset = DataSet("law", tuple(Task(name, 2) for name in names), x_train, y_train, x_test, y_test, low=-1.0)
    tasks = tuple(Task(name, 2, secured=name in secured) for name in names)
    model = MultiTaskModel(tasks, (40,), trunk=nn.Identity())
    model.branches = nn.ModuleList(Read(column) for column in range(len(names)))
    return model.eval(), dataset, draw_keys(list(secured), (40,), low=-1.0)


def measured(beta, **options) -> tuple[AnswerLeak, ...]:
    model, dataset, keys = victim()
    decoupling = decouple(dataset, list(keys), DecouplingConfig(beta=beta))
    return answer_leaks(model, dataset, keys, decoupling, stream=Stream(STREAM), **options)


@cache
def found(beta=1.0) -> dict[tuple[str, tuple[str, ...], str], AnswerLeak]:
    leaks = measured(beta)
    return {(leak.target, leak.sources, leak.rule): leak for leak in leaks}


@pytest.mark.parametrize("rule", ["label", "scores"])
def test_answers_of_a_task_that_agrees_in_8_of_10_lift_a_guess_to_that(rule):
    leak = found()["secret", ("friend",), rule]
    assert leak.best == pytest.approx(AGREE, abs=4 * math.sqrt(AGREE * (1 - AGREE) / N))
    assert leak.gain == pytest.approx(leak.best - leak.prior)
    assert leak.labels == pytest.approx(leak.best, abs=1e-9)
    assert leak.beyond_labels == pytest.approx(0, abs=1e-9)
    assert (leak.samples, leak.held, dict(leak.opening)) == (N, (), {"friend": 1.0})


@pytest.mark.parametrize("rule", ["label", "scores"])
def test_answers_of_independent_tasks_tell_nothing(rule):
    for target, sources in (("secret", ("stranger",)), ("secret", ("other",)), ("other", ("friend", "stranger"))):
        leak = found()[target, sources, rule]
        # The prior is counted on the test labels themselves, so that most gains are below 0.
        assert -4 * leak.standard_error < leak.gain < 3 * leak.standard_error


def test_each_view_is_taken_once_with_the_keys_that_open_it():
    held = {(target, sources): leak.held for (target, sources, _), leak in found().items()}
    assert held == {
        ("secret", ("friend",)): (),
        ("secret", ("stranger",)): (),
        ("secret", ("other",)): ("other",),
        ("secret", ("friend", "stranger")): (),
        ("secret", ("friend", "stranger", "other")): ("other",),
        ("other", ("friend",)): (),
        ("other", ("stranger",)): (),
        ("other", ("secret",)): ("secret",),
        ("other", ("friend", "stranger")): (),
        ("other", ("friend", "stranger", "secret")): ("secret",),
    }


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_decoupled_task_tells_beta_of_what_it_told(beta):
    leaks = found(beta)
    optimum = beta * AGREE + (1 - beta) / 2
    for rule in ("label", "scores"):
        leak = leaks["secret", ("friend",), rule]
        assert dict(leak.opening) == {"friend": beta}
        assert leak.best == pytest.approx(optimum, abs=4 * math.sqrt(0.25 / N))
        assert leak.labels == pytest.approx(AGREE, abs=0.04)


def test_a_source_is_decoupled_only_while_what_it_tells_of_is_closed():
    leaks = found(0.0)
    assert leaks["other", ("friend",), "label"].opening == {"friend": 0.0}
    assert leaks["other", ("friend", "stranger", "secret"), "label"].opening == {
        "friend": 1.0,
        "stranger": 1.0,
        "secret": 1.0,
    }


def test_labels_alone_tell_what_the_table_of_counts_says():
    _, dataset, _ = victim()
    leaks = {(leak.target, leak.source): leak for leak in label_leaks(dataset, ["secret"])}
    assert set(leaks) == {("secret", name) for name in ("other", "friend", "stranger")}
    friend, stranger = leaks["secret", "friend"], leaks["secret", "stranger"]
    information = math.log(2) + AGREE * math.log(AGREE) + (1 - AGREE) * math.log(1 - AGREE)
    assert friend.guess == pytest.approx(AGREE, abs=0.04)
    assert friend.gain == pytest.approx(friend.guess - friend.prior)
    assert friend.mutual_information == pytest.approx(information, abs=0.03)
    assert friend.cramers_v == pytest.approx(2 * AGREE - 1, abs=0.06)
    assert friend.source_class == friend.target_class
    assert friend.conditional == pytest.approx(AGREE, abs=0.04)
    assert friend.leaky
    assert not stranger.leaky
    assert stranger.mutual_information < 0.003
    assert not label_leaks(dataset, ["secret"], DecouplingConfig(lift=0.9))[1].leaky


def test_rare_classes_and_missing_labels_are_left_out():
    model, dataset, keys = victim(("secret",))
    y = dataset.y_test["secret"]
    y[:100] = -1
    y[100:][y[100:] == 1] = -1
    y[100:104] = 1
    assert answer_leaks(model, dataset, keys) == ()
    y[104:110] = 1
    leak = answer_leaks(model, dataset, keys, samples=500)[0]
    assert leak.samples == int((y[:500] >= 0).sum())
    assert leak.prior == pytest.approx((y[:500] == 0).sum() / leak.samples)


def test_what_cannot_be_measured_is_refused():
    model, dataset, keys = victim()
    with pytest.raises(KeyRefused, match="secured tasks"):
        answer_leaks(model, dataset, {"secret": keys["secret"]})
    with pytest.raises(InputError, match="samples must be at least 1; got 0"):
        answer_leaks(model, dataset, keys, samples=0)
    with pytest.raises(InputError, match="task must be one of"):
        label_leaks(dataset, ["absent"])


def test_progress_is_told_and_the_same_seeds_give_the_same_figures():
    heard = []
    leaks = measured(0.5, samples=50, progress=lambda what, done: heard.append((what, done)))
    assert leaks == measured(0.5, samples=50)
    assert heard[0] == ("what friend tells of secret", 0.0)
    assert [done for _, done in heard] == sorted(done for _, done in heard)
