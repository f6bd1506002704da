"""Time and memory against the number of maps.

Measured, in a process of its own for each size: seconds to generate the maps, split them, resize them into memory, and
train one epoch of `lightning_cnn` with its validation; and the highest memory of the process (resident set, everything
included: interpreter, libraries, maps, training). The maps are generated, so the largest size is that of all labelled
WM-811K maps.

    python benchmarks/scale.py --output benchmarks/results/scale.json --picture docs/scale.png
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import plain_config, write_record
from provenance import BATCHES, CNN, GENERATOR, SPLIT, TRAINING

MEASURES = (*GENERATOR, "pack_maps", *SPLIT, *BATCHES, *TRAINING, *CNN, "CheckpointFiles", "History")
PHASES = ("generate", "split", "resize", "train_one_epoch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, nargs="+", default=[1350, 13500, 54000, 172950])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    rows = []
    for n in arguments.maps:
        flags = [f"--one={n}", f"--batch-size={arguments.batch_size}", f"--image-size={arguments.image_size}"]
        done = subprocess.run([sys.executable, __file__, *flags], check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(", ".join(f"{k} {v:,.2f}" for k, v in rows[-1].items() if k != "precision"), flush=True)
    settings = {"batch_size": arguments.batch_size, "image_size": arguments.image_size}
    precision = [row.pop("precision") for row in rows]
    record = {"benchmark": "scale", **settings, "sizes": rows}
    write_record(arguments.output, record, measures=MEASURES, repeats="one run of each size", precision=precision)
    if arguments.picture:
        draw(rows, arguments.picture)


def measure(n: int, arguments: argparse.Namespace) -> dict[str, float | str]:
    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.data.reading import load_wafer_maps
    from waferlab.data.splitting import split_by_lot

    seconds = {}

    def timed(phase: str, work):
        started = time.monotonic()
        result = work()
        seconds[phase] = round(time.monotonic() - started, 3)
        return result

    with tempfile.TemporaryDirectory() as folder:
        config = plain_config(
            model_type="lightning_cnn", max_epochs=1, batch_size=arguments.batch_size,
            image_size=arguments.image_size, output_dir=folder,
        )  # fmt: skip
        pipeline = IntegratedMLPipeline(config)
        pipeline.maps = timed("generate", lambda: load_wafer_maps("synthetic", samples_per_class=round(n / 9), seed=0))
        pipeline.split = timed("split", lambda: split_by_lot(pipeline.maps, seed=0))
        timed("resize", lambda: pipeline.data_module(config.batch_size).setup())
        trained = timed("train_one_epoch", lambda: pipeline.train_final_model("lightning_cnn"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "maps": len(pipeline.maps), **seconds, "peak_memory_gb": round(peak / 1e9, 2), "precision": trained.precision
    }  # fmt: skip


def draw(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    times, memory = figure.subplots(1, 2)
    maps = [row["maps"] for row in rows]
    for phase in PHASES:
        times.plot(maps, [row[phase] for row in rows], marker="o", label=phase.replace("_", " "))
    times.set(xscale="log", yscale="log", xlabel="maps", ylabel="seconds", title="Time")
    times.legend(frameon=False)
    memory.plot(maps, [row["peak_memory_gb"] for row in rows], marker="o", color="black")
    memory.set(xscale="log", ylim=(0, None), xlabel="maps", ylabel="GB", title="Highest memory of the process")
    for axes in (times, memory):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
