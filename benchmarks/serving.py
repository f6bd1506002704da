"""How long an answer takes over HTTP, beside `mlflow models serve`; and what comes of requests that make no sense.

Measured, from the client's first byte sent to the last one read, with bodies that are written beforehand, on
connections that stay open: one map, and a lot of 25 of one size, from 1 client and from 8 at a time, each of which
sends its next request when it has its answer. The same exported file is behind our service, asked in JSON and in .npy,
and behind MLflow's, asked in its JSON; MLflow's file is kept as the registry keeps it. The three take turns, each
server idles while the other is measured, and the clients run on the same cores as the servers. Without --model it is an
untrained LightningCNN, of 40 pixels and eight views, which takes as long as a trained one.

    python benchmarks/serving.py --model checkpoints/production/lightning_cnn/model.onnx \
        --output benchmarks/results/serving.json

`--fuzz 10000` sends so many requests instead: random bytes, random JSON, good bodies with bad places, strange headers.
After each, a good one has to be answered as before. Counted are the answers by status; the service's memory is read
before, and after each tenth. It ends with status 1 if anything but an answer (200) or a refusal (4xx) came back.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from measure import ROOT, repeats_in_words, take_warm_turns, write_record

MEASURES = ("Predictor", "Answering", "create_app", "serve", "maps_from_body", "read_body", "Metrics", "export_onnx")
SERVE = """
import sys
from waferlab.deployment.answering import THREADS
from waferlab.deployment.predictor import Predictor
from waferlab.deployment.service import serve
serve(Predictor(sys.argv[1], threads=THREADS), port=int(sys.argv[2]))
"""
JSON, NPY = "application/json", "application/x-npy"
Asked = tuple[str, str, bytes]  # path, content type, body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FILE.onnx")
    parser.add_argument("--requests", type=int, default=400, help="of each client in a turn")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="without MLflow's server beside it")
    parser.add_argument("--fuzz", type=int, metavar="N", help="send so many senseless requests instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or untrained(Path(folder) / "untrained.onnx")
        found = fuzz(model, arguments) if arguments.fuzz else compare(model, Path(folder), arguments)
    record = {"benchmark": "serving", "model": "trained" if arguments.model else "untrained LightningCNN", **found}
    repeats = f"{arguments.fuzz} requests" if arguments.fuzz else repeats_in_words(arguments.repeats)
    write_record(arguments.output, record, measures=MEASURES, repeats=repeats, weights=None, search=None)
    if arguments.fuzz and not record["all_well"]:
        sys.exit(1)


def untrained(path: Path) -> Path:
    import torch

    from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
    from waferlab.deployment.onnx_export import export_onnx
    from waferlab.evaluation.decision import Decision

    torch.manual_seed(0)
    pipeline = IntegratedMLPipeline(ExperimentConfig(use_pretrained=False, image_size=40))
    network = pipeline.create_model("lightning_cnn").eval()
    return export_onnx(network, path, image_size=40, decision=Decision(views=8))


# ------------------------------------------------------------------------------------------------- how long it takes


def compare(model: Path, folder: Path, arguments: argparse.Namespace) -> dict:
    lot = one_lot(25, arguments.seed)
    ways, commands = {}, {"service": ours(model)}
    if not arguments.alone:
        commands["mlflow models serve"] = mlflows(model, folder)
    with contextlib.ExitStack() as stack:
        up = {name: stack.enter_context(started(command)) for name, command in commands.items()}
        for maps in (lot[:1], lot):
            as_lists = [one.tolist() for one in maps]
            asked = {
                "service, .npy": ("/predict", NPY, as_npy(maps)),
                "service, JSON": ("/predict", JSON, json.dumps({"maps": as_lists}).encode()),
                "mlflow models serve": ("/invocations", JSON, json.dumps({"inputs": as_lists}).encode()),
            }
            for clients in arguments.clients:
                for name, request in asked.items():
                    if (server := name.partition(",")[0]) in up:
                        call = partial(latencies, up[server][1], request, clients=clients, requests=arguments.requests)
                        ways[name, len(maps), clients] = call
        turns = take_warm_turns(ways, repeats=arguments.repeats)
    rows = [
        {"server": name, "maps": maps, "clients": clients}
        | {key: round(statistics.median(turn[key] for turn in turns[name, maps, clients]), 2) for key in FIGURES}
        | {"p99_ms_of_turns": [round(turn["p99_ms"], 2) for turn in turns[name, maps, clients]]}
        for name, maps, clients in ways
    ]
    for row in rows:
        who = f"{row['server']}, {row['maps']} map(s), {row['clients']} client(s)"
        print(f"{who:46} p50 {row['p50_ms']:7.1f} ms, p99 {row['p99_ms']:7.1f} ms, {row['requests_a_second']:7.1f}/s")
    return {
        "map_size": list(lot[0].shape),
        "requests_of_a_client": arguments.requests,
        "rows": rows,
        "up_seconds": {name: round(seconds, 2) for name, (_, _, seconds) in up.items()},
    }


FIGURES = ("p50_ms", "p99_ms", "requests_a_second")


def latencies(port: int, request: Asked, *, clients: int, requests: int) -> dict[str, float]:
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = np.concatenate(list(pool.map(lambda _: one_client(port, request, requests), range(clients))))
    whole = time.perf_counter() - started
    p50, p99 = 1000 * np.quantile(seconds, [0.5, 0.99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "requests_a_second": len(seconds) / whole}


def one_client(port: int, request: Asked, requests: int) -> list[float]:
    """The seconds of each of its requests, after one that opens the connection."""
    connection, seconds = http.client.HTTPConnection("127.0.0.1", port, timeout=60), []
    with contextlib.closing(connection):
        for _ in range(requests + 1):
            started = time.perf_counter()
            status, _ = ask(connection, request)
            seconds.append(time.perf_counter() - started)
            if status != 200:
                raise RuntimeError(f"answered with status {status}")
    return seconds[1:]


def ask(connection: http.client.HTTPConnection, request: Asked) -> tuple[int, bytes]:
    path, content_type, body = request
    connection.request("POST", path, body, {"Content-Type": content_type} if content_type else {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def one_lot(maps: int, seed: int) -> list[np.ndarray]:
    """Generated maps of one size."""
    from waferlab.data.generator import generate_wafer_maps

    by_size: dict[tuple[int, ...], list[np.ndarray]] = {}
    for one in generate_wafer_maps(maps, seed=seed)[0]:
        by_size.setdefault(one.shape, []).append(one)
        if len(by_size[one.shape]) == maps:
            return by_size[one.shape]
    raise RuntimeError("no size has as many maps")


def as_npy(maps: list[np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.stack(maps))
    return file.getvalue()


# -------------------------------------------------------------------------------------------------- what is started


def ours(model: Path) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-c", SERVE, str(model), str(port)]


def mlflows(model: Path, folder: Path) -> Callable[[int], list[str]]:
    import mlflow.onnx
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    kept, loaded = folder / "mlflow_model", onnx.load(model)
    classes = loaded.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    mlflow.onnx.save_model(
        loaded, str(kept), pip_requirements=["mlflow", "onnx", "onnxruntime"],
        onnx_execution_providers=["CPUExecutionProvider"], save_as_external_data=False,
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1), "maps")]),
            Schema([TensorSpec(np.dtype("float32"), (-1, classes), "probabilities")]),
        ),
    )  # fmt: skip
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(kept), "--env-manager", "local"]
    return lambda port: [*command, "-h", "127.0.0.1", "-p", str(port)]


@contextlib.contextmanager
def started(command: Callable[[int], list[str]]) -> Iterator[tuple[subprocess.Popen, int, float]]:
    """A server's process, its port, and the seconds until it said that it is well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    clock = time.monotonic()
    process = subprocess.Popen(
        command(port), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},  # of `uvicorn`
    )  # fmt: skip
    try:
        while not is_well(port):
            if process.poll() is not None or time.monotonic() - clock > 120:
                raise RuntimeError("the server did not start")
            time.sleep(0.05)
        yield process, port, time.monotonic() - clock
    finally:
        end_group(process)


