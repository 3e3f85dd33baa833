"""Comparison keys, and the comparisons built on them: exact, at the declared cost, uniform on the wire."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import combine, simulate, split

from protocols import limits
from protocols.dealing.correlation import correction_shapes
from protocols.primitives import aes, comparison_steps, dcf
from protocols.primitives.prg import Stream
from protocols.two_party import compare

BITS = limits.COMPARISON_BITS - 1


def points(values) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


# --- the keys -------------------------------------------------------------------------------------------------------

EDGES = [0, 1, 63, 64, 65, 126, 127, 128, 2**24, 2**31 - 1, 2**31 - 2]
point = st.one_of(st.sampled_from(EDGES), st.integers(0, 2**31 - 1))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(point, point, st.integers(0, 1)), min_size=1, max_size=40))
def test_the_two_evaluations_share_whether_y_is_below_q(triples):
    y, q, flip = (points(v) for v in zip(*triples, strict=True))
    s0, s1 = dcf.seeds(Stream(), len(y)), dcf.seeds(Stream(), len(y))
    keys = dcf.generate(s0, s1, q, flip, BITS)
    shares = [dcf.evaluate(party, seeds, keys, y) for party, seeds in enumerate((s0, s1))]
    np.testing.assert_array_equal(shares[0] ^ shares[1], (y < q).astype(np.uint8) ^ flip.astype(np.uint8))


@pytest.mark.parametrize("bits", [8, 9, 16, 31, 39])
def test_points_of_every_length_are_compared(bits):
    stream = Stream(bytes(16))
    q, y = (stream.integers(bits, (500,)).numpy().view(np.uint64) for _ in range(2))
    y[:100] = q[:100]
    s0, s1 = dcf.seeds(stream, 500), dcf.seeds(stream, 500)
    keys = dcf.generate(s0, s1, q, np.zeros(500, np.uint64), bits)
    both = dcf.evaluate(0, s0, keys, y) ^ dcf.evaluate(1, s1, keys, y)
    np.testing.assert_array_equal(both, y < q)


@pytest.mark.skipif(not aes.NATIVE, reason="this processor has no AES instructions, or numba is missing")
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 70), bits=st.sampled_from([8, 20, 31]), seed=st.binary(min_size=16, max_size=16))
def test_compiled_and_plain_functions_agree_bit_by_bit(n, bits, seed):
    stream, m = Stream(seed), dcf.padded(n)
    q, y = (stream.integers(bits, (m,)).numpy().view(np.uint64) for _ in range(2))
    flip = stream.integers(1, (m,)).numpy().view(np.uint64)
    s0, s1 = dcf.seeds(stream, m), dcf.seeds(stream, m)
    keys = dcf.generate(s0, s1, q, flip, bits)
    words, values = np.empty_like(keys.words), np.empty_like(keys.values)
    dcf.generate_numpy(s0, s1, q, flip, bits, words, values)
    np.testing.assert_array_equal(words, keys.words)
    np.testing.assert_array_equal(values, keys.values)
    for party, seeds in enumerate((s0, s1)):
        out = np.empty(m, dtype=np.uint8)
        dcf.evaluate_numpy(party, seeds, words, values, y, bits, out)
        np.testing.assert_array_equal(out, dcf.evaluate(party, seeds, keys, y))


def test_the_fixed_permutation_is_aes_128():
    # FIPS 197, appendix C.1
    key, text = bytes(range(16)), bytes.fromhex("00112233445566778899aabbccddeeff")
    assert aes.expand(key)[0].tobytes() == key
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    block = np.frombuffer(text, dtype=np.uint64).reshape(1, 2)
    expected = Cipher(algorithms.AES(aes.KEY), modes.ECB()).encryptor().update(text)  # noqa: S305
    assert aes.encrypt_blocks(block).tobytes() == expected
    assert aes.expand(key)[10].tobytes().hex() == "13111d7fe3944a17f307a78b4d2b30c5"


def test_a_partys_key_looks_the_same_whatever_the_point():
    # Correction words and one party's evaluation, for a fixed point and for random ones: byte counts by chi-square.
    n = 4096
    for q in (
        np.zeros(n, np.uint64),
        np.full(n, 2**31 - 1, np.uint64),
        Stream().integers(31, (n,)).numpy().view(np.uint64),
    ):
        s0, s1 = dcf.seeds(Stream(), n), dcf.seeds(Stream(), n)
        keys = dcf.generate(s0, s1, q, np.zeros(n, np.uint64), BITS)
        for array in (keys.words, keys.values.astype(np.uint32) << 8 >> 8):
            data = array.reshape(-1)[: 1 << 16].view(np.uint8)
            if array is keys.words:
                counts = np.bincount(data, minlength=256)
                chi = ((counts - len(data) / 256) ** 2 / (len(data) / 256)).sum()
                assert chi < 400
        ones = dcf.evaluate(0, s0, keys, np.zeros(n, np.uint64)).mean()
        assert abs(ones - 0.5) < 0.05


def test_a_comparison_costs_each_party_at_most_460_bytes():
    for kind, per in (("sign", 1), ("pairs", 2)):
        for bits in (0, 16):
            n = 8192
            request = compare.request_of(kind, (2, n // 2) if kind == "pairs" else (n,), bits)
            for rank in (0, 1):
                n_bytes = 8 * sum(int(np.prod(shape)) for shape in correction_shapes(request, rank))
                assert n_bytes / (n // per) <= 460, (kind, bits, rank)


# --- ReLU and maxima ------------------------------------------------------------------------------------------------

values32 = st.one_of(st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31)]), st.integers(-(2**31), 2**31 - 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(values32, min_size=1, max_size=30))
def test_relu_is_exact_at_its_declared_cost(values):
    t = torch.tensor(values)
    shares = split(t)

    def program(p):
        return compare.relu(p, shares[p.rank], 0), p.wire.bytes, p.wire.clock

    (k, sent0, rounds), (u, sent1, _) = simulate([compare.request_of("sign", t.shape, 0)], program)
    assert torch.equal(k + u, t.clamp(min=0))
    cost = compare.relu.cost(t.numel())
    assert (rounds, sent0 + sent1) == (cost.rounds, cost.payload_bytes)


@pytest.mark.parametrize("k", [20, 24, 39, 40])
@pytest.mark.parametrize("cut", [0, 16])
def test_values_are_compared_on_any_number_of_bits(k, cut):
    most = 2 ** (k - 1) - 1
    t = torch.tensor([0, 1, -1, 2, -2, most, -most, most - 1, 1 - most, most // 3, -most // 7])
    shares = split(t << cut)

    def program(p):
        p.comparison_bits = k
        return compare.relu(p, shares[p.rank], cut)

    got = combine(simulate([compare.request_of("sign", t.shape, cut, k)], program))
    assert ((got - t.clamp(min=0)).abs() <= (cut > 0)).all()
    # One bit more, and the answer is that for another sign: the bound is where it is said to be.
    beyond = split(torch.full((64,), most + 2) << cut)

    def wrong(p):
        p.comparison_bits = k
        return compare.relu(p, beyond[p.rank], cut)

    assert (combine(simulate([compare.request_of("sign", (64,), cut, k)], wrong)) == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(values32, min_size=1, max_size=30))
def test_the_sign_bit_is_exact_at_its_declared_cost(values):
    t = torch.tensor(values)
    shares = split(t)

    def program(p):
        return compare.is_negative(p, shares[p.rank]), p.wire.bytes, p.wire.clock

    (k, sent0, rounds), (u, sent1, _) = simulate([compare.request_of("sign", t.shape, 0)], program)
    assert torch.equal(k + u, (t < 0).long())
    cost = compare.is_negative.cost(t.numel())
    assert (rounds, sent0 + sent1) == (cost.rounds, cost.payload_bytes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(values32, st.integers(0, 2**16 - 1)), min_size=1, max_size=30))
def test_relu_with_truncation_is_the_relu_of_the_floor_or_one_above(pairs):
    z = torch.tensor([(a << 16) + b for a, b in pairs if a < 2**31 - 1] or [0])
    shares = split(z)
    request = compare.request_of("sign", z.shape, 16)
    got = combine(simulate([request], lambda p: compare.relu(p, shares[p.rank], 16)))
    floor = z >> 16
    assert bool(((got == floor.clamp(min=0)) | (got == (floor + 1).clamp(min=0))).all())


@pytest.mark.parametrize("bits", [0, 16])
@pytest.mark.parametrize("width", [2, 3, 4, 9])
def test_maxima_of_pairs_are_right_at_the_declared_cost(bits, width):
    t = torch.randint(-(2**30), 2**30, (width, 3, 5))
    t[:, 0, 0] = 7  # ties
    z = (t << bits) + (torch.randint(0, 2**bits, t.shape) if bits else 0)
    shares = split(z)

    def program(p):
        return compare.max_of_pairs(p, shares[p.rank], bits), p.wire.bytes, p.wire.clock

    (k, sent0, rounds), (u, sent1, _) = simulate([compare.request_of("pairs", z.shape, bits)], program)
    half = width // 2
    expected = torch.cat([torch.maximum(t[:half], t[half : 2 * half]), t[2 * half :]])
    error = k + u - expected
    assert bool(((error == 0) | (error == (1 if bits else 0))).all())
    cost = compare.max_of_pairs.cost(t.numel(), 15 * half)
    assert (rounds, sent0 + sent1) == (cost.rounds, cost.payload_bytes)


def chi_square(data: bytes) -> float:
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    return float(((counts - len(data) / 256) ** 2 / (len(data) / 256)).sum())


@pytest.mark.parametrize("value", [0, 1, -1, 12345 << 16, -(2**31) << 15])
def test_what_a_comparison_sends_is_uniform_whatever_the_value(value):
    z = torch.full((2, 8192), value)
    zero = torch.zeros_like(z)
    for kind, protocol in (("sign", compare.relu), ("pairs", compare.max_of_pairs)):
        request = compare.request_of(kind, z.shape, 16)

        def program(p, protocol=protocol):
            protocol(p, z if p.rank == 0 else zero, 16)
            return {name: t.numpy().tobytes() for name, t in p.wire.sent}

        sent = simulate([request], program)
        for one in sent:
            assert chi_square(one["open"]) < 400  # 255 degrees of freedom
            # 1,024 to 2,048 bytes of packed bits: the share alone, and the opened bit below.
            assert chi_square(one["bits"]) < 400
        opened = bytes(a ^ b for a, b in zip(sent[0]["bits"], sent[1]["bits"], strict=True))
        ones = np.unpackbits(np.frombuffer(opened, np.uint8)).mean()
        assert abs(ones - 0.5) < 0.03


STEPS = {"relu_truncated": 5, "relu": 4, "larger_truncated": 7, "larger": 6, "truncated": 3, "public_part": 1}


@pytest.mark.parametrize("name", STEPS)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=8, max_size=8))
def test_compiled_loops_do_for_each_element_what_the_step_says(name, values):
    arrays = [np.array([v, -v // 3], dtype=np.int64) for v in values]
    bits = [(arrays[0] & 1).astype(np.uint8)] if name.startswith(("relu", "larger")) else []
    last = [1] if name != "public_part" else []
    for cut in (16, 21, 32) if name in ("relu_truncated", "public_part") else (None,):
        more = [] if cut is None else [cut]
        step = getattr(comparison_steps, "_public_part_of" if name == "public_part" else f"_{name}").py_func
        tensors = [torch.from_numpy(a) for a in (*bits, *arrays[: STEPS[name]])]
        compiled = getattr(comparison_steps, name)(*tensors, *last, *more)
        with np.errstate(over="ignore"):
            plain = step(*(b.astype(np.int64) for b in bits), *arrays[: STEPS[name]], *map(np.int64, last + more))
        np.testing.assert_array_equal(compiled.numpy(), plain)
        shape_alone = getattr(comparison_steps, name)(*(x.to("meta") for x in tensors), *last, *more)
        assert (shape_alone.shape, shape_alone.dtype) == (compiled.shape, compiled.dtype)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=30))
def test_bits_are_packed_and_unpacked(bits):
    x = torch.tensor(bits, dtype=torch.uint8)
    packed = comparison_steps.pack_bits(x)
    assert packed.tolist() == np.packbits(bits).tolist()
    assert torch.equal(comparison_steps.unpack_bits(packed, x.shape), x)
