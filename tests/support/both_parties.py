"""Programs of one operator each, and any program run by both parties in one process."""

from dataclasses import asdict

import numpy as np
from simulate import simulate

from protocols import limits
from protocols.dealing.correlation import USER
from protocols.primitives import ring
from protocols.primitives.prg import Stream
from protocols.program import functions
from protocols.program.pieces import Pieces, WidePieces
from protocols.program.program import Layer, Program
from protocols.running import backend, runner

RNG = np.random.default_rng(0)
PROTOCOLS = sorted(backend.PROTOCOLS)
LOCAL = {"add", "sub", "shift", "scale", "sum", "sum_pool2d"} | {"reshape", "transpose", "concat", "take", "expand"}
CONV = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}

# min(max(x, 0), 6), and [x >= 0] as a number without fraction.
ReLU6 = Pieces((0, 6 << 16), (0, 0, 0, 0, 1, 0, 6 << 16, 0, 0), 16)
POSITIVE_BIT = Pieces((0,), (0, 0, 0, 1, 0, 0), 0)


def spline_of(pieces: Pieces | WidePieces, keep_bits: int) -> dict:
    return asdict(pieces) | {"keep_bits": keep_bits}


# operator -> list of (shapes of inputs, shape of output, shapes of params by role, attrs)
CASES = {
    "conv2d": [
        ([(3, 6, 5)], (4, 4, 3), {"weight": (4, 3, 3, 3), "bias": (4,)}, CONV),
        (
            [(2, 7, 7)],
            (4, 4, 4),
            {"weight": (4, 1, 3, 3), "bias": (4,)},
            CONV | {"groups": 2, "stride": (2, 2), "pads": (1, 1, 1, 1)},
        ),
        (
            [(1, 9, 9)],
            (2, 6, 7),
            {"weight": (2, 1, 3, 2), "bias": (2,)},
            CONV | {"dilation": (2, 2), "pads": (0, 0, 1, 0)},
        ),
        ([(4, 3, 6, 5)], (4, 2, 4, 3), {"weight": (2, 3, 3, 3), "bias": (2,)}, CONV),
    ],
    "matmul": [
        ([(7,)], (4,), {"weight": (7, 4), "bias": (4,)}, {}),
        ([(5, 7)], (5, 4), {"weight": (7, 4), "bias": (4,)}, {}),
    ],
    "affine": [([(3, 4, 4)], (3, 4, 4), {"scale": (1, 3, 1, 1), "shift": (1, 3, 1, 1)}, {})],
    "add": [([(3, 4), (3, 4)], (3, 4), {}, {})],
    "sub": [([(3, 4), (3, 4)], (3, 4), {}, {})],
    "mul": [([(3, 4), (3, 4)], (3, 4), {}, {})],
    "relu": [([(33,)], (33,), {}, {})],
    "shift": [([(3, 4)], (3, 4), {"addend": (1, 3, 1)}, {})],
    "scale": [
        ([(9,)], (9,), {}, {"factor": -1, "offset": 1}),
        ([(9,)], (9,), {}, {"factor": 0.3, "offset": -0.25}),
        ([(9,)], (9,), {}, {"factor": 0.0625, "offset": 0.3}),
    ],
    "dot": [([(2, 3, 4), (2, 4, 5)], (2, 3, 5), {}, {}), ([(2, 3, 4), (1, 4, 5)], (2, 3, 5), {}, {})],
    "spline": [
        ([(33,)], (33,), {}, spline_of(ReLU6, 16)),
        ([(33,)], (33,), {}, spline_of(POSITIVE_BIT, 16)),
        ([(3, 3)], (3, 3), {}, spline_of(functions.pieces("gelu"), 16)),
        ([(9,)], (9,), {}, spline_of(functions.pieces("exp_negative"), 24)),
    ],
    "wide_spline": [
        ([(33,)], (33,), {}, spline_of(functions.pieces("sqrt"), 24)),
        ([(3, 3)], (3, 3), {}, spline_of(functions.pieces_of(functions.CUSTOM["root"](2.0)), 16)),
    ],
    "max": [([(7, 3)], (1, 3), {}, {"axis": 1}), ([(2, 4)], (2, 1), {}, {"axis": 2})],
    "argmax": [([(7, 3)], (1, 3), {}, {"axis": 1, "last": 0}), ([(2, 4)], (2, 1), {}, {"axis": 2, "last": 1})],
    "take": [
        ([(3, 4)], (3, 6), {}, {"axis": 2, "indices": (3, -1, 0, 0, -1, 2), "fill": 0.5}),
        ([(3, 4)], (1, 4), {}, {"axis": 1, "indices": (1,), "fill": 0}),
    ],
    "expand": [([(3, 1)], (3, 4), {}, {"shape": (3, 4)})],
    "max_pool2d": [
        ([(2, 6, 6)], (2, 3, 3), {}, {"kernel": (2, 2), "stride": (2, 2), "pads": (0, 0, 0, 0)}),
        ([(2, 5, 6)], (2, 3, 3), {}, {"kernel": (3, 3), "stride": (2, 2), "pads": (1, 1, 1, 0)}),
        ([(2, 3, 5, 6)], (2, 3, 3, 3), {}, {"kernel": (3, 3), "stride": (2, 2), "pads": (1, 1, 1, 0)}),
    ],
    "avg_pool2d": [
        (
            [(2, 6, 6)],
            (2, 2, 2),
            {},
            {"kernel": (3, 3), "stride": (3, 3), "pads": (0, 0, 0, 0), "count_include_pad": 0},
        ),
        (
            [(2, 5, 5)],
            (2, 3, 3),
            {},
            {"kernel": (3, 3), "stride": (2, 2), "pads": (1, 1, 1, 1), "count_include_pad": 0},
        ),
        (
            [(2, 5, 5)],
            (2, 3, 3),
            {},
            {"kernel": (3, 3), "stride": (2, 2), "pads": (1, 1, 1, 1), "count_include_pad": 1},
        ),
        (
            [(2, 3, 5, 6)],
            (2, 3, 3, 3),
            {},
            {"kernel": (3, 3), "stride": (2, 2), "pads": (1, 1, 1, 0), "count_include_pad": 0},
        ),
    ],
    "mean": [
        ([(3, 4, 5)], (3,), {}, {"axes": (2, 3), "keepdims": 0}),
        ([(3, 4, 5)], (3, 1, 1), {}, {"axes": (2, 3), "keepdims": 1}),
    ],
    "sum_pool2d": [
        ([(2, 5, 6)], (2, 3, 3), {}, {"kernel": (3, 3), "stride": (2, 2), "pads": (1, 1, 1, 0)}),
        ([(2, 3, 5, 6)], (2, 3, 3, 3), {}, {"kernel": (3, 3), "stride": (2, 2), "pads": (1, 1, 1, 0)}),
    ],
    "sum": [
        ([(3, 4, 5)], (3,), {}, {"axes": (2, 3), "keepdims": 0}),
        ([(3, 4, 5)], (1, 4, 5), {}, {"axes": (1,), "keepdims": 1}),
    ],
    "deviation": [
        ([(3, 4, 5)], (3, 4, 5), {}, {"axes": (2, 3)}),
        ([(3, 4)], (3, 4), {}, {"axes": (2,)}),
    ],
    "reshape": [([(3, 4)], (12,), {}, {"shape": (12,)})],
    "transpose": [([(3, 4)], (4, 3), {}, {"perm": (0, 2, 1)})],
    "concat": [([(3, 4), (2, 4)], (5, 4), {}, {"axis": 1})],
}


