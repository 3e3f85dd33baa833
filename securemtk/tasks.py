"""What a multi-task model answers: one `Task` for each head."""

from dataclasses import dataclass

from protocols.errors import InputError


@dataclass(frozen=True)
class Task:
    """One classification task.

    Args:
        name: identifier, also the name of the ONNX output; letters, digits, "-" and "_".
        classes: number of classes, at least 2.
        secured: whether the task answers truly only with its trigger-key.
    """

    name: str
    classes: int
    secured: bool = False

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise InputError(f"a task's name must consist of letters, digits, '-' and '_'; got {self.name!r}")
        if self.classes < 2:
            raise InputError(f"task {self.name!r} must have at least 2 classes; got {self.classes}")
