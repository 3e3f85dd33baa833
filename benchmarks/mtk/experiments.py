"""The experiments of `benchmarks.mtk`: data sets, trained settings, and what is measured on them.

An experiment is a function (Bench) -> points; a point is a label and, for each curve, a figure. One Bench stands for
one data set and one seed: each setting is trained once, however many experiments look at it.
"""

import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import chi2_contingency
from scipy.stats.contingency import crosstab

from securemtk.data import DataSet, load
from securemtk.data.base import Labels
from securemtk.mtk.attacks.base import Victim
from securemtk.mtk.attacks.guess import guess as guess_keys
from securemtk.mtk.evaluation.evaluate import (
    Release,
    accuracy,
    attack,
    evaluate,
    opening_rate,
    probabilities,
    release,
    released_accuracy,
)
from securemtk.mtk.evaluation.guarantees import guarantees
from securemtk.mtk.keys.key import TriggerKey, stamp
from securemtk.mtk.training.assembler import AssemblerConfig
from securemtk.mtk.training.decoupling import DecouplingConfig
from securemtk.mtk.training.model import Scores, predict
from securemtk.mtk.training.train import TrainConfig, TrainResult, train
from securemtk.runs.run_folder import Trained, export
from securemtk.serving.session import Session

WRONG = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
# Random patterns for each key and seed: with five seeds 300,000, so that none at all bounds the share by 1e-5.
TRIES = 60_000
# Test samples on which wrong keys are judged, at most.
JUDGED_ON = 300
# Test samples that are asked about under encryption in each state of the keys, at most.
ASKED = 400
# Closed answers through encrypted predictions, for each seed: 10,000 with five.
ANSWERS = 2000

Floats = NDArray[np.float32]
Point = tuple[str, dict[str, float]]


@dataclass(frozen=True)
class Case:
    """A data set, the tasks that are secured in it, and how it is trained.

    Args:
        dataset: seed -> data set; drawn or split anew by each seed where it can be.
        secured: names of the secured tasks.
        config: of the training.
        sizes: key sides (images) or columns (tables) to compare with the default.
        decoupling: thresholds for what counts as telling.
        betas: to compare.
        costly: names of experiments that "all" leaves out here, for the models that they train.
    """

    dataset: Callable[[int], DataSet]
    secured: tuple[str, ...]
    config: TrainConfig
    sizes: tuple[int, ...]
    decoupling: DecouplingConfig = field(default_factory=DecouplingConfig)
    betas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    costly: tuple[str, ...] = ("ablations",)


CASES = {
    # `large` lifts no digit by more than 0.1: a threshold of its own, or nothing would count as telling.
    "digits": Case(
        lambda seed: load("digits"), ("digit", "parity"), TrainConfig(), (3, 4), DecouplingConfig(lift=0.05)
    ),
    "shapes": Case(
        lambda seed: load("shapes-correlated", n_train=3000, n_test=800, seed=seed),
        ("shape", "size", "texture"),
        TrainConfig(epochs=16),
        (3, 8),
        betas=(0.0, 0.5, 1.0),
        costly=("size", "secured", "encrypted", "ablations"),
    ),
    "cancer": Case(lambda seed: load("breast_cancer", seed=seed), ("benign", "size"), TrainConfig(), (4, 8, 24)),
    "wine": Case(lambda seed: load("wine", seed=seed), ("cultivar", "proline"), TrainConfig(), (4, 8, 24)),
}


@dataclass(frozen=True, eq=False)
class Keyed:
    """A data set with room for keys, and a model that was trained on it."""

    data: DataSet
    result: TrainResult

    @property
    def keys(self) -> Mapping[str, TriggerKey]:
        """Task name -> key."""
        return self.result.keys

    def scores(self, x: Floats) -> dict[str, Scores]:
        """Return the scores of all tasks, in the clear."""
        return predict(self.result.model, x)

    def right(self, task: str, x: Floats, rows: slice = slice(None)) -> float:
        """Return the accuracy of a task's sampled answers on test samples, or some of them, as they are here."""
        return released_accuracy(self.scores(x)[task], self.data.y_test[task][rows])

    @property
    def unprotected(self) -> list[str]:
        """Names of the tasks without a key."""
        return [task.name for task in self.result.tasks if not task.secured]


