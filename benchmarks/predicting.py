"""How long predict.py takes to its first answer, and what a million maps cost it.

Measured, from the shell's point of view, each run in a process of its own: (a) seconds from the start of the process to
the line with the first answer, of a champion in an SQLite registry that answers a file of maps; the process is then
stopped. The files are in the disk cache (one turn is thrown away). (b) seconds, maps per second and the highest memory
(resident set: interpreter, libraries, model, maps) of the whole command on a compressed file of so many maps; generated
maps are repeated to get there, so that the file inflates to more than is read at a time, and each map is answered anew.
The model is a network with the weights it was made with: an untrained one is as fast as a trained one.

What the clock leaves out: making the file, the registry and the model.

    python benchmarks/predicting.py --output benchmarks/results/predicting.json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from measure import ROOT, plain_config, write_record

MEASURES = (
    *("stream_wafer_maps", "read_headers", "ArrayStream", "stream_array", "Predictor", "PredictionSets"),
    *("answer_maps", "stream_answers", "answer_file", "Tallies", "plot_least_certain", "fetch_registered"),
    *("RawMapClassifier", "export_onnx", "generate_wafer_maps"),
)
NAME = "wafer_defect_classifier"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=1_000_000, help="of (b)")
    parser.add_argument("--generated", type=int, default=5_000, help="maps that are repeated")
    parser.add_argument("--model", default="lightning_cnn")
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--views", type=int, default=8, choices=(1, 8), help="of each map that the model looks at")
    parser.add_argument("--suffix", default=".csv", choices=(".csv", ".parquet", ".jsonl"), help="of the answers")
    parser.add_argument("--repeats", type=int, default=7, help="of (a)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings = {
        name: getattr(arguments, name) for name in ("maps", "generated", "model", "image_size", "views", "suffix")
    }
    record = {"benchmark": "predicting", **settings}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        register(folder, arguments)
        record["file"] = write_maps(folder / "maps.npz", arguments.maps, arguments.generated)
        turns = [first_answer(folder) for _ in range(arguments.repeats + 1)][1:]
        record["first_answer_seconds"] = {
            key: round(f(turns), 3) for key, f in (("median", statistics.median), ("low", min), ("high", max))
        }
        print(f"first answer after {record['first_answer_seconds']} s", flush=True)
        record["whole"] = whole(folder, arguments.suffix)
    print(", ".join(f"{key} {value:,.2f}" for key, value in record["whole"].items()))
    repeats = f"{arguments.repeats} first answers after one to warm up, one run of all maps"
    write_record(arguments.output, record, measures=MEASURES, repeats=repeats, weights=None, search=None)


def register(folder: Path, arguments: argparse.Namespace) -> None:
    """Puts a champion into a new registry, as `mlflow.db` in the folder."""
    from mlflow import MlflowClient

    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.data.maps import CLASS_NAMES
    from waferlab.deployment.onnx_export import export_onnx
    from waferlab.evaluation.conformal import PredictionSets
    from waferlab.evaluation.decision import Decision
    from waferlab.tracking.runs import make_database

    config = plain_config(model_type=arguments.model, image_size=arguments.image_size, output_dir=str(folder))
    model = IntegratedMLPipeline(config).create_model(arguments.model).eval()
    sets = PredictionSets(CLASS_NAMES, (30,) * 9, ((0.1,) * 9,) * 50)
    kept = folder / "kept"
    more = {"decision": Decision(views=arguments.views), "prediction_sets": sets.as_text()}
    export_onnx(model, kept / "model.onnx", image_size=arguments.image_size, **more)
    make_database(folder / "mlflow.db", files=str(folder / "mlruns"))
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db", f"sqlite:///{folder}/mlflow.db")
    client.create_registered_model(NAME)
    client.create_model_version(NAME, str(kept))
    client.set_registered_model_alias(NAME, "champion", "1")


def write_maps(path: Path, n: int, generated: int) -> dict[str, float]:
    """Writes n maps, dies as a stream, so that this process needs no more memory than the one it measures."""
    from waferlab.data.generator import generate_wafer_maps
    from waferlab.data.maps import CLASS_NAMES

    drawn, labels, lots = generate_wafer_maps(-(-min(generated, n) // 9), seed=0)
    drawn, times = drawn[:n], -(-n // len(drawn[:n]))
    shapes = np.array([one.shape for one in drawn], dtype=np.int16)
    shapes, names = np.tile(shapes, (times, 1))[:n], np.tile(np.array(CLASS_NAMES)[labels[: len(drawn)]], times)[:n]
    group = np.concatenate([lots[: len(drawn)] + turn * (lots.max() + 1) for turn in range(times)])[:n]
    offsets = np.concatenate([[0], np.cumsum(shapes.astype(np.int64).prod(1))])
    some = np.concatenate([one.ravel() for one in drawn]).tobytes()
    np.savez_compressed(path, offsets=offsets, shapes=shapes, labels=names, group=group.astype(np.int32))
    header, left = {"descr": "|u1", "fortran_order": False, "shape": (int(offsets[-1]),)}, int(offsets[-1])
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("maps_flat.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        while left:
            left -= member.write(some[:left])
    return {"megabytes": round(path.stat().st_size / 1e6, 1), "inflated_megabytes": round(int(offsets[-1]) / 1e6, 1)}


def first_answer(folder: Path) -> float:
    """Seconds to the line with the first answer; the rest is not waited for."""
    command = [sys.executable, str(ROOT / "predict.py"), "maps.npz"]
    started = time.monotonic()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("First answer"):
                seconds = time.monotonic() - started
                process.kill()
                return seconds
        raise RuntimeError(process.stderr.read())


def whole(folder: Path, suffix: str) -> dict[str, float]:
    """All maps answered by the command, its seconds and its highest memory."""
    command = [sys.executable, str(ROOT / "predict.py"), "maps.npz", "--output", f"answers{suffix}"]
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = highest_memory(process.pid) or peak
            time.sleep(0.05)
    seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"predict.py ended with {process.returncode}")
    summary = json.loads((folder / "answers_summary.json").read_text())
    return {
        "seconds": round(seconds, 2),
        "maps_per_second": round(summary["maps_per_second"], 1),
        "peak_memory_mb": round(peak / 1e6, 1),
        "answers_megabytes": round((folder / f"answers{suffix}").stat().st_size / 1e6, 1),
    }


def highest_memory(pid: int) -> int:
    """Bytes, the highest resident set so far; 0 where it cannot be told.

    Not `ru_maxrss`: that of a new process begins with the memory of the one that started it.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
