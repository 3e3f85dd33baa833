"""One contract for all protocols: every operator agrees with the plain oracle, in the open and under the gates."""

import numpy as np
import program_oracle
import pytest
import torch
from both_parties import CASES, CONV, LOCAL, PROTOCOLS, RNG, secure, single
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.dealing.correlation import Secrets
from protocols.errors import IntegrityError, UnsupportedError
from protocols.primitives import ring
from protocols.program import plain
from protocols.program.program import OPERATORS, Layer, Program
from protocols.running import backend
from protocols.two_party import party, spline


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("op", "number"), [(op, i) for op, cases in CASES.items() for i in range(len(cases))])
def test_every_operator_agrees_with_the_plain_oracle(protocol, op, number):
    program, params = single(op, CASES[op][number])
    inputs = {k: RNG.uniform(-2, 2, (3, *s)).astype(np.float32) for k, s in program.inputs.items()}
    got, *_ = secure(protocol, program, params, inputs)
    expected = plain.run(program, params, inputs)["y"]
    assert got["y"].shape == expected.shape == (3, *program.shape("y"))
    np.testing.assert_allclose(got["y"], expected, atol=2e-3)


# operator -> rounds of fss until the user has the result, for each case. Revealing is one of them and so is the
# truncation of what has more than 16 fraction bits; the user's message of a linear layer travels with that of its
# truncation. A comparison takes 2 rounds, a level of a maximum too, of an argmax 3 with the choice.
REVEAL, TRUNCATION, PRODUCT, COMPARISON = 1, 1, 1, 2
ROUNDS = {
    **dict.fromkeys(("conv2d", "matmul", "affine"), lambda number: PRODUCT + REVEAL),
    **dict.fromkeys(LOCAL - {"scale"}, lambda number: REVEAL),
    "scale": lambda number: (TRUNCATION if number else 0) + REVEAL,
    **dict.fromkeys(("mean", "deviation", "avg_pool2d"), lambda number: TRUNCATION + REVEAL),
    **dict.fromkeys(("mul", "dot"), lambda number: PRODUCT + TRUNCATION + REVEAL),
    "relu": lambda number: COMPARISON + REVEAL,
    # The last one keeps 24 bits first.
    "spline": lambda number: COMPARISON + (0, 0, TRUNCATION, 2 * TRUNCATION)[number] + REVEAL,
    # Both scales are opened at once, and so is what has to be truncated of both results; then one is chosen.
    "wide_spline": lambda number: COMPARISON + TRUNCATION + PRODUCT + (TRUNCATION, 0)[number] + REVEAL,
    "max": lambda number: (3, 2)[number] * COMPARISON + REVEAL,
    "argmax": lambda number: (3, 2)[number] * (COMPARISON + PRODUCT) + REVEAL,
    "max_pool2d": lambda number: (2, 4, 4)[number] * COMPARISON + REVEAL,
}


@pytest.mark.parametrize(("op", "number"), [(op, i) for op, cases in CASES.items() for i in range(len(cases))])
def test_every_operator_takes_the_rounds_that_are_written_of_it(op, number):
    program, params = single(op, CASES[op][number])
    inputs = {k: RNG.uniform(-2, 2, (1, *s)).astype(np.float32) for k, s in program.inputs.items()}
    assert secure("fss", program, params, inputs)[1] == ROUNDS[op](number)


def test_a_spline_sends_what_it_declares():
    for number, (_, shape, _, attrs) in enumerate(CASES["spline"]):
        program, params = single("spline", CASES["spline"][number])
        x = RNG.uniform(-2, 2, (3, *shape)).astype(np.float32)
        _, _, sent = secure("fss", program, params, {"x0": x})
        truncations = (attrs["frac_bits"] > attrs["keep_bits"]) + (min(attrs["frac_bits"], attrs["keep_bits"]) > 16)
        declared = [spline.evaluate.cost(x.size, len(attrs["knots"])), party.reveal_to_user.cost(x.size)]
        declared += [party.truncate.cost(x.size)] * truncations
        measured = sum(t.numel() * t.element_size() for each in sent for _, t in each)
        assert measured == sum(cost.payload_bytes for cost in declared)


