"""CrypTen's own programs on our protocols: real processes, real sockets, mutual TLS."""

import functools
import math
import os
import signal
import subprocess
import sys
import threading

import crypten_programs as programs
import numpy as np
import pytest
import torch
from helpers import PATIENCE_S, alive, environment, wait_until
from torch.nn import functional

from examples import crypten_user
from protocols.crypten.door import crypten
from protocols.errors import DealerError, InputError, IntegrityError, PeerLost, ProtocolAbort
from securemtk import Config
from securemtk.crypten_backend import run
from securemtk.support import values

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 6, generator=DRAW), torch.randn(6, 6, generator=DRAW)
IMAGE, KERNEL = torch.randn(2, 3, 7, 7, generator=DRAW), torch.randn(4, 3, 3, 3, generator=DRAW) / 3
EXPECTED = {
    "sum": X + Y,
    "product": X * Y,
    "matmul": X @ Y.t(),
    "matmul with the same again": (X + 1) @ Y.t(),
    "matmul by a public one": X @ Y,
    "matmul before a change": X @ Y,
    "matmul after a change in place": X @ (Y + 1),
    "conv": functional.conv2d(IMAGE, KERNEL, stride=2, padding=1),
    "conv by a public one": functional.conv2d(IMAGE, KERNEL, padding=(0, 1)),
    "relu": X.relu(),
    "abs": X.abs(),
    "less": (X < Y).long(),
    "at least": (X >= Y).long(),
    "equal": torch.ones(6, 6).long(),
    "unequal": torch.ones(6, 6).long(),
    "maximum": X.max(dim=1)[0],
    "its place": functional.one_hot(X.argmax(dim=1), 6),
    "minimum": X.min(dim=1)[0],
    "maximum of all": X.max(),
    "index": X.argmax(dim=0),
    "index among all": X.argmax(),
    "pool": functional.max_pool2d(IMAGE, 2),
    "padded pool": functional.max_pool2d(IMAGE, 3, stride=2, padding=1),
    "dilated pool": functional.max_pool2d(IMAGE, 2, dilation=2),
    "hardtanh": functional.hardtanh(X, -0.5, 0.5),
    "softmax": X.softmax(1),
    "where": torch.minimum(X, Y),
    "stack": torch.stack([X, Y]).relu(),
    "mean": X.mean(dim=1),
    "whole multiple": X * 2,
    "after a wrong guess": X[:2].relu(),
}


# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return run(programs.operations, X, Y, IMAGE, kernel=KERNEL)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_operation_of_crypten_gives_both_parties_what_torch_gives(results, name):
    for result in results:
        got = result["revealed"][name]
        assert (got.shape, got.is_floating_point()) == (EXPECTED[name].shape, EXPECTED[name].is_floating_point())
        # A product adds up as many roundings of 2**-16 as it has terms, times the size of the other operand.
        torch.testing.assert_close(got, EXPECTED[name], atol=0.01 if name == "softmax" else 1e-3, rtol=0)


def test_the_dealer_foresees_a_loop_and_recovers_where_it_ends(results):
    # How often it guessed wrong depends on how fast it was, and is the same for both parties.
    assert results[0]["epoch"] == results[1]["epoch"] >= 1


def test_a_users_cryptensors_are_of_our_type(results):
    assert [result["type"] for result in results] == ["ComparedTensor"] * 2
    assert crypten.get_default_cryptensor_type() == "mpc"


