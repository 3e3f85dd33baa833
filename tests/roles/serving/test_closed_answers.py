"""Closed answers under encryption tell nothing, however much the network itself would tell."""

import numpy as np
import onnxruntime
import small_models
from scipy.stats import chi2_contingency, ks_2samp
from scipy.stats.contingency import crosstab

from securemtk.mtk.keys.key import stamp
from securemtk.serving.session import Session

N = 10_000
# The noise is drawn anew: some 150 tests fail by chance once in 10^7 runs.
LEAST_P = 1e-9


def leading(scores: np.ndarray) -> np.ndarray:
    """Return which score lies furthest above its mean: some class of an untrained network may always win."""
    return (scores - scores.mean(axis=0)).argmax(axis=1)


def dependence(answers: np.ndarray, plain: np.ndarray) -> list[float]:
    """Return p values: of leading classes, of each score's law for two sorts of samples, of linear dependence."""
    first = leading(plain) == leading(plain)[0]
    classes = chi2_contingency(crosstab(leading(answers), leading(plain)).count).pvalue
    laws = [ks_2samp(column[first], column[~first]).pvalue for column in answers.T]
    # A sum of independent terms, so normal with deviation 1 / sqrt(n) under independence.
    linear = np.corrcoef(answers.T, plain.T)[: answers.shape[1], answers.shape[1] :]
    return [classes, *laws, *(2 * np.exp(-(linear.ravel() ** 2) * len(plain) / 2))]


def test_ten_thousand_closed_answers_of_a_network_that_never_closes_depend_on_nothing(tmp_path):
    keys = small_models.make_bundle(tmp_path)
    x = np.random.default_rng(0).uniform(-1, 1, (N, *small_models.SHAPE)).astype(np.float32)
    plain = onnxruntime.InferenceSession(small_models.multitask()[0])
    names = [output.name for output in plain.get_outputs()]
    with Session(key_files=tmp_path / "keys") as session:
        model = session.load(tmp_path / "bundle")
        closed, opened = model.predict(x), model.predict(x[:1000], open_tasks=list(keys))
    asked = {"closed": (closed, x), "opened": (opened, stamp(x[:1000], keys.values()))}
    for state, (answers, samples) in asked.items():
        truth = dict(zip(names, plain.run(None, {"x": samples}), strict=True))
        for name in keys:
            found = dependence(answers[name], truth[name])
            if state == "closed":
                assert min(found) > LEAST_P, name
            else:
                # The same tests see at once what an open answer tells.
                assert found[0] < LEAST_P, name
                assert min(found[-answers[name].shape[1] :]) < LEAST_P, name