def test_results_of_linear_layers_are_added_and_joined_before_they_are_truncated():
    layers = [
        Layer("matmul", "a", ("x",), "a", (4,), {"weight": "w", "bias": "b"}),
        Layer("matmul", "c", ("x",), "c", (4,), {"weight": "w", "bias": "b"}),
        Layer("add", "d", ("a", "c"), "d", (4,)),
        Layer("sub", "e", ("d", "x"), "e", (4,)),
        Layer("concat", "f", ("e", "d"), "f", (8,), {}, {"axis": 1}),
        Layer("sum", "g", ("f",), "g", (1,), {}, {"axes": (1,), "keepdims": 1}),
        Layer("relu", "y", ("g",), "y", (1,)),
    ]
    program = Program({"x": (4,)}, ("y",), tuple(layers), {"w": (4, 4), "b": (4,)})
    params = {k: RNG.standard_normal(s).astype(np.float32) for k, s in program.params.items()}
    x = {"x": RNG.uniform(-2, 2, (9, 4)).astype(np.float32)}
    got, rounds, _ = secure("fss", program, params, x)
    np.testing.assert_allclose(got["y"], plain.run(program, params, x)["y"], atol=2e-3)
    alone = Program({"x": (1,)}, ("y",), (Layer("matmul", "g", ("x",), "g", (1,), {"weight": "w", "bias": "b"}),
        Layer("relu", "y", ("g",), "y", (1,))), {"w": (1, 1), "b": (1,)})  # fmt: skip
    ones = {"w": np.ones((1, 1), np.float32), "b": np.zeros(1, np.float32)}
    assert rounds == secure("fss", alone, ones, {"x": x["x"][:, :1]})[1]


def chi_square(data: bytes) -> float:
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    return float(((counts - len(data) / 256) ** 2 / (len(data) / 256)).sum())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [0.0, -1.5])
@pytest.mark.parametrize("op", CASES)
def test_all_that_a_party_sends_is_uniform_whatever_the_secrets(protocol, op, value):
    program, params = single(op, CASES[op][0])
    inputs = {k: np.full((100, *shape), value, np.float32) for k, shape in program.inputs.items()}
    params = {k: np.full_like(w, value) for k, w in params.items()}
    pooled: dict[tuple[int, str], bytes] = {}
    for rank, sent in enumerate(secure(protocol, program, params, inputs)[2]):
        for kind, tensor in sent:
            if kind == "reveal":
                continue  # the output minus the user's own share: the user could have written it
            flat = tensor.numpy().reshape(-1)
            if flat.dtype == np.int64 and set(np.unique(flat)) <= {0, 1}:
                # Shares of single bits travel as whole words in CrypTen's conversions.
                kind, flat = f"{kind}, of bits", np.packbits(flat.astype(np.uint8))[: len(flat) // 8]
            pooled[rank, kind] = pooled.get((rank, kind), b"") + flat.tobytes()
    assert pooled or op in LOCAL
    for sender, data in pooled.items():
        assert chi_square(data) < 420, sender  # 255 degrees of freedom: above 420 with probability 3e-10


def test_every_operator_of_a_program_has_a_case_and_an_implementation():
    assert set(CASES) == set(ROUNDS) == set(OPERATORS) == set(plain.OPERATORS) == set(program_oracle.OPERATORS)
    for protocol in PROTOCOLS:
        assert set(backend.find(protocol).operators) == set(OPERATORS)


def network() -> tuple[Program, dict[str, np.ndarray]]:
    """A convolution, pooling, a residual sum and two heads."""
    layers = (
        Layer("conv2d", "conv", ("x",), "h", (4, 6, 6), {"weight": "w", "bias": "b"}, CONV | {"pads": (1, 1, 1, 1)}),
        Layer("relu", "relu", ("h",), "r", (4, 6, 6)),
        Layer("add", "sum", ("h", "r"), "s", (4, 6, 6)),
        Layer("max_pool2d", "pool", ("s",), "p", (4, 3, 3), {}, {"kernel": (2, 2), "stride": (2, 2), "pads": (0,) * 4}),
        Layer("reshape", "flat", ("p",), "f", (36,), {}, {"shape": (36,)}),
        Layer("matmul", "head_a", ("f",), "a", (3,), {"weight": "wa", "bias": "ba"}),
        Layer("matmul", "head_b", ("f",), "b_", (2,), {"weight": "wb", "bias": "bb"}),
        Layer("relu", "top", ("b_",), "b", (2,)),
    )
    params = {"w": (4, 1, 3, 3), "b": (4,), "wa": (36, 3), "ba": (3,), "wb": (36, 2), "bb": (2,)}
    program = Program({"x": (1, 6, 6)}, ("a", "b"), layers, params)
    program.validate()
    return program, {k: (RNG.standard_normal(s) * 0.5).astype(np.float32) for k, s in params.items()}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("open_a", "open_b"), [(True, True), (False, True), (True, False), (False, False)])