def test_a_model_that_crypten_converts_from_torch_predicts_and_learns():
    net, x = programs.plain_net(), torch.randn(3, 1, 8, 8, generator=DRAW)
    first, again, learnt = run(programs.converted_model, x)[1]
    expected = net(x)
    torch.testing.assert_close(first, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(again, expected, atol=2e-3, rtol=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    functional.mse_loss(expected, torch.ones(3, 5)).backward()
    optimizer.step()
    torch.testing.assert_close(learnt, net(x), atol=5e-3, rtol=0)
    assert (learnt - first).abs().max() > 0.02


def test_the_example_gives_what_torch_gives():
    expected = crypten_user.plain_net()(crypten_user.images()).detach()
    for result in run(crypten_user.predict, 1, pause_s=0.0):
        torch.testing.assert_close(result["scores"], expected, atol=1e-3, rtol=0)
        assert torch.equal(result["best"], expected.argmax(dim=1))
        assert len(result["model_s"]) == len(result["relu_s"]) == 1


def test_cryptens_circuits_give_the_same_over_the_same_dealer():
    for kind, y in run(programs.relu_type, X, protocol="crypten"):
        assert kind == "MPCTensor"
        torch.testing.assert_close(y, X.relu(), atol=1e-4, rtol=0)


def test_a_script_runs_by_itself(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import securemtk.crypten_backend as backend\n"
        "import crypten, torch\n"
        "def program(n):\n"
        "    print('seen')\n"
        "    return crypten.cryptensor(torch.arange(n) - 1.0, src=0).relu().get_plain_text().tolist()\n"
        "if __name__ == '__main__':\n"
        "    print(backend.run(program, 3))\n"
    )
    # Where output is buffered, as it is by default, and without a word of our own processes.
    env = environment(PYTHONUNBUFFERED="")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "[[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]\n"
    assert done.stderr == "seen\nseen\n"


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        (
            programs.other_shapes,
            DealerError,
            r"same program; at correlation 0 party0 asks for sign \(\(3,\),\).*\(2,\)",
        ),
        (programs.other_steps, IntegrityError, "party1 failed at correlation 0.*same program; party0 sent 'open'"),
        (programs.earlier_end, DealerError, "party0 asks for none, it has ended and party1 asks for sign"),
        (programs.error_with_a_value, ProtocolAbort, r"program failed: ValueError in crypten_programs.py:\d+"),
    ],
)
def test_a_program_that_cannot_go_on_ends_at_once_with_the_reason(program, error, message):
    # The program ends by what went wrong: silence would be an error after an hour only.
    with pytest.raises(error, match=message) as caught:
        run(program, config=Config(timeout_s=3600))
    assert "42" not in str(caught.value)


@pytest.mark.parametrize(
    ("program", "args", "message"),
    [
        (lambda: None, (), "function at the top of a file; got '<lambda>'"),
        (programs.relu_type, ({1, 2},), "got a set"),
        (programs.relu_type, (np.array(["a"]),), "arrays of numbers"),
        (programs.relu_type, ({1: 2},), "dicts by str"),
    ],
)
def test_what_cannot_be_handed_to_another_process_is_refused_before_any_starts(program, args, message):
    with pytest.raises(InputError, match=message):
        run(program, *args)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(InputError, match="protocol must be one of fss, crypten; got 'magic'"):
        run(programs.relu_type, X, protocol="magic")


def test_a_killed_party_ends_the_others(tmp_path):
    failure: list[BaseException] = []

    def call() -> None:
        try:
            run(programs.forever, str(tmp_path))
        except BaseException as error:
            failure.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    files = [tmp_path / f"{r}.pid" for r in (0, 1)]
    wait_until(lambda: all(file.exists() for file in files) or not caller.is_alive(), "both parties run")
    pids = [int(file.read_text()) for file in files]
    os.kill(pids[1], signal.SIGKILL)
    caller.join(timeout=PATIENCE_S)
    assert not caller.is_alive()
    assert isinstance(failure[0], PeerLost)
    assert "party1 is gone (its last step: correlation" in str(failure[0])
    assert not any(map(alive, pids))


# --- values between processes ---------------------------------------------------------------------------------------


def test_values_travel_unchanged():
    value = {
        "a": [1, 2.5, "x", None, True],
        "b": (np.arange(3, dtype=np.int16), np.float64(2.0), torch.ones(2, 0, dtype=torch.float64)),
        "c": {"d": torch.tensor(True)},
        "e": [math.inf, -(3**80), 2**53],
    }
    got = values.unpack(*values.pack(value))
    assert (got["a"], got["e"]) == (value["a"], value["e"])
    assert isinstance(got["b"], tuple)
    for ours, theirs in zip(got["b"], value["b"], strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert (np.asarray(ours) == np.asarray(theirs)).all()
    assert got["c"]["d"].dtype == torch.bool


@pytest.mark.parametrize(
    "meta",
    [
        {"tensor": 0, "dtype": "|O", "shape": [1]},
        {"tensor": 3, "dtype": "<i8", "shape": [1]},
        {"other": 1},
        {"number": "1e999"},
        {"dict": [1]},
        functools.reduce(lambda inner, _: {"list": [inner]}, range(5000), 1),
    ],
    ids=["dtype", "index", "kind", "number", "dict", "deep"],
)
def test_values_that_nobody_packed_are_refused(meta):
    with pytest.raises(IntegrityError, match="one of ours"):
        values.unpack(meta, [np.zeros(8, dtype=np.uint8)])
