"""Will an encrypted prediction answer right? A model on sample data: as onnxruntime has it, and in fixed point.

Everything here runs in the clear, for whoever holds both the model and the data.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from protocols import limits
from protocols.running import backend, precision, ranges
from protocols.running.precision import MOST_ERROR, LayerError
from protocols.running.ranges import LayerRange
from protocols.two_party.weights import parameter_bits
from securemtk.onnx.building.scales import LossyConstant, lossy
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.model import runtime
from securemtk.onnx.model.declared import bound
from securemtk.onnx.model.graph import ValueInfo
from securemtk.onnx.model.reading import read_proto

Arrays = Mapping[str, NDArray[np.floating]]
_SHOWN = 5


@dataclass(frozen=True)
class AnswerError:
    """What of an output differs under encryption, on sample data.

    Args:
        name: the output.
        error: greatest difference from onnxruntime's answer.
        largest: greatest magnitude of onnxruntime's answers.
    """

    name: str
    error: float
    largest: float

    @property
    def share(self) -> float:
        """Return error / largest; an error of less than a few units in the last place is none."""
        if self.error <= _UNITS:
            return 0.0
        return min(self.error / self.largest, 1e9) if self.largest else 1e9


# An answer that is smaller than a few units in the last place is told by the layers' errors.
_UNITS = 4 * 2.0**-limits.FRAC_BITS


@dataclass(frozen=True)
class Examination:
    """What sample data say of a model under encryption.

    Args:
        ranges: how near each layer came to the bounds of fixed point.
        errors: each layer's own error.
        answers: the outputs' errors against onnxruntime; empty where that does not run the model.
        constants: parameters of which parts are too small for their fraction bits.
    """

    ranges: tuple[LayerRange, ...] = ()
    errors: tuple[LayerError, ...] = ()
    answers: tuple[AnswerError, ...] = ()
    constants: tuple[LossyConstant, ...] = ()

    @property
    def in_range(self) -> bool:
        """Whether all values stayed below their bounds; True where nothing was measured."""
        return all(row.headroom >= 0 for row in self.ranges)

    @property
    def right(self) -> bool:
        """Whether all answers are within `MOST_ERROR` of the largest; True where nothing was measured."""
        return all(row.share <= MOST_ERROR for row in self.answers)

    def wrong(self) -> str:
        """Return what is wrong with the answers and why, "" where they are right and all values in range."""
        texts = []
        beyond = [row.name for row in self.ranges if row.headroom < 0]
        if beyond:
            texts.append(
                f"values of {_listed(beyond)} reach the bounds of fixed point: scale the model or its input down"
            )
        if not self.right:
            worst = max(self.answers, key=lambda row: row.share)
            off = "its size" if worst.share > 1 else f"{100 * worst.share:.2g} % of the largest"
            texts.append(f"output {worst.name!r} is off by {worst.error:.3g}, {off}")
        return "; ".join(texts)

    def hints(self) -> Iterator[str]:
        """Give what to look at: layers with errors of their own, lost features and constants.

        Where all answers are far better than they have to be, what few bits are left in a layer does no harm.
        """
        harmless = bool(self.answers) and all(row.share <= MOST_ERROR / 4 for row in self.answers)
        for kind in (True, False):
            rows = [e for e in self.errors if e.share > MOST_ERROR and (e.op == "input") == kind]
            if harmless or not rows:
                continue
            names = _listed([row.name for row in rows])
            worst = max(rows, key=lambda row: row.share)
            what = "features of the input are" if kind else "layers are"
            more = "scale them up, in the model's input" if kind else "scale their input, or look at its range"
            least = 2.0**-limits.FRAC_BITS
            yield (
                f"{what} off by more than {100 * MOST_ERROR:g} % of their largest value (a unit of fixed point is "
                f"{least:.2g}): {names}; {worst.name} by {worst.error:.3g} of {worst.largest:.3g}: {more}"
            )
        for row in self.answers:
            if row.error <= _UNITS and row.error > MOST_ERROR * row.largest:
                yield f"output {row.name!r} is at most {row.largest:.2g}, a few units of fixed point: scale it up"
        if self.constants:
            names = _listed([f"{row.layer} ({row.role}, {row.count} of {row.of})" for row in self.constants])
            yield f"constants too small for their fraction bits: {names}; scale them up, and what is behind them down"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def examine(
    model: ModelProto, imported: Imported, inputs: Arrays, protocol: str = "fss", comparison_bits: int = 32
) -> Examination:
    """Run a model on data in the clear, as onnxruntime does and as an encrypted prediction does.

    Args:
        model: as `read_proto` returns it, with public inputs bound.
        imported: what it became.
        inputs: each of the program's inputs -> float array (n, *sample), as `input_arrays` returns them.
        protocol, comparison_bits: of the prediction.

    Raises:
        UnsupportedError: an unknown protocol.
    """
    backend.require(protocol)
    program, params = imported.program, imported.params
    errors, answers = precision.measure(program, params, [inputs], imported.exact, protocol, comparison_bits)
    wanted = expected(model, imported, inputs)
    rows = tuple(_answer(name, answers[name], wanted[name]) for name in answers if name in wanted)
    steps = ranges.steps_of(protocol)
    measured = ranges.measure(program, params, [inputs], comparison_bits)
    return Examination(
        tuple(row for row in measured if row.step in steps), errors, rows, lossy_constants(imported, comparison_bits)
    )


def _answer(name: str, got: NDArray[np.float64], wanted: NDArray[np.float64]) -> AnswerError:
    finite = np.isfinite(wanted)
    error = np.where(finite, np.abs(got.reshape(wanted.shape) - np.where(finite, wanted, 0.0)), np.inf)
    return AnswerError(name, float(error.max(initial=0.0)), float(np.abs(wanted[finite]).max(initial=0.0)))


def lossy_constants(imported: Imported, comparison_bits: int = limits.COMPARISON_BITS) -> tuple[LossyConstant, ...]:
    """Return the parameters of which rows, columns or elements are too small for the fraction bits that they have."""
    bits = parameter_bits(imported.program, comparison_bits)
    return tuple(
        found
        for layer in imported.program.layers
        for role, name in layer.params.items()
        for found in lossy(layer, role, imported.params[name], bits[name])
    )


def expected(model: ModelProto, imported: Imported, inputs: Arrays) -> dict[str, NDArray[np.float64]]:
    """Return output name -> onnxruntime's answers as float64 (n, ...); empty where it does not run the model."""
    program, n = imported.program, len(next(iter(inputs.values())))
    size = 1 if program.whole else imported.batch or n
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in program.outputs}
    try:
        probe = runtime.prober(model)
        for begin in range(0, n, size):
            places = np.minimum(np.arange(begin, begin + size), n - 1)
            feeds = {x.name: _fed(x, inputs[x.name][places], whole=program.whole) for x in imported.inputs}
            made = probe(list(program.outputs), feeds)
            for name, value in zip(program.outputs, made, strict=True):
                array = np.asarray(value, dtype=np.float64)
                found[name].append(array[None] if program.whole else array[: n - begin])
    except runtime.ERRORS:
        return {}
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _fed(x: ValueInfo, values: NDArray[np.floating], *, whole: bool) -> NDArray[np.generic]:
    return (values[0] if whole else values).astype(x.dtype)


class Examiner:
    """A model, read here once, to examine data with.

    Args:
        data: the bytes of an ONNX file.
        shapes, public: as `load_onnx` takes them.

    Raises:
        as `load_onnx`.
    """

    def __init__(
        self,
        data: bytes,
        shapes: Mapping[str, Sequence[int]] | None = None,
        public: Mapping[str, NDArray[np.generic]] | None = None,
    ) -> None:
        whole = None if shapes is None else {name: tuple(shape) for name, shape in shapes.items()}
        self._imported = load_onnx(data, whole, public)
        model = read_proto(data)
        self._model = bound(model, public) if public else model

    def examine(self, inputs: Arrays, protocol: str = "fss", comparison_bits: int = 32) -> Examination:
        """Return what `examine` finds."""
        return examine(self._model, self._imported, inputs, protocol, comparison_bits)