def test_gates_stamp_the_input_and_close_tasks_exactly_at_the_same_rounds(protocol, open_a, open_b):
    program, params = network()
    x = RNG.uniform(-1, 1, (2, 1, 6, 6)).astype(np.float32)
    mask = np.zeros((1, 6, 6), dtype=np.int64)
    mask[:, 4:, 4:] = 1
    pattern = RNG.uniform(0, 1, (1, 6, 6)) * mask
    noise = {"a": torch.arange(6).reshape(2, 3) << 16, "b": torch.arange(4).reshape(2, 2) << 16}
    granted = open_a or open_b
    secrets = Secrets(
        torch.from_numpy(mask * granted),
        torch.from_numpy(mask * granted) * ring.encode(pattern),
        {"a": open_a, "b": open_b},
        {k: lambda n, k=k: noise[k][:n] for k in noise},
    )
    got, rounds, _ = secure(protocol, program, params, {"x": x}, True, secrets)
    stamped = x * (1 - mask) + pattern if granted else x
    expected = plain.run(program, params, {"x": stamped})
    for name, is_open in (("a", open_a), ("b", open_b)):
        if is_open:
            np.testing.assert_allclose(got[name], expected[name], atol=2e-3)
        else:
            np.testing.assert_array_equal(got[name], ring.decode(noise[name]))
    _, plain_rounds, _ = secure(protocol, program, params, {"x": x})
    # Without gates the output that a comparison has left at scale 2**f needs no opening of its own, but the other does;
    # the masked input goes with the user's first message to a linear layer, before that of a triple.
    assert rounds == plain_rounds + (protocol == "crypten")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=30))
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_relu_is_right_at_every_value_that_fixed_point_holds(protocol, values):
    program, params = single("relu", ([(len(values),)], (len(values),), {}, {}))
    x = np.array([values], dtype=np.float32)
    got, *_ = secure(protocol, program, params, {"x0": x})
    np.testing.assert_allclose(got["y"], np.maximum(ring.decode(ring.encode(x)), 0), atol=2.0**-15)


def test_an_unknown_protocol_and_a_spoilt_program_are_refused():
    with pytest.raises(UnsupportedError, match="protocol must be one of"):
        backend.find("magic")
    program, _ = network()
    assert Program.from_json(program.to_json()).to_json() == program.to_json()
    for old, new in [('"relu"', '"teleport"'), ('"x"', '"nobody"'), ('"wa"', '"absent"'), ("[4, 6, 6]", "null")]:
        with pytest.raises(IntegrityError):
            Program.from_json(program.to_json().replace(old, new, 1))
    for text in ("", "[]", "{}", '{"inputs": {}, "outputs": [], "layers": [], "params": {}}'):
        with pytest.raises(IntegrityError):
            Program.from_json(text)