def is_well(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def end_group(process: subprocess.Popen) -> None:
    """MLflow starts its server in a process of its own, which has to go, too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


# --------------------------------------------------------------------------------------------------- what is senseless


def fuzz(model: Path, arguments: argparse.Namespace) -> dict:
    import psutil

    chance, lot = random.Random(arguments.seed), one_lot(4, arguments.seed)
    good = ("/predict", JSON, json.dumps({"maps": [lot[0].tolist()]}).encode())
    statuses: Counter[int] = Counter()
    with started(ours(model)) as (process, port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        expected = [ask(connection, good)[1] for _ in range(200)][-1]
        memory = [psutil.Process(process.pid).memory_info().rss]
        still_good = 0
        for i in range(arguments.fuzz):
            statuses[ask(connection, senseless(chance, lot))[0]] += 1
            still_good += ask(connection, good) == (200, expected)
            if (i + 1) % max(1, arguments.fuzz // 10) == 0:
                memory.append(psutil.Process(process.pid).memory_info().rss)
        connection.close()
    well = still_good == arguments.fuzz and not [s for s in statuses if s != 200 and not 400 <= s < 500]
    megabytes = [round(value / 2**20) for value in memory]
    print(f"{arguments.fuzz} requests: {dict(sorted(statuses.items()))}; then answered as before: {still_good}")
    print(f"memory in MiB, from tenth to tenth: {megabytes}")
    return {
        "fuzzed": arguments.fuzz, "statuses": {str(s): n for s, n in sorted(statuses.items())},
        "answered_after_each": still_good, "memory_mib": megabytes, "all_well": well,
    }  # fmt: skip


def senseless(chance: random.Random, lot: list[np.ndarray]) -> Asked:
    """A request that is most probably wrong."""
    few = lot[: chance.randint(1, len(lot))]
    bodies = {
        JSON: lambda: json.dumps({"maps": [one.tolist() for one in few]}).encode(),
        NPY: lambda: as_npy(few),
        "": lambda: json.dumps(anything(chance, 6)).encode(),
        "bytes": lambda: chance.randbytes(chance.randint(0, 400)),
        "deep": lambda: chance.choice([b"[", b'{"maps":']) * chance.randint(1, 100_000),
        "size": lambda: as_npy([np.ones((chance.randint(1, 300), chance.randint(1, 300)), np.uint8)]),
        "almost": lambda: json.dumps({"maps": [[[anything(chance, 1) for _ in range(3)] for _ in range(3)]]}).encode(),
    }
    kind = chance.choice([*bodies])
    body = bytearray(bodies[kind]())
    if kind != "size":
        for _ in range(chance.choice([0, 1, 1, 3, 20])):
            place = (
                chance.randrange(len(body) + 1) if chance.random() < 0.5 else chance.randrange(min(len(body), 90) + 1)
            )
            body[place : place + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
    usual = kind if kind in (JSON, NPY) else NPY if kind == "size" else chance.choice([JSON, NPY])
    content_type = usual if chance.random() < 0.9 else chance.choice(["", "text/plain", JSON, NPY, "x" * 5000])
    return "/predict", content_type, bytes(body)


def anything(chance: random.Random, depth: int) -> object:
    if depth and chance.random() < 0.7:
        some = [anything(chance, depth - 1) for _ in range(chance.randint(0, 4))]
        return some if chance.random() < 0.7 else {chance.choice(["maps", "", "more"]): one for one in some}
    return chance.choice([0, 1, 2, 3, -1, 10**30, 1.5, 1.0, float("nan"), float("inf"), True, None, "", "1", "\0"])


if __name__ == "__main__":
    main()