class Bench:
    """One data set at one seed, and the models that were trained on it so far."""

    def __init__(self, name: str, seed: int) -> None:
        self.case, self.seed = CASES[name], seed
        self.data = self.case.dataset(seed)
        self._trained: dict[tuple[tuple[str, ...], TrainConfig], Keyed] = {}

    def keyed(self, secured: tuple[str, ...] | None = None, config: TrainConfig | None = None) -> Keyed:
        """Return the model of a setting; that of the case where nothing else is said."""
        secured = self.case.secured if secured is None else secured
        config = replace(config or self.case.config, seed=self.seed)
        if config.decoupling.beta == 1:
            # Without decoupling its thresholds do nothing; one model serves both.
            config = replace(config, decoupling=DecouplingConfig())
        if (secured, config) not in self._trained:
            data = config.with_room(self.data, secured)
            self._trained[secured, config] = Keyed(data, train(data, secured, config))
        return self._trained[secured, config]


# --- keys that open and close -----------------------------------------------------------------------------------------


def states(bench: Bench) -> Iterator[Point]:
    """Accuracy of each task in each state of the keys, beside plain training and the best guess from open labels."""
    plain, model = bench.keyed(()), bench.keyed()
    base = {task: each.no_key for task, each in evaluate(plain.result.model, plain.data, {}).items()}
    yield "baseline", base
    found = evaluate(model.result.model, model.data, model.keys)
    for state in ("right_key", "all_keys", "no_key", "wrong_random", "wrong_other", "chance"):
        yield state.replace("_", " "), {task: getattr(each, state) for task, each in found.items()}
    rounded = evaluate(model.result.model, model.data, model.keys, how="rounded")
    yield "no key, rounded", {task: rounded[task].no_key for task in model.keys}
    told = guarantees(model.result.model, model.data, model.keys)
    yield "KL(uniform, closed), nats", {task: each.kl for task, each in told.items()}
    yield "T2's bound", {task: each.bound for task, each in told.items()}


def secured(bench: Bench) -> Iterator[Point]:
    """Mean accuracy against the number of secured tasks: opened, closed as released, and of those unprotected."""
    tasks = [task.name for task in bench.data.tasks]
    for n in range(len(tasks) + 1):
        model = bench.keyed(tuple(tasks[:n]))
        found = evaluate(model.result.model, model.data, model.keys)
        kinds = {
            "right key": [found[t].right_key for t in tasks[:n]],
            "no key": [found[t].no_key for t in tasks[:n]],
            "unprotected": [found[t].no_key for t in tasks[n:]],
        }
        yield str(n), {kind: fmean(values) for kind, values in kinds.items() if values}


def size(bench: Bench) -> Iterator[Point]:
    """Accuracy with the right key and with a tenth of it wrong, and random patterns that open, against the key size."""
    for side in (*bench.case.sizes, None):
        model = bench.keyed(config=replace(bench.case.config, key_side=side))
        found = evaluate(model.result.model, model.data, model.keys)
        rng = np.random.default_rng(bench.seed)
        for task, key in model.keys.items():
            width = int(key.mask.any(axis=tuple(range(key.mask.ndim - 1))).sum())
            x = model.data.x_test
            yield (
                f"{width}, {task}",
                {
                    "right key": found[task].right_key,
                    "no key": found[task].no_key,
                    "random patterns that open": opening_rate(model.result.model, model.data, key, tries=1000).share,
                    "10 % wrong": fmean(
                        model.right(task, _partly_wrong(x, key, 0.1, model.data, rng)) for _ in range(20)
                    ),
                },
            )


def error(bench: Bench) -> Iterator[Point]:
    """Accuracy of secured tasks with a damaged key: noise, wrong pixels, shifts, JPEG (of images)."""
    model = bench.keyed()
    for label, damage in _damages(model.data, bench.seed):
        yield label, {task: model.right(task, damage(model.data.x_test, key)) for task, key in model.keys.items()}


Damage = Callable[[Floats, TriggerKey], Floats]


def _damages(data: DataSet, seed: int) -> Iterator[tuple[str, Damage]]:
    rng = np.random.default_rng(seed)
    low, high = data.low, data.high

    def noisy(amount: float) -> Damage:
        def damage(x: Floats, key: TriggerKey) -> Floats:
            stamped = stamp(x, [key])
            noise = rng.uniform(-amount, amount, x.shape) * (high - low)
            return np.where(key.mask, np.clip(stamped + noise, low, high), stamped).astype(np.float32)

        return damage

    def shifted(n: int) -> Damage:
        def damage(x: Floats, key: TriggerKey) -> Floats:
            mask, pattern = (np.roll(value, -n, axis=-1) for value in (key.mask, key.pattern))
            return np.where(mask, pattern, x).astype(np.float32)

        return damage

    yield "right", lambda x, key: stamp(x, [key])
    for amount in (0.02, 0.05, 0.1, 0.2):
        yield f"noise {amount:g}", noisy(amount)
    for share in (0.05, 0.1, 0.25, 0.5):
        yield f"{share:.0%} wrong", lambda x, key, share=share: _partly_wrong(x, key, share, data, rng)
    for n in (1, 2, 3):
        yield f"shift {n}", shifted(n)
    if data.x_test.ndim == 4:
        for quality in (95, 80, 50):
            yield f"JPEG {quality}", lambda x, key, q=quality: _jpeg(stamp(x, [key]), q, low, high)


