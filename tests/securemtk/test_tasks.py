"""What a task is made of."""

import pytest

from securemtk import InputError, Task


def test_labels_are_one_for_each_class():
    assert Task.named("digit", ["no", "yes"]) == Task("digit", 2, labels=("no", "yes"))
    assert Task("digit", 2).labels is None


@pytest.mark.parametrize("labels", [("a",), ("a", "a"), ("a", ""), ("a", 1), ["a", "b"], "ab", ("a", "b", "c")])
def test_labels_that_do_not_name_the_classes_are_refused(labels):
    with pytest.raises(InputError, match="labels of task 'digit' must be 2 unique names"):
        Task("digit", 2, labels=labels)
