"""Throws inputs at every reader of strangers' bytes, led by what each input reaches (atheris), and counts them.

For each reader of `targets.py`: so many seconds of inputs, a process of its own. An input for which it raises what it
does not promise, takes more than ten seconds or two gigabytes ends that process and is kept in `--found`; from there it
belongs into `tests/corpus/<reader>/`, once it is understood. It needs `pip install atheris`.

    python benchmarks/faults/fuzz.py --seconds 600 --output benchmarks/results/fuzz.json

A call with the same output file adds to what it holds, but for inputs of a reader that has changed since.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickle
import re
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from measure import ROOT, write_record
from provenance import changed, digests
from targets import TARGETS

sys.path.insert(0, str(ROOT))
MAPS = ("load_wafer_maps", "stream_wafer_maps")
READERS = {  # by target: what its inputs are thrown at
    "lswmd": (*MAPS, "read_lswmd"),
    "request": ("maps_from_body",),
    "model": ("Predictor",),
    "image": (*MAPS, "read_image"),
    "options": ("parse_options", "ExperimentConfig"),
    "yaml": ("read_options", "ExperimentConfig"),
    "npz": (*MAPS, "read_npz"),
}
MEASURES = sorted({name for names in READERS.values() for name in names})
WATCHED = {"options": ["waferlab.config", "yaml"], "yaml": ["waferlab.config", "yaml"]}  # all else makes these slow
CORPUS = ROOT / "tests/corpus"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="for each")
    parser.add_argument("--found", type=Path, default=Path("found"), help="folder for inputs that went wrong")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    arguments, more = parser.parse_known_args()
    if arguments.child:
        throw(arguments.child, more)
    if more:
        parser.error(f"unknown: {more}")
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output and arguments.output.exists() else []
    rows = [row for row in rows if not changed(row["code"])]
    for name in arguments.targets:
        rows.append(run(name, arguments.seconds, arguments.found / name))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.output:
            total = sum(row["inputs"] for row in rows)
            write_record(arguments.output, {"benchmark": "fuzz", "rows": rows}, measures=MEASURES,
                         repeats=f"{total:,} inputs", weights=None, search=None)  # fmt: skip


def run(name: str, seconds: int, found: Path) -> dict[str, object]:
    """A process that throws inputs at one reader, begun anew after each that it finds."""
    found.mkdir(parents=True, exist_ok=True)
    inputs, until, before = 0, time.monotonic() + seconds, len([*found.iterdir()])
    with tempfile.TemporaryDirectory() as work:
        corpus = Path(work)
        given = [*seeds(name), *(file.read_bytes() for file in (CORPUS / name).glob("*"))]
        longest = max(4096, 2 * max(map(len, given)))
        for number, seed in enumerate(given):
            (corpus / str(number)).write_bytes(seed)
        while (left := int(until - time.monotonic())) > 2:
            done = subprocess.run(
                [sys.executable, __file__, "--child", name, str(corpus), f"-max_total_time={left}", "-timeout=10",
                 "-rss_limit_mb=2048", f"-max_len={longest}", f"-artifact_prefix={found}/", "-print_final_stats=1"],
                capture_output=True, text=True, check=False, errors="replace",
            )  # fmt: skip
            counted = re.findall(r"number_of_executed_units:\s+(\d+)", done.stderr)
            inputs += int(counted[-1]) if counted else 0
            if done.returncode:
                print(done.stderr[-1500:], file=sys.stderr, flush=True)
    wrong = len([*found.iterdir()]) - before
    return {"reader": name, "inputs": inputs, "seconds": seconds, "found": wrong, "code": digests(READERS[name])}


def throw(name: str, flags: list[str]) -> None:
    """In the process of its own: inputs until the time is up. Does not return."""
    import atheris

    watched = WATCHED.get(name, ["waferlab", "yaml", "PIL", "numpy.lib"])
    with atheris.instrument_imports(include=watched), contextlib.suppress(Exception):
        import integrated_pipeline  # noqa: F401  which registers the models

        TARGETS[name](b"\0" * 64)  # imports what it needs
    atheris.Setup([sys.argv[0], *flags], TARGETS[name])
    atheris.Fuzz()


@cache
def seeds(name: str) -> list[bytes]:
    """Sound inputs to begin with."""
    import numpy as np

    if name in ("options", "yaml"):
        from targets import option_names

        texts = [
            "1",
            "true",
            "null",
            "[macro_f1, latency]",
            "{gradient_clip_val: 1.0}",
            "a: [1, {b: 2001-01-01}]",
            "1e-3",
        ]
        lines = [f"{option}: {text}" for option in ("seed", "trainer", "objectives") for text in texts]
        behind = [bytes([i]) + text.encode() for i in range(len(option_names())) for text in texts]
        return behind if name == "options" else [line.encode() for line in lines]
    if name == "npz":
        return [bytes([layout, 3, array, 100, kind, 2, 9, 4, 0, 9, 9]) for layout in range(3) for array in range(9)
                for kind in range(14)]  # fmt: skip
    if name == "image":
        from PIL import Image

        kept = []
        for number, kind in enumerate(("bmp", "jpeg", "jpeg", "png", "tiff", "tiff")):
            written = io.BytesIO()
            Image.fromarray(np.array([[0, 128], [255, 0]], np.uint8)).save(written, kind)
            kept.append(bytes([number]) + written.getvalue())
        return kept
    if name == "lswmd":
        return [pickle.dumps(frame(), protocol=protocol) for protocol in (2, 3, 4, 5)]
    if name == "request":
        written = io.BytesIO()
        np.save(written, np.ones((2, 3, 3), np.uint8))
        return [b'{"maps": [[[0, 1, 0], [1, 2, 1]]]}', b'{"maps": [[[1]], [[2, 2]]]}', written.getvalue()]
    import torch

    from waferlab.deployment.onnx_export import export_onnx

    network = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(4, 9)).eval()
    with tempfile.TemporaryDirectory() as folder:
        return [export_onnx(network, Path(folder) / "model.onnx", image_size=16).read_bytes()]


def frame():
    """Two rows as WM-811K has them."""
    import numpy as np
    import pandas as pd

    nested = [np.array([["none"]]), np.zeros((0, 0))]
    columns = {
        "waferMap": [np.ones((2, 3), np.uint8)] * 2, "dieSize": [6.0, 6.0], "lotName": ["lot1", "lot1"],
        "waferIndex": [1.0, 2.0], "trianTestLabel": nested, "failureType": nested,
    }  # fmt: skip
    return pd.DataFrame({name: pd.Series(cells) for name, cells in columns.items()})


if __name__ == "__main__":
    main()