def _partly_wrong(x: Floats, key: TriggerKey, share: float, data: DataSet, rng: np.random.Generator) -> Floats:
    """Stamp a key into samples of which that share of the values is drawn anew."""
    n = int(key.mask.sum())
    places = np.flatnonzero(key.mask)[rng.permutation(n)[: round(share * n)]]
    pattern = np.array(key.pattern)
    pattern.flat[places] = rng.uniform(data.low, data.high, len(places))
    return np.where(key.mask, pattern, x).astype(np.float32)


def _jpeg(x: Floats, quality: int, low: float, high: float) -> Floats:
    out = np.empty_like(x)
    for i, image in enumerate(np.rint((x - low) / (high - low) * 255).astype(np.uint8)):
        buffer = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=quality)
        pixels = np.asarray(Image.open(buffer), dtype=np.float32)
        out[i] = low + (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)) / 255 * (high - low)
    return out


def similarity(bench: Bench) -> Iterator[Point]:
    """Cosine between the trunk's features under the right key and under one with wrong pixels, beside what it opens."""
    model = bench.keyed()
    rng = np.random.default_rng(bench.seed)
    rows = slice(200)
    x = model.data.x_test[rows]

    def features(samples: Floats) -> Floats:
        with torch.no_grad():
            return model.result.model.trunk(torch.tensor(samples)).flatten(1).numpy()

    for share in WRONG:
        cosines, opened = [], []
        for task, key in model.keys.items():
            altered = _partly_wrong(x, key, share, model.data, rng)
            a, b = features(stamp(x, [key])), features(altered)
            cosines.append(float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()))
            opened.append(model.right(task, altered, rows))
        yield f"{share:.0%} wrong", {"cosine": fmean(cosines), "accuracy as released": fmean(opened)}


def guess(bench: Bench) -> Iterator[Point]:
    """Wrong keys as `securemtk attack` tries them: how many random patterns open, and the best of each kind."""
    model = bench.keyed()
    findings = guess_keys(_victim(model), tries=TRIES, seed=bench.seed)
    for task in model.keys:
        mine = {f.what: f for f in findings if f.task == task}
        alone = mine["random patterns, no other key: share that opens"]
        figures = {"tries": float(alone.details["tries"]), "opened": float(alone.details["opened"])}
        if beside := mine.get("random patterns, beside all other keys: share that opens"):
            figures |= {"opened beside other keys": float(beside.details["opened"])}
        groups = {str(f.details["group"]): f for f in mine.values() if "group" in f.details}
        for group in ("blank", "other tasks'", "shifted", "recoloured"):
            if group in groups:
                figures[f"best {group}"] = groups[group].figure
        yield task, figures


def _victim(model: Keyed) -> Victim:
    """Return a model to be attacked, judged on some of the test samples: thousands of patterns go through each."""
    y_test = {task: y[:JUDGED_ON] for task, y in model.data.y_test.items()}
    return Victim(
        model.result.model, replace(model.data, x_test=model.data.x_test[:JUDGED_ON], y_test=y_test), model.keys
    )


def ablations(bench: Bench) -> Iterator[Point]:
    """What single ingredients of the training are worth: right key, no key, and random patterns that open."""
    settings = {
        "as it is": AssemblerConfig(),
        "no decoys": AssemblerConfig(decoys=0),
        "no mined decoys": AssemblerConfig(mined=0),
        "no recoloured decoys": AssemblerConfig(kinds=(*AssemblerConfig().kinds[:-1], 0.0)),
        "single keys only": AssemblerConfig(multi=0),
        "random labels": AssemblerConfig(targets="random"),
        "fixed labels": AssemblerConfig(targets="fixed"),
    }
    for label, assembler in settings.items():
        model = bench.keyed(config=replace(bench.case.config, assembler=assembler))
        found = evaluate(model.result.model, model.data, model.keys)
        findings = guess_keys(_victim(model), tries=1000, seed=bench.seed)
        for task in model.keys:
            recoloured = next(f for f in findings if f.task == task and f.details.get("group") == "recoloured")
            yield (
                f"{label}, {task}",
                {
                    "right key": found[task].right_key,
                    "all keys": found[task].all_keys,
                    "no key": found[task].no_key,
                    "random patterns that open": next(f.figure for f in findings if f.task == task),
                    "best recoloured": recoloured.figure,
                },
            )


# --- what is told -----------------------------------------------------------------------------------------------------


