"""Time SecretFlow-SPU's semi2k protocol: two parties over loopback, a process for each.

    python -m benchmarks.peers.setup_spu                         # once: the environment .spu
    .spu/bin/python -m benchmarks.peers.spu_peer cnn 4 --repeats 3

Prints one JSON line: seconds of each run, as party 0 saw them, and the largest error against float. Contains SPU's
beaver triples, which its default makes at party 0 (a trusted first party); the reveal is left out.
"""

import argparse
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from spu import api, libspu
from spu.utils import frontend

from benchmarks.networks.models import NETWORKS, Ops, float_scores, forward

N_PARTIES = 2
FRAC_BITS = 16
OUTPUT = "scores"
JAX = Ops(
    conv=lambda x, weight, bias: (
        lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        + bias.reshape(1, -1, 1, 1)
    ),
    dense=lambda x, weight, bias: x @ weight.T + bias,
    relu=jax.nn.relu,
    pool=lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"),
)

# A share as bytes: its description and its chunks.
Packed = tuple[bytes, list[bytes]]


@dataclass(frozen=True)
class Job:
    """What both parties run.

    Args:
        addresses: where each party listens.
        code: the compiled network.
        names: of its inputs.
        runs: how often.
    """

    addresses: Sequence[str]
    code: bytes
    names: Sequence[str]
    runs: int


def _config() -> Any:
    config = libspu.RuntimeConfig(protocol=libspu.ProtocolKind.SEMI2K, field=libspu.FieldType.FM64)
    config.fxp_fraction_bits = FRAC_BITS
    return config


def _pack(share: Any) -> Packed:
    return bytes(share.meta), [bytes(chunk) for chunk in share.share_chunks]


def _unpack(packed: Packed) -> Any:
    share = libspu.Share()
    share.meta, share.share_chunks = packed
    return share


def _executable(job: Job) -> Any:
    executable = libspu.Executable()
    executable.name, executable.code = "network", job.code
    executable.input_names, executable.output_names = list(job.names), [OUTPUT]
    return executable


def party(rank: int, job: Job, shares: Sequence[Packed], answer: Connection) -> None:
    """Be one party: run the network, send (seconds of each run, share of the scores)."""
    link = libspu.link.Desc()
    for i, address in enumerate(job.addresses):
        link.add_party(f"party{i}", address)
    runtime = api.Runtime(libspu.link.create_brpc(link, rank), _config())
    for name, packed in zip(job.names, shares, strict=True):
        runtime.set_var(name, _unpack(packed))
    executable = _executable(job)
    seconds = []
    for _ in range(job.runs):
        start = time.perf_counter()
        runtime.run(executable)
        seconds.append(time.perf_counter() - start)
    answer.send((seconds, _pack(runtime.get_var(OUTPUT))))
    # SPU may abort while it closes its link; nothing is left to do.
    os._exit(0)


def _free_addresses() -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(N_PARTIES)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def _run(job: Job, shares: Sequence[Sequence[Packed]]) -> list[tuple[list[float], Packed]]:
    context = multiprocessing.get_context("spawn")
    parties, answers = [], []
    for rank in range(N_PARTIES):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=party, args=(rank, job, shares[rank], there), daemon=True)
        process.start()
        there.close()
        parties.append(process)
        answers.append(here)
    try:
        results = [answer.recv() for answer in answers]
    except EOFError:
        raise RuntimeError("a party of SPU failed; see stderr") from None
    for process in parties:
        process.join()
    return results


def measure(name: str, batch: int, warmup: int, repeats: int) -> dict[str, object]:
    """Compile the network, run both parties and return the JSON line's content.

    Raises:
        RuntimeError: a party failed.
    """
    network = NETWORKS[name]
    arguments = (network.inputs(batch), network.weights())
    flat = jax.tree_util.tree_leaves((arguments, {}))
    names = [f"in{i}" for i in range(len(flat))]
    secret = libspu.Visibility.VIS_SECRET
    executable, _ = frontend.compile(
        frontend.Kind.JAX,
        lambda x, weights: forward(network, weights, x, JAX),
        arguments,
        {},
        names,
        [secret] * len(flat),
        lambda outputs: [OUTPUT],
        copts=libspu.CompilerOptions(),
    )
    io = api.Io(N_PARTIES, _config())
    made = [io.make_shares(np.asarray(array), secret) for array in flat]
    shares = [[_pack(of_all[rank]) for of_all in made] for rank in range(N_PARTIES)]
    job = Job(_free_addresses(), bytes(executable.code), list(executable.input_names), warmup + repeats)
    results = _run(job, shares)
    scores = np.asarray(io.reconstruct([_unpack(packed) for _, packed in results]))
    return {
        "peer": "spu",
        "version": version("spu"),
        "model": name,
        "batch": batch,
        "seconds": results[0][0][warmup:],
        "error": float(np.abs(scores - float_scores(network, arguments[0])).max()),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.spu_peer", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", choices=NETWORKS)
    parser.add_argument("batch", type=int)
    parser.add_argument("--warmup", type=int, default=1, help="runs that are not counted")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.batch, options.warmup, options.repeats)))


if __name__ == "__main__":
    main()
