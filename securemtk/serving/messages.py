"""Everything that keeper, authority and user say to each other, beside tensors.

Each message is defined here once: written, read and checked, and sized for the estimator by the same record. The rules
of its fields hold at receipt, whoever sent it.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from protocols import limits
from protocols.errors import IntegrityError, SecureError
from protocols.net.frames import Count, Index, Message, Record, Shape
from protocols.program.program import Program
from securemtk.onnx.manifest import Manifest
from securemtk.onnx.model.graph import ValueInfo
from securemtk.onnx.model.inputs import NUMBERS
from securemtk.serving.start_messages import check_protocol

Bits = Annotated[int, msgspec.Meta(ge=limits.FEWEST_COMPARISON_BITS, le=limits.MOST_COMPARISON_BITS)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
# Of tasks to open: as many as a manifest may have, and more.
Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=4096)]


# --- loading a model ------------------------------------------------------------------------------------------------


class Load(Message, frozen=True):
    """The user to the keeper: load a model. Arrays: the bytes of an ONNX file where there is no name, then `public`.

    Args:
        protocol: by name.
        comparison_bits: width of comparisons.
        model: by which the keeper's `ModelStore` knows it; None for a file that comes as an array.
        shapes: input name -> whole shape; None where nothing is told.
        public: names and dtypes of inputs whose values come as arrays.
    """

    kind: ClassVar[str] = "load"
    holds_arrays: ClassVar[bool] = True

    protocol: str
    comparison_bits: Bits
    model: str | None = None
    shapes: dict[str, Shape] | None = None
    public: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_protocol(self.protocol)
        if len({name for name, _ in self.public}) != len(self.public):
            raise ValueError("public inputs must have distinct names")
        if any(dtype not in NUMBERS for _, dtype in self.public):
            raise ValueError(f"public inputs must be of {', '.join(NUMBERS)}")

    @property
    def n_arrays(self) -> int:
        """How many arrays come with it."""
        return (self.model is None) + len(self.public)


class Declared(Record, frozen=True, array_like=True):
    """An input or output, as an ONNX file declares it: name, shape and dtype."""

    name: str
    shape: Shape | None
    dtype: str

    @classmethod
    def of(cls, infos: Sequence[ValueInfo]) -> "tuple[Declared, ...]":
        """Return inputs or outputs as they travel."""
        return tuple(cls(info.name, info.shape, info.dtype) for info in infos)

    def info(self) -> ValueInfo:
        """Return what `of` was given."""
        return ValueInfo(self.name, self.shape, self.dtype)


class PublicModel(Message, frozen=True):
    """The keeper to user and authority: a model that it has loaded, as all three may know it.

    Args:
        model: its number in this session.
        protocol: by name.
        comparison_bits: width of comparisons.
        program: as `Program.to_json` writes it.
        manifest: as `Manifest.to_json` writes it; None for a plain ONNX file.
        inputs, outputs: as the file declares them.
    """

    kind: ClassVar[str] = "model"

    model: Index
    protocol: str
    comparison_bits: Bits
    program: str
    manifest: str | None = None
    inputs: tuple[Declared, ...] = ()
    outputs: tuple[Declared, ...] = ()

    def __post_init__(self) -> None:
        check_protocol(self.protocol)

    def read_program(self) -> Program:
        """Return the program; raise IntegrityError where it is none."""
        try:
            return Program.from_json(self.program)
        except (RecursionError, OverflowError) as error:
            raise IntegrityError(f"a program must be JSON as to_json writes it; {type(error).__name__}") from None

    def read_manifest(self) -> Manifest | None:
        """Return the manifest; raise IntegrityError where it is none."""
        if self.manifest is None:
            return None
        try:
            return Manifest.from_json(self.manifest)
        except (SecureError, RecursionError, OverflowError, ValueError) as error:
            raise IntegrityError(f"the keeper must send a manifest as to_json writes it; {error}") from None


class NeedsMore(Message, frozen=True):
    """The keeper to the user: what it must be told of the inputs before the model can be loaded.

    Args:
        why: what stands in the way.
        shapes: whether the whole shape of each input is needed.
        public: names of inputs whose values are needed.
    """

    kind: ClassVar[str] = "needs"

    why: str
    shapes: bool
    public: tuple[str, ...]


class AskKnown(Message, frozen=True):
    """The user to the authority: take the model that the keeper tells of."""

    kind: ClassVar[str] = "known"


class Known(Message, frozen=True):
    """The authority to the user: it knows the model.

    Args:
        needs_grant: whether each of its predictions must be allowed when it is made, whatever was dealt before.
    """

    kind: ClassVar[str] = "known"

    needs_grant: bool


# --- a prediction ---------------------------------------------------------------------------------------------------


class Prepare(Message, frozen=True):
    """The user to the authority: deal a prediction. Who asks, the certificate says.

    Args:
        prediction: its number; numbers only grow.
        model: number of the model.
        batch: samples.
        open_tasks: names of the tasks to open.
        use: whether it is used at once; False where it is dealt ahead of need.
    """

    kind: ClassVar[str] = "prepare"
    # The keeper shall not learn it, by a log neither.
    hidden: ClassVar[frozenset[str]] = frozenset({"open_tasks"})

    prediction: Index
    model: Index
    batch: Count
    open_tasks: Names = ()
    use: bool = False


class Use(Message, frozen=True):
    """The user to the authority: allow a prediction now that was dealt ahead."""

    kind: ClassVar[str] = "use"

    prediction: Index


class Granted(Message, frozen=True):
    """The authority to the user: a prediction will be dealt, or may be used."""

    kind: ClassVar[str] = "granted"

    prediction: Index


class Allowed(Message, frozen=True):
    """The authority to the keeper: a prediction of a model that needs grants may run."""

    kind: ClassVar[str] = "allowed"

    prediction: Index


class Predict(Message, frozen=True):
    """The user to the keeper: compute a prediction that was dealt.

    Args:
        prediction: its number.
        model: number of the model.
        batch: samples.
    """

    kind: ClassVar[str] = "predict"

    prediction: Index
    model: Index
    batch: Count


class Ready(Message, frozen=True):
    """The keeper to the user: its correlations are here, and how many bytes they were on the way."""

    kind: ClassVar[str] = "ready"

    prediction: Index
    bytes: Index


class Drop(Message, frozen=True):
    """The user to the keeper: throw away what was dealt for a prediction."""

    kind: ClassVar[str] = "drop"

    prediction: Index
