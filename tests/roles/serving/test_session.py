"""Sessions as a user has them: real processes, real sockets, mutual TLS."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import small_models
from helpers import PATIENCE_S, alive, environment, wait_until
from onnx import helper

import securemtk
from protocols.dealing.store import SealedStore
from securemtk import (
    Config,
    InputError,
    KeyRefused,
    ProtocolAbort,
    RangeError,
    RangeWarning,
    Session,
    ShapeError,
    StoreError,
    Task,
    UnmeasuredWarning,
    UnsupportedError,
)
from securemtk.mtk.keys.key import stamp
from securemtk.onnx.bundle import write_bundle
from securemtk.onnx.manifest import MANIFEST

RNG = np.random.default_rng(0)


def reference(model: bytes, x: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(model).run(None, {"x": x})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return folder, small_models.make_bundle(folder)


@pytest.fixture(scope="module")
def open_session(bundle):
    """One session for all tests that leave it alive."""
    with Session(key_files=bundle[0] / "keys") as session:
        yield session


def samples(n: int, shape=small_models.SHAPE) -> np.ndarray:
    return RNG.uniform(-1, 1, (n, *shape)).astype(np.float32)


# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_a_plain_onnx_file_gives_what_onnxruntime_gives(open_session, n):
    model = open_session.load(small_models.mlp())
    x = samples(n, (8,))
    scores = model.predict(x)
    assert list(scores) == ["y"]
    assert scores["y"].dtype == np.float32
    np.testing.assert_allclose(scores["y"], reference(small_models.mlp(), x)[0], atol=2e-3)


def test_a_model_of_which_nobody_measured_a_sample_says_so_once(open_session, bundle):
    model = open_session.load(small_models.mlp())
    with pytest.warns(UnmeasuredWarning, match="securemtk check MODEL --sample"):
        model.predict(samples(1, (8,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(samples(1, (8,)))
        open_session.load(small_models.mlp()).predict(samples(1, (8,)), check=True)


def test_the_owner_of_a_model_is_told_of_wrong_answers_before_anything_is_sent(open_session):
    nodes = [helper.make_node("Mul", ["x", "x"], ["z"]), helper.make_node("Mul", ["z", "x"], ["y"])]
    model = open_session.load(small_models.build(nodes, {"x": (1,)}, {"y": (1,)}, {}))
    np.testing.assert_allclose(model.predict(np.full((1, 1), 3.0), check=True)["y"], 27, atol=1e-3)
    before = open_session.cost
    with pytest.raises(RangeError, match=r"bounds of fixed point.*'y' is off by"):
        model.predict(np.full((1, 1), 100.0), check=True)
    assert open_session.cost is before
    assert model.predict(np.full((1, 1), 3.0))["y"].shape == (1, 1)


@pytest.mark.parametrize("keys", [[], ["digit"], ["parity"], ["digit", "parity"], ["digit", "digit"]])
def test_a_bundle_answers_truly_for_the_open_tasks_alone(open_session, bundle, keys):
    folder, all_keys = bundle
    model = open_session.load(folder / "bundle")
    x = samples(6)
    scores = model.predict(x, open_tasks=keys)
    stamped = stamp(x, [all_keys[k] for k in dict.fromkeys(keys)])
    truth = dict(
        zip([t.name for t in small_models.TASKS], reference(small_models.multitask()[0], stamped), strict=True)
    )
    for task in small_models.TASKS:
        difference = np.abs(scores[task.name] - truth[task.name]).max()
        if not task.secured or task.name in keys:
            assert difference < 2e-3, task.name
        else:
            assert difference > 1, task.name


def test_closed_answers_are_fresh_noise_and_open_ones_do_not_change(open_session, bundle):
    model = open_session.load(bundle[0] / "bundle")
    x = samples(4)
    first, second = model.predict(x, open_tasks=["parity"]), model.predict(x, open_tasks=["parity"])
    assert np.abs(first["digit"] - second["digit"]).max() > 0.5
    np.testing.assert_allclose(first["parity"], second["parity"], atol=1e-3)
    np.testing.assert_allclose(first["large"], second["large"], atol=1e-3)


def test_closed_answers_do_not_depend_on_the_input(open_session, bundle):
    model = open_session.load(bundle[0] / "bundle")
    one = model.predict(np.repeat(samples(1), 400, axis=0))["digit"]
    other = model.predict(samples(400))["digit"]
    for scores in (one, other):  # labels uniform over 4 classes: 100 each, standard deviation 8.7
        assert np.bincount(scores.argmax(1), minlength=4).min() > 55
    assert np.abs(one.mean(0) - other.mean(0)).max() < 1.2


def test_a_closed_and_an_open_prediction_look_alike_to_the_keeper(open_session, bundle):
    model = open_session.load(bundle[0] / "bundle")
    costs = []
    for keys in ([], ["digit"], ["digit", "parity"]):
        model.predict(samples(2), open_tasks=keys)
        model.predict(samples(2), open_tasks=keys)
        costs.append(
            (open_session.cost.online_bytes, open_session.cost.rounds, [c.bytes for c in open_session.cost.layers])
        )
    assert len({str(c) for c in costs}) == 1


def test_the_cost_counts_bytes_rounds_and_layers(open_session):
    model = open_session.load(small_models.mlp())
    model.predict(samples(2, (8,)))
    cost = open_session.cost
    assert cost.online_s > 0
    assert cost.offline_s > 0
    assert cost.online_bytes > 2 * 8 * 8
    assert cost.offline_bytes > 0
    assert [layer.name for layer in cost.layers] == ["input", "fc1", "relu1", "fc2", "output"]
    assert sum(layer.rounds for layer in cost.layers) == cost.rounds
    assert 0 < cost.rounds < 40
    assert sum(layer.bytes for layer in cost.layers) == cost.online_bytes
    assert "rounds" in str(cost)
    assert {"online_s", "offline_s", "waiting_s", "online_bytes", "offline_bytes", "rounds", "layers"} == set(
        cost.to_dict()
    )


def test_a_large_batch_runs_in_chunks_with_the_same_result(bundle):
    x = samples(9)
    with Session(Config(chunk_elements=3 * 48), key_files=bundle[0] / "keys") as session:
        model = session.load(bundle[0] / "bundle")
        chunked = model.predict(x, open_tasks=["digit"])
        assert session.cost.rounds > 0
    truth = reference(small_models.multitask()[0], stamp(x, [bundle[1]["digit"]]))
    np.testing.assert_allclose(chunked["digit"], truth[0], atol=2e-3)


# --- correlations ahead of need --------------------------------------------------------------------------------------


def test_what_was_ordered_ahead_is_used_in_order_and_answers_truly(open_session, bundle):
    model = open_session.load(bundle[0] / "bundle")
    x = samples(3)
    truth = reference(small_models.multitask()[0], stamp(x, [bundle[1]["digit"]]))
    model.prepare(3, open_tasks=["digit"], predictions=2)
    ordered = [order.prediction for order in open_session._user.orders.ahead]
    assert len(ordered) == 2
    for left in (1, 0):
        np.testing.assert_allclose(model.predict(x, open_tasks=["digit"])["digit"], truth[0], atol=2e-3)
        assert [order.prediction for order in open_session._user.orders.ahead] == ordered[2 - left :]
    np.testing.assert_allclose(model.predict(x, open_tasks=["digit"])["digit"], truth[0], atol=2e-3)


def test_what_was_ordered_for_other_keys_or_batches_is_thrown_away(open_session, bundle):
    model = open_session.load(bundle[0] / "bundle")
    x = samples(3)
    truth = reference(small_models.multitask()[0], stamp(x, [bundle[1]["digit"]]))[0]
    model.prepare(3, open_tasks=["parity"], predictions=2)
    closed = model.predict(x[:2], open_tasks=["digit"])
    assert not open_session._user.orders.ahead
    np.testing.assert_allclose(closed["digit"], truth[:2], atol=2e-3)
    wait_until(lambda: not open_session._user._pool._unwanted)
    assert not open_session._user._pool._ready
    model.prepare(3, open_tasks=["parity"])
    assert np.abs(model.predict(x)["parity"] - reference(small_models.multitask()[0], x)[1]).max() > 1


def test_the_same_plan_twice_in_a_row_is_dealt_ahead_for_models_without_secured_tasks(open_session, bundle):
    model = open_session.load(small_models.mlp())
    x = samples(2, (8,))
    for n_ordered in (0, 1, 1):
        scores = model.predict(x)
        assert len(open_session._user.orders.ahead) == n_ordered
        np.testing.assert_allclose(scores["y"], reference(small_models.mlp(), x)[0], atol=2e-3)
    secured = open_session.load(bundle[0] / "bundle")
    assert not open_session._user.orders.ahead
    for _ in range(3):
        secured.predict(samples(2))
        assert not open_session._user.orders.ahead


def test_a_prediction_dealt_ahead_needs_nothing_more_of_the_dealer(open_session):
    model = open_session.load(small_models.mlp())
    x = samples(2, (8,))
    model.prepare(2)
    wait_until(lambda: open_session._user.orders.ahead[0].prediction in open_session._user._pool._ready)
    os.kill(open_session.pids["authority"], signal.SIGSTOP)
    try:
        scores = model.predict(x)  # well before the watch misses the dealer
    finally:
        os.kill(open_session.pids["authority"], signal.SIGCONT)
    np.testing.assert_allclose(scores["y"], reference(small_models.mlp(), x)[0], atol=2e-3)


def stored(folder: Path, role: str) -> list[Path]:
    return sorted(folder.glob(f"*-{role}-*/*"), key=lambda path: int(path.stem))


@contextlib.contextmanager
def six_on_disk(folder: Path):
    """A session with six predictions of `mlp` made ahead: one in memory, five on disk at keeper and user."""
    with Session(Config(store=folder)) as session:
        model = session.load(small_models.mlp())
        model.prepare(2, predictions=6)
        wait_until(lambda: [len(stored(folder, role)) for role in ("keeper", "user")] == [5, 5])
        wait_until(lambda: len(session._user._pool._stored) == 5)
        yield session, model


def test_predictions_made_ahead_that_memory_does_not_hold_wait_on_disk(tmp_path):
    with six_on_disk(tmp_path) as (_, model):
        for done in range(6):
            x = samples(2, (8,))
            np.testing.assert_allclose(model.predict(x)["y"], reference(small_models.mlp(), x)[0], atol=2e-3)
            left = max(4 - done, 0)
            wait_until(lambda left=left: {len(stored(tmp_path, role)) for role in ("keeper", "user")} == {left})
        model.prepare(2, predictions=3)  # beside the one that was made unasked
        wait_until(lambda: [len(stored(tmp_path, role)) for role in ("keeper", "user")] == [3, 3])
        model.predict(samples(1, (8,)))  # another plan: what waits is thrown away
        assert not [*stored(tmp_path, "user"), *stored(tmp_path, "keeper")]
        model.prepare(1, predictions=3)
        wait_until(lambda: [len(stored(tmp_path, role)) for role in ("keeper", "user")] == [2, 2])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("role", ["keeper", "user"])
def test_a_damaged_file_ends_the_session_by_an_error_that_names_role_and_prediction(tmp_path, role):
    with six_on_disk(tmp_path) as (session, model):
        path = stored(tmp_path, role)[1]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        pids = session.pids

        def predict_until_the_end():
            for _ in range(6):
                model.predict(samples(2, (8,)))

        said = f"the {role}'s correlations of prediction {path.stem} on disk must be as they were written"
        with pytest.raises(StoreError, match=said):
            predict_until_the_end()
    assert not any(alive(pid) for pid in pids.values())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_at_a_role_ends_the_session_at_once(tmp_path):
    with Session(Config(store=tmp_path)) as session:
        model = session.load(small_models.mlp())
        hard = resource.prlimit(session.pids["keeper"], resource.RLIMIT_FSIZE)[1]
        resource.prlimit(session.pids["keeper"], resource.RLIMIT_FSIZE, (100, hard))
        model.prepare(2, predictions=3)
        wait_until(lambda: not session._watch.is_alive())  # nobody had to ask for a prediction
        with pytest.raises(StoreError, match=r"keeper failed at .*prediction 1 on disk must be written; File too"):
            model.predict(samples(2, (8,)))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_keeper_left_on_disk_goes_when_the_next_session_starts(tmp_path):
    with six_on_disk(tmp_path) as (session, model):
        os.kill(session.pids["keeper"], signal.SIGKILL)
        with pytest.raises(ProtocolAbort, match="keeper"):
            model.predict(samples(2, (8,)))
    assert len(stored(tmp_path, "keeper")) == 5
    assert not stored(tmp_path, "user")
    with Session(Config(store=tmp_path)):
        assert not stored(tmp_path, "keeper")
    assert not list(tmp_path.iterdir())


def test_a_keeper_whose_user_is_killed_removes_its_store_and_the_next_store_removes_the_users(tmp_path):
    body = f"""
    session = Session(Config(store={str(tmp_path)!r}))
    session.load(small_models.mlp()).prepare(2, predictions=4)
    input()