def single(op: str, case) -> tuple[Program, dict[str, np.ndarray]]:
    """A program of one operator, and random parameters."""
    shapes, out, params, attrs = case
    inputs = {f"x{i}": shape for i, shape in enumerate(shapes)}
    layer = Layer(op, op, tuple(inputs), "y", out, {role: role for role in params}, attrs)
    program = Program(inputs, ("y",), (layer,), params)
    program.validate()
    return program, {k: RNG.standard_normal(s).astype(np.float32) for k, s in params.items()}


def secure(protocol, program, params, inputs, gated=False, secrets=None, comparison_bits=limits.COMPARISON_BITS):
    """Run a program as two parties; the user's outputs as float32, the rounds, and what each party sent."""
    batch = len(next(iter(inputs.values())))
    plan = runner.Plan(program, protocol, batch, gated, comparison_bits)
    module = backend.find(protocol)
    masks = {name: Stream().words(shape) for name, shape in program.params.items()}
    own = module.share_weights(program, params, comparison_bits)
    masked = {name: own[name] - masks[name] for name in module.masked_names(program)}

    def party_program(party):
        weights = module.share_weights(program, params if party.rank != USER else None, comparison_bits)
        given = {k: ring.encode(x) if party.rank == USER else None for k, x in inputs.items()}
        probe = runner.Probe(lambda: (party.wire.bytes, party.wire.clock))
        return runner.run(party, plan, weights, given, probe), party.wire.clock, party.wire.sent

    def finish(request, part):
        return module.finish(request, part, masked)

    (nothing, _, by_keeper), (out, rounds, by_user) = simulate(
        runner.requests(plan), party_program, secrets, masks, finish
    )
    assert set(nothing.values()) == {None}
    return {k: ring.decode(v) for k, v in out.items()}, rounds, (by_keeper, by_user)
