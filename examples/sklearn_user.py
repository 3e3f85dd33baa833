"""Models of scikit-learn under encryption: trained as always, exported by skl2onnx, asked by a user who shows nothing.

    pip install 'securemtk[sklearn]'
    python -m examples.sklearn_user

`exported` is all that the model's owner does, `asked` all that the user does.
"""

import numpy as np
from numpy.typing import NDArray
from skl2onnx import to_onnx
from sklearn.base import ClassifierMixin
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from securemtk.serving.onnxruntime_api import InferenceSession

Floats = NDArray[np.float32]
N_TRAIN, N_ASKED = 1000, 20


def digits() -> tuple[Floats, NDArray[np.int64]]:
    """Return images (n, 64) of 0 to 1 and their digits."""
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y


def models() -> dict[str, ClassifierMixin]:
    """Return untrained classifiers by name."""
    return {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression()),
        "linear SVC": LinearSVC(random_state=0),
        "MLP": MLPClassifier((32,), solver="lbfgs", max_iter=1000, alpha=0.1, random_state=0),
    }


def exported(model: ClassifierMixin, x: Floats) -> bytes:
    """Return a trained model as ONNX; it has labels and probabilities (of a LinearSVC: scores) as outputs."""
    data: bytes = to_onnx(model, x[:1]).SerializeToString()
    return data


def asked(model: bytes, x: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Return labels (n,) and scores (n, classes) of images (n, 64), which the model's side never sees."""
    with InferenceSession(model) as session:
        labels, scores = session.run(None, {"X": x})
    return labels, scores


def main() -> None:
    """Train, export and ask each model, and compare with scikit-learn."""
    x, y = digits()
    samples = x[-N_ASKED:]
    for name, model in models().items():
        model.fit(x[:N_TRAIN], y[:N_TRAIN])
        labels, scores = asked(exported(model, x), samples)
        expected = model.decision_function(samples) if name == "linear SVC" else model.predict_proba(samples)
        difference, same = np.abs(scores - expected).max(), (labels == model.predict(samples)).sum()
        if difference > 0.01 or same < N_ASKED:
            raise SystemExit(f"{name}: the result must be scikit-learn's; it differs by {difference}")
        print(
            f"{name:>20}: {same} of {N_ASKED} labels as scikit-learn's, largest difference of a score {difference:.1e}"
        )


if __name__ == "__main__":
    main()
