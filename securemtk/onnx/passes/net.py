"""A model's steps as passes see them: immutable, with the questions that every pass asks."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from protocols.program.program import Shape
from securemtk.onnx.building.registry import Step


@dataclass(frozen=True)
class Net:
    """Steps in an order in which every value is made before it is used.

    Args:
        steps: the steps; what makes a value is named by the value.
        inputs: shape of one sample of each input of the model.
        outputs: names that must still be made.
    """

    steps: tuple[Step, ...]
    inputs: Mapping[str, Shape]
    outputs: tuple[str, ...]

    def having(self, steps: Sequence[Step]) -> "Net":
        """Return the net with other steps."""
        return replace(self, steps=tuple(steps))

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of one sample of each value."""
        return {**self.inputs, **{step.output: step.shape for step in self.steps}}

    def uses(self) -> Counter[str]:
        """Return how often each value is used, an output of the model included."""
        return Counter(x for step in self.steps for x in step.inputs) + Counter(self.outputs)

    def users(self, value: str) -> list[Step]:
        """Return the steps that use a value."""
        return self._users.get(value, [])

    @functools.cached_property
    def _users(self) -> dict[str, list[Step]]:
        users: dict[str, list[Step]] = {}
        for step in self.steps:
            for name in set(step.inputs):
                users.setdefault(name, []).append(step)
        return users

    def layout(self) -> list[object]:
        """Return all of the net but its parameters' values: what is public."""
        return [(s.op, s.inputs, s.output, s.shape, sorted(s.params), dict(s.attrs)) for s in self.steps]


Pass = Callable[[Net], Net]


def join_pairs(net: Net, rule: Callable[[Step, Step], Sequence[Step] | None]) -> Net:
    """Replace each step and the one before it, whose result nothing else uses, by what `rule(before, step)` returns.

    Args:
        net: as it is.
        rule: returns steps that make the second one's output, or None to leave both.
    """
    uses = net.uses()
    kept: dict[str, Step] = {}
    for step in net.steps:
        before = kept.get(step.inputs[0])
        joined = rule(before, step) if before is not None and uses[before.output] == 1 else None
        if before is None or joined is None:
            kept[step.output] = step
        else:
            del kept[before.output]
            kept |= {x.output: x for x in joined}
    return net.having(list(kept.values()))


def renamed(net: Net, names: Mapping[str, str]) -> Net:
    """Let every step use other values: old name -> new name.

    Args:
        net: as it is.
        names: old name of a value -> new one.
    """
    return net.having([replace(s, inputs=tuple(names.get(x, x) for x in s.inputs)) for s in net.steps])