"""
    script = "import small_models\nfrom securemtk import Config, Session\nif __name__ == '__main__':" + body
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        env=environment(),
    )
    both = ("keeper", "user")
    wait_until(lambda: [len(stored(tmp_path, role)) for role in both] == [3, 3], "both have stored", running=process)
    process.kill()
    process.wait()
    process.stdin.close()
    wait_until(lambda: not list(tmp_path.glob("*-keeper-*")))
    assert len(stored(tmp_path, "user")) == 3
    SealedStore(tmp_path, "user").close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["file", 3])
def test_a_store_that_is_no_folder_is_refused(tmp_path, where):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="store must be a folder"),
        Session(Config(store=tmp_path / where if isinstance(where, str) else where)),
    ):
        pass


@pytest.mark.parametrize(("batch", "predictions"), [(0, 1), (1, 0)])
def test_fewer_than_one_sample_or_prediction_cannot_be_ordered(open_session, batch, predictions):
    model = open_session.load(small_models.mlp())
    with pytest.raises(InputError, match="1 or more"):
        model.prepare(batch, predictions=predictions)


def test_a_key_that_the_authority_lacks_is_refused_when_what_was_ordered_is_asked_for(bundle):
    with Session() as session:
        model = session.load(bundle[0] / "bundle")
        model.prepare(2, open_tasks=["digit"])
        for _ in range(2):
            with pytest.raises(KeyRefused, match="digit"):
                model.predict(samples(2), open_tasks=["digit"])
        assert model.predict(samples(2))["large"].shape[0] == 2


@pytest.mark.usefixtures("in_open_session")
def test_inference_session_is_called_like_onnxruntimes():
    ours, theirs = small_models.mlp(), onnxruntime.InferenceSession(small_models.mlp())
    x = samples(2, (8,))
    with securemtk.InferenceSession(ours) as session:
        assert [(a.name, a.type) for a in session.get_inputs()] == [(a.name, a.type) for a in theirs.get_inputs()]
        assert [a.name for a in session.get_outputs()] == [a.name for a in theirs.get_outputs()]
        assert session.get_inputs()[0].shape == ["batch", 8]
        (got,) = session.run(None, {"x": x})
        np.testing.assert_allclose(got, theirs.run(None, {"x": x})[0], atol=2e-3)
        with pytest.raises(InputError, match="outputs must be among y"):
            session.run(["z"], {"x": x})
        with pytest.raises(InputError, match="inputs must be x"):
            session.run(None, {"z": x})


# --- bad input: refused before anything is sent, and the session lives on -------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (samples(2, (1, 6, 5)), ShapeError, r"\(n, 1, 6, 6\).*got shape \(2, 1, 6, 5\)"),
        (samples(1)[0], ShapeError, "got shape"),
        (samples(0), ShapeError, "n >= 1"),
        (np.zeros((2, 1, 6, 6), dtype=np.int64), ShapeError, "got dtype int64"),
        (np.full((1, 1, 6, 6), np.nan, dtype=np.float32), RangeError, "must be finite"),
        (np.full((1, 1, 6, 6), -np.inf, dtype=np.float32), RangeError, "must be finite"),
        (np.full((1, 1, 6, 6), 5.0, dtype=np.float32), RangeError, r"must lie in \[-4, 4\]"),
        ([[1.0]], TypeError, "got a list"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(open_session, bundle, x, error, message):
    model = open_session.load(bundle[0] / "bundle")
    with pytest.raises(error, match=message):
        model.predict(x)
    assert model.predict(samples(1))["large"].shape == (1, 2)


def test_values_beyond_fixed_point_are_refused_for_a_plain_file_too(open_session):
    model = open_session.load(small_models.mlp())
    with pytest.raises(RangeError, match="must lie in"):
        model.predict(np.full((1, 8), 1e6, dtype=np.float32))


@pytest.fixture
def ranged(tmp_path):
    """Write a bundle whose samples are large, or whose manifest says that they left the range."""

    def write(scale: float, *, forge: bool = False) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RangeWarning)
            manifest = write_bundle(
                tmp_path / "bundle",
                small_models.mlp(),
                model_id=small_models.MODEL_ID,
                tasks=(Task("y", 3),),
                input_name="x",
                input_shape=(8,),
                low=-scale,
                high=scale,
                samples=[np.full((2, 8), scale, np.float32)],
                overwrite=True,
            )
        if forge:
            manifest = replace(manifest, headroom={"comparison": {"relu1": -1}})
            (tmp_path / "bundle" / MANIFEST).write_text(manifest.to_json())
        return tmp_path / "bundle"

    return write


def test_loading_a_bundle_warns_where_its_samples_came_near_the_bounds(open_session, ranged):
    with pytest.warns(RangeWarning, match=r"'relu1' \(comparison\) reach half") as caught:
        model = open_session.load(ranged(4000.0))
    assert caught[0].filename == __file__
    x = samples(2, (8,))
    np.testing.assert_allclose(model.predict(x)["y"], reference(small_models.mlp(), x)[0], atol=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_session.load(ranged(1.0))


def test_a_session_lives_on_where_a_warning_is_an_error(open_session, ranged):
    folder = ranged(4000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RangeWarning):
            open_session.load(folder)
    assert open_session.load(small_models.mlp()).predict(samples(1, (8,)))["y"].shape == (1, 3)


def test_a_bundle_whose_samples_left_the_range_is_refused_at_load(open_session, ranged):
    with pytest.raises(RangeError, match=r"those of 'relu1' \(comparison\) do not"):
        open_session.load(ranged(1.0, forge=True))
    assert open_session.load(small_models.mlp()).predict(samples(1, (8,)))["y"].shape == (1, 3)


def test_a_weight_outside_fixed_point_is_refused_at_load_with_its_layer(open_session):
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="dense")]
    for name, value in (("w", 1e10), ("w", np.nan), ("b", 2.0**30), ("b", np.inf)):
        weights = {"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}
        weights[name][0] = value
        role = {"w": "weight", "b": "bias"}[name]
        with pytest.raises(RangeError, match=f"layer 'dense': parameter 'dense.{role}' must"):
            open_session.load(small_models.build(nodes, {"x": (2,)}, {"y": (2,)}, weights))
    assert open_session.load(small_models.mlp()).predict(samples(1, (8,)))["y"].shape == (1, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [(["colour"], "among the model's tasks"), (["large"], "unprotected"), ("digit", "sequence of task names")],
)
def test_a_key_for_no_secured_task_is_refused(open_session, bundle, keys, message):
    model = open_session.load(bundle[0] / "bundle")
    with pytest.raises(InputError, match=message):
        model.predict(samples(1), open_tasks=keys)


def test_a_key_of_another_model_and_an_absent_key_are_refused_and_the_session_lives_on(bundle, tmp_path):
    small_models.make_bundle(tmp_path, model_id="f" * 32)
    (tmp_path / "keys" / "parity.key").unlink()
    with Session(key_files=tmp_path / "keys") as session:
        model = session.load(bundle[0] / "bundle")
        with pytest.raises(KeyRefused, match="must be of this model"):
            model.predict(samples(1), open_tasks=["digit"])
        with pytest.raises(KeyRefused, match="must hold a key of task 'parity'"):
            model.predict(samples(1), open_tasks=["parity"])
        assert model.predict(samples(1))["large"].shape == (1, 2)


def test_keys_under_a_passphrase_open_with_it_and_are_refused_without(bundle, tmp_path):
    bundle[1]["digit"].save(tmp_path / "digit.key", passphrase="correct horse")
    with pytest.raises(KeyRefused, match="passphrase"), Session(key_files=[tmp_path / "digit.key"], passphrase="wrong"):
        pass
    x = samples(2)
    with Session(key_files=[tmp_path / "digit.key"], passphrase="correct horse") as session:
        scores = session.load(bundle[0] / "bundle").predict(x, open_tasks=["digit"])
    truth = reference(small_models.multitask()[0], stamp(x, [bundle[1]["digit"]]))
    np.testing.assert_allclose(scores["digit"], truth[0], atol=2e-3)


def test_models_that_cannot_be_loaded_are_refused_with_the_reason(open_session, tmp_path):
    from onnx import helper

    odd = small_models.build(
        [helper.make_node("Sin", ["x"], ["a"], name="wave"), helper.make_node("Cos", ["a"], ["y"], name="wave2")],
        {"x": (3,)},
        {"y": (3,)},
        {},
    )
    with pytest.raises(UnsupportedError, match=r"(?s)wave.*wave2"):
        open_session.load(odd)
    with pytest.raises(securemtk.BundleError):
        open_session.load(b"this is no model")
    with pytest.raises(securemtk.BundleError):
        open_session.load(tmp_path / "absent.onnx")
    assert open_session.load(small_models.mlp()).predict(samples(1, (8,)))["y"].shape == (1, 3)


def test_an_edited_bundle_is_refused(open_session, tmp_path):
    small_models.make_bundle(tmp_path)
    path = tmp_path / "bundle" / "cloud.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(securemtk.BundleError, match=r"cloud\.onnx"):
        open_session.load(tmp_path / "bundle")


def test_a_port_in_use_and_unknown_settings_are_refused():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="must be free"), Session(Config(keeper_port=taken.getsockname()[1])):
            pass
    with pytest.raises(UnsupportedError, match="protocol must be one of"):
        Session(protocol="magic")
    with pytest.raises(InputError, match="timeout_s must be positive"):
        Session(timeout_s=0)
    with pytest.raises(KeyRefused, match="must exist"), Session(key_files="no/such/folder"):
        pass


# --- how it ends ----------------------------------------------------------------------------------------------------


def test_close_is_idempotent_and_ends_all_processes():
    session = Session()
    session.close()
    session.close()
    with pytest.raises(ProtocolAbort, match="closed"):
        session.load(small_models.mlp())
    with Session() as session:
        pids = session.pids
        assert set(pids) == {"keeper", "authority"}
        assert all(alive(pid) for pid in pids.values())
        session.close()
        session.close()
    assert not any(alive(pid) for pid in pids.values())


def test_an_exception_in_the_users_code_ends_all_processes():
    seen = {}

    def users_code():
        with Session() as session:
            seen.update(session.pids)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        users_code()
    pids = seen
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids.values())


@pytest.mark.parametrize("role", ["keeper", "authority"])
@pytest.mark.parametrize(("how", "said"), [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "silent")])
def test_a_role_that_dies_or_hangs_during_a_prediction_ends_the_session(role, how, said):
    with Session(timeout_s=2.0) as session:
        model = session.load(small_models.slow())
        pids, box = session.pids, []

        def strike():
            # In the middle: at the comparison of one of many predictions.
            deadline = time.monotonic() + 60
            while not session.step.endswith("relu1"):
                if session.step == "closed" or time.monotonic() > deadline:
                    return
                time.sleep(0.0005)
            box.append(time.monotonic())
            os.kill(pids[role], how)

        thread = threading.Thread(target=strike, name="securemtk-test-strike")
        thread.start()
        x = samples(32, (3, 32, 32))

        def predict_until_the_end():
            while True:
                model.predict(x)

        with pytest.raises(ProtocolAbort) as caught:
            predict_until_the_end()
        ended = time.monotonic()
        thread.join()
        assert box, f"the session ended by itself: {caught.value}"
        took = ended - box[0]
    assert role in str(caught.value)
    assert said in str(caught.value)
    assert "prediction" in str(caught.value)
    assert took < (5 if how == signal.SIGKILL else 2 + 5)
    assert not any(alive(pid) for pid in pids.values())
    with pytest.raises(ProtocolAbort, match="closed"):
        model.predict(samples(1, (3, 32, 32)))


SCRIPT = """
import sys, numpy as np, small_models
from securemtk import Session
if __name__ == "__main__":
    session = Session()
    session.start()
    model = session.load(small_models.slow())
    print(*session.pids.values(), flush=True)
    {body}
"""


@pytest.mark.parametrize(
    ("body", "how", "status"),
    [
        ("while True: model.predict(np.zeros((8, 3, 32, 32), dtype=np.float32))", signal.SIGINT, None),
        ("while True: model.predict(np.zeros((8, 3, 32, 32), dtype=np.float32))", signal.SIGKILL, -9),
        ("sys.exit(7)", None, 7),
        ("raise ValueError", None, 1),
    ],
)
def test_no_process_outlives_a_user_who_stops_without_closing(body, how, status):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    if how is not None:
        time.sleep(1.0)
        process.send_signal(how)
    got = process.wait(timeout=PATIENCE_S)
    process.stdout.close()
    assert got != 0 if status is None else got == status
    wait_until(lambda: not any(alive(pid) for pid in pids), "the roles have ended")
