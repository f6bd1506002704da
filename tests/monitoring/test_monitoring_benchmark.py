"""Promises about benchmarks/monitoring.py: it runs on small data, and its changes are what they are called."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import warm
from made_up_network import write_model

from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import split_in_order
from waferlab.deployment.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import monitoring  # noqa: E402
import readme_tables  # noqa: E402


def test_it_writes_a_record_that_the_tables_can_be_made_of(tiny_arrays, tmp_path):
    lots = np.random.default_rng(0).permutation(len(tiny_arrays["labels"])) % 60
    np.savez(tmp_path / "tiny.npz", **(tiny_arrays | {"group": lots}))
    write_model(tmp_path / "model.onnx")
    flags = ("--data", tmp_path / "tiny.npz", "--model", tmp_path / "model.onnx", "--lots", 6, "--permutations", 39)
    flags += ("--reference", tmp_path / "reference.npz", "--batches", 3, "--shift-batches", 1)
    command = [sys.executable, ROOT / "benchmarks/monitoring.py", *flags, "--output", tmp_path / "record.json"]
    done = warm.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "reference.npz").is_file()
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["data"] == "tiny.npz" and record["seconds"]["comparisons"] == 2 * 3 + 15
    for found in record["false_alarms"].values():
        assert found["verdict"]["n"] == 3
        assert found["verdict"]["interval"][0] <= found["verdict"]["share"] <= found["verdict"]["interval"][1]
    assert len({(s["shift"], s["strength"]) for s in record["shifts"]}) == len(record["shifts"]) == 15
    everywhere = next(s for s in record["shifts"] if (s["shift"], s["strength"]) == ("new die grid", 1.0))
    assert everywhere["alarms"]["new_grids, alone"]["share"] == 1
    assert len(readme_tables.monitoring_shifts(record)) == 2 + 15
    assert "as a user meets them" in readme_tables.monitoring(record)[0]


def test_the_last_lots_are_scored_before_and_after_the_correction(tiny_npz, tmp_path):
    write_model(tmp_path / "model.onnx")
    arguments = SimpleNamespace(reference=tmp_path / "reference.npz", lots=6, shift_batches=2)
    maps, watch = load_wafer_maps(tiny_npz), monitoring.Stopwatch(19)
    record = monitoring.ordered(watch, Predictor(tmp_path / "model.onnx"), maps, arguments, np.random.default_rng(0))
    found = record["ordered"]
    assert found["maps"] == len(split_in_order(maps).test) and watch.calls == 3
    assert found["macro_f1"].keys() == found["accuracy"].keys() and len(found["accuracy"]) == 4
    assert all(0 <= score <= 1 for score in found["macro_f1"].values())
    table = readme_tables.monitoring_ordered(record | {"lots_in_batch": 6})
    assert "| corrected for the estimated mix |" in "\n".join(table)


@pytest.fixture
def one():
    rng = np.random.default_rng(0)
    return np.where(rng.random((30, 26)) < 0.1, 0, np.where(rng.random((30, 26)) < 0.2, 2, 1)).astype(np.uint8)


def test_the_changes_are_what_they_are_called(one):
    grown = monitoring.resampled(one)
    assert grown.shape == (37, 22) and grown.dtype == np.uint8
    assert (grown == 2).mean() == pytest.approx((one == 2).mean(), abs=0.04)
    worse = monitoring.more_failing(one, 0.1, np.random.default_rng(1))
    assert (worse[one != 1] == one[one != 1]).all() and worse.dtype == np.uint8
    assert (worse[one == 1] == 2).mean() == pytest.approx(0.1, abs=0.03)
    squares = monitoring.checkered(one)
    assert ((squares == 0) == (one == 0)).all() and (squares[one == 2] == 2).all()
    assert (squares[:2, :2][one[:2, :2] > 0] == 2).all() and (squares[:2, 2:4] == one[:2, 2:4]).all()
