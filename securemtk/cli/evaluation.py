"""The figures of a run on its test part, as `train` and `evaluate` show them."""

from dataclasses import asdict
from typing import Any

from securemtk.cli.tables import accuracy_table, emit, rows_table
from securemtk.mtk.evaluation.evaluate import opening_rate
from securemtk.runs.run_folder import Trained, task_figures


def show_evaluation(as_json: bool, trained: Trained, tries: int = 0) -> None:
    """Print the accuracies of a run; with `tries` also how many random patterns open each task."""
    result = trained.result
    tasks = {name: task_figures(figures) for name, figures in trained.metrics.items()}
    document: dict[str, Any] = {"tasks": tasks}
    if tries:
        document["random_patterns"] = {
            name: asdict(opening_rate(result.model, trained.dataset, key, tries=tries))
            for name, key in result.keys.items()
        }

    def show() -> None:
        names = ("chance", "no_key", "right_key", "wrong_random", "wrong_other", "all_keys")
        accuracy_table(tasks, {name: name.replace("_", " ") for name in names})
        guesses = document.get("random_patterns", {})
        rows_table("random patterns in a key's place", [{"task": name} | rate for name, rate in guesses.items()])

    emit(as_json, document, show)
