"""How long, and in how much memory, a full-size `LSWMD.pkl` is converted.

Measured: `waferlab.data.lswmd.convert_lswmd` on a generated pickle of 811,457 rows, 172,950 of them labelled, in a
process of its own: wall-clock seconds of the first call (reading, checking, compressing, writing), of the second call
(which finds the copy), of loading the copy, and the peak resident memory of that process, as the operating system
counts it.

The clock leaves out the making of the pickle, the start of Python and the import of numpy. The pickle was written just
before, so it may come from the operating system's file cache rather than from the disk.

The generated maps have WM-811K's number, labels and mean size; their content is a disc with scattered failures. The
pickle is written by today's pandas, so its bytes differ from those of the file of 2015, while its structure does not.

    python benchmarks/lswmd_conversion.py                              # full size: 4 GB of disk, a few minutes
    python benchmarks/lswmd_conversion.py --rows 20000 --output small.json
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

import numpy as np
from measure import ROOT, write_record

MEASURES = ("convert_lswmd",)
ROWS = 811_457
LABELLED = {  # of the 811,457 rows
    "none": 147_431, "Edge-Ring": 9_680, "Edge-Loc": 5_189, "Center": 4_294, "Loc": 3_593,
    "Scratch": 1_193, "Random": 866, "Donut": 555, "Near-full": 149,
}  # fmt: skip
WAFERS_PER_LOT = 25
MEAN_DIES = 1_700
CHILD = "--convert"  # how this script calls itself to measure in a process of its own


def make_sizes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """340 map shapes from 22x15 to 212x204 and their shares, which give about `MEAN_DIES` dies a map on average."""
    rows = np.geomspace(22, 212, 340).astype(int)
    columns = np.clip((rows * rng.uniform(0.7, 1.1, 340)).astype(int), 15, 204)
    dies = rows * columns
    steepness = np.linspace(0.2, 3, 200)  # small maps are common, large ones are rare: share ~ dies ** -steepness
    means = [(dies ** (1 - s)).sum() / (dies ** (-s)).sum() for s in steepness]
    shares = dies ** -steepness[int(np.argmin(np.abs(np.array(means) - MEAN_DIES)))]
    return np.stack([rows, columns], axis=1), shares / shares.sum()


def make_maps(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`count` wafer maps, uint8, each in an array of its own: a disc of passing dies, one in ten failing."""
    sizes, shares = make_sizes(rng)
    failures = (rng.random(1 << 22) < 0.1).astype(np.uint8)  # a long strip; every map takes another piece of it
    discs = []
    for rows, columns in sizes:
        y, x = np.ogrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
        discs.append((x * x + y * y <= 1).astype(np.uint8))
    kinds = rng.choice(len(sizes), size=count, p=shares)
    starts = rng.integers(0, len(failures) - max(disc.size for disc in discs), size=count)
    return [
        discs[kind] * (failures[start : start + discs[kind].size].reshape(discs[kind].shape) + np.uint8(1))
        for kind, start in zip(kinds, starts, strict=True)
    ]


def nested(texts: list[str]) -> list[np.ndarray]:
    """Texts the way LSWMD.pkl has them, `array([['none']])`, and an empty array for an empty text."""
    return [np.array([[text]]) if text else np.zeros((0, 0)) for text in texts]


def write_pickle(path: Path, *, rows: int, seed: int = 0) -> int:
    """Writes the generated frame to `path` and returns how many of its rows have a label."""
    import pandas as pd  # here, so that the measured process does not load it

    rng = np.random.default_rng(seed)
    texts = np.repeat([*LABELLED], [count * rows // ROWS for count in LABELLED.values()]).tolist()
    labelled = len(texts)
    texts += [""] * (rows - labelled)
    texts = [texts[i] for i in rng.permutation(rows)]
    frame = pd.DataFrame(
        {
            "waferMap": pd.Series(make_maps(rows, rng), dtype=object),
            "dieSize": np.zeros(rows),
            "lotName": pd.Series([f"lot{row // WAFERS_PER_LOT + 1}" for row in range(rows)], dtype=object),
            "waferIndex": np.arange(rows) % WAFERS_PER_LOT + 1.0,
            "trianTestLabel": pd.Series(nested(["Training" if text else "" for text in texts]), dtype=object),
            "failureType": pd.Series(nested(texts), dtype=object),
        }
    )
    frame.to_pickle(path)
    return labelled


def convert(path: Path) -> dict[str, float | int]:
    """Runs and times the conversion in this process."""
    sys.path.insert(0, str(ROOT))
    from waferlab.data.lswmd import convert_lswmd

    clock = [time.perf_counter()]
    cache = convert_lswmd(path)
    clock.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )  # KiB on Linux
    convert_lswmd(path)
    clock.append(time.perf_counter())
    with np.load(cache, allow_pickle=False) as arrays:
        maps, dies = len(arrays["labels"]), len(arrays["maps_flat"])
    clock.append(time.perf_counter())
    first, second, load = np.diff(clock).round(3).tolist()
    return {
        "convert_seconds": first,
        "find_copy_seconds": second,
        "load_copy_seconds": load,
        "peak_resident_bytes": peak,
        "copy_bytes": cache.stat().st_size,
        "maps_in_copy": maps,
        "dies_in_copy": dies,
    }


def measure(folder: Path, *, rows: int) -> dict[str, object]:
    """Generates a pickle in `folder`, converts it in a child process and returns the figures; removes both files."""
    path = folder / "LSWMD.pkl"
    try:
        labelled = write_pickle(path, rows=rows)
        command = [sys.executable, __file__, CHILD, str(path)]
        child = subprocess.run(command, check=True, capture_output=True, text=True)
        return {
            "rows": rows,
            "labelled": labelled,
            "pickle_bytes": path.stat().st_size,
            **json.loads(child.stdout),
            "numpy": np.__version__,
        }
    finally:
        path.unlink(missing_ok=True)
        path.with_suffix(".npz").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the generated pickle (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to put the pickle (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument(CHILD, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        print(json.dumps(convert(arguments.convert)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        record = measure(Path(folder), rows=arguments.rows)
    write_record(arguments.output, record, measures=MEASURES, repeats="one run", weights=None, search=None)


if __name__ == "__main__":
    main()
