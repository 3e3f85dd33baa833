"""A program that forks while it has sessions; says what came of it as one line of JSON. See test_fork."""

import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import small_models

from protocols.primitives.prg import Stream
from securemtk import Config, InferenceSession, Session, UnmeasuredWarning, WrongProcess

X = np.random.default_rng(0).uniform(-1, 1, (2, 8)).astype(np.float32)


def outcome(work) -> dict:
    """Return the class and text of what `work` raised, None where nothing, and how long it took."""
    start = time.monotonic()
    try:
        work()
        error = None
    except Exception as caught:
        error = caught
    return {"error": type(error).__name__, "said": str(error), "seconds": time.monotonic() - start}


def in_fork(work) -> dict:
    """Return what `work` returns in a fork that ends as an interpreter does: finalizers, exit functions and all."""
    read, write = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 on: there are threads
        pid = os.fork()
    if not pid:
        try:
            os.close(read)
            said = work()
        except BaseException:
            said = {"failed": traceback.format_exc()}
        with os.fdopen(write, "w") as file:
            json.dump(said, file)
        sys.exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) | {"status": status}


def try_all(session, model, onnx) -> dict:
    """Knock at every door, in a fork."""
    link, pool = session._user._keeper, session._user._pool
    store = pool._store
    own = Stream().bytes(16).hex()
    doors = {
        "predict": lambda: model.predict(X),
        "wrong input": lambda: model.predict("nonsense", open_tasks=["nothing"]),
        "prepare": lambda: model.prepare(2),
        "load": lambda: session.load(small_models.mlp()),
        "start": session.start,
        "enter": session.__enter__,
        "run": lambda: onnx.run(None, {"x": X}),
        "send": lambda: link.send("request"),
        "send held back": lambda: link.send("request", hold=True),
        "recv": lambda: link.recv("ready"),
        "peek": lambda: link.peek(0.1),
        "socket send": lambda: link._sock.send(memoryview(b"x")),
        "socket recv": lambda: link._sock.recv_into(memoryview(bytearray(1))),
        "socket seal": lambda: link._sock.seal(b"x"),
        "take": lambda: pool.take(0),
        "drop": lambda: pool.drop(0),
        "rest": pool.rest,
        "put": lambda: store.put(10**6, []),
        "tell": lambda: session._peers.processes[0].tell({}),
    }
    found = {name: outcome(work) for name, work in doors.items()}
    # What must not reach the parent's roles.
    session._watch.bye()
    session._watch.fail(WrongProcess("a copy's failure"))
    link.fail(WrongProcess("a copy's failure"))
    link.finish(0.2)
    pool.close()
    store.close()
    session.close()
    onnx.close()
    for process in session._peers.processes:
        process.stop(0.0)
    return {"doors": found, "own": own}


def streams(stream: Stream) -> dict:
    """Try to draw from a copied stream."""
    draws = {
        "bytes": lambda: stream.bytes(16),
        "words": lambda: stream.words((4,)),
        "normal": lambda: stream.normal((4,)),
        "permutation": lambda: stream.permutation(4),
        "derive": lambda: stream.derive("label"),
    }
    return {name: outcome(work) for name, work in draws.items()}


def new_session(_=None) -> list:
    """Return what a session made here answers."""
    with Session() as session:
        return session.load(small_models.mlp()).predict(X)["y"].tolist()


def worker(model, pipe) -> None:
    """Be a worker of multiprocessing: ask the parent's model, then one's own."""
    pipe.send((outcome(lambda: model.predict(X)), new_session()))


def main(folder: str) -> None:
    """Fork several times between predictions."""
    warnings.simplefilter("ignore", UnmeasuredWarning)
    store = Path(folder)
    report: dict = {}
    # Nothing else refers to them, so that a copy can forget them.
    held = {"session": Session(Config(store=store, timeout_s=20.0)), "onnx": InferenceSession(small_models.mlp())}
    held["model"] = held["session"].load(small_models.mlp())

    def ask() -> list:
        return held["model"].predict(X)["y"].tolist()

    def forget() -> dict:
        held.clear()
        gc.collect()
        return {}

    answers = [ask()]
    held["model"].prepare(2, predictions=3)
    while len(list(store.rglob("*.sealed"))) < 4:  # two at the user and two at the keeper
        time.sleep(0.01)
    report["all doors"] = in_fork(lambda: try_all(**held))
    report["forgotten"] = in_fork(forget)
    report["files"] = len(list(store.rglob("*.sealed")))
    answers.append(ask())

    stream = Stream()
    report["streams"] = in_fork(lambda: streams(stream))
    report["streams differ"] = stream.bytes(16).hex() != report["all doors"]["own"]

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=worker, args=(held["model"], there))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    report["worker"] = here.recv()
    process.join()
    report["worker ended"] = process.exitcode
    answers += [ask(), held["onnx"].run(None, {"x": X})[0].tolist()]

    report["pids"] = [*held["session"].pids.values(), *held["onnx"].pids.values()]
    for name in ("session", "onnx"):
        held[name].close()
    report["left"] = [path.name for path in store.iterdir()]
    sys.stdout.write(json.dumps(report | {"answers": answers}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
