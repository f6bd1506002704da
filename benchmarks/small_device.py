r"""The champion for a small device: its four forms' bytes, milliseconds a map, and scores.

What `python -m waferlab.deployment.small_device` makes of the model that benchmarks/champion.py has trained: the ranges
of 8-bit numbers from validation maps, the scores on the test part. Milliseconds are of one map at a time with one
thread, the forms in turn; opening the file is left out.

    python benchmarks/small_device.py --data wm811k.npz --champion champion \
        --output benchmarks/results/small_device.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import rows, write_record

MEASURES = ("in_8_bits", "make_forms", "measure_forms", "Predictor", "export_onnx", "RawMapClassifier", "LightningCNN")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PATH")
    parser.add_argument("--champion", type=Path, required=True, help="output folder of benchmarks/champion.py")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    import numpy as np

    from waferlab.data.reading import load_wafer_maps
    from waferlab.data.splitting import split_by_lot
    from waferlab.deployment.small_device import MOST_MAPS, TIMED_MAPS, make_forms, measure_forms

    data = load_wafer_maps(arguments.data)
    summary = json.loads((arguments.champion / "results/champion/experiment_summary.json").read_text())
    split = split_by_lot(data, seed=summary["config"]["seed"])
    if split.fingerprint != summary["split"]["fingerprint"]:
        raise SystemExit(f"{arguments.champion} was trained on another split. Train it anew: benchmarks/champion.py")
    file = arguments.champion / "checkpoints/champion/lightning_cnn/model.onnx"
    chosen = np.random.default_rng(0).permutation(split.validation)[:MOST_MAPS]
    maps = [data[i] for i in chosen]
    with tempfile.TemporaryDirectory() as folder:
        found = measure_forms(make_forms(file, maps, Path(folder)), maps, data, part=split.test)
    (result,) = summary["models"]
    record = {"benchmark": "small_device", "data": Path(arguments.data).name, "forms": found}
    write_record(
        arguments.output,
        record | {"views": result["decision"]["views"]},
        measures=MEASURES,
        repeats=f"{min(len(maps), TIMED_MAPS)} maps in turn after ten to warm up",
        weights=None,
        search=None,
    )


def table_of_forms(record: dict[str, Any]) -> list[str]:
    """For benchmarks/README.md."""
    cells = []
    for form, values in record["forms"].items():
        against = values["against_first"]
        difference = f"{against['difference']:+.4f} [{against['interval'][0]:+.4f}, {against['interval'][1]:+.4f}]"
        cells.append([form, f"{values['bytes'] / 1e3:,.0f}", f"{values['ms_a_map']:.2f}", f"{against['new']:.4f}",
                      "-" if not cells else difference, f"{values['other_class']:.2%}"])  # fmt: skip
    first = next(iter(record["forms"].values()))
    return [
        *rows("form, kB, ms a map, macro F1, difference, other class", cells),
        "",
        f"{first['maps']:,} test maps of {first['against_first']['n_groups']} lots, {record['views']} views where they "
        "are needed. In brackets: 95% paired jackknife over lots.",
    ]


if __name__ == "__main__":
    main()
