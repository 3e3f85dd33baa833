"""Frames and typed messages: what is ours is read as it was written, and everything else is an error of ours."""

import struct
from typing import ClassVar

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from links import pair

from protocols.dealing.correlation import Request
from protocols.dealing.messages import Corrections, Deal, Supply, Want, pack, unpack
from protocols.errors import IntegrityError, ProtocolAbort
from protocols.net import frames
from protocols.net.frames import HEADER, Message, Record, Refused, describe, from_line, read, to_line
from protocols.net.messages import Abort, Beat, Bye, Hello, Welcome
from protocols.two_party import compare, linear  # noqa: F401  they register kinds of correlations

REQUESTS = pack(
    [
        Request("square", ((40,),)),
        Request("linear", ((3, 4), (3, 5)), (("op", "matmul"), ("weight", "fc1.weight"), ("pads", (0, 1, 0, 1)))),
        Request("sign", ((7,),), (("bits", 16), ("k", 32))),
    ]
)
MESSAGES = [
    Hello("data"),
    Welcome(),
    Beat("prediction 3: conv1"),
    Bye(),
    Abort("load", Refused("InputError", "x must be y; got \u00e9")),
    Refused("KeyRefused", ""),
    Deal(0, (0, 1), REQUESTS),
    Deal(7, (2, 64)),
    Corrections(3, last=False),
    Want(5, REQUESTS[1]),
    Want(6),
    Supply(5, 1, REQUESTS[0]),
]
KINDS = sorted({type(message) for message in MESSAGES}, key=lambda kind: kind.__name__)


def heard(text: bytes, *kinds, body: bytes = b"") -> Message:
    return read(frames.decode(text, bytearray(body), "peer"), "peer", *kinds).message


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_a_message_is_read_as_it_was_written_and_is_as_long_as_it_says(message):
    arrays = [np.zeros((3, 2), "<i8"), np.zeros(5, "|u1")] if message.holds_arrays else []
    forms = [(a.dtype.str, a.shape) for a in arrays]
    text = describe(message.kind, message, forms)
    assert heard(text, type(message), body=b"".join(a.tobytes() for a in arrays)) == message
    assert (
        from_line(to_line(message), "peer", Bye if isinstance(message, Welcome) else Welcome, type(message)) == message
    )
    with pair() as [(keeper, user)]:
        before = user.counters["setup"].sent
        user.say(message, arrays)
        sent = user.counters["setup"].sent - before
        assert sent == message.frame_bytes(forms)
        if not isinstance(message, Refused):
            assert keeper.hear(type(message)).message == message
            assert keeper.counters["setup"].received >= sent


def test_requests_travel_as_what_they_are():
    asked = [Request("sign", ((7,),), (("bits", 16), ("k", 32))), Request("triple", ((2,), (2,)), (("op", "mul"),))]
    deal = Deal(0, (0, 1), pack(asked))
    assert unpack(heard(describe("deal", deal), Deal).requests) == asked


