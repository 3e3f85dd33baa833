"""CrypTen behind its one door: where its randomness, triples and messages come from."""

import subprocess
import sys

import pytest
import torch
from helpers import environment
from simulate import combine, dealt_shares, simulate, split

from protocols.crypten import door
from protocols.dealing.correlation import Request
from protocols.errors import ProtocolAbort, UnsupportedError
from protocols.primitives import ring
from protocols.primitives.prg import Stream
from protocols.two_party.party import Party
from protocols.two_party.recorder import Recorder

crypten = door.crypten


def recorded(program, shape):
    """The requests of a CrypTen computation on one shared tensor."""
    recorder = Recorder(0)
    with door.acting(recorder.party()), torch.no_grad():
        program(door.mpc_tensor(recorder.make(shape)))
    return recorder.requests


def run(program, x, extra=lambda party: None):
    """Apply a CrypTen computation to a shared float tensor; return the decoded result."""
    shares = split(ring.encode(x))

    def party_program(party):
        with door.acting(party), torch.no_grad():
            result = program(door.mpc_tensor(shares[party.rank])).share
            extra(party)
            return result

    return ring.decode(combine(simulate(recorded(program, tuple(x.shape)), party_program)))


@pytest.mark.parametrize(
    ("name", "ours", "torchs", "tolerance"),
    [
        ("relu", lambda x: x.relu(), torch.relu, 2e-5),
        ("square", lambda x: x.square(), torch.square, 4e-4),
        ("product", lambda x: x * x.relu(), lambda x: x * x.relu(), 4e-4),
        ("by a public number", lambda x: x * 0.3, lambda x: x * 0.3, 4e-4),
        ("over a public number", lambda x: x / 3, lambda x: x / 3, 2e-4),
        ("over a power of two", lambda x: x / 4, lambda x: x / 4, 4e-5),
        ("matmul", lambda x: x.matmul(x.t()), lambda x: x @ x.t(), 4e-3),
        ("comparison", lambda x: x > 0.5, lambda x: (x > 0.5).float() / 2**16, 1e-9),
        ("sigmoid", lambda x: x.sigmoid(), torch.sigmoid, 1e-2),
        ("softmax", lambda x: x.softmax(1), lambda x: x.softmax(1), 1e-2),
        ("maximum", lambda x: x.max(dim=1)[0], lambda x: x.max(dim=1)[0], 1e-3),
    ],
)
def test_cryptens_operations_work_over_our_dealer(name, ours, torchs, tolerance):
    x = torch.linspace(-3, 3, 35).reshape(5, 7)
    got = run(ours, x)
    assert abs(torch.from_numpy(got) - torchs(x)).max() <= tolerance, name


