"""Sharing, revealing, truncation and the gates: exact in the ring, at the declared cost."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import combine, dealt_shares, simulate, split

from protocols.dealing.correlation import USER, Request, Secrets
from protocols.errors import DealerError, RangeError
from protocols.primitives import ring
from protocols.primitives.prg import Stream
from protocols.two_party import gate, party

EDGES = [0, 1, -1, 2**16, -(2**16), 2**61, -(2**61), 2**62 - 1, -(2**62) + 1]
values = st.lists(st.one_of(st.sampled_from(EDGES), st.integers(-(2**62) + 1, 2**62 - 1)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(values=values, bits=st.integers(1, 48))
def test_truncation_is_the_floor_or_one_above_and_costs_what_it_declares(values, bits):
    z = torch.tensor(values)
    shares = split(z)

    def program(p):
        return party.truncate(p, shares[p.rank], bits), p.wire.bytes, p.wire.clock

    (t0, sent0, rounds), (t1, sent1, _) = simulate(
        [Request("truncation", (tuple(z.shape),), (("bits", bits),))], program
    )
    error = t0 + t1 - (z >> bits)
    assert bool(((error == 0) | (error == 1)).all())
    cost = party.truncate.cost(z.numel())
    assert (rounds, sent0 + sent1) == (cost.rounds, cost.payload_bytes)


def test_truncation_never_errs_by_more_than_one_on_ten_million_values():
    # CrypTen's share-by-share division jumps by 2**48 about once in 2**(64 - bits of the value).
    stream = Stream(bytes(16))
    n, worst, jumps = 1 << 18, 0, 0
    for block in range(40):
        z = stream.words((n,)) >> (2 + block % 3)
        shares = split(z, stream)
        t = combine(
            simulate(
                [Request("truncation", ((n,),), (("bits", 16),))],
                lambda p, shares=shares: party.truncate(p, shares[p.rank], 16),
            )
        )
        error = t - (z >> 16)
        assert int(error.min()) >= 0
        worst = max(worst, int(error.max()))
        naive = torch.div(shares[0], 1 << 16, rounding_mode="trunc") + torch.div(
            shares[1], 1 << 16, rounding_mode="trunc"
        )
        jumps += int(((naive - (z >> 16)).abs() > 2).sum())
    assert worst == 1
    assert jumps > 0  # the reference that we replaced does fail on these values


@settings(max_examples=40, deadline=None)
@given(values=values)
def test_the_users_input_is_shared_and_revealed_exactly_at_the_declared_cost(values):
    x = torch.tensor(values)

    def program(p):
        share = party.share_input(p, x if p.rank == USER else None, x.shape)
        after_input = p.wire.bytes, p.wire.clock
        return party.reveal_to_user(p, share), after_input, p.wire.clock

    (nothing, keeper_sent, _), (opened, user_sent, rounds) = simulate([], program)
    assert nothing is None
    assert torch.equal(opened, x)
    assert keeper_sent[0] == 0
    assert user_sent == (party.share_input.cost(1).payload_bytes, party.share_input.cost(1).rounds)
    assert rounds == party.share_input.cost(1).rounds + party.reveal_to_user.cost(1).rounds


def key_secrets(mask, pattern, is_open, noise=None):
    return Secrets(mask, mask * pattern, is_open, noise or {})


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 3))
def test_the_key_gate_stamps_exactly_and_sends_the_same_messages_without_a_key(data, n):
    shape = (1, 3, 4)
    word = st.integers(-(2**63), 2**63 - 1)
    x = torch.tensor(data.draw(st.lists(word, min_size=12 * n, max_size=12 * n))).reshape(n, *shape)
    p = torch.tensor(data.draw(st.lists(word, min_size=12, max_size=12))).reshape(shape)
    m = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=12, max_size=12))).reshape(shape)

    def program(part):
        share = gate.share_gated_input(part, x if part.rank == USER else None, x.shape)
        return share, [(kind, tuple(t.shape)) for kind, t in part.wire.sent], part.wire.clock

    transcripts = []
    for mask in (m, torch.zeros_like(m)):
        (k, k_sent, k_clock), (u, u_sent, _) = simulate(
            [Request("key_gate", (tuple(x.shape),))], program, key_secrets(mask, p, {})
        )
        assert torch.equal(k + u, x - mask * x + mask * p)
        transcripts.append((k_sent, u_sent, k_clock))
    assert transcripts[0] == transcripts[1]
    assert transcripts[0][2] == gate.share_gated_input.cost(x.numel()).rounds


@pytest.mark.parametrize("bits", [0, 16])
@pytest.mark.parametrize("is_open", [True, False])
def test_the_output_gate_reveals_scores_or_exactly_the_authoritys_noise(bits, is_open):
    z = {"a": torch.randint(-(2**40), 2**40, (5, 4)), "b": torch.randint(-(2**40), 2**40, (5, 2))}
    noise = {name: Stream().words(v.shape) for name, v in z.items()}
    secrets = Secrets(
        torch.zeros(1),
        torch.zeros(1),
        {"a": float(is_open), "b": 1.0},
        {name: lambda n, k=name: noise[k] for name in z},
    )
    shares = {name: split(v) for name, v in z.items()}
    requests = [Request("output_gate", (tuple(v.shape),), (("bits", bits), ("task", name))) for name, v in z.items()]

    def program(p):
        scores = [gate.Scores(name, shares[name][p.rank], bits, True) for name in z]
        closed = gate.close_outputs(p, scores)
        return closed, p.wire.bytes, p.wire.clock

    (k, sent0, rounds), (u, sent1, _) = simulate(requests, program, secrets)
    got = dict(zip(z, (a + b for a, b in zip(k, u, strict=True)), strict=True))
    if is_open:
        assert int((got["a"] - (z["a"] >> bits)).abs().max()) <= 1
    else:
        assert torch.equal(got["a"], noise["a"])  # exactly, whatever the scores are
    assert int((got["b"] - (z["b"] >> bits)).abs().max()) <= 1
    cost = gate.close_outputs.cost(sum(v.numel() for v in z.values()))
    assert (rounds, sent0 + sent1) == (cost.rounds, cost.payload_bytes)


def test_what_the_output_gate_opens_is_uniform_whether_open_or_closed():
    z = torch.zeros((64, 64), dtype=torch.int64)
    for is_open in (True, False):
        secrets = Secrets(z, z, {"a": float(is_open)}, {"a": lambda n: torch.zeros((n, 64), dtype=torch.int64)})
        request = Request("output_gate", ((64, 64),), (("bits", 16), ("task", "a")))

        def program(p):
            gate.close_outputs(p, [gate.Scores("a", z, 16, True)])
            return p.wire.sent[0][1]

        for sent in simulate([request], program, secrets):
            counts = np.bincount(np.frombuffer(sent.numpy().tobytes(), dtype=np.uint8), minlength=256)
            expected = sent.numel() * 8 / 256
            chi_square = float(((counts - expected) ** 2 / expected).sum())
            assert chi_square < 400  # 255 degrees of freedom: above 400 with probability 2e-8


def test_a_hand_gives_each_correlation_once_and_only_in_order():
    requests = [Request("square", ((3,),)), Request("and", ((2,), (2,)))]
    keeper, user = dealt_shares(requests)
    with pytest.raises(DealerError, match="correlation 0 must be"):
        keeper.take(requests[1])
    for hand in (keeper, user):
        hand.take(requests[0])
        hand.take(requests[1])
        with pytest.raises(DealerError, match="one more correlation"):
            hand.take(requests[0])


@pytest.mark.parametrize(
    ("kind", "shapes", "options", "relation"),
    [
        ("square", ((7,),), (), lambda k, u: torch.equal((k[0] + u[0]) ** 2, k[1] + u[1])),
        ("and", ((7,), (2, 7)), (), lambda k, u: torch.equal((k[0] ^ u[0]) & (k[1] ^ u[1]), k[2] ^ u[2])),
        (
            "bit",
            ((7,),),
            (),
            lambda k, u: torch.equal(k[0] ^ u[0], k[1] + u[1]) and set((k[0] ^ u[0]).tolist()) <= {0, 1},
        ),
        (
            "triple",
            ((3, 4), (4, 2)),
            (("op", "matmul"),),
            lambda k, u: torch.equal((k[0] + u[0]) @ (k[1] + u[1]), k[2] + u[2]),
        ),
        (
            "triple",
            ((2, 4, 5, 5), (6, 2, 3, 3)),
            (("op", "conv2d"), ("groups", 2), ("stride", (2, 1))),
            lambda k, u: torch.equal(torch.conv2d(k[0] + u[0], k[1] + u[1], groups=2, stride=(2, 1)), k[2] + u[2]),
        ),
    ],
)
def test_a_dealt_correlation_satisfies_its_relation(kind, shapes, options, relation):
    request = Request(kind, shapes, options)
    keeper, user = dealt_shares([request])
    k, u = keeper.take(request), user.take(request)
    assert relation(k, u)
    assert not any(torch.equal(a, b) for a, b in zip(k, u, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-16384, 16384, width=32), min_size=1, max_size=20))
def test_encoding_is_to_the_nearest_and_decodes_back(values):
    x = np.array(values, dtype=np.float32)
    assert np.abs(ring.decode(ring.encode(x)) - x).max() <= 2.0**-17 + np.abs(x).max() * 2.0**-24


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**46])
def test_encoding_refuses_what_fixed_point_does_not_hold(bad):
    with pytest.raises(RangeError, match="the input must be"):
        ring.encode(np.array([0.0, bad]), what="the input")