DEEP = b"[" * 100_000
HUGE = b"9" * 100_000
HOSTILE = {
    "nothing": b"",
    "no JSON": b"\x00" * 40,
    "no UTF-8": b'{"kind":"hello","meta":{"purpose":"\xff"},"arrays":[]}',
    "half a surrogate": b'{"kind":"hello","meta":{"purpose":"\\ud800"},"arrays":[]}',
    "deep nesting": DEEP,
    "deep nesting of fields": b'{"kind":"hello","meta":' + DEEP,
    "deep nesting that ends": b'{"kind":"hello","meta":' + DEEP + b"]" * 100_000 + b',"arrays":[]}',
    "deep nesting in a field": b'{"kind":"hello","meta":{"purpose":' + DEEP + b"]" * 100_000 + b'},"arrays":[]}',
    "deep nesting of objects": b'{"kind":"hello","meta":' + b'{"a":' * 100_000,
    "deep nesting of arrays": b'{"kind":"hello","meta":{"purpose":"x"},"arrays":' + DEEP,
    "left-over bytes": b'{"kind":"hello","meta":{"purpose":"x"},"arrays":[]}x',
    "a space": b'{"kind":"hello","meta":{"purpose":"x"}, "arrays":[]}',
    "another order": b'{"meta":{"purpose":"x"},"kind":"hello","arrays":[]}',
    "an unknown part": b'{"kind":"hello","meta":{"purpose":"x"},"arrays":[],"more":1}',
    "a missing part": b'{"kind":"hello","meta":{"purpose":"x"}}',
    "a part twice": b'{"kind":"hello","kind":"hello","meta":{"purpose":"x"},"arrays":[]}',
    "an unknown field": b'{"kind":"hello","meta":{"purpose":"x","more":1},"arrays":[]}',
    "a missing field": b'{"kind":"hello","meta":{},"arrays":[]}',
    "a field twice": b'{"kind":"hello","meta":{"purpose":"y","purpose":"x"},"arrays":[]}',
    "a field of another type": b'{"kind":"hello","meta":{"purpose":1},"arrays":[]}',
    "fields that are none": b'{"kind":"hello","meta":[],"arrays":[]}',
    "an escape": b'{"kind":"hello","meta":{"purpose":"\\u0078"},"arrays":[]}',
    "a kind of another type": b'{"kind":1,"meta":{},"arrays":[]}',
    "an endless kind": b'{"kind":"' + b"a" * 300 + b'","meta":{},"arrays":[]}',
    "another kind": b'{"kind":"bye","meta":{},"arrays":[]}',
    "a huge number": b'{"kind":"want","meta":{"number":' + HUGE + b'},"arrays":[]}',
    "an endless number": b'{"kind":"want","meta":{"number":1e999},"arrays":[]}',
    "a fraction": b'{"kind":"want","meta":{"number":1.0},"arrays":[]}',
    "a truth value": b'{"kind":"want","meta":{"number":true},"arrays":[]}',
    "a number below 0": b'{"kind":"want","meta":{"number":-1},"arrays":[]}',
    "a correlation that nobody knows": b'{"kind":"want","meta":{"number":1,"request":["magic",[[1]],[]]},"arrays":[]}',
    "a shape below 0": b'{"kind":"want","meta":{"number":1,"request":["square",[[-1]],[]]},"arrays":[]}',
    "a huge shape": b'{"kind":"want","meta":{"number":1,"request":["square",[[%d]],[]]},"arrays":[]}' % (1 << 62),
    "a request too long": b'{"kind":"want","meta":{"number":1,"request":["square",[[1]],[],0]},"arrays":[]}',
    "a request too short": b'{"kind":"want","meta":{"number":1,"request":["square",[[1]]]},"arrays":[]}',
    "an array that must not be": b'{"kind":"hello","meta":{"purpose":"x"},"arrays":[["<i8",[0]]]}',
    "an array of objects": b'{"kind":"corrections","meta":{"prediction":0,"last":true},"arrays":[["|O",[0]]]}',
    "a size below 0": b'{"kind":"corrections","meta":{"prediction":0,"last":true},"arrays":[["<i8",[-1]]]}',
    "a size that is no number": b'{"kind":"corrections","meta":{"prediction":0,"last":true},"arrays":[["<i8",["1"]]]}',
    "a huge size": b'{"kind":"corrections","meta":{"prediction":0,"last":true},"arrays":[["<i8",[%d]]]}' % (1 << 80),
    "sizes whose product is huge": b'{"kind":"corrections","meta":{"prediction":0,"last":true},"arrays":[["<i8",[%s]]]}'
    % b",".join([b"1099511627776"] * 60),
    "too many axes": b'{"kind":"corrections","meta":{"prediction":0,"last":true},"arrays":[["<i8",[%s]]]}'
    % b",".join([b"1"] * 65),
    "an array without bytes": b'{"kind":"corrections","meta":{"prediction":0,"last":true},"arrays":[["<i8",[1]]]}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bytes_that_are_no_message_of_ours_are_an_error_that_names_the_role(name):
    with pytest.raises(IntegrityError, match=r"^peer (sent a frame|must send)") as caught:
        heard(HOSTILE[name], Hello, Want, Corrections)
    assert len(str(caught.value)) < 300


def test_bytes_left_over_in_a_body_are_an_error():
    text = describe("corrections", Corrections(0, last=True), [("<i8", (1,))])
    assert heard(text, Corrections, body=bytes(8)) == Corrections(0, last=True)
    for n in (0, 7, 9, 16):
        with pytest.raises(IntegrityError, match="peer sent a frame"):
            heard(text, Corrections, body=bytes(n))


@pytest.mark.parametrize(
    "header",
    [(0, 0, 1), (1 << 27, 0, 1), (5, 1 << 40, 1), (5, 0, (1 << 32) - 1), (5, 0, frames.MAX_CLOCK + 1)],
)
def test_a_header_that_cannot_be_is_an_error(header):
    with pytest.raises(IntegrityError, match="peer sent a frame of impossible size"):
        frames.read_header(struct.pack("!IQI", *header), "peer")


def test_a_clock_that_ran_to_its_end_is_an_error_of_ours_at_both_ends():
    with pair() as [(keeper, user)]:
        text = describe("open", None)
        user._write(memoryview(HEADER.pack(len(text), 0, frames.MAX_CLOCK) + text))
        keeper.recv("open")
        keeper.send("open")
        with pytest.raises(IntegrityError, match="keeper sent a frame of impossible size"):
            user.recv("open")


def test_a_body_for_which_there_is_no_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(frames, "MAX_BODY_BYTES", 1 << 62)
    with pytest.raises(IntegrityError, match="for which there is no memory"):
        frames.room_for(1 << 60, "peer")


def test_an_array_frame_has_no_fields_and_a_message_is_no_array_frame():
    with pair() as [(keeper, user)]:
        user.say(Beat("x"))
        with pytest.raises(IntegrityError, match="with arrays alone; it has fields"):
            keeper.recv("beat")
        user.send("beat")
        with pytest.raises(IntegrityError, match="user must send 'beat' with fields that keep its rules"):
            keeper.hear(Beat)
        user.say(Beat("x"))
        with pytest.raises(IntegrityError, match="must send 'hello' or 'bye' now; got 'beat'"):
            keeper.hear(Hello, Bye)
        user._write(memoryview(HEADER.pack(len(DEEP), 0, 1) + DEEP))
        with pytest.raises(IntegrityError, match="user sent a frame that is not one of ours"):
            keeper.hear(Hello)
        user._write(memoryview(HEADER.pack(3, 0, 1) + b"{}x"))
        with pytest.raises(IntegrityError, match="user sent a frame"):
            keeper.peek(5.0)


def test_a_refusal_of_another_form_is_an_error_too():
    with pair() as [(keeper, user)]:
        text = b'{"kind":"refused","meta":{"error":"KeyRefused"},"arrays":[]}'
        user._write(memoryview(HEADER.pack(len(text), 0, 1) + text))
        with pytest.raises(IntegrityError, match="user must send 'refused'"):
            keeper.hear(Hello)
        user.say(Refused("SystemExit", "1"))
        with pytest.raises(ProtocolAbort, match="1"):
            keeper.hear(Hello)


class Whispered(Message, frozen=True):
    """A message with a secret."""

    kind: ClassVar[str] = "whispered"
    hidden: ClassVar[frozenset[str]] = frozenset({"word"})

    word: str
    length: int


def test_a_secret_field_is_not_printed_and_a_long_one_is_not_printed_whole():
    whispered = Whispered("sesame", 6)
    for text in (repr(whispered), str(whispered), f"{whispered}", repr([whispered])):
        assert "sesame" not in text
        assert "Whispered(word=<hidden>, length=6)" in text
    assert repr(Beat("x" * 10_000)) == "Beat(step=<str of 10002 characters>)"
    with pytest.raises(IntegrityError) as caught:
        heard(b'{"kind":"whispered","meta":{"word":"sesame","length":"sesame"},"arrays":[]}', Whispered)
    assert "sesame" not in str(caught.value)
    assert "at $.length" in str(caught.value)


def test_messages_are_frozen():
    with pytest.raises(AttributeError):
        Beat("x").step = "y"
    assert issubclass(Message, Record)


# --- fuzz -----------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(sorted({name for kind in KINDS for name in kind.__struct_fields__} | {"more"}))
some_fields = st.dictionaries(names, json_values, max_size=5)
texts = st.binary(max_size=200) | st.builds(
    lambda kind, fields, arrays: msgspec.json.encode({"kind": kind, "meta": fields, "arrays": arrays}),
    st.sampled_from([kind.kind for kind in KINDS]),
    some_fields,
    st.just([]) | json_values,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=200, deadline=None)
@given(text=texts, body=st.binary(max_size=40))
@example(text=DEEP, body=b"")
def test_whatever_comes_is_a_message_or_an_integrity_error(kind, text, body):
    try:
        found = heard(text, kind, body=body)
    except IntegrityError:
        return
    assert describe(found.kind, found) == text or kind.holds_arrays


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_message_that_was_altered_is_another_message_or_an_integrity_error(message, data):
    text = bytearray(describe(message.kind, message))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "double"])):
            case "flip":
                text[at] = data.draw(st.integers(0, 255))
            case "cut":
                del text[at:]
                text += b"}"
            case "insert":
                text[at:at] = data.draw(st.binary(min_size=1, max_size=4))
            case "double":
                text[at:at] = text[at : at + 20]
    try:
        found = heard(bytes(text), *KINDS)
    except IntegrityError:
        return
    assert describe(found.kind, found) == text
