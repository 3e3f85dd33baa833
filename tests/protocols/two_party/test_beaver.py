"""Products of shared values: exact in the ring, at the declared cost, in the messages and triples of CrypTen's."""

import pytest
import torch
from simulate import combine, simulate, split

from protocols.crypten import door
from protocols.dealing.correlation import Request
from protocols.primitives.prg import Stream
from protocols.two_party import beaver
from protocols.two_party.recorder import Recorder

HOW = {"stride": (2, 1), "dilation": (1, 2), "groups": 2}
# name -> shapes of the operands, how, options of the triple
PRODUCTS = {
    "mul": ([(3, 4), (3, 4)], {}, ()),
    "mul, broadcast": ([(3, 1, 4), (5, 1)], {}, ()),
    "matmul": ([(3, 4), (4, 5)], {}, ()),
    "matmul, for each of many": ([(2, 3, 4), (1, 4, 5)], {}, ()),
    "conv2d": ([(2, 4, 7, 8), (6, 2, 3, 3)], HOW, tuple(sorted(HOW.items()))),
}


def product(op, shares, how):
    """Run a product as both parties; the value, the bytes, the rounds, and what was sent."""
    shapes = tuple(tuple(x.shape) for x, _ in shares)
    request = Request("triple", shapes, (("op", op), *sorted(how.items())))

    def program(party):
        mine = [both[party.rank] for both in shares]
        return getattr(beaver, op)(party, *mine, **how), party.wire.bytes, party.wire.clock, party.wire.sent

    (z0, bytes0, rounds, sent), (z1, bytes1, *_) = simulate([request], program)
    return combine([z0, z1]), bytes0 + bytes1, rounds, sent


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_exact_in_the_ring_and_costs_what_it_declares(name):
    shapes, how, _ = PRODUCTS[name]
    op, stream = name.split(",")[0], Stream()
    # Of all 64 bits, so that whatever wraps around does.
    values = [stream.words(shape) for shape in shapes]
    z, n_bytes, rounds, _ = product(op, [split(v) for v in values], how)
    assert torch.equal(z, getattr(torch, op)(*values, **how))
    cost = getattr(beaver, op).cost(sum(v.numel() for v in values))
    assert (rounds, n_bytes) == (cost.rounds, cost.payload_bytes)


def test_a_square_is_exact_in_the_ring_and_costs_what_it_declares():
    x = Stream().words((3, 5))
    shares = split(x)

    def program(party):
        return beaver.square(party, shares[party.rank]), party.wire.bytes, party.wire.clock

    (z0, bytes0, rounds), (z1, bytes1, _) = simulate([Request("square", ((3, 5),))], program)
    assert torch.equal(z0 + z1, x * x)
    cost = beaver.square.cost(x.numel())
    assert (rounds, bytes0 + bytes1) == (cost.rounds, cost.payload_bytes)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_asks_for_the_triple_and_sends_the_message_that_cryptens_would(name):
    shapes, how, options = PRODUCTS[name]
    op = name.split(",")[0]
    seen = []
    for ours in (True, False):
        recorder = Recorder(0)
        party = recorder.party()
        x, y = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in shapes)
        if ours:
            z = getattr(beaver, op)(party, x, y, **how)
        else:
            with door.acting(party), torch.no_grad():
                z = door.beaver(op, x, y, **how)
        seen.append((recorder.requests, recorder.messages, tuple(z.shape)))
    assert seen[0] == seen[1]
    assert seen[0][0] == [Request("triple", tuple(shapes), (("op", op), *options))]


def test_openings_are_uniform_whatever_the_operands():
    x = torch.zeros(2, 4096, dtype=torch.int64)
    _, _, _, sent = product("mul", [(x, x), (x, x)], {})
    counts = torch.bincount(sent[0][1].view(torch.uint8).long(), minlength=256).double()
    expected = counts.sum() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 420  # 255 degrees of freedom
