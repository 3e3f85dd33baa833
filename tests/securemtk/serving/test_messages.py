"""What roles and their starter say: typed, checked at receipt, and silent about secrets."""

import itertools
import math
import sys

import msgspec
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.pretty import pretty_repr

from protocols.errors import InputError, IntegrityError
from protocols.net import frames
from protocols.net.frames import Message, Refused, describe, from_line, read, to_line
from securemtk.crypten_backend.messages import Addresses, Call, PartySettings, Result
from securemtk.onnx.importer import load_onnx
from securemtk.serving.messages import (
    Allowed,
    AskKnown,
    Declared,
    Drop,
    Granted,
    Known,
    Load,
    NeedsMore,
    Predict,
    Prepare,
    PublicModel,
    Ready,
    Use,
)
from securemtk.serving.parties.orders import PredictionKind, PreparedPrediction, predict_of, prepare_of
from securemtk.serving.start_messages import AuthoritySettings, KeeperAt, KeeperSettings, Listening

PROGRAM = load_onnx(small_models.mlp()).program.to_json()
COMMON = {
    "credentials": {"key": "-----BEGIN PRIVATE KEY-----"},
    "host": "127.0.0.1",
    "timeout_s": 60.0,
    "start_timeout_s": 0.5,
    "threads": 1,
}
SHAPES = (Declared("x", (1, 8), "float32"), Declared("z", None, "int64"))
MESSAGES = [
    Load("fss", 32, "/models/digits"),
    Load("crypten", 20, None, {"x": (2, 3)}, (("axes", "int64"), ("s", "bool"))),
    PublicModel(0, "fss", 32, PROGRAM, None, SHAPES, SHAPES[:1]),
    NeedsMore("the shape of 'x'", shapes=True, public=("axes",)),
    AskKnown(),
    Known(needs_grant=True),
    Prepare(3, 0, 64, ("digit", "parity"), use=True),
    Prepare(4, 1, 1),
    Use(3),
    Granted(3),
    Allowed(1 << 40),
    Predict(3, 0, 64),
    Ready(3, 123_456_789),
    Drop(3),
    KeeperSettings(**COMMON, protocol="fss", store="/tmp/store", slots=2, needs_grant=True),
    AuthoritySettings(
        **COMMON, protocol="crypten", key_files=("a.key",), passphrase="sesame", grants="/g.json", port=65535
    ),
    Listening(("127.0.0.1", 40000)),
    KeeperAt(("127.0.0.1", 40000)),
    PartySettings(**COMMON, role="party0"),
    Addresses({"party0": ("127.0.0.1", 1)}),
    Call("__main__", "/a/b.py", "program", ("/a",), "fss", {"tuple": [1, "sesame"]}),
    Result({"list": [1.5, None]}),
]
KINDS = sorted({type(message) for message in MESSAGES}, key=lambda kind: kind.__name__)


def test_every_message_has_an_example_here():
    modules = {kind.__module__ for kind in KINDS}
    assert {x for module in modules for x in vars(sys.modules[module]).values() if is_message_of(x, module)} == {*KINDS}


def is_message_of(x: object, module: str) -> bool:
    return isinstance(x, type) and issubclass(x, Message) and x.__module__ == module and x.kind != ""


def heard(text: bytes, *kinds) -> Message:
    return read(frames.decode(text, bytearray(), "peer"), "peer", *kinds).message


def altered(message: Message, **fields) -> bytes:
    """Return a message as another program would write it, with other fields."""
    raw = {**msgspec.json.decode(msgspec.json.encode(message)), **fields}
    return msgspec.json.encode({"kind": message.kind, "meta": raw, "arrays": []})


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_read_as_it_was_written_and_is_as_long_as_it_says(message):
    text = describe(message.kind, message)
    assert heard(text, type(message)) == message
    assert from_line(to_line(message), "peer", Refused, type(message)) == message
    assert message.frame_bytes() == frames.HEADER.size + len(text)
    assert to_line(message).count(b"\n") == 1


def test_kinds_tell_messages_of_one_direction_apart():
    to_role = ([Load, Predict, Drop], [AskKnown, Prepare, Use], [PublicModel, NeedsMore, Refused], [Known, Granted])
    for kinds in (*to_role, [KeeperSettings, AuthoritySettings, PartySettings], [Listening, Refused]):
        assert all(a.kind != b.kind for a, b in itertools.combinations(kinds, 2))


