"""Correlations on disk: sealed, read once, gone afterwards; and the pool that keeps them there."""

import contextlib
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import environment, wait_until
from links import pair
from scipy import stats

from protocols.dealing import correlation
from protocols.dealing import store as store_module
from protocols.dealing.correlation import Dealing, Request
from protocols.dealing.dealer import TrustedDealer, send_corrections, stream_of
from protocols.dealing.messages import Deal, pack
from protocols.dealing.pool import CorrelationPool
from protocols.dealing.prediction_shares import PredictionShares
from protocols.dealing.store import SealedStore, sealed_bytes
from protocols.errors import DealerError, InputError, PeerLost, StoreError

SHAPES = [(3, 5), (0,), (200_000,), (), (2, 3, 4)]
# Several pieces for the large one.
PIECE = 1 << 16


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(store_module, "PIECE_BYTES", PIECE)


@pytest.fixture
def store(tmp_path):
    kept = SealedStore(tmp_path, "keeper")
    yield kept
    kept.close()


def tensors(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-(2**63), 2**63 - 1, shape, generator=generator) for shape in SHAPES]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def taken(store: SealedStore, prediction: int) -> list[torch.Tensor]:
    return store.take(prediction, SHAPES)


# --- one file -------------------------------------------------------------------------------------------------------


def test_what_is_put_comes_back_once_and_its_file_is_gone(store, tmp_path):
    for prediction in (0, 1, 7):
        store.put(prediction, tensors(prediction))
    assert [path.stat().st_size for path in files(tmp_path)] == [sealed_bytes(SHAPES)] * 3
    for left, prediction in ((2, 1), (1, 0), (0, 7)):
        got = taken(store, prediction)
        assert all(torch.equal(a, b) for a, b in zip(got, tensors(prediction), strict=True))
        assert [a.shape for a in got] == [torch.Size(shape) for shape in SHAPES]
        assert len(files(tmp_path)) == left
        with pytest.raises(DealerError, match=f"prediction {prediction} must be stored, and be read once"):
            taken(store, prediction)


@pytest.mark.parametrize("again", [3, 2])
def test_a_prediction_is_stored_once_and_numbers_grow(store, again):
    store.put(3, tensors())
    taken(store, 3)
    with pytest.raises(DealerError, match=f"prediction {again} must be stored once"):
        store.put(again, tensors())


