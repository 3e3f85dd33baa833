"""Let stock CrypTen compute functions between two processes on one machine, with its own approximations and settings.

    python -m benchmarks.peers.crypten_functions points.npz values.npz

Reads arrays "function/anything:operand", writes CrypTen's result of each as "function/anything", and prints one JSON
line: version, and rounds and bytes, of both parties together, of each result.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.onnx._internal.torchscript_exporter.registration as _registration

# CrypTen looks where torch had it before 2.9.
sys.modules.setdefault("torch.onnx._internal.registration", _registration)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import crypten

N_PARTIES = 2
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "div": lambda a, b: a / b,
    "erf": lambda x: x.erf(),
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
    "log_softmax": lambda x: x.log_softmax(1),
    "reciprocal": lambda x: x.reciprocal(),
    "rsqrt": lambda x: x.inv_sqrt(),
    "sigmoid": lambda x: x.sigmoid(),
    "softmax": lambda x: x.softmax(1),
    "sqrt": lambda x: x.sqrt(),
    "tanh": lambda x: x.tanh(),
}


def _party(rank: int, rendezvous: str, jobs: Mapping[str, list[np.ndarray]], answer: Connection) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(N_PARTIES), RENDEZVOUS=rendezvous, DISTRIBUTED_BACKEND="gloo")
    torch.set_num_threads(1)
    crypten.init()
    crypten.cfg.communicator.verbose = True
    wire = crypten.communicator.get()
    found = {}
    with crypten.no_grad():
        for name, arrays in jobs.items():
            shared = [crypten.cryptensor(torch.from_numpy(x), src=0) for x in arrays]
            wire.reset_communication_stats()
            made = FUNCTIONS[name.split("/")[0]](*shared)
            rounds, n_bytes = wire.comm_rounds, wire.comm_bytes
            found[name] = (made.get_plain_text().numpy(), rounds, N_PARTIES * n_bytes)
    if rank == 0:
        answer.send(found)
    crypten.uninit()


def compute(jobs: Mapping[str, list[np.ndarray]]) -> dict[str, tuple[np.ndarray, int, int]]:
    """Return (values, rounds, bytes) for each name; raise RuntimeError when a party failed."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        job = (f"file://{folder}/rendezvous", dict(jobs), there)
        parties = [context.Process(target=_party, args=(rank, *job), daemon=True) for rank in range(N_PARTIES)]
        for process in parties:
            process.start()
        there.close()
        try:
            found: dict[str, tuple[np.ndarray, int, int]] = here.recv()
        except EOFError:
            raise RuntimeError("a party of CrypTen failed; see stderr") from None
        for process in parties:
            process.join()
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.crypten_functions")
    parser.add_argument("points")
    parser.add_argument("values")
    options = parser.parse_args()
    jobs: dict[str, list[np.ndarray]] = {}
    with np.load(options.points) as points:
        for name in points.files:
            jobs.setdefault(name.partition(":")[0], []).append(points[name])
    found = compute(jobs)
    np.savez(options.values, **{name: values for name, (values, _, _) in found.items()})
    costs = {name: {"rounds": rounds, "bytes": n_bytes} for name, (_, rounds, n_bytes) in found.items()}
    print(json.dumps({"peer": "crypten", "version": crypten.__version__, "costs": costs}))


if __name__ == "__main__":
    main()
