"""Links, certificates and the watch, over real sockets."""

import contextlib
import socket
import ssl
import struct
import threading
import time

import numpy as np
import pytest
from links import in_thread, pair

from protocols.dealing.messages import Corrections
from protocols.errors import (
    InputError,
    IntegrityError,
    KeyRefused,
    PeerLost,
    PeerRefused,
    PeerTimeout,
    ProtocolAbort,
    SecureError,
)
from protocols.net import frames, watch
from protocols.net.link import Link
from protocols.net.listener import Listener, connect
from protocols.net.tls import Credentials, context_of, issue, peer_role, peer_user
from protocols.net.watch import Watch


def test_the_next_frame_can_be_looked_at_and_stays():
    with pair() as [(keeper, user)]:
        assert keeper.peek(0.01) is None
        user.send("first", None, [np.zeros(3)[:0].astype("<i8")], hold=True)
        user.send("second")
        assert [keeper.peek(5.0), keeper.peek(0.0), keeper.recv("first").kind] == ["first"] * 3
        assert keeper.peek(5.0) == "second"
        user.close()
        assert keeper.recv("second").kind == "second"
        with pytest.raises(PeerLost):
            keeper.peek(5.0)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (300, 1000)])
@pytest.mark.parametrize("dtype", ["<i8", "<f4", "|u1"])
def test_arrays_arrive_as_they_were_sent(shape, dtype):
    x = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    with pair() as [(keeper, user)]:
        received = in_thread(lambda: keeper.hear(Corrections))
        user.say(Corrections(3, last=True), [x, x[..., ::-1] if x.ndim else x])
        heard = received()
        assert heard.message == Corrections(3, last=True)
        for got, sent in zip(heard.arrays, [x, x[..., ::-1] if x.ndim else x], strict=True):
            assert got.dtype == sent.dtype
            assert got.shape == sent.shape
            np.testing.assert_array_equal(got, sent)


def test_two_parties_may_send_large_messages_at_the_same_time():
    x = np.arange(4 << 20, dtype="<i8")  # 32 MiB each way: far more than the socket buffers hold
    with pair() as [(keeper, user)]:
        other = in_thread(lambda: keeper.exchange("open", x))
        np.testing.assert_array_equal(user.exchange("open", -x), x)
        np.testing.assert_array_equal(other(), -x)


def test_counters_agree_at_both_ends_and_are_kept_by_phase():
    with pair() as [(keeper, user)]:
        for link in (keeper, user):
            link.enter("online")
        user.send_array("e", np.zeros(100, dtype="<i8"))
        keeper.recv_array("e", (100,))
        keeper.send_array("z", np.zeros(10, dtype="<i8"))
        user.recv_array("z", (10,))
        mine, theirs = user.counters["online"], keeper.counters["online"]
        assert (mine.sent, mine.received) == (theirs.received, theirs.sent)
        assert 800 < mine.sent < 1000
        assert 80 < mine.received < 280
        assert user.counters["setup"].sent > 0


def test_rounds_count_messages_that_had_to_wait_and_nothing_else():
    x = np.zeros(1, dtype="<i8")
    with pair() as [(keeper, user)]:
        user.enter("online")
        keeper.enter("online")

        def keeper_side():
            keeper.recv_array("a", (1,))  # round 1: two messages in a row wait for nothing
            keeper.recv_array("b", (1,))
            keeper.exchange("c", x)  # round 2
            keeper.exchange("d", x)  # round 3
            keeper.send_array("e", x)  # round 4
            return keeper.clock

        other = in_thread(keeper_side)
        user.send_array("a", x)
        user.send_array("b", x)
        user.exchange("c", x)
        user.exchange("d", x)
        user.recv_array("e", (1,))
        other()
        assert user.clock == 4


