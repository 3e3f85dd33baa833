"""What a multi-task model answers: one `Task` for each head."""

from collections.abc import Sequence
from dataclasses import dataclass

from protocols.errors import InputError


@dataclass(frozen=True)
class Task:
    """One classification task.

    Args:
        name: identifier, also the name of the ONNX output; letters, digits, "-" and "_".
        classes: number of classes, at least 2.
        secured: whether the task answers truly only with its trigger-key.
        labels: names of the classes, in order, distinct; None where they have none. They are as public as the task: a
            bundle's manifest tells them.

    Raises:
        InputError: a field does not fit this description.
    """

    name: str
    classes: int
    secured: bool = False
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise InputError(f"a task's name must consist of letters, digits, '-' and '_'; got {self.name!r}")
        if self.classes < 2:
            raise InputError(f"task {self.name!r} must have at least 2 classes; got {self.classes}")
        if self.labels is None:
            return
        texts = isinstance(self.labels, tuple) and all(isinstance(label, str) and label for label in self.labels)
        if not texts or not len(self.labels) == len(set(self.labels)) == self.classes:
            raise InputError(
                f"labels of task {self.name!r} must be {self.classes} unique names, as a tuple of texts; "
                f"got {self.labels!r}"
            )

    @classmethod
    def named(cls, name: str, labels: Sequence[str]) -> "Task":
        """Return the task with a class for each of these names, in order.

        Args:
            name: of the task.
            labels: names of its classes, distinct.
        """
        return cls(name, len(labels), labels=tuple(labels))