def test_no_mask_comes_from_torchs_generators(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("torch's generator was used")

    for name in ("randint", "rand", "randn", "bernoulli", "randperm", "Generator"):
        monkeypatch.setattr(torch, name, forbidden)
    for name in ("random_", "uniform_", "normal_", "bernoulli_"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    run(lambda x: x.softmax(1), torch.linspace(-3, 3, 35).reshape(5, 7))


def test_cryptens_drawing_functions_take_no_torch_generator():
    party = Party(0, None, None, Stream(), Stream(), Stream())
    with door.acting(party):
        for module in (crypten.mpc.primitives.arithmetic, crypten.mpc.provider.tfp_provider, crypten.common.rng):
            with pytest.raises(UnsupportedError, match="AES stream"):
                module.generate_random_ring_element((2,), generator=torch.Generator())
        assert crypten.mpc.primitives.binary.generate_kbit_random_tensor((2,), bitlength=3).max() < 8


def test_zero_sharings_add_up_to_zero_and_are_fresh():
    def program(party):
        with door.acting(party):
            return torch.stack([crypten.mpc.primitives.ArithmeticSharedTensor.PRZS((4,)).share for _ in range(2)])

    k, u = simulate([], program)
    assert torch.equal(k + u, torch.zeros_like(k))
    assert not torch.equal(k[0], k[1])
    assert bool((k != 0).all())


def test_nothing_travels_as_pickle_and_no_party_starts_behind_our_back():
    party = Party(0, None, None, Stream(), Stream(), Stream())
    with door.acting(party):
        communicator = crypten.communicator.get()
        for call in (communicator.send_obj, communicator.recv_obj, communicator.broadcast_obj):
            with pytest.raises(UnsupportedError, match="pickle"):
                call({}, 0)
        for call in (communicator.initialize, communicator.shutdown):
            with pytest.raises(UnsupportedError, match=r"securemtk|session"):
                call()
        assert communicator.get_world_size() == 2
    assert not crypten.communicator.is_initialized()
    with pytest.raises(ProtocolAbort, match="no party acts"):
        crypten.communicator.get()


def test_triples_never_come_from_a_party():
    party = Party(0, None, dealt_shares([])[0], Stream(), Stream(), Stream())
    with door.acting(party):
        assert crypten.mpc.get_default_provider().NAME == "dealer"
        with pytest.raises(ProtocolAbort, match="one more correlation"):
            crypten.mpc.get_default_provider().square((3,))
        with pytest.raises(ProtocolAbort, match="wrap"):
            crypten.mpc.get_default_provider().wrap_rng((3,))


def test_the_collectives_combine_both_parties_values():
    x = (torch.tensor([1, 2]), torch.tensor([10, 30]))

    def program(party):
        with door.acting(party):
            c, mine = crypten.communicator.get(), x[party.rank]
            xor = c.all_reduce(mine, op=torch.distributed.ReduceOp.BXOR)
            both = c.all_reduce([mine, mine[:1]], batched=True)
            only = c.reduce(mine, 1)
            sent = c.broadcast(mine, 0)
            gathered = c.all_gather(mine)
            at_one = c.gather(mine, 1)
            part = c.scatter(list(x), 0, size=(2,))
            c.barrier()
            return xor, both, only, sent, gathered, at_one, part

    (xor, both, _, sent, gathered, nothing, part), (xor1, _, only, sent1, gathered1, at_one, part1) = simulate(
        [], program
    )
    assert xor.tolist() == xor1.tolist() == [11, 28]
    assert [b.tolist() for b in both] == [[11, 32], [11]]
    assert only.tolist() == [11, 32]
    assert sent.tolist() == sent1.tolist() == [1, 2]
    assert [g.tolist() for g in gathered] == [g.tolist() for g in gathered1] == [[1, 2], [10, 30]]
    assert nothing is None
    assert [g.tolist() for g in at_one] == [[1, 2], [10, 30]]
    assert (part.tolist(), part1.tolist()) == ([1, 2], [10, 30])


def test_an_opening_is_one_round():
    def program(party):
        with door.acting(party):
            door.mpc_tensor(torch.ones(3, dtype=torch.int64)).reveal()
            return party.wire.clock, [kind for kind, _ in party.wire.sent]

    assert simulate([], program) == [(1, ["open"]), (1, ["open"])]


def test_tensors_hide_their_shares():
    share = torch.tensor([123456789])
    with door.acting(Party(0, None, None, Stream(), Stream(), Stream())):
        for tensor in (door.mpc_tensor(share), door.arithmetic(share)):
            assert "123456789" not in repr(tensor)
            assert "hidden" in repr(tensor)


def test_requests_are_the_same_whatever_the_values():
    request = recorded(lambda x: x.relu(), (3,))
    assert request == recorded(lambda x: x.relu(), (3,))
    assert all(isinstance(r, Request) for r in request)


def test_settings_are_kept_by_thread():
    def program(party):
        with crypten.cfg.temp_override({"encoder.precision_bits": 10 + party.rank}):
            party.wire.exchange("wait", torch.zeros(1))
            mine = crypten.cfg.encoder.precision_bits
            party.wire.exchange("wait", torch.zeros(1))
        return mine, crypten.cfg.encoder.precision_bits

    assert simulate([], program) == [(10, 16), (11, 16)]


def test_who_tried_to_import_crypten_before_can_use_it_behind_the_door():
    program = "try:\n    import crypten\nexcept ModuleNotFoundError:\n    pass\nimport protocols.crypten.door"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, env=environment(), timeout=120)