def test_a_message_of_another_kind_or_shape_is_an_integrity_error():
    with pair() as [(keeper, user)]:
        user.send_array("e", np.zeros(3, dtype="<i8"))
        user.send_array("e", np.zeros(3, dtype="<i8"))
        with pytest.raises(IntegrityError, match="must send 'f'"):
            keeper.recv("f")
        with pytest.raises(IntegrityError, match=r"shape \(4,\)"):
            keeper.recv_array("e", (4,))


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("!IQI", 0, 0, 1),
        struct.pack("!IQI", 5, 1 << 50, 1) + b"abcde",
        struct.pack("!IQI", 5, 0, 1) + b"abcde",
        struct.pack("!IQI", 2, 0, 1) + b"{}",
        struct.pack("!IQI", 44, 8, 1) + b'{"kind":"a","meta":{},"arrays":[["|O",[1]]]}' + bytes(8),
        struct.pack("!IQI", 46, 8, 1) + b'{"kind":"a","meta":{},"arrays":[["<i8",[100]]]}'[:46] + bytes(8),
        struct.pack("!IQI", 45, 8, 1) + b'{"kind":"a","meta":{},"arrays":[["<i8",[-1]]]}'[:45] + bytes(8),
    ],
)
def test_a_frame_that_is_not_ours_is_refused(frame):
    with pair() as [(keeper, user)]:
        user._write(memoryview(frame))
        with pytest.raises(IntegrityError, match="user sent a frame"):
            keeper.recv("a")


def test_a_silent_peer_is_a_timeout_that_names_role_and_step():
    with pair() as [(_, user)]:
        user.timeout_s = 0.3
        user.step = "prediction 3: conv1"
        with pytest.raises(PeerTimeout, match=r"keeper .*prediction 3: conv1"):
            user.recv("open")


def test_a_peer_that_reads_nothing_is_a_timeout_too():
    with pair() as [(_, user)]:
        user.timeout_s = 0.3
        with pytest.raises(PeerTimeout, match="keeper"):
            user.send_array("e", np.zeros(8 << 20, dtype="<i8"))


def test_a_closed_connection_names_the_peer():
    with pair() as [(keeper, user)]:
        keeper.close()
        with pytest.raises(PeerLost, match="keeper"):
            user.recv("open")
        with pytest.raises(PeerLost, match="keeper"):
            user.recv("open")


def test_a_refusal_is_raised_at_the_peer_as_what_it_was():
    with pair() as [(keeper, user)]:
        keeper.refuse(KeyRefused("no key of task 'digit'"))
        with pytest.raises(KeyRefused, match="digit"):
            user.recv("deal")
        assert isinstance(frames.restore_error(frames.Refused("os", "x")), ProtocolAbort)
        assert isinstance(frames.restore_error(frames.Refused("Sequence", "")), ProtocolAbort)


def test_an_error_of_a_subclass_travels_as_its_nearest_known_kind():
    class Special(InputError):
        pass

    assert type(frames.restore_error(frames.describe_error(Special("x")))) is InputError


def test_a_port_in_use_is_an_input_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"keeper: the address 127.0.0.1:{port} must be free"):
            Listener(issue(["keeper"])["keeper"], "127.0.0.1", port, 1)


# --- who may connect ------------------------------------------------------------------------------------------------


def attempt(credentials, listener, role="keeper", purpose="data"):
    return connect(credentials, listener.address, role, purpose, 2.0)


def test_a_certificate_of_another_authority_is_refused_by_both_sides():
    ours, others = issue(["keeper", "user"]), issue(["keeper", "user"])
    listener = Listener(ours["keeper"], "127.0.0.1", 0, 2)
    accepted = in_thread(lambda: listener.accept([("user", "data")], 10))
    with pytest.raises(PeerRefused):
        attempt(others["user"], listener)
    mixed = Credentials("user", ours["user"].ca, others["user"].certificate, others["user"].key)
    with pytest.raises((PeerRefused, PeerLost)):
        attempt(mixed, listener)
    attempt(ours["user"], listener).close()  # the right one still gets in
    accepted()["user", "data"].close()
    listener.close()


def test_a_role_with_another_roles_certificate_is_refused():
    credentials = issue(["keeper", "user", "authority"])
    listener = Listener(credentials["keeper"], "127.0.0.1", 0, 2)
    accepted = in_thread(lambda: listener.accept([("user", "data")], 10))
    with pytest.raises(PeerRefused):  # the authority where the user is expected
        attempt(credentials["authority"], listener)
    with pytest.raises(PeerRefused, match="must be 'authority'; its certificate says 'keeper'"):
        attempt(credentials["user"], listener, role="authority")
    attempt(credentials["user"], listener).close()
    accepted()["user", "data"].close()
    listener.close()