def test_only_this_user_may_open_folder_and_files(tmp_path):
    store = SealedStore(tmp_path / "new" / "store", "keeper")
    store.put(0, tensors())
    (path,) = files(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new" / "store").stat().st_mode & 0o777 == 0o700
    store.close()


def test_the_file_is_uniform_whatever_is_stored_and_never_twice_the_same(store, tmp_path):
    same = [torch.arange(40_000)]
    for prediction in range(2):
        store.put(prediction, same)
    one, other = (path.read_bytes() for path in files(tmp_path))
    for data in (one, other):
        counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
    plain = same[0].numpy().tobytes()
    assert not any(plain[i : i + 8] in one for i in range(0, len(plain), 8 * 97))
    assert np.mean(np.frombuffer(one, np.uint8) == np.frombuffer(other, np.uint8)) < 0.01


def test_no_key_is_on_disk(store, tmp_path):
    for prediction in range(3):
        store.put(prediction, tensors())
    keys = list(store._keys.values())
    assert len({*keys}) == 3
    assert {len(key) for key in keys} == {32}
    written = b"".join(path.read_bytes() for path in files(tmp_path))
    assert not any(half in written for key in keys for half in (key[:16], key[16:]))
    taken(store, 1)
    assert keys[1] not in store._keys.values()
    assert not any(key.hex() in repr(store) or str(key) in repr(store) for key in keys)


def flip(path: Path, other: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


HARM = {
    "first bit": (lambda path, other: flip(path, other, 0), "altered"),
    "last bit": (lambda path, other: flip(path, other, -1), "altered"),
    "middle": (lambda path, other: flip(path, other, 800_000), "altered"),
    "cut": (lambda path, other: os.truncate(path, path.stat().st_size - 1), "another size"),
    "longer": (lambda path, other: path.write_bytes(path.read_bytes() + b"x"), "another size"),
    "empty": (lambda path, other: os.truncate(path, 0), "another size"),
    "missing": (lambda path, other: path.unlink(), "No such file"),
    "swapped": (lambda path, other: os.replace(other, path), "altered"),
    "pieces swapped": (lambda path, other: swap_pieces(path), "altered"),
}


def swap_pieces(path: Path) -> None:
    head, size = 15 * 8 + 16, PIECE + 16
    data = path.read_bytes()
    first, second = data[head : head + size], data[head + size : head + 2 * size]
    path.write_bytes(data[:head] + second + first + data[head + 2 * size :])


@pytest.mark.parametrize("harm", HARM)
def test_a_file_that_is_not_as_it_was_written_is_an_error_and_never_a_value(store, tmp_path, harm):
    store.put(4, tensors(4))
    store.put(5, tensors(5))
    other, path = files(tmp_path)
    damage, said = HARM[harm]
    damage(path, other)
    with pytest.raises(StoreError, match=f"the keeper's correlations of prediction 5 on disk must .*{said}"):
        taken(store, 5)
    assert not path.exists()


def test_a_file_that_was_read_cannot_be_brought_back(store, tmp_path):
    store.put(0, tensors())
    (path,) = files(tmp_path)
    copy = path.read_bytes()
    taken(store, 0)
    path.write_bytes(copy)
    with pytest.raises(DealerError, match="read once"):
        taken(store, 0)


@contextlib.contextmanager
def full_disk(limit: int):
    """Let no file grow beyond `limit` bytes: the system then refuses as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_at_once_and_leaves_nothing_of_the_file(store, tmp_path):
    store.put(0, tensors())
    with (
        full_disk(100_000),
        pytest.raises(StoreError, match=r"the keeper's correlations of prediction 1 .* be written; File too large"),
    ):
        store.put(1, tensors())
    assert [path.name for path in files(tmp_path)] == ["0.sealed"]


# --- the folder -----------------------------------------------------------------------------------------------------


def test_dropped_and_closed_leave_nothing(tmp_path):
    store = SealedStore(tmp_path, "keeper")
    for prediction in range(3):
        store.put(prediction, tensors())
    store.drop(1)
    store.drop(1)
    assert [path.name for path in files(tmp_path)] == ["0.sealed", "2.sealed"]
    store.close()
    store.close()
    assert not list(tmp_path.iterdir())


def test_a_store_that_nobody_closes_goes_with_its_object(tmp_path):
    store = SealedStore(tmp_path, "keeper")
    store.put(0, tensors())
    del store
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys, torch
from protocols.dealing.store import SealedStore
store = SealedStore(sys.argv[1], "keeper")
store.put(0, [torch.zeros(1000, dtype=torch.int64)])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_when_the_next_starts_and_what_lives_stays(tmp_path):
    living = SealedStore(tmp_path, "user")
    living.put(0, tensors())
    mine = tmp_path / "notes.txt"
    mine.write_text("not the store's")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "0.sealed").write_text("not the store's")
    (tmp_path / f"{store_module.PREFIX}link").symlink_to(elsewhere)
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment())
    left = [path for path in tmp_path.iterdir() if path.name.startswith(f"{store_module.PREFIX}keeper")]
    assert len(left) == 1
    assert files(left[0])
    store = SealedStore(tmp_path, "keeper")
    assert not left[0].exists()
    assert mine.exists()
    assert files(elsewhere)
    assert all(torch.equal(a, b) for a, b in zip(taken(living, 0), tensors(), strict=True))
    store.close()
    living.close()


def test_a_store_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="store must be a folder that the user can write to; File exists"):
        SealedStore(tmp_path / "file", "user")


# --- the pool -------------------------------------------------------------------------------------------------------

REQUESTS = [Request("square", ((40,),)), Request("triple", ((3, 4), (4, 5)), (("op", "matmul"),))]


class Supply:
    """A dealer and the keeper's pool, joined by a real link."""

    def __init__(self, folder, stack: contextlib.ExitStack, slots: int = 1):
        ((self.ours, theirs),) = stack.enter_context(pair())
        self.dealer, self.failures = TrustedDealer(), []
        self.store = SealedStore(folder, "keeper")
        self.pool = CorrelationPool(
            theirs, 0, self.dealer._seeds[0], store=self.store, slots=slots, on_failure=self.note
        )
        self.pool.start()
        stack.callback(self.pool.close)

    def note(self, failure):
        self.failures.append(failure)

    def deal(self, *predictions: int) -> None:
        for prediction in predictions:
            self.send(prediction, self.dealer.deal(prediction, REQUESTS, Dealing()))

    def send(self, prediction, dealt):
        self.ours.say(Deal(prediction, (0, 1), pack(REQUESTS)))
        send_corrections(self.ours, Nobody(), prediction, REQUESTS, dealt)

    def expected(self, prediction: int) -> PredictionShares:
        keeper, user = (stream_of(seed, prediction) for seed in self.dealer._seeds)
        made = [c for q in REQUESTS for c in correlation.deal(q, keeper, user, Dealing())[0]]
        return PredictionShares(0, stream_of(self.dealer._seeds[0], prediction), REQUESTS, made)


class Nobody:
    def say(self, *args):
        pass


@pytest.fixture
def supply(tmp_path):
    with contextlib.ExitStack() as stack:
        yield Supply(tmp_path, stack)


def assert_same(hand: PredictionShares, expected: PredictionShares) -> None:
    for request in REQUESTS:
        for a, b in zip(hand.take(request), expected.take(request), strict=True):
            assert torch.equal(a, b)


def test_more_hands_than_memory_holds_wait_on_disk_and_are_the_ones_that_were_dealt(supply, tmp_path):
    supply.deal(*range(5))
    wait_until(lambda: len(files(tmp_path)) == 4)
    assert list(supply.pool._ready) == [0]
    for prediction in range(5):
        ready = supply.pool.take(prediction)
        assert_same(ready.shares, supply.expected(prediction))
        assert ready.bytes > 0
        assert len(files(tmp_path)) == 4 - prediction  # nothing is opened while a prediction runs
        supply.pool.rest()
        left = max(3 - prediction, 0)
        wait_until(lambda left=left: len(files(tmp_path)) == left)
    assert not files(tmp_path)
    assert not supply.failures


def test_a_stored_hand_that_is_asked_for_out_of_turn_is_opened(supply, tmp_path):
    supply.deal(*range(4))
    wait_until(lambda: len(files(tmp_path)) == 3)
    assert_same(supply.pool.take(2).shares, supply.expected(2))
    assert [path.name for path in files(tmp_path)] == ["1.sealed", "3.sealed"]


def test_dropped_hands_leave_the_disk_and_make_room(supply, tmp_path):
    supply.deal(*range(4))
    wait_until(lambda: len(files(tmp_path)) == 3)
    for prediction in (1, 0, 9):
        supply.pool.drop(prediction)
    wait_until(lambda: list(supply.pool._ready) == [2])
    assert [path.name for path in files(tmp_path)] == ["3.sealed"]
    supply.deal(9)
    wait_until(lambda: not supply.pool._unwanted)
    assert [path.name for path in files(tmp_path)] == ["3.sealed"]


def test_a_damaged_file_ends_the_pool_and_tells_why_before_anybody_asks(supply, tmp_path):
    supply.deal(0, 1, 2)
    wait_until(lambda: len(files(tmp_path)) == 2)
    flip(files(tmp_path)[0], Path(), 10)
    supply.pool.take(0)
    supply.pool.rest()
    wait_until(lambda: supply.failures)
    assert isinstance(supply.failures[0], StoreError)
    with pytest.raises(StoreError, match="prediction 1 on disk must be as they were written"):
        supply.pool.take(1)
    assert len(supply.failures) == 1


def test_the_same_deal_is_never_dealt_nor_taken_twice(supply):
    supply.deal(0, 1)
    with pytest.raises(DealerError, match="never dealt twice"):
        supply.deal(1)
    other = TrustedDealer()  # one that forgot
    supply.send(1, other.deal(1, REQUESTS, Dealing()))
    wait_until(lambda: supply.failures)
    assert "must deal each prediction once; got 1 again or late" in str(supply.failures[0])


def test_closing_the_pool_ends_its_threads_and_removes_what_waits(tmp_path):
    with contextlib.ExitStack() as stack:
        supply = Supply(tmp_path, stack)
        supply.deal(*range(3))
        wait_until(lambda: len(files(tmp_path)) == 2)
        supply.pool.close()
        assert not list(tmp_path.iterdir())
        assert not [t for t in threading.enumerate() if t.name.startswith(("securemtk-pool", "securemtk-opener"))]
        assert not supply.failures  # it was closed, nothing failed
        with pytest.raises(PeerLost):
            supply.pool.take(1)
