"""How well the estimate of `securemtk check` meets what a session then takes, over networks that relays stand in for.

    python -m benchmarks.latency.network --models mlp,cnn --batch 1,4 --networks local,wan
    python -m benchmarks.latency.network --show                          the table of the last run again

All connections of a session, also those between keeper and authority, run through a process that delivers what it
reads half a round trip later and no faster than the bandwidth, each direction of a connection by itself. That is what a
network does to messages, without its packets: no loss, no window that has to grow. The kernel at hand has no
netem, and the host's network is left alone. Writes results/network.json and prints a Markdown table.
"""

import argparse
import contextlib
import json
import multiprocessing
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.networks.models import NETWORKS as MODELS
from benchmarks.networks.onnx_models import to_onnx
from protocols.running.replay import Network
from securemtk.planning.estimate import NETWORKS, estimate_prediction
from securemtk.serving.config import Config
from securemtk.serving.launch import RoleProcess
from securemtk.serving.session import Session

RESULT = Path(__file__).parents[1] / "results" / "network.json"
WARMUP = 2
_CHUNK = 1 << 16

Address = tuple[str, int]


# --- the network ----------------------------------------------------------------------------------------------------


def _read(source: socket.socket, chunks: "queue.Queue[tuple[float, bytes]]", network: Network) -> None:
    """Put each piece that comes with the time at which it is to arrive; an empty one ends."""
    free = 0.0
    while True:
        try:
            data = source.recv(_CHUNK)
        except OSError:
            data = b""
        free = max(free, time.monotonic()) + network.transfer_s(len(data))
        chunks.put((free + network.rtt_s / 2, data))
        if not data:
            return


def _write(target: socket.socket, chunks: "queue.Queue[tuple[float, bytes]]") -> None:
    while True:
        due, data = chunks.get()
        time.sleep(max(0.0, due - time.monotonic()))
        with contextlib.suppress(OSError):
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(data)


def _relay(told: Connection, target: Address, network: Network) -> None:
    """Be the network in front of an address until the process is ended."""
    listener = socket.create_server(("127.0.0.1", 0))
    told.send(listener.getsockname()[:2])
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(target)
        for source, sink in ((near, far), (far, near)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            chunks: queue.Queue[tuple[float, bytes]] = queue.Queue()
            threading.Thread(target=_read, args=(source, chunks, network), daemon=True).start()
            threading.Thread(target=_write, args=(sink, chunks), daemon=True).start()


@contextlib.contextmanager
def network_between_roles(network: Network) -> Iterator[None]:
    """Let the roles of sessions that start in this block see each other over a network."""
    if network == Network():
        yield
        return
    context = multiprocessing.get_context("spawn")
    relays: list[Any] = []
    direct = RoleProcess.address

    def address(process: RoleProcess, timeout_s: float) -> Address:
        here, there = context.Pipe()
        relay = context.Process(target=_relay, args=(there, direct(process, timeout_s), network), daemon=True)
        relay.start()
        relays.append(relay)
        host, port = here.recv()
        return str(host), int(port)

    RoleProcess.address = address  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        RoleProcess.address = direct  # type: ignore[method-assign]
        for relay in relays:
            relay.terminate()
            relay.join()


# --- measurement ----------------------------------------------------------------------------------------------------


def measure(name: str, batch: int, protocol: str, network: Network, repeats: int) -> dict[str, Any]:
    """Return estimate and measurement of one network's prediction: bytes, rounds, median seconds, their ratios."""
    data, x = to_onnx(MODELS[name], name), MODELS[name].inputs(batch)
    with network_between_roles(network), Session(Config(ahead=0), protocol=protocol) as session:
        model = session.load(data)
        costs = []
        for _ in range(WARMUP + repeats):
            model.predict(x)
            costs.append(session.cost)
        waiting_s = float(np.median([cost.offline_s for cost in costs[WARMUP:]]))
        online = []
        for _ in range(WARMUP + repeats):
            model.prepare(batch)
            time.sleep(2 * waiting_s + 0.02)
            model.predict(x)
            online.append(session.cost.online_s)
        program = model.program
    found = estimate_prediction(program, batch, protocol, network=network)
    first = costs[0]
    rows = [[(layer.rounds, layer.online_bytes) for layer in found.layers], [(x.rounds, x.bytes) for x in first.layers]]
    facts = {name: (getattr(found, name), getattr(first, name)) for name in ("rounds", "online_bytes", "offline_bytes")}
    online_s = float(np.median(online[WARMUP:]))
    return {
        "model": name,
        "batch": batch,
        "protocol": protocol,
        "equal": rows[0] == rows[1] and all(a == b for a, b in facts.values()),
        **{name: a for name, (a, _) in facts.items()},
        "online_s": {"measured": online_s, "estimated": found.online_s, "all": sorted(online[WARMUP:])},
        "offline_s": {"measured": waiting_s, "estimated": found.offline_s},
        "online_ratio": (found.online_s or 0.0) / online_s,
        "offline_ratio": (found.offline_s or 0.0) / waiting_s,
    }


def tables(content: dict[str, Any]) -> str:
    """Return the Markdown table of a run."""
    head = ["network", "model, batch", "protocol", "rounds", "online", "offline", "counts equal"]
    head += ["online, estimated", "measured", "", "offline, estimated", "measured", ""]
    rows = []
    for run in content["runs"]:
        cells = [run["network"], f"{run['model']}, {run['batch']}", run["protocol"], str(run["rounds"])]
        cells += [report.megabytes(run[key]) for key in ("online_bytes", "offline_bytes")]
        cells.append("yes" if run["equal"] else "NO")
        for key in ("online", "offline"):
            pair, off = run[f"{key}_s"], 100 * (run[f"{key}_ratio"] - 1)
            cells += [report.seconds(pair["estimated"]), report.seconds(pair["measured"]), f"{off:+.0f} %"]
        rows.append(cells)
    return report.table(head, rows)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mlp,cnn")
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--protocols", default="fss,crypten")
    parser.add_argument("--networks", default="local,wan")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    if options.show:
        print(tables(json.loads(RESULT.read_text())))
        return 0
    content = report.header("network", {"repeats": options.repeats, "warmup": WARMUP}) | {"runs": []}
    for network in options.networks.split(","):
        for protocol in options.protocols.split(","):
            for model in options.models.split(","):
                for batch in map(int, options.batch.split(",")):
                    print(network, protocol, model, batch, file=sys.stderr, flush=True)
                    run = measure(model, batch, protocol, NETWORKS[network], options.repeats)
                    content["runs"].append({"network": network} | run)
    report.write_json(RESULT, content)
    print(tables(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