def is_refused(sock) -> bool:
    """Return whether a connection ends without a byte for us."""
    try:
        sock.sendall(b"x")
        return sock.recv(1) == b""
    except OSError:
        return True


def test_a_stranger_without_certificate_or_tls_is_refused_and_waited_past():
    credentials = issue(["keeper", "user"])
    listener = Listener(credentials["keeper"], "127.0.0.1", 0, 2)
    accepted = in_thread(lambda: listener.accept([("user", "data")], 20))
    with socket.create_connection(listener.address) as raw:
        raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(listener.address) as raw, context.wrap_socket(raw) as sock:
        assert sock.version() == "TLSv1.3"
        assert is_refused(sock)
    attempt(credentials["user"], listener).close()
    accepted()["user", "data"].close()
    listener.close()


def test_tls_1_2_is_refused():
    credentials = issue(["keeper", "user"])
    listener = Listener(credentials["keeper"], "127.0.0.1", 0, 2)
    accepted = in_thread(lambda: listener.accept([("user", "data")], 10))
    context = context_of(credentials["user"], server=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(listener.address) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw)
    attempt(credentials["user"], listener).close()
    accepted()["user", "data"].close()
    listener.close()


def test_a_role_that_hangs_while_it_is_called_is_a_timeout():
    with (
        contextlib.closing(socket.create_server(("127.0.0.1", 0))) as hung,
        pytest.raises(PeerTimeout, match=r"keeper must answer within 0\.2 s; it has not"),
    ):
        connect(issue(["user"])["user"], hung.getsockname(), "keeper", "data", 60.0, opening_s=0.2)


def test_a_role_that_never_comes_is_named():
    listener = Listener(issue(["keeper"])["keeper"], "127.0.0.1", 0, 2)
    with pytest.raises(PeerTimeout, match="user must connect within"):
        listener.accept([("user", "data")], 0.3)
    listener.close()


def test_a_certificate_tells_the_peer_which_user_plays_its_role():
    credentials = issue(["keeper", "user"], users={"user": "ann@site.org"})
    listener = Listener(credentials["keeper"], "127.0.0.1", 0, 2)
    accepted = in_thread(lambda: listener.accept([("user", "data")], 10))
    link = attempt(credentials["user"], listener)
    theirs = accepted()["user", "data"]
    assert (link.role, link.user, theirs.role, theirs.user) == ("keeper", None, "user", "ann@site.org")
    for end in (link, theirs, listener):
        end.close()


@pytest.mark.parametrize("name", ["", "ann smith", "ann\n", "urn:securemtk:role:keeper", "a" * 65, "\u00e9va"])
def test_a_name_that_a_certificate_cannot_carry_as_it_is_is_refused(name):
    with pytest.raises(InputError, match="user's name must be"):
        issue(["user"], users={"user": name})


class ClaimsOf:
    """What a connection knows of a certificate with some names."""

    def __init__(self, *uris):
        self.uris = uris

    def getpeercert(self):
        return {"subjectAltName": tuple(("URI", f"urn:securemtk:{uri}") for uri in self.uris)}


def test_a_certificate_of_several_roles_or_users_is_refused():
    assert peer_role(ClaimsOf("role:user", "user:ann")) == "user"
    assert peer_user(ClaimsOf("role:user", "user:ann")) == "ann"
    assert peer_user(ClaimsOf("role:user")) is None
    for uris in ((), ("user:ann",), ("role:user", "role:keeper")):
        with pytest.raises(PeerRefused, match="must name its role"):
            peer_role(ClaimsOf(*uris))
    with pytest.raises(PeerRefused, match="one user at most"):
        peer_user(ClaimsOf("role:user", "user:ann", "user:bob"))


def test_credentials_hide_their_key():
    credentials = issue(["user"])["user"]
    assert "PRIVATE" not in repr(credentials)
    assert Credentials.from_json(credentials.to_json()) == credentials


