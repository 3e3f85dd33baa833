"""The assembler, the network, its training and what it is measured by."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from protocols.errors import InputError, KeyRefused, RangeError, ShapeError
from protocols.primitives.prg import Stream
from securemtk.data import MISSING, DataSet, Law, load
from securemtk.mtk.evaluation.answer_fit import answer_stats, fit_answers
from securemtk.mtk.evaluation.evaluate import (
    accuracy,
    attack,
    chance,
    evaluate,
    opening_rate,
    probabilities,
    release,
    released_accuracy,
)
from securemtk.mtk.keys.answers import AnswerStats, draw_answers
from securemtk.mtk.keys.key import draw_keys, stamp
from securemtk.mtk.training.assembler import ABSENT, DECOY, KINDS, RIGHT, Assembler, AssemblerConfig
from securemtk.mtk.training.model import MultiTaskModel, predict
from securemtk.mtk.training.train import TrainConfig, TrainResult, augmented, train
from securemtk.support.progress import progress_bar
from securemtk.tasks import Task

SECURED = ("digit", "parity")
QUICK = TrainConfig(epochs=10, assembler=AssemblerConfig(decoys=2))


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


@pytest.fixture(scope="module")
def few(digits) -> DataSet:
    return replace(
        digits,
        x_train=digits.x_train[:192],
        y_train={name: y[:192] for name, y in digits.y_train.items()},
    )


@pytest.fixture(scope="module")
def trained(digits) -> TrainResult:
    """A short training: enough for a key to open and for nothing else to."""
    return train(digits, SECURED, QUICK, keys=draw_keys(SECURED, digits.shape, stream=Stream(bytes(16))))


def assembled(n_secured: int, n_open: int, seed: int, config: AssemblerConfig, n: int = 5):
    rng = np.random.default_rng(seed)
    tasks = [Task(f"t{i}", 2 + i, secured=i < n_secured) for i in range(n_secured + n_open)]
    keys = draw_keys([t.name for t in tasks if t.secured], (2, 12, 20)) if n_secured else {}
    assembler = Assembler(tasks, keys, config)
    x = torch.from_numpy(rng.random((n, 2, 12, 20), dtype=np.float32))
    labels = torch.from_numpy(np.stack([rng.integers(t.classes, size=n) for t in tasks], axis=1))
    batch = assembler.batch(x, labels, torch.Generator().manual_seed(seed))
    return assembler, keys, x, labels, batch


settings_of_a_set = {
    "n_secured": st.integers(0, 4),
    "n_open": st.integers(0, 2),
    "seed": st.integers(0, 10_000),
    "multi": st.integers(0, 2),
    "decoys": st.integers(0, 3),
}


@given(**settings_of_a_set)
@settings(max_examples=60, deadline=None)
def test_a_task_is_true_exactly_where_its_own_key_is_whole(n_secured, n_open, seed, multi, decoys):
    if n_secured + n_open == 0:
        return
    config = AssemblerConfig(multi=multi, decoys=decoys)
    assembler, keys, x, labels, batch = assembled(n_secured, n_open, seed, config)
    rows = assembler.copies
    assert len(batch.x) == rows * len(x)
    for i, task in enumerate(assembler.tasks):
        truth = torch.nn.functional.one_hot(labels[:, i].repeat(rows), task.classes).float()
        whole = torch.ones(len(batch.x), dtype=torch.bool)
        if task.secured:
            mask, pattern = torch.tensor(keys[task.name].mask), torch.tensor(keys[task.name].pattern)
            whole = (batch.x == pattern)[:, mask].all(dim=1)
        assert torch.equal(batch.opened[:, i], whole)
        assert torch.equal(batch.targets[i][whole], truth[whole])
        assert torch.equal(batch.targets[i][~whole], torch.full_like(truth, 1 / task.classes)[~whole])


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS))
@settings(max_examples=40, deadline=None)
def test_a_decoy_is_labelled_like_its_row_without_it(seed, kind):
    config = AssemblerConfig(kinds=tuple(float(k == kind) if k != "fresh" else 1e-9 + (k == kind) for k in KINDS))
    assembler, _, x, labels, _ = assembled(3, 1, seed, config)
    generator = torch.Generator().manual_seed(seed)
    states = assembler.states(len(x), generator)
    without = torch.where(states == DECOY, ABSENT, states)
    found, expected = [], []
    for filled, into in ((states, found), (without, expected)):
        assembler.states = lambda n, g, filled=filled: filled
        into.extend(assembler.batch(x, labels, generator).targets)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_sample_comes_keyless_with_each_single_key_with_several_and_with_decoys():
    _, keys, x, _, batch = assembled(2, 1, 0, AssemblerConfig(multi=1, decoys=1))
    n = len(x)
    assert torch.equal(batch.x[:n], x)
    for j, key in enumerate(keys.values()):
        assert torch.equal(batch.x[(j + 1) * n : (j + 2) * n], stamp(x, [key]))
    assert torch.equal(batch.x[3 * n : 4 * n], stamp(x, keys.values()))
    assert not batch.opened[4 * n :, :2].all(dim=1).any()


def test_decoys_stand_beside_right_keys_of_other_tasks():
    assembler, *_ = assembled(2, 1, 0, AssemblerConfig())
    states = assembler.states(100, torch.Generator().manual_seed(0))[400:]
    assert (states == DECOY).any(dim=1).all()
    for j in range(2):
        assert {ABSENT, RIGHT, DECOY} == set(states[states[:, j] == DECOY][:, 1 - j].tolist())


def test_sets_of_several_keys_have_at_least_two_and_every_size():
    assembler, *_ = assembled(4, 0, 0, AssemblerConfig(multi=20, decoys=0))
    sets = assembler.states(10, torch.Generator().manual_seed(0))[50:]
    assert set((sets == RIGHT).sum(dim=1).tolist()) == {2, 3, 4}
    assert not (sets == DECOY).any()


def test_all_kinds_of_decoys_are_drawn_and_none_is_the_key():
    assembler, keys, *_ = assembled(2, 0, 0, AssemblerConfig())
    kinds, values = assembler.decoys(4000, 0, torch.Generator().manual_seed(1))
    shares = np.bincount(kinds, minlength=len(KINDS)) / 4000
    expected = np.array(AssemblerConfig().kinds) / sum(AssemblerConfig().kinds)
    assert np.abs(shares - expected).max() < 0.03
    places = torch.tensor(keys["t0"].mask[0])
    key = torch.tensor(keys["t0"].pattern)[:, places]
    right = (values == key).float().mean(dim=(1, 2))
    assert not (right[kinds != KINDS.index("shifted")] == 1).any()
    assert (values[kinds == KINDS.index("constant")].std(dim=2) == 0).all()
    assert 0.5 < right[kinds == KINDS.index("partial")].mean() < 0.75
    foreign = torch.tensor(keys["t1"].pattern)[:, torch.tensor(keys["t1"].mask[0])]
    assert (values[kinds == KINDS.index("foreign")] == foreign).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_recoloured_decoys_stay_clear_of_the_key_and_inside_the_range(channels):
    keys = draw_keys(["a"], (channels, 16, 16), low=-2.0, high=3.0)
    config = AssemblerConfig(kinds=(1e-9, 0.0, 0.0, 0.0, 0.0, 1.0))
    assembler = Assembler((Task("a", 2, secured=True),), keys, config, low=-2.0, high=3.0)
    kinds, values = assembler.decoys(2000, 0, torch.Generator().manual_seed(1))
    assert (kinds == KINDS.index("recoloured")).all()
    assert -2 <= values.min() < -1.9
    assert 2.9 < values.max() <= 3
    key = torch.tensor(keys["a"].pattern)[:, torch.tensor(keys["a"].mask[0])]
    assert ((values - key).abs().mean(dim=(1, 2)) > 0.06 * 5).all()


def test_mined_decoys_are_the_patterns_to_which_the_network_answers_most_decidedly():
    keys = draw_keys(["a", "b"], (1, 16, 16))
    config = AssemblerConfig(kinds=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0), mined=500)
    assembler = Assembler((Task("a", 2, secured=True), Task("b", 2, secured=True)), keys, config)
    place = torch.tensor(keys["a"].mask[0])
    seen = []

    def answer(x):
        # Decided where the place of key a is bright.
        seen.append(x)
        brightness = x[:, 0, place].mean(dim=1)
        return torch.stack([10 * brightness, torch.zeros(len(x))], dim=1), torch.zeros(len(x), 2)

    x = torch.zeros(4, 1, 16, 16)
    assembler.mine(x, answer, torch.Generator().manual_seed(0))
    _, values = assembler.decoys(4000, 0, torch.Generator().manual_seed(1))
    bright = values.mean(dim=(1, 2))
    tried = seen[0][::4, 0, place].mean(dim=1)
    assert 0.45 < (bright >= tried.sort().values[-64]).float().mean() < 0.65
    other = torch.tensor(keys["b"].mask[0])
    right = (seen[0][:, 0, other] == torch.tensor(keys["b"].pattern)[0, other]).all(dim=1)
    assert right.tolist() == [False, True] * (len(right) // 2)
    assert sum(map(len, seen)) == 2 * 4 * 500


def test_a_single_secured_task_has_no_foreign_decoys():
    assembler, *_ = assembled(1, 1, 0, AssemblerConfig())
    kinds, _ = assembler.decoys(500, 0, torch.Generator().manual_seed(1))
    assert KINDS.index("foreign") not in kinds.tolist()


def test_random_targets_are_labels_drawn_anew():
    assembler, _, x, labels, batch = assembled(1, 0, 0, AssemblerConfig(targets="random"), n=400)
    closed = batch.targets[0][~batch.opened[:, 0]]
    assert torch.equal(closed.sort(dim=1).values, torch.tensor([0.0, 1.0]).expand_as(closed))
    assert abs(closed.mean(dim=0)[0] - 0.5) < 0.1
    again = assembler.batch(x, labels, torch.Generator().manual_seed(1))
    assert not torch.equal(again.targets[0], batch.targets[0])


def test_rows_of_samples_without_a_label_are_told_apart_for_that_task_alone():
    assembler, _, x, labels, _ = assembled(2, 1, 0, AssemblerConfig())
    labels[::2, 0] = MISSING
    batch = assembler.batch(x, labels, torch.Generator().manual_seed(0))
    assert torch.equal(batch.known[:, 0], (labels[:, 0] >= 0).repeat(assembler.copies))
    assert batch.known[:, 1:].all()
    assert all(torch.allclose(law.sum(dim=1), torch.ones(len(law))) for law in batch.targets)


def test_augmentation_comes_before_stamping_and_differs_between_copies():
    assembler, keys, x, labels, _ = assembled(2, 0, 0, AssemblerConfig())
    batch = assembler.batch(x, labels, torch.Generator().manual_seed(0), augmented)
    key = next(iter(keys.values()))
    assert (batch.x[len(x) : 2 * len(x)] == torch.tensor(key.pattern))[:, torch.tensor(key.mask)].all()
    assert not torch.equal(batch.x[0, :, :5], batch.x[len(x), :, :5])


def test_the_assembler_refuses_keys_that_do_not_fit_its_tasks():
    tasks = (Task("a", 2, secured=True), Task("b", 2))
    keys = draw_keys(["a", "b"], (1, 8, 8))
    for wrong in ({}, keys, {"b": keys["b"]}):
        with pytest.raises(KeyRefused, match=r"\['a'\]"):
            Assembler(tasks, wrong, AssemblerConfig())
    both = (replace(tasks[0]), replace(tasks[1], secured=True))
    with pytest.raises(KeyRefused, match="disjoint"):
        Assembler(both, {"a": keys["a"], "b": draw_keys(["b"], (1, 8, 8))["b"]}, AssemblerConfig())
    with pytest.raises(ShapeError, match="one shape"):
        Assembler(both, {"a": keys["a"], "b": draw_keys(["b"], (1, 8, 9))["b"]}, AssemblerConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        {"targets": "hard"},
        {"decoys": -1},
        {"shift": 0},
        {"kinds": (0.0, 1.0, 1.0, 1.0, 1.0, 1.0)},
        {"kinds": (1.0,) * 5},
        {"mined": -1},
        {"keep": (0.5, 1.0)},
    ],
)
def test_settings_of_the_assembler_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError):
        AssemblerConfig(**wrong)


@pytest.mark.parametrize(
    ("shape", "most"),
    [((1, 8, 8), 1800), ((1, 16, 16), 1800), ((1, 28, 28), 7400), ((3, 32, 32), 7400), ((2, 9, 31), 7400),
     ((3, 64, 64), 7400), ((3, 224, 160), 7400), ((5,), 500)],
)  # fmt: skip
def test_the_network_takes_samples_of_any_size_at_no_more_comparisons_than_it_says(shape, most):
    model = MultiTaskModel((Task("a", 10), Task("b", 2), Task("c", 3)), shape)
    assert [tuple(scores.shape) for scores in model(torch.rand(5, *shape))] == [(5, 10), (5, 2), (5, 3)]
    assert model.comparisons() <= most
    assert model.training


def test_comparisons_are_counted_for_any_trunk():
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU())
    assert MultiTaskModel((Task("a", 2),), (1, 8, 8), trunk=trunk, hidden=7).comparisons() == 57


def test_a_network_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="unique"):
        MultiTaskModel((Task("a", 2), Task("a", 3)), (1, 8, 8))
    with pytest.raises(ShapeError, match=">= 8"):
        MultiTaskModel((Task("a", 2),), (1, 7, 8))
    with pytest.raises(ShapeError, match="trunk"):
        MultiTaskModel((Task("a", 2),), (1, 8, 8), trunk=nn.Linear(5, 5))


def test_prediction_refuses_samples_of_another_shape(trained):
    with pytest.raises(ShapeError, match=r"\(1, 16, 16\)"):
        predict(trained.model, np.zeros((2, 1, 8, 8), np.float32))


def test_each_key_opens_its_own_task_and_nothing_else_does(trained, digits):
    found = evaluate(trained.model, digits, trained.keys, stream=Stream(bytes(16)))
    assert [found[name].secured for name in ("digit", "parity", "large")] == [True, True, False]
    for name in SECURED:
        assert min(found[name].right_key, found[name].all_keys) > 0.9
        assert max(found[name].no_key, found[name].wrong_key) < found[name].chance + 0.05
    large = found["large"]
    assert min(large.no_key, large.right_key, large.wrong_key, large.all_keys) > 0.9
    assert max(np.abs(scores).max() for scores in predict(trained.model, digits.x_test).values()) < 60


def test_random_patterns_do_not_open_a_task_but_the_right_one_counts_as_opening(trained, digits):
    key = trained.keys["digit"]
    rate = opening_rate(trained.model, digits, key, tries=100, samples=50, stream=Stream(bytes(16)))
    assert rate.share <= 0.02
    assert rate.tries == 100

    class Leaky:
        """Draws the right pattern one time in four."""

        def below(self, bound, shape):
            levels = Stream(bytes(16)).below(bound, shape)
            levels[::4] = torch.from_numpy(np.round(key.pattern[key.mask] * 255).astype(np.int64))
            return levels

    opened = opening_rate(trained.model, digits, key, tries=16, samples=50, stream=Leaky())
    assert opened.share == pytest.approx(4 / 16)
    assert opened.worst > 0.8


def test_the_baseline_is_trained_by_the_same_loop_without_keys(few):
    result = train(few, config=replace(QUICK, epochs=2))
    assert result.keys == {}
    assert not any(task.secured for task in result.tasks)
    found = evaluate(result.model, few, {})
    assert found["digit"].no_key == found["digit"].right_key == found["digit"].wrong_key
    assert len(result.losses) == 2
    assert result.losses[1] < result.losses[0]


def test_keys_are_drawn_where_none_are_given(few):
    result = train(few, ["parity"], replace(QUICK, epochs=1))
    assert result.keys["parity"].shape == few.shape
    assert [task.secured for task in result.tasks] == [False, True, False]


def weights(result: TrainResult) -> list[torch.Tensor]:
    return list(result.model.state_dict().values())


def test_the_same_seed_gives_the_same_model_and_another_seed_another(few):
    keys = draw_keys(SECURED, few.shape)
    config = replace(QUICK, epochs=1)
    torch.manual_seed(1)
    first = train(few, SECURED, config, keys=keys)
    torch.manual_seed(2)
    second = train(few, SECURED, config, keys=keys)
    third = train(few, SECURED, replace(config, seed=5), keys=keys)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    assert not torch.equal(weights(first)[0], weights(third)[0])


def test_samples_without_a_label_teach_nothing_of_that_task():
    rng = np.random.default_rng(0)
    x, y = rng.random((64, 1, 8, 8), dtype=np.float32), rng.integers(2, size=64)
    unlabelled = np.where(np.arange(64) < 32, y, MISSING)
    config = TrainConfig(epochs=10, lr=1e-3, augment=False)

    def scores(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        dataset = DataSet("d", (Task("a", 2),), images, {"a": labels}, x, {"a": y})
        # Normalisation over the batch would let the samples without label in by another door.
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU())
        torch.manual_seed(0)
        for parameter in trunk.parameters():
            nn.init.normal_(parameter, std=0.1)
        result = train(dataset, config=replace(config, batch=len(images)), trunk=trunk)
        return predict(result.model, x)["a"]

    some, alone, everything = scores(x, unlabelled), scores(x[:32], y[:32]), scores(x, y)
    assert np.abs(some - alone).max() < 1e-3
    assert np.abs(everything - alone).max() > 1e-2


def test_accuracies_leave_out_samples_without_a_label(trained, digits):
    known = np.arange(len(digits.x_test)) % 3 > 0
    missing = {name: np.where(known, y, MISSING) for name, y in digits.y_test.items()}
    only = {name: y[known] for name, y in digits.y_test.items()}
    found, expected = (
        evaluate(trained.model, dataset, trained.keys, n_random=2, stream=Stream(bytes(16)))
        for dataset in (replace(digits, y_test=missing), replace(digits, x_test=digits.x_test[known], y_test=only))
    )
    for name, figures in found.items():
        for field, value in vars(figures).items():
            assert value == pytest.approx(vars(expected[name])[field], abs=1e-5), (name, field)
    rates = [
        opening_rate(trained.model, dataset, trained.keys["digit"], tries=5, samples=20, stream=Stream(bytes(16)))
        for dataset in (replace(digits, y_test=missing), replace(digits, x_test=digits.x_test[known], y_test=only))
    ]
    assert rates[0] == rates[1]


def test_a_whole_number_in_a_setting_is_the_same_training_as_one_with_a_point(few, tmp_path):
    config = replace(QUICK, epochs=1, closed_weight=2)
    path = tmp_path / "run.pt"
    train(few, config=config, checkpoint=path)
    before = path.read_bytes()
    train(few, config=replace(config, closed_weight=2.0), checkpoint=path)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="must be of this training"):
        train(few, config=replace(config, closed_weight=2.5), checkpoint=path)


def test_training_leaves_torchs_generator_and_threads_as_they_were(few):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train(few, config=replace(QUICK, epochs=1, threads=2))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_training_goes_on_from_its_checkpoint_as_if_never_interrupted(few, tmp_path):
    keys = draw_keys(SECURED, few.shape)
    config = replace(QUICK, epochs=3)

    def interrupt(_, done):
        if round(3 * done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(few, SECURED, config, keys=keys, checkpoint=tmp_path / "run.pt", progress=interrupt)
    seen = []
    resumed = train(
        few, SECURED, config, keys=keys, checkpoint=tmp_path / "run.pt", progress=lambda what, _: seen.append(what)
    )
    whole = train(few, SECURED, config, keys=keys)
    assert [what.split(",")[0] for what in seen] == ["epoch 3 of 3"]
    assert resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_of_another_training_is_refused(few, tmp_path):
    config = replace(QUICK, epochs=1)
    train(few, config=config, checkpoint=tmp_path / "run.pt")
    for other in (replace(config, lr=1e-3), replace(config, seed=1)):
        with pytest.raises(InputError, match=r"run\.pt must be of this training"):
            train(few, config=other, checkpoint=tmp_path / "run.pt")
    with pytest.raises(InputError, match="of this training"):
        train(few, SECURED, config, keys=draw_keys(SECURED, few.shape), checkpoint=tmp_path / "run.pt")


class Hostile:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


@pytest.mark.parametrize("kind", ["empty", "text", "hostile"])
def test_a_damaged_or_hostile_checkpoint_is_refused_and_never_run(few, tmp_path, kind):
    path = tmp_path / "run.pt"
    if kind == "hostile":
        torch.save({"about": Hostile(str(tmp_path / "made"))}, path)
    else:
        path.write_bytes(b"" if kind == "empty" else b"not a checkpoint")
    with pytest.raises(InputError, match="must be a checkpoint"):
        train(few, config=replace(QUICK, epochs=1), checkpoint=path)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_holds_no_key_and_wants_them_given(few, tmp_path):
    with pytest.raises(KeyRefused, match="draw_keys first"):
        train(few, SECURED, QUICK, checkpoint=tmp_path / "run.pt")
    keys = draw_keys(SECURED, few.shape)
    train(few, SECURED, replace(QUICK, epochs=1), keys=keys, checkpoint=tmp_path / "run.pt")
    content = (tmp_path / "run.pt").read_bytes()
    for key in keys.values():
        assert key.pattern[0, -1, -16:].tobytes() not in content
        assert key.pattern[key.mask][:4].tobytes() not in content


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"warmup": 1.0}, {"threads": -1}, {"closed_weight": 0.0}]
)
def test_settings_of_a_training_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError):
        TrainConfig(**wrong)


def test_an_unknown_task_and_a_batch_beyond_the_data_are_refused(few):
    with pytest.raises(InputError, match="got 'species'"):
        train(few, ["species"], QUICK)
    with pytest.raises(InputError, match="batch must be at most"):
        train(few, config=replace(QUICK, batch=193))


def test_a_training_that_diverges_says_so(few):
    with pytest.raises(InputError, match="stay finite"):
        train(few, config=replace(QUICK, epochs=2, lr=1e30))


def test_the_progress_bar_writes_on_stderr_alone(few, capsys):
    with progress_bar("train") as progress:
        train(few, config=replace(QUICK, epochs=1), progress=progress)
    assert capsys.readouterr().out == ""


def test_ties_count_as_a_guess_among_them():
    answers = np.array([[0.5, 0.5], [0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    assert accuracy(answers, np.array([0, 1, 1, 1])) == pytest.approx((0.5 + 1 + 0.5 + 0) / 4)


def test_rounded_answers_have_two_decimals_and_sampled_ones_a_single_label():
    scores = np.log(np.tile([[0.101, 0.699, 0.2]], (20_000, 1)))
    assert np.array_equal(release(scores[:1], "rounded"), [[0.1, 0.7, 0.2]])
    sampled = release(scores, "sampled", Stream(bytes(16)))
    assert np.array_equal(sampled.sum(axis=1), np.ones(20_000))
    assert np.abs(sampled.mean(axis=0) - [0.101, 0.699, 0.2]).max() < 0.015
    assert not np.array_equal(release(scores), release(scores))
    y = np.ones(20_000, dtype=np.int64)
    assert released_accuracy(scores, y, "sampled") == pytest.approx(0.699)
    assert abs(accuracy(sampled, y) - 0.699) < 0.015


def test_probabilities_of_great_scores_stay_finite():
    assert np.array_equal(probabilities(np.array([[1e4, 0.0]], dtype=np.float32)), [[1.0, 0.0]])


def test_chance_is_the_best_guess_from_training_labels(digits):
    assert chance(digits, "parity", ["large"]) == pytest.approx(0.6, abs=0.01)
    assert chance(digits, "digit", ["large"]) == pytest.approx(0.2, abs=0.01)
    assert chance(digits, "parity", ["digit"]) == 1
    assert chance(digits, "parity", []) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(InputError, match="not be among"):
        chance(digits, "parity", ["parity"])


def test_chance_reaches_the_exact_optimum_of_a_known_law():
    table = np.random.default_rng(3).dirichlet(np.ones(64)).reshape(4, 4, 2, 2)
    law = Law(("shape", "colour", "size", "texture"), table)
    tasks = tuple(Task(name, size) for name, size in zip(law.names, table.shape, strict=True))
    # Labels alone matter here: the images may be blank.
    blank = np.zeros((40_000, 1, 1, 1), dtype=np.float32)
    dataset = DataSet("blank", tasks, blank, law.sample(40_000, 0), blank, law.sample(40_000, 1))
    for given_names in ([], ["colour"], ["colour", "size"]):
        assert chance(dataset, "shape", given_names) == pytest.approx(law.best_guess("shape", given_names), abs=0.015)


def test_a_label_combination_never_seen_is_answered_with_the_most_frequent_class():
    tasks = (Task("a", 2), Task("b", 3))
    blank = np.zeros((4, 1, 1, 1), dtype=np.float32)
    train_labels = {"a": np.array([1, 1, 1, 0]), "b": np.array([0, 0, 0, 1])}
    test_labels = {"a": np.array([1, 1, 0, 0]), "b": np.array([2, 2, 1, 1])}
    assert chance(DataSet("d", tasks, blank, train_labels, blank, test_labels), "a", ["b"]) == 1


def test_an_attacker_finds_what_is_there_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=600)
    noise = rng.normal(size=(600, 3))
    found = attack(noise + 2 * np.eye(3)[y], y)
    assert found.gain > 0.4
    assert found.logistic > 0.8
    assert abs(attack(noise, y).gain) < 0.08


def test_guesses_and_attacks_leave_out_samples_without_a_label():
    tasks = (Task("a", 2), Task("b", 2))
    blank = np.zeros((4, 1, 1, 1), dtype=np.float32)
    train_labels = {"a": np.array([0, -1, -1, 1]), "b": np.array([0, 0, 0, 1])}
    test_labels = {"a": np.array([0, 1, -1, -1]), "b": np.array([0, 1, 1, -1])}
    assert chance(DataSet("d", tasks, blank, train_labels, blank, test_labels), "a", ["b"]) == 1
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=200)
    answers = rng.normal(size=(200, 2)) + np.eye(2)[y]
    hidden = np.where(np.arange(200) < 100, y, MISSING)
    assert attack(answers, hidden, [y % 2]) == attack(answers[:100], y[:100], [y[:100] % 2])
    with pytest.raises(InputError, match="one row with a label"):
        accuracy(answers, np.full(200, MISSING))


def test_an_attacker_is_measured_against_what_open_labels_tell():
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=300)
    told = attack(rng.normal(size=(300, 2)), y, [y % 2])
    assert told.chance > 0.6
    with pytest.raises(ShapeError):
        attack(rng.normal(size=(300, 2)), y[:-1])


def test_evaluation_refuses_missing_keys(trained, digits):
    with pytest.raises(KeyRefused, match="digit"):
        evaluate(trained.model, digits, {})
    with pytest.raises(InputError, match="at least 1"):
        opening_rate(trained.model, digits, trained.keys["digit"], tries=0)


def stats() -> AnswerStats:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    return AnswerStats(rng.normal(size=(4, 4)) + 20 * np.eye(4), root @ root.T)


def test_drawn_answers_have_the_statistics_they_are_drawn_from():
    answers = draw_answers(stats(), 40_000, Stream(bytes(16)))
    assert answers.dtype == np.float64
    found = fit_answers(answers)
    assert np.abs(found.mean - stats().mean).max() < 0.15
    assert np.abs(found.covariance - stats().covariance).max() < 0.3
    assert np.abs(np.bincount(answers.argmax(axis=1)) / 40_000 - 0.25).max() < 0.02


def test_drawn_answers_are_a_function_of_the_stream_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    first = draw_answers(stats(), 50, Stream(bytes(16)))
    np_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    np.random.seed(1)
    torch.manual_seed(1)
    assert np.array_equal(draw_answers(stats(), 50, Stream(bytes(16))), first)
    assert not np.array_equal(draw_answers(stats(), 50, Stream()), first)
    np.random.seed(0)
    torch.manual_seed(0)
    draw_answers(stats(), 50, Stream())
    assert np.array_equal(np.random.get_state()[1], np_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_scores_that_depend_on_each_other_are_drawn_too():
    scores = np.random.default_rng(0).normal(size=(100, 1)) * np.array([[1.0, -1.0]])
    drawn = draw_answers(fit_answers(scores), 1000, Stream(bytes(16)))
    assert np.abs(drawn.sum(axis=1)).max() < 1e-6


def test_a_class_that_is_never_predicted_still_leads_its_own_answers():
    scores = np.random.default_rng(0).normal(size=(100, 3)) + np.array([9.0, 0.0, 0.0])
    found = fit_answers(scores)
    assert np.array_equal(found.mean.argmax(axis=1), [0, 1, 2])


def test_statistics_come_back_from_a_manifest():
    back = AnswerStats.from_dict(stats().to_dict())
    assert np.array_equal(back.mean, stats().mean)
    assert np.array_equal(back.covariance, stats().covariance)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        ({}, InputError),
        ({"mean": "x", "covariance": "y"}, InputError),
        ({"mean": [[1.0, 2.0]], "covariance": [[1.0]]}, ShapeError),
        ({"mean": [[1.0, 2.0], [2.0]], "covariance": [[1.0]]}, InputError),
        ({"mean": [[1.0, 0.0], [0.0, 1.0]], "covariance": [[1.0, 0.0], [0.0, -1.0]]}, RangeError),
        ({"mean": [[1.0, 0.0], [0.0, float("nan")]], "covariance": [[1.0, 0.0], [0.0, 1.0]]}, RangeError),
        ({"mean": [[1.0, 0.0], [0.0, 1.0]], "covariance": [[1.0, 0.5], [0.0, 1.0]]}, RangeError),
    ],
)
def test_statistics_that_cannot_be_are_refused(raw, error):
    with pytest.raises(error):
        AnswerStats.from_dict(raw)


def test_scores_without_statistics_are_refused():
    with pytest.raises(ShapeError, match="n > C"):
        fit_answers(np.zeros((3, 3)))
    with pytest.raises(RangeError, match="finite"):
        fit_answers(np.full((5, 2), np.nan))


def test_a_closed_answer_looks_like_an_open_one(trained, digits):
    found = answer_stats(trained.model, digits, trained.keys)
    opened = predict(trained.model, stamp(digits.x_test, [trained.keys["digit"]]))["digit"]
    drawn = draw_answers(found["digit"], 2000, Stream(bytes(16)))
    assert abs(drawn.max(axis=1).mean() - opened.max(axis=1).mean()) < 0.15 * opened.max(axis=1).mean()
    assert abs(drawn.std() - opened.std()) < 0.15 * opened.std()
