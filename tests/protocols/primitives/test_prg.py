"""Randomness: AES streams, and what is wrong with CrypTen's own generators."""

import pickle

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.primitives.prg import Stream, fresh_seed


def test_a_stream_is_aes_128_in_counter_mode():
    seed = bytes(range(16))
    expected = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(4096))
    assert Stream(seed).bytes(4096) == expected
    assert Stream(seed).words((512,)).numpy().tobytes() == expected


def test_large_draws_are_the_same_stream_as_small_ones():
    seed = fresh_seed()
    whole = Stream(seed).words((9 << 20,))  # more than one chunk of the cipher
    parts = Stream(seed)
    assert torch.equal(whole, torch.cat([parts.words((n,)) for n in (1, 7, (9 << 20) - 8)]))


def test_fresh_streams_differ_and_equal_seeds_agree():
    seed = fresh_seed()
    assert torch.equal(Stream(seed).words((4, 5)), Stream(seed).words((4, 5)))
    assert not torch.equal(Stream().words((4,)), Stream().words((4,)))


def test_derived_streams_depend_on_label_and_seed_only():
    stream = Stream(bytes(16))
    stream.words((3,))
    assert stream.derive("a").bytes(16) == Stream(bytes(16)).derive("a").bytes(16)
    assert stream.derive("a").bytes(16) != stream.derive("b").bytes(16)
    assert stream.derive("a").bytes(16) != Stream(bytes(15) + b"\1").derive("a").bytes(16)


def test_a_stream_hides_its_seed_and_does_not_pickle():
    stream = Stream(b"0123456789abcdef")
    assert "0123" not in repr(stream)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(stream)


@pytest.mark.parametrize("n", [0, 15, 17])
def test_a_seed_of_another_length_is_refused(n):
    with pytest.raises(ValueError, match="16 bytes"):
        Stream(bytes(n))


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(1, 63), n=st.integers(0, 100))
def test_integers_stay_inside_their_bits(bits, n):
    values = Stream().integers(bits, (n,))
    assert values.shape == (n,)
    assert bool((values >= 0).all())
    assert n == 0 or int(values.max()) < 2**bits


def test_draws_have_the_distribution_they_claim():
    stream = Stream(bytes(16))  # fixed: the test is deterministic
    ones = np.unpackbits(np.frombuffer(stream.bytes(1 << 20), dtype=np.uint8)).mean()
    assert abs(ones - 0.5) < 1e-3
    normal = stream.normal((1 << 18,))
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 1) < 0.01
    counts = torch.bincount(stream.below(10, (100_000,)), minlength=10)
    assert counts.shape == (10,)
    assert int((counts - 10_000).abs().max()) < 500
    assert sorted(stream.permutation(50).tolist()) == list(range(50))


def test_cryptens_generator_keeps_32_bits_of_its_seed_and_ours_does_not():
    def torch_draw(seed):
        return torch.randint(-(2**62), 2**62, (8,), generator=torch.Generator().manual_seed(seed))

    low = 0x0123_4567
    # Two 64-bit seeds that share their low half: Mersenne Twister gives the same "masks".
    assert torch.equal(torch_draw(low), torch_draw(low + (0x7654_3210 << 32)))
    one, two = (Stream((low + (high << 32)).to_bytes(16, "little")) for high in (0, 0x7654_3210))
    assert not torch.equal(one.words((8,)), two.words((8,)))
    # Every one of the 128 bits of a seed changes the stream.
    seed = fresh_seed()
    reference = Stream(seed).bytes(16)
    for bit in range(128):
        flipped = (int.from_bytes(seed, "big") ^ (1 << bit)).to_bytes(16, "big")
        assert Stream(flipped).bytes(16) != reference