# --- the watch ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(timeout_s=30.0, silence_s=30.0, pulse=True):
    """A keeper and a user, each with data link and watch, and with a pulse where asked."""
    with pair(timeout_s, purposes=("data", "watch", "pulse")) as [(k, u), (kw, uw), (kp, up)]:
        keeper, user = (
            Watch(role, {peer: own}, [link], silence_s=silence_s, pulses={peer: beats} if pulse else None)
            for role, peer, own, link, beats in (("keeper", "user", kw, k, kp), ("user", "keeper", uw, u, up))
        )
        keeper.start()
        user.start()
        try:
            yield keeper, k, user, u
        finally:
            keeper.bye()
            user.bye()


def raised_within(limit_s: float, work) -> SecureError:
    start = time.monotonic()
    with pytest.raises(SecureError) as caught:
        work()
    assert time.monotonic() - start < limit_s
    return caught.value


def test_an_abort_wakes_the_peer_with_the_root_cause():
    with watched() as (keeper, _, _user, link):
        waiting = in_thread(lambda: raised_within(5, lambda: link.recv("open")))
        keeper.step = "prediction 0: relu2"
        keeper.abort(KeyRefused("the key must be of this model"))
        error = waiting()
        assert isinstance(error, KeyRefused)
        assert str(error) == "keeper failed at prediction 0: relu2: the key must be of this model (we were at start)"


def test_a_lost_peer_is_named_with_its_last_step():
    with watched() as (keeper, keeper_link, _user, link):
        keeper.step = "prediction 0: relu2"
        time.sleep(2 * watch.BEAT_S)
        keeper._links["user"]._sock.cut()
        with contextlib.suppress(OSError):  # the watch may have been quicker
            keeper_link._sock.cut()
        error = raised_within(5, lambda: link.recv("open"))
        assert isinstance(error, PeerLost)
        assert "keeper is gone (its last step: prediction 0: relu2" in str(error)


def test_a_hung_peer_is_noticed_by_its_silence(monkeypatch):
    with watched(silence_s=2.0, pulse=False) as (keeper, _, _user, link):
        stuck = threading.Event()
        monkeypatch.setattr(
            Link,
            "send",
            lambda *a, real=Link.send, **k: stuck.wait(8) if a[0] in keeper._links.values() else real(*a, **k),
        )
        error = raised_within(7, lambda: link.recv("open"))
        stuck.set()
        assert isinstance(error, PeerTimeout)
        assert "keeper has been silent for 2 s" in str(error)


def test_a_peer_whose_thread_hangs_beats_on(monkeypatch):
    with watched(silence_s=1.0) as (keeper, keeper_link, _user, link):
        stuck = threading.Event()
        monkeypatch.setattr(
            Link,
            "send",
            lambda *a, real=Link.send, **k: stuck.wait(8) if a[0] in keeper._links.values() else real(*a, **k),
        )
        received = in_thread(lambda: link.recv("open"))
        time.sleep(3)
        stuck.set()
        keeper_link.send("open")
        assert received().kind == "open"


def test_a_peer_that_computes_is_waited_for_beyond_the_links_limit():
    x = np.zeros(8 << 20, dtype="<i8")
    with watched(timeout_s=0.3) as (_, keeper, _user, user):
        sent = in_thread(lambda: user.send_array("e", x))
        time.sleep(1.5)  # the keeper computes, and reads nothing
        assert keeper.recv_array("e", x.shape).shape == x.shape
        sent()
        received = in_thread(lambda: user.recv("open"))
        time.sleep(1.5)
        keeper.send("open")
        assert received().kind == "open"
        assert not user.is_overdue(time.monotonic() - 10)
        with pytest.raises(PeerTimeout):  # a limit that the caller names holds
            user.recv("open", timeout_s=0.2)
    time.sleep(0.4)
    assert user.is_overdue(time.monotonic() - 10)  # no watch any more


def test_an_error_inside_the_watch_ends_the_waits_that_it_guards(monkeypatch):
    with watched() as (keeper, _, _user, link):
        waiting = in_thread(lambda: raised_within(5, lambda: link.recv("open")))
        monkeypatch.setattr(keeper._beats, "look", lambda: 1 / 0)
        assert "keeper failed at start: internal error: ZeroDivisionError in the watch" in str(waiting())


def test_a_connection_that_the_network_cuts_is_noticed_by_the_system():
    with pair(timeout_s=10.0) as [(keeper, user)]:
        for link in (keeper, user):
            raw = link._sock.raw
            options = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT]
            assert [raw.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [2, 2, 4]
            assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
