"""Attacks on hand-made models: they find what is weak, and nothing where a task is exactly closed."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from protocols.errors import InputError, KeyRefused
from securemtk.data import MISSING, DataSet, load
from securemtk.mtk.attacks import base, guess, invert
from securemtk.mtk.attacks.base import OpeningRule, Victim, opening_rule, share_bounds, stream_of
from securemtk.mtk.attacks.finetune import finetune
from securemtk.mtk.attacks.guess import guess as guess_keys
from securemtk.mtk.attacks.infer import infer
from securemtk.mtk.attacks.invert import invert as invert_keys
from securemtk.mtk.attacks.membership import membership
from securemtk.mtk.attacks.suite import ATTACKS, Effort, run_attacks
from securemtk.mtk.keys.key import MODEL_ID_BYTES, TriggerKey, plane
from securemtk.mtk.training.model import MultiTaskModel
from securemtk.mtk.training.train import TrainConfig, train
from securemtk.report.pictures import draw_attacks
from securemtk.support.progress import progress_bar
from securemtk.tasks import Task

SHAPE = (1, 8, 8)
MODEL_ID = "ab" * MODEL_ID_BYTES
TINY = Effort(tries=50, queries=800, steps=2, restarts=2, labelled=(20,))


class Branch(nn.Module):
    """Reads a label from the top row of an image, and tells it as loudly as `gate` of the image says."""

    def __init__(self, gate, row=0):
        super().__init__()
        self.gate, self.row = gate, row
        self.loud = nn.Parameter(torch.tensor(20.0))

    def forward(self, features):
        x = features.reshape(-1, *SHAPE)
        told = self.loud * (x[:, 0, self.row].mean(dim=1) - 0.5) * self.gate(x)
        return torch.stack([-told, told], dim=1)


def patch_of(x):
    return x[:, 0, 5:, 5:].flatten(1)


def bright(x):
    """A weak gate: the brighter the patch, the more it tells."""
    return ((patch_of(x).mean(dim=1) - 0.6) * 4).clamp(0, 1)


def exactly(pattern):
    """A gate that nothing opens but the key itself."""
    wanted = torch.from_numpy(pattern[0, 5:, 5:].flatten().copy())
    return lambda x: ((patch_of(x) - wanted).abs().amax(dim=1) < 1e-4).float() + 0 * x.sum(dim=(1, 2, 3))


def any_patch(x):
    """A gate that everything opens that is written there in 256 levels; samples have other values."""
    levels = 255 * patch_of(x)
    return ((levels - levels.round()).abs().amax(dim=1) < 1e-3).float()


def always(x):
    return torch.ones(len(x))


def samples(n, seed, agree=0.5):
    """Images whose top row is bright in class 1 of `secret`, and whose second row tells `open`."""
    rng = np.random.default_rng(seed)
    x = rng.random((n, *SHAPE), dtype=np.float32)
    secret = np.arange(n) % 2
    other = np.where(rng.random(n) < agree, secret, 1 - secret)
    for row, y in ((0, secret), (1, other)):
        x[:, 0, row] = 0.1 * x[:, 0, row] + np.where(y, 0.85, 0.05)[:, None]
    return x, {"secret": secret, "open": other}


def key_of(task="secret", values=None, left=5):
    mask, pattern = np.zeros(SHAPE, dtype=np.bool_), np.zeros(SHAPE, dtype=np.float32)
    mask[:, 5:, left : left + 3] = True
    levels = stream_of(3, task).below(256, (9,)).numpy() / 255
    pattern[mask] = levels if values is None else values
    return TriggerKey(task, MODEL_ID, mask, pattern)


def victim_of(gate, key=None, agree=0.5, trunk=None):
    tasks = (Task("secret", 2, secured=True), Task("open", 2))
    x_train, y_train = samples(120, 0, agree)
    x_test, y_test = samples(200, 1, agree)
    dataset = DataSet("made", (Task("secret", 2), Task("open", 2)), x_train, y_train, x_test, y_test)
    model = MultiTaskModel(tasks, SHAPE, trunk=nn.Flatten() if trunk is None else trunk)
    model.branches = nn.ModuleList([Branch(gate), Branch(always, row=1)])
    return Victim(model.eval(), dataset, {"secret": key_of(values=0.95) if key is None else key})


@pytest.fixture(scope="module")
def weak() -> Victim:
    return victim_of(bright)


@pytest.fixture(scope="module")
def closed() -> Victim:
    key = key_of()
    return victim_of(exactly(key.pattern), key)


def only(findings, *words):
    (found,) = [f for f in findings if all(word in f.what for word in words)]
    return found


# --- the rule -------------------------------------------------------------------------------------------------------


def test_a_victim_needs_a_secured_task_and_its_keys(weak):
    with pytest.raises(KeyRefused, match="secret"):
        Victim(weak.model, weak.dataset, {})
    plain = MultiTaskModel(weak.dataset.tasks, SHAPE, trunk=nn.Flatten())
    with pytest.raises(InputError, match="secured"):
        Victim(plain, weak.dataset, {})


def test_the_rule_asks_for_20_points_or_half_of_what_the_key_adds(weak):
    x, y = weak.dataset.x_test, weak.dataset.y_test["secret"]
    rule = opening_rule(weak, "secret", x, y)
    assert rule.right > 0.95
    assert rule.lift == pytest.approx(0.2)
    assert 0.5 <= rule.base < 0.6
    skewed = np.flatnonzero((y == 1) | (np.arange(len(y)) % 20 == 0))
    rare = opening_rule(weak, "secret", x[skewed], y[skewed])
    assert rare.base > 0.9
    assert rare.threshold == pytest.approx((rare.base + rare.right) / 2, abs=0.03)
    assert rare.lift >= 0.05


def test_answers_without_a_clue_pass_the_rule_no_more_often_than_it_says():
    rng = np.random.default_rng(0)
    rule = OpeningRule(base=0.5, right=1.0, lift=0.1, samples=100)
    y = np.arange(100) % 2
    passed = np.mean([rule.opens(np.array([np.mean(rng.integers(2, size=100) == y)]))[0] for _ in range(4000)])
    assert 0 < passed <= rule.false_positive == pytest.approx(math.exp(-2))


def test_answers_that_are_always_wrong_tell_as_much_as_right_ones():
    y = np.array([0, 1, 2, 0, 1, 2])
    assert base.relabelled_accuracy(np.eye(3, dtype=np.float32)[(y + 1) % 3], y) == 1
    assert base.relabelled_accuracy(np.zeros((6, 3), dtype=np.float32), y) == pytest.approx(1 / 3)
    turned = victim_of(lambda x: -any_patch(x), key_of())
    found = only(guess_keys(turned, tries=100), "raw scores")
    assert found.figure == 1
    assert found.chance == pytest.approx(2**2 * math.exp(-2 * 200 * found.details["lift"] ** 2))


def test_a_share_never_seen_is_bounded_by_about_three_in_n():
    low, high = share_bounds(0, 100_000)
    assert low == 0
    assert high == pytest.approx(1 - 0.05 ** (1 / 100_000), rel=1e-9)
    assert share_bounds(5, 5)[1] == 1
    assert share_bounds(3, 10)[0] < 0.3 < share_bounds(3, 10)[1]


# --- guessing -------------------------------------------------------------------------------------------------------


def test_guesses_open_a_weak_task_as_often_as_judging_all_patterns_on_all_samples_says(weak):
    findings = guess_keys(weak, tries=2000, seed=1)
    found = only(findings, "no other key")
    key, (x, y) = weak.keys["secret"], (weak.dataset.x_test, weak.dataset.y_test["secret"])
    stream = stream_of(1, "guess secret").derive("alone")
    patterns = base.random_patterns(weak, key, 2000, stream)
    released, _ = base.pattern_accuracies(weak.model, "secret", x, y, patterns)
    opened = int((released >= found.details["threshold"]).sum())
    assert opened > 50
    assert found.details["opened"] == pytest.approx(opened, rel=0.05)
    assert found.figure == found.details["opened"] / 2000
    assert found.details["upper_95"] > found.figure > found.chance
    kinds = only(findings, "blank").details["kinds"]
    assert (kinds["white"]["opened"], kinds["black"]["opened"]) == (1, 0)
    assert "white" in only(findings, "blank").meaning


def test_nothing_but_the_key_opens_a_task_that_is_exactly_closed(closed):
    findings = guess_keys(closed, tries=500)
    for state in ("no other key", "raw scores"):
        found = only(findings, state)
        assert (found.figure, found.details["opened"]) == (0, 0)
        assert found.details["right"] > 0.95
    for f in findings:
        for kind in f.details.get("kinds", {}).values():
            assert kind["opened"] == 0
            assert kind["best"] == pytest.approx(0.5)
    assert sum(only(findings, "no other key").details["histogram"]) == 500


def test_a_gate_that_any_patch_opens_is_seen_as_open_by_every_guess():
    findings = guess_keys(victim_of(any_patch, key_of()), tries=300)
    assert only(findings, "no other key").figure == 1
    assert only(findings, "raw scores").details["released"]["opened"] == 300
    kinds = only(findings, "blank").details["kinds"]
    assert kinds["black"]["opened"] == kinds["white"]["opened"] == 1


def test_guesses_depend_on_the_seed_alone(weak):
    first, again, other = (guess_keys(weak, tries=200, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert only(first, "no other key").details["histogram"] != only(other, "no other key").details["histogram"]


def test_a_guess_stands_beside_the_keys_of_other_tasks_too():
    keys = {"secret": key_of(values=0.95), "open": key_of("open", left=2)}
    x, y = samples(120, 0)
    dataset = DataSet("made", (Task("secret", 2), Task("open", 2)), x, y, x, y)
    tasks = (Task("secret", 2, secured=True), Task("open", 2, secured=True))
    model = MultiTaskModel(tasks, SHAPE, trunk=nn.Flatten())
    other = torch.from_numpy(keys["open"].pattern[0, 5:, 2:5].copy())

    def beside(x):
        return (x[:, 0, 5:, 2:5] == other).all(dim=2).all(dim=1).float()

    for gate, opened, alone in ((lambda x: any_patch(x) * beside(x), 20, 0), (beside, 0, 1)):
        model.branches = nn.ModuleList([Branch(gate), Branch(always, row=1)])
        findings = [f for f in guess_keys(Victim(model.eval(), dataset, keys), tries=200) if f.task == "secret"]
        assert only(findings, "no other key").figure == 0
        assert only(findings, "beside all other keys").details["opened"] == opened
        kinds = only(findings, "other tasks'").details["kinds"]
        assert kinds["open in its own place"]["opened"] == alone
        assert kinds["open in this place"]["opened"] == 0


def test_shifted_keys_are_the_key_elsewhere_and_cut_at_the_edge():
    key = key_of()
    moved = guess._shifted(key, 1)
    assert moved.shape == (8, *SHAPE)
    up_left = moved[0]
    assert np.array_equal(up_left[0, 4:7, 4:7], key.pattern[0, 5:, 5:])
    assert np.isnan(up_left).sum() == 64 - 9
    assert np.isnan(moved[-1]).sum() == 64 - 4


@pytest.mark.parametrize(("share", "wrong"), [(0.1, 1), (0.5, 4), (0.9, 8)])
def test_partly_wrong_keys_differ_in_as_many_pixels_as_they_say(weak, share, wrong):
    key = key_of()
    right = np.where(key.mask, key.pattern, np.nan).astype(np.float32)[None]
    patterns = guess._replaced(weak, key, right, share, stream_of(0, "test"))
    assert np.array_equal(np.isnan(patterns), np.broadcast_to(~key.mask, patterns.shape))
    differs = (patterns[:, key.mask] != key.pattern[key.mask]).sum(axis=1)
    assert differs.max() == wrong
    assert differs.mean() > 0.9 * wrong
    assert len({tuple(np.flatnonzero(p[key.mask] != key.pattern[key.mask])) for p in patterns}) > 1


def test_recoloured_keys_stay_in_range_and_permute_channels():
    right = np.full((1, 3, 4, 4), np.nan, dtype=np.float32)
    right[0, :, 0] = np.array([0.1, 0.5, 0.9], dtype=np.float32)[:, None]
    kinds = guess._recoloured(right, 0.0, 1.0)
    assert kinds["channels permuted"].shape == (5, 3, 4, 4)
    assert np.allclose(kinds["negated"][0, :, 0, 0], [0.9, 0.5, 0.1])
    for patterns in kinds.values():
        assert np.array_equal(np.isnan(patterns), np.isnan(np.broadcast_to(right, patterns.shape)))
        assert 0 <= np.nanmin(patterns) <= np.nanmax(patterns) <= 1


def test_shifted_keys_of_a_table_move_along_its_columns():
    mask = np.arange(8) >= 5
    key = TriggerKey("secret", MODEL_ID, mask, np.where(mask, np.arange(8), 0).astype(np.float32))
    left, right = guess._shifted(key, 2)
    assert np.array_equal(left, [np.nan] * 3 + [5, 6, 7] + [np.nan] * 2, equal_nan=True)
    assert np.array_equal(right, [np.nan] * 7 + [5], equal_nan=True)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_channels_are_permuted_in_a_few_ways_whatever_their_number(channels):
    orders = guess._orders(channels)
    assert len(orders) == {1: 0, 2: 1}.get(channels, 2 * channels - 1)
    assert all(sorted(order) == list(range(channels)) != order for order in orders)
    table = np.zeros((1, 3), dtype=np.float32)
    assert "channels permuted" not in guess._recoloured(table, -1.0, 1.0)


def test_the_few_samples_of_the_screen_hold_all_classes():
    y = np.array([0] * 50 + [1] * 3 + [2] * 10)
    assert sorted(y[guess._balanced(y, 6)]) == [0, 0, 1, 1, 2, 2]
    assert sorted(y[guess._balanced(y, 12)]) == [0] * 5 + [1] * 3 + [2] * 4


# --- inverting ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inverted(weak):
    return invert_keys(weak, queries=40_000, steps=60, restarts=4)


@pytest.mark.parametrize("way", ["sampled", "rounded", "place known", "place unknown"])
def test_every_search_finds_the_key_of_a_weak_model(inverted, way):
    found = only(inverted, way)
    assert found.details["opens"]
    assert found.figure >= found.details["threshold"] > found.chance
    assert "opened secret" in found.meaning
    assert found.details["overlap"]["place"] == 1 or way == "place unknown"


def test_no_search_finds_a_key_where_a_task_is_exactly_closed(closed):
    for found in invert_keys(closed, queries=10_000, steps=20, restarts=2):
        assert not found.details["opens"]
        assert found.figure == pytest.approx(0.5, abs=0.1)
        assert "did not open" in found.meaning


def test_searches_by_queries_keep_to_their_budget(closed):
    findings = invert_keys(closed, queries=5000, steps=1, restarts=1)
    assert only(findings, "sampled").details["effort"]["queries"] <= 5000


def test_what_is_found_is_judged_but_never_kept(inverted, weak):
    for found in inverted:
        assert all(not isinstance(value, list) for value in found.details.values())
        assert all(isinstance(value, float | int) for value in found.details["overlap"].values())
    assert all(parameter.grad is None for parameter in weak.model.parameters())


def test_searches_depend_on_the_seed_alone(weak):
    effort = {"queries": 1600, "steps": 3, "restarts": 2}
    first, again, other = (invert_keys(weak, seed=seed, **effort) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_overlap_of_a_key_with_itself_is_whole_and_with_another_place_none(weak):
    key = key_of()
    itself = np.where(key.mask, key.pattern, np.nan).astype(np.float32)
    assert invert._overlap(weak, key, itself) == pytest.approx(
        {"place": 1, "pixels": 9, "distance": 0, "correlation": 1}, abs=1e-6
    )
    assert invert._overlap(weak, key_of(left=0), itself) == {"place": 0, "pixels": 9}


def test_an_attacker_and_the_judge_share_no_sample(weak):
    (x, _), (judge, y) = weak.halves("secret", 0)
    assert len(x) == len(judge) == len(y) == 100
    assert not {row.tobytes() for row in x} & {row.tobytes() for row in judge}


# --- inferring, fine-tuning, membership -----------------------------------------------------------------------------


def test_a_correlated_open_task_betrays_a_closed_one_and_counts_as_its_chance(closed):
    findings = infer(victim_of(exactly(key_of().pattern), key_of(), agree=0.9))
    found = only(findings, "sampled")
    assert found.chance == pytest.approx(0.9, abs=0.05)
    assert found.figure == pytest.approx(found.chance, abs=0.05)
    assert found.details["open_outputs_alone"] == pytest.approx(found.chance, abs=0.05)
    assert found.details["prior"] == 0.5
    independent = only(infer(closed), "rounded")
    assert independent.figure == pytest.approx(0.5, abs=0.12)


def test_raw_scores_of_a_task_that_is_nearly_closed_tell_it_and_rounded_ones_do_not():
    findings = infer(victim_of(lambda x: torch.full((len(x),), 1e-4)))
    assert only(findings, "raw").figure > 0.95
    assert only(findings, "rounded").figure < 0.65
    assert only(findings, "sampled").figure < 0.65


def test_a_trunk_that_carries_the_task_is_of_use_and_an_empty_one_is_not(closed):
    carries = only(finetune(closed, counts=(60, 10**6), steps=60, repeats=1), "60 samples")

    class Empty(nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)

    # The branches of `victim_of` read pixels; a plain one is what a fresh branch is made of.
    for victim, least, most in ((victim_of(bright), 0.9, 1.0), (victim_of(bright, trunk=Empty()), 0.4, 0.6)):
        victim.model.branches = nn.ModuleList(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in "ab")
        (found,) = finetune(victim, counts=(60,), steps=60, repeats=1)
        assert least <= found.figure <= most
        assert found.details["labelled"] == 60
    assert carries.details["stolen"] == [carries.figure]
    with pytest.raises(InputError, match="counts"):
        finetune(closed, counts=(10**6,))


def test_a_network_from_scratch_keeps_nothing_of_the_stolen_one(closed):
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
    with torch.no_grad():
        trunk[1].weight.zero_()
        trunk[1].bias.zero_()
    victim = victim_of(always, trunk=trunk)
    victim.model.branches = nn.ModuleList(nn.Linear(16, 2) for _ in "ab")
    (found,) = finetune(victim, counts=(100,), steps=100, repeats=1)
    assert found.figure == pytest.approx(0.5, abs=0.1)
    assert found.chance > 0.9
    assert not trunk[1].weight.any()


def test_answers_learnt_by_heart_tell_members(weak):
    members = torch.from_numpy(weak.dataset.x_train).flatten(1)

    def remembered(x):
        return (torch.cdist(x.flatten(1), members).amin(dim=1) < 0.05).float()

    findings = membership(victim_of(remembered))
    closed, opened = findings
    assert (closed.task, opened.task) == ("secret", "open")
    assert closed.figure > 0.95
    assert closed.details["advantage"] > 0.9
    assert "do not tell" not in closed.meaning
    assert "do not tell" in opened.meaning
    assert abs(opened.details["advantage"]) < 0.3


# --- samples of any kind ---------------------------------------------------------------------------------------------


def trained_on_table():
    config = TrainConfig(epochs=4, batch=32, key_side=4)
    dataset = config.with_room(load("wine"), ["cultivar", "proline"])
    return dataset, train(dataset, ["cultivar", "proline"], config)


def trained_on_maps():
    """Maps of two channels with values of any size and sign; one sample in five has no label of the secured task."""
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=260)
    x = rng.uniform(-7, 2, (260, 2, 9, 8)).astype(np.float32)
    x[:, 0, 0] = 3 * y[:, None] - 5
    labels = {"secret": np.where(np.arange(260) % 5, y, MISSING), "open": y % 2}
    parts = [(x[rows], {name: v[rows] for name, v in labels.items()}) for rows in (slice(200), slice(200, 260))]
    tasks = (Task("secret", 3), Task("open", 2))
    dataset = DataSet("maps", tasks, *parts[0], *parts[1], low=-7.5, high=4.0)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.ReLU())
    config = TrainConfig(epochs=3, batch=50, key_side=3, augment=False)
    return dataset, train(dataset, ["secret"], config, trunk=trunk)


@pytest.mark.parametrize("made", [trained_on_table, trained_on_maps])
def test_every_attack_handles_tables_and_maps_of_any_range(made):
    dataset, result = made()
    victim = Victim(result.model, dataset, result.keys)
    found = run_attacks(victim, effort=TINY).to_dict()["findings"]
    secured = set(result.keys)
    for name in ATTACKS:
        attacked = {f["task"] for f in found if f["attack"] == name}
        assert secured <= attacked == secured | ({t.name for t in dataset.tasks} if name == "membership" else set())
    for group in ("blank", "shifted", "recoloured", "partly wrong", "noisy"):
        assert sum(f["details"].get("group") == group for f in found) == len(secured)
    assert all(0 <= f["figure"] <= 1 and f["meaning"].endswith(".") for f in found)
    for f in found:
        if "place known" in f["what"]:
            key = result.keys[f["task"]]
            assert (f["details"]["overlap"]["place"], f["details"]["overlap"]["pixels"]) == (1, plane(key.mask).sum())
            assert 0 < f["details"]["overlap"]["distance"] < 1
    assert draw_attacks(found).startswith(b"\x89PNG")


def test_patterns_of_a_table_lie_in_its_range_and_in_the_columns_of_the_key():
    dataset, result = trained_on_table()
    victim, key = Victim(result.model, dataset, result.keys), result.keys["proline"]
    drawn = base.random_patterns(victim, key, 50, stream_of(0, "test"))
    assert np.array_equal(np.isnan(drawn), np.broadcast_to(~key.mask, drawn.shape))
    assert -1 <= np.nanmin(drawn) < -0.9 < 0.9 < np.nanmax(drawn) <= 1
    right = np.where(key.mask, key.pattern, np.nan).astype(np.float32)[None]
    wrong = guess._replaced(victim, key, right, 0.5, stream_of(1, "test"))
    assert ((wrong[:, key.mask] != key.pattern[key.mask]).sum(axis=1) <= 2).all()
    assert np.array_equal(np.isnan(wrong), np.isnan(drawn[: len(wrong)]))


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(weak):
    return run_attacks(weak, effort=TINY)


def test_a_report_has_findings_of_every_attack_and_goes_through_json(report):
    assert [f.attack for f in report.findings] == sorted((f.attack for f in report.findings), key=ATTACKS.index)
    assert set(report.seconds) == {f.attack for f in report.findings} == set(ATTACKS)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["effort"]["tries"] == 50
    for f in document["findings"]:
        assert f["task"] in ("secret", "open")
        assert f["meaning"].endswith(".")
        assert 0 <= f["figure"] <= 1


def test_attacks_are_chosen_by_name_and_tell_their_progress(weak):
    told = []
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    found = run_attacks(weak, ["membership"], effort=TINY, progress=lambda what, done: told.append((what, done)))
    assert {f.attack for f in found.findings} == {"membership"}
    assert told == [("membership by secret", 0.0), ("membership by open", 0.5)]
    run_attacks(weak, ["finetune"], effort=TINY)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_is_refused(weak):
    with pytest.raises(InputError, match=r"guess, invert, .*got steal"):
        run_attacks(weak, ["steal"])
    with pytest.raises(InputError, match="at least 1"):
        Effort(tries=0)
    with pytest.raises(InputError, match="tries"):
        guess_keys(weak, tries=0)
    with pytest.raises(InputError, match="restarts"):
        invert_keys(weak, restarts=0)
    with pytest.raises(InputError, match="seed"):
        stream_of(-1, "x")


def test_the_progress_bar_of_attacks_writes_on_stderr_alone(weak, capsys):
    with progress_bar("attack") as progress:
        run_attacks(weak, ["membership"], progress=progress)
    assert capsys.readouterr().out == ""


def test_a_picture_has_a_panel_for_each_attack_and_the_same_bytes_again(report):
    findings = report.to_dict()["findings"]
    whole = draw_attacks(findings)
    assert whole.startswith(b"\x89PNG")
    assert whole == draw_attacks(findings)
    for name in ATTACKS:
        part = draw_attacks([f for f in findings if f["attack"] == name])
        assert part.startswith(b"\x89PNG")
        assert len(part) < len(whole)
