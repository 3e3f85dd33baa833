"""Time stock CrypTen 0.4.1: its own protocols, its default provider (a trusted first party), a process for each party.

    python -m benchmarks.peers.crypten_peer cnn 4 --repeats 3

Prints one JSON line: seconds of each encrypted forward pass with its reveal, as party 0 saw them, and the largest error
against float. Runs in securemtk's environment but imports nothing of ours: `protocols.crypten.door` would replace
CrypTen's communicator, provider and randomness. The one change is an alias for a module that torch has moved.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.onnx._internal.torchscript_exporter.registration as _registration

from benchmarks.networks.models import NETWORKS, Ops, float_scores, forward

# CrypTen looks where torch had it before 2.9.
sys.modules.setdefault("torch.onnx._internal.registration", _registration)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import crypten

N_PARTIES = 2
MODEL_OWNER, DATA_OWNER = 0, 1
SECRET = Ops(
    conv=lambda x, weight, bias: x.conv2d(weight, padding=1) + bias.view(1, -1, 1, 1),
    dense=lambda x, weight, bias: x.matmul(weight.t()) + bias,
    relu=lambda x: x.relu(),
    pool=lambda x: x.max_pool2d(2, stride=2),
)


def party(rank: int, rendezvous: str, name: str, batch: int, runs: int, answer: Connection) -> None:
    """Be one party for `runs` forward passes; party 0 sends (seconds of each, largest error)."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(N_PARTIES), RENDEZVOUS=rendezvous, DISTRIBUTED_BACKEND="gloo")
    torch.set_num_threads(1)
    crypten.init()
    network = NETWORKS[name]
    x = network.inputs(batch)
    expected = float_scores(network, x)
    weights = [
        tuple(crypten.cryptensor(torch.from_numpy(array), src=MODEL_OWNER) for array in pair)
        for pair in network.weights()
    ]
    secret = crypten.cryptensor(torch.from_numpy(x), src=DATA_OWNER)
    seconds, error = [], 0.0
    with crypten.no_grad():
        for _ in range(runs):
            start = time.perf_counter()
            scores = forward(network, weights, secret, SECRET).get_plain_text()
            seconds.append(time.perf_counter() - start)
            error = max(error, float(np.abs(scores.numpy() - expected).max()))
    if rank == 0:
        answer.send((seconds, error))
    crypten.uninit()


def measure(name: str, batch: int, warmup: int, repeats: int) -> dict[str, object]:
    """Run both parties and return the JSON line's content.

    Raises:
        RuntimeError: a party failed.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        job = (f"file://{folder}/rendezvous", name, batch, warmup + repeats, there)
        parties = [context.Process(target=party, args=(rank, *job), daemon=True) for rank in range(N_PARTIES)]
        for process in parties:
            process.start()
        there.close()
        try:
            seconds, error = here.recv()
        except EOFError:
            raise RuntimeError("a party of CrypTen failed; see stderr") from None
        for process in parties:
            process.join()
    return {
        "peer": "crypten",
        "version": crypten.__version__,
        "model": name,
        "batch": batch,
        "seconds": seconds[warmup:],
        "error": error,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.crypten_peer", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", choices=NETWORKS)
    parser.add_argument("batch", type=int)
    parser.add_argument("--warmup", type=int, default=1, help="passes that are not counted")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.batch, options.warmup, options.repeats)))


if __name__ == "__main__":
    main()