WRONG = [
    (Load("fss", 32, "m"), {"protocol": "magic"}),
    (Load("fss", 32, "m"), {"protocol": ["fss"]}),
    *((Load("fss", 32, "m"), {"comparison_bits": bits}) for bits in (0, -1, 19, 41, 32.0, "32", True, None, 10**400)),
    (Load("fss", 32, "m"), {"model": 3}),
    (Load("fss", 32, "m"), {"shapes": {"x": [-1]}}),
    (Load("fss", 32, "m"), {"shapes": {"x": [1] * 65}}),
    (Load("fss", 32, "m"), {"public": [["axes", "object"]]}),
    (Load("fss", 32, "m"), {"public": [["axes", "int64"], ["axes", "int64"]]}),
    (PublicModel(0, "fss", 32, "{}"), {"protocol": "magic"}),
    (PublicModel(0, "fss", 32, "{}"), {"comparison_bits": 64}),
    (PublicModel(0, "fss", 32, "{}"), {"model": -1}),
    (PublicModel(0, "fss", 32, "{}"), {"inputs": [["x", [1], "float32", 0]]}),
    *((Prepare(0, 0, 1), {"batch": n}) for n in (0, -1, 1.5, 1.0, "1", True, None, 1 << 60, 10**400)),
    *((Prepare(0, 0, 1), {"prediction": n}) for n in (-1, 0.5, "0", False, 1 << 60)),
    (Prepare(0, 0, 1), {"keys": "digit"}),
    (Prepare(0, 0, 1), {"keys": [""]}),
    (Prepare(0, 0, 1), {"keys": ["a" * 300]}),
    (Prepare(0, 0, 1), {"keys": ["a"] * 5000}),
    (Prepare(0, 0, 1), {"use": 1}),
    (Predict(0, 0, 1), {"batch": 0}),
    (Predict(0, 0, 1), {"model": None}),
    (Ready(0, 1), {"bytes": -1}),
    (Known(needs_grant=True), {"needs_grant": "no"}),
    (Listening(("h", 1)), {"address": ["h", 65536]}),
    (Listening(("h", 1)), {"address": ["h"]}),
    (Listening(("h", 1)), {"address": ["h", 1, 2]}),
    (KeeperSettings(**COMMON, protocol="fss"), {"protocol": "magic"}),
    (KeeperSettings(**COMMON, protocol="fss"), {"threads": 0}),
    (KeeperSettings(**COMMON, protocol="fss"), {"timeout_s": 0}),
    (KeeperSettings(**COMMON, protocol="fss"), {"timeout_s": -1.5}),
    (AuthoritySettings(**COMMON, protocol="fss"), {"passphrase": 7}),
    (PartySettings(**COMMON, role="party0"), {"role": 0}),
    (Call("m", None, "f", (), "fss", 1), {"protocol": "magic"}),
    (Granted(0), {"more": 1}),
]


@pytest.mark.parametrize(("message", "fields"), WRONG)
def test_a_field_that_breaks_its_rule_is_an_error_that_does_not_tell_its_value(message, fields):
    with pytest.raises(IntegrityError, match=f"^peer must send '{message.kind}' with fields that keep its rules"):
        heard(altered(message, **fields), type(message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_field_that_is_missing_or_unknown_is_an_error(message):
    fields = msgspec.json.decode(msgspec.json.encode(message))
    needed = [f.name for f in msgspec.structs.fields(message) if f.required]
    for name in needed:
        left = {key: value for key, value in fields.items() if key != name}
        text = msgspec.json.encode({"kind": message.kind, "meta": left, "arrays": []})
        with pytest.raises(IntegrityError, match="peer must send"):
            heard(text, type(message))
    with pytest.raises(IntegrityError, match="peer must send"):
        heard(altered(message, unheard_of=1), type(message))


def test_what_is_printed_of_messages_has_no_secret():
    said = " ".join([*map(repr, MESSAGES), *map(pretty_repr, MESSAGES)])
    for secret in ("PRIVATE", "sesame", "parity"):
        assert secret not in said
    assert "passphrase=<hidden>" in said
    assert "open_tasks=<hidden>" in said  # which tasks a request opens
    assert "<str of" in repr(MESSAGES[2])


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"layers":' * 50_000, "9" * 10_000, '{"layers": [1e999]}', "null", "[1]", "\x00"]
)
def test_a_program_or_manifest_that_is_none_is_an_error_of_ours(text):
    model = PublicModel(0, "fss", 32, text, text)
    for read_part in (model.read_program, model.read_manifest):
        with pytest.raises(IntegrityError) as caught:
            read_part()
        assert not isinstance(caught.value, InputError)
    assert PublicModel(0, "fss", 32, PROGRAM).read_program().to_json() == PROGRAM
    assert PublicModel(0, "fss", 32, PROGRAM).read_manifest() is None


def test_a_name_that_utf8_cannot_hold_is_refused_before_it_is_sent():
    with pytest.raises(InputError, match="must be text that UTF-8 can hold"):
        to_line(Load("fss", 32, "/tmp/\udcff"))
    refused = frames.describe_error(InputError("no file /tmp/\udcff"))
    assert "udcff" in from_line(to_line(refused), "peer", Refused).message


def test_an_order_says_the_same_to_both_roles_and_takes_no_more_bytes_than_it_must():
    order = PreparedPrediction(3, PredictionKind(0, 64, ("digit",)))
    assert prepare_of(order) == Prepare(3, 0, 64, ("digit",))
    assert predict_of(order) == Predict(3, 0, 64)
    # As it was written before: by hand, with the protocol's name and no type.
    before = '{"kind":"request","meta":{"task":"predict","prediction":3,"model":0,"protocol":"fss","batch":64},'
    before += '"arrays":[]}'
    assert predict_of(order).frame_bytes() < 16 + len(before)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_fields_come_is_a_message_that_keeps_its_rules_or_an_integrity_error(message, data):
    names = st.sampled_from([*message.__struct_fields__, "more"])
    text = altered(message, **data.draw(st.dictionaries(names, json_values, max_size=3)))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.binary(max_size=3)) + text[at:]
    try:
        found = heard(text, *KINDS) if not isinstance(message, PartySettings) else heard(text, PartySettings)
    except IntegrityError:
        return
    assert describe(found.kind, found) == text
    for name in ("batch", "threads"):
        value = getattr(found, name, 1)
        assert type(value) is int
        assert value >= 1
    assert getattr(found, "timeout_s", 1.0) > 0
    assert not math.isnan(getattr(found, "timeout_s", 1.0))