def released(bench: Bench) -> Iterator[Point]:
    """A closed task's answers, released in plain: their accuracy, and attackers who see all, beside open ones alone."""
    model = bench.keyed()
    rules: tuple[Release, ...] = ("sampled", "rounded")
    for task in model.keys:
        y = model.data.y_test[task]
        for state in ("no key", "other keys"):
            held = [key for name, key in model.keys.items() if name != task] if state == "other keys" else []
            opened = [*model.unprotected, *(key.task for key in held)]
            scores = model.scores(stamp(model.data.x_test, held))
            open_answers = [probabilities(scores[name]) for name in opened]
            base = _attacked(open_answers, y)
            told = attack(np.zeros((len(y), 1)), y, [model.data.y_test[name] for name in opened]).chance
            closed = [name for name in model.keys if name not in opened]
            for rule in rules:
                seen = [release(scores[name], rule) for name in closed]
                found = _attacked([*open_answers, *seen], y)
                yield (
                    f"{task}, {state}, {rule}",
                    {
                        "accuracy": released_accuracy(scores[task], y, rule),
                        "open labels alone": told,
                        "attacker, open answers alone": base,
                        "attacker, all answers": found,
                        "closed answers add": found - base,
                    },
                )


def _attacked(answers: list[NDArray[np.float64]], y: Labels) -> float:
    """Return the better attacker's accuracy."""
    found = attack(np.concatenate(answers, axis=1), y)
    return max(found.logistic, found.boosting)


def beta(bench: Bench) -> Iterator[Point]:
    """What an attacker gains on closed tasks from released open answers, and what those are worth, against beta."""
    for value in bench.case.betas:
        decoupling = replace(bench.case.decoupling, beta=value)
        yield str(value), dict(_leak(bench.keyed(config=replace(bench.case.config, decoupling=decoupling))))


def _leak(model: Keyed) -> Iterator[tuple[str, float]]:
    """Give figures of a decoupled model without keys: attacks on each closed task, utility of each open one."""
    data, result = model.data, model.result
    scores = model.scores(data.x_test)
    sources = [] if result.decoupling is None else result.decoupling.sources(list(result.keys))
    answers = np.concatenate(
        [release(scores[t], "sampled" if t in sources else "raw") for t in model.unprotected], axis=1
    )
    for task in result.keys:
        yield f"attacker's gain on {task}", attack(answers, data.y_test[task]).gain
    opened = model.scores(stamp(data.x_test, result.keys.values()))
    for task in model.unprotected:
        y = data.y_test[task]
        own = released_accuracy(scores[task], y) if task in sources else accuracy(scores[task], y)
        yield f"{task} without keys", own
        yield f"{task} with all keys", accuracy(opened[task], y)


# --- under encryption -------------------------------------------------------------------------------------------------


def encrypted(bench: Bench) -> Iterator[Point]:
    """Accuracy of each task through encrypted predictions, and whether closed answers depend on anything."""
    model = bench.keyed()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        figures = evaluate(model.result.model, model.data, model.keys)
        export(Trained(model.data, model.result, figures), folder / "bundle")
        paths = []
        for task, key in model.keys.items():
            paths.append(folder / f"{task}.key")
            key.save(paths[-1])
        with Session(key_files=paths) as session:
            bundle = session.load(folder / "bundle")
            names = list(model.keys)
            for granted in ([], *([n] for n in names), names):
                scores = bundle.predict(model.data.x_test[:ASKED], open_tasks=granted)
                label = " + ".join(granted) or "no key"
                yield label, {t: accuracy(s, model.data.y_test[t][:ASKED]) for t, s in scores.items()}
            rows = np.arange(ANSWERS) % len(model.data.x_test)
            closed = bundle.predict(model.data.x_test[rows], open_tasks=[])
    plain = model.scores(model.data.x_test[rows])
    yield (
        f"{ANSWERS:,} closed answers: p of independence from the label",
        {task: independence(closed[task].argmax(1), model.data.y_test[task][rows]) for task in names},
    )
    yield (
        f"{ANSWERS:,} closed answers: p of independence from the network's own answer",
        {task: independence(closed[task].argmax(1), plain[task].argmax(1)) for task in names},
    )


def independence(answers: Labels, y: Labels) -> float:
    """Return the p value of Pearson's chi-squared test that answers are independent of labels."""
    counts = crosstab(answers, y).count
    return float(chi2_contingency(counts, correction=False).pvalue) if min(counts.shape) > 1 else 1.0


EXPERIMENTS: Mapping[str, Callable[[Bench], Iterator[Point]]] = {
    each.__name__: each
    for each in (states, released, guess, beta, encrypted, error, similarity, size, secured, ablations)
}
