"""Correlations for programs that nobody recorded: guesses of what comes next, and products with a weight's one mask."""

import numpy as np
import pytest
import torch
from simulate import combine, simulate
from torch.nn import functional

from protocols.dealing import correlation
from protocols.dealing.correlation import Request
from protocols.dealing.demand import CONTEXTS, RequestPredictor
from protocols.errors import UnsupportedError
from protocols.primitives.prg import Stream
from protocols.two_party import reused_masks
from protocols.two_party.reused_masks import MATMUL, Weights, conv2d

ONE, TWO, THREE = (Request("square", ((n,),)) for n in (1, 2, 3))


def learnt(requests) -> RequestPredictor:
    foresight = RequestPredictor()
    for request in requests:
        foresight.learn(request)
    return foresight


def guesses(foresight, n) -> list[Request | None]:
    ahead: list[Request] = []
    for _ in range(n):
        ahead.append(foresight.guess(ahead))
    return ahead


# --- guesses --------------------------------------------------------------------------------------------------------


def test_a_loop_is_foreseen_as_far_as_anybody_asks():
    foresight = learnt([ONE, ONE, TWO, ONE, THREE] * 4)
    assert guesses(foresight, 40) == [ONE, ONE, TWO, ONE, THREE] * 8


def test_nothing_is_foreseen_after_what_is_new():
    assert guesses(learnt([ONE] * (min(CONTEXTS) - 1)), 1) == [None]
    assert guesses(learnt([*[ONE, TWO] * 10, THREE]), 1) == [None]


def test_a_program_that_has_changed_is_foreseen_as_it_is_now():
    foresight = learnt([ONE, TWO] * 10 + [ONE, THREE] * 10)
    assert guesses(foresight, 4) == [ONE, THREE, ONE, THREE]


# --- products with a weight -----------------------------------------------------------------------------------------

CASES = [
    (MATMUL, (3, 5), (5, 4), torch.matmul),
    (MATMUL, (2, 3, 5), (5, 4), torch.matmul),
    (conv2d((1, 1), (0, 0), (1, 1), 1), (2, 3, 6, 5), (4, 3, 3, 3), functional.conv2d),
    (
        conv2d((2, 1), (1, 2), (1, 2), 3),
        (1, 3, 7, 8),
        (6, 1, 3, 2),
        lambda x, w: functional.conv2d(x, w, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=3),
    ),
]


def words(*shape: int) -> torch.Tensor:
    return Stream().words(shape)


def multiply(options, pairs):
    """Multiply each (x, w) in turn, as both parties; return results, costs of each, and what party 0 sent."""
    numbers: dict[int, int] = {}
    seen = [numbers.setdefault(id(w), len(numbers)) for _, w in pairs]
    masks = {number: (words(*w.shape), words(*w.shape)) for number, (_, w) in zip(seen, pairs, strict=True)}
    # All at party 0: what it sends must be masked by more than the sharing.
    shares = {id(t): (t, torch.zeros_like(t)) for pair in pairs for t in pair}
    listed = [
        Request(
            "reused",
            (tuple(x.shape), reused_masks.out_shape(options, x.shape, w.shape), tuple(w.shape)),
            (("weight", str(number)), *options),
        )
        for number, (x, w) in zip(seen, pairs, strict=True)
    ]

    def program(party):
        weights = Weights(lambda number, shape: masks[number][party.rank])
        out, costs = [], []
        for x, w in pairs:
            before = party.wire.bytes, party.wire.clock
            out.append(weights.multiply(party, options, shares[id(x)][party.rank], shares[id(w)][party.rank]))
            costs.append((party.wire.clock - before[1], party.wire.bytes - before[0]))
        return out, costs, party.wire.sent

    both = simulate(listed, program, masks={str(n): sum(pair) for n, pair in masks.items()})
    results = [combine([k, u]) for k, u in zip(both[0][0], both[1][0], strict=True)]
    costs = [(r, 2 * sent) for r, sent in both[0][1]]
    return results, costs, both[0][2]


@pytest.mark.parametrize(("options", "x_shape", "w_shape", "plain"), CASES)
def test_products_with_a_weight_are_exact_at_the_declared_cost(options, x_shape, w_shape, plain):
    w, other = words(*w_shape), words(*w_shape)
    xs = [words(*x_shape) for _ in range(3)]
    results, costs, _ = multiply(options, [(xs[0], w), (xs[1], w), (xs[2], other)])
    for result, x, weight in zip(results, xs, (w, w, other), strict=True):
        assert torch.equal(result, plain(x, weight))
    for (rounds, n_bytes), new in zip(costs, (w.numel(), 0, w.numel()), strict=True):
        declared = Weights.multiply.cost(xs[0].numel(), new)
        assert (rounds, n_bytes) == (declared.rounds, declared.payload_bytes)


@pytest.mark.parametrize("value", [0, 1 << 20])
def test_what_a_product_sends_is_uniform_whatever_the_values(value):
    x, w = torch.full((64, 300), value), torch.full((300, 8), value)
    _, _, sent = multiply(MATMUL, [(x, w), (x, w)])
    assert len(sent) == 2
    for _, tensor in sent:
        data = np.frombuffer(tensor.numpy().tobytes(), dtype=np.uint8)
        expected = len(data) / 256
        assert ((np.bincount(data, minlength=256) - expected) ** 2 / expected).sum() < 400  # 255 degrees of freedom


def test_a_weight_that_was_changed_gets_another_mask():
    asked = []
    weights = Weights(lambda number, shape: asked.append(number))
    w = words(4, 4)
    first = weights._find(w)
    assert weights._find(w) is first
    assert weights._find(w.t()) is not first
    assert weights._find(w.t()) is weights._find(w.t())
    w += 1
    changed = weights._find(w)
    assert changed.number not in (first.number, weights._find(w.t()).number)
    w.data.numpy()[0, 0] ^= 1  # torch does not notice this
    assert weights._find(w) is not changed


def test_triples_know_the_shapes_of_every_product_of_crypten():
    x, w = (2, 3, 6, 5), (4, 3, 3, 2)
    for op, options, result in (
        ("conv2d", (("padding", (1, 0)), ("stride", (2, 1))), (2, 4, 3, 4)),
        ("conv_transpose2d", (("padding", (1, 1)),), None),
        ("conv1d", (), None),
    ):
        shapes = {"conv_transpose2d": ((2, 4, 6, 5), w), "conv1d": ((2, 3, 9), (4, 3, 2))}.get(op, (x, w))
        request = Request("triple", shapes, (("op", op), *options))
        plain = getattr(torch, op)(*(torch.zeros(s) for s in shapes), **dict(options))
        assert correlation.correction_shapes(request, 0) == [tuple(plain.shape)]
        assert result in (None, tuple(plain.shape))
    with pytest.raises(UnsupportedError, match="must be of mul, matmul"):
        correlation.correction_shapes(Request("triple", ((1,), (1,)), (("op", "system"),)), 0)
