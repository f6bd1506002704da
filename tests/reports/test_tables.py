"""Promises about tables and the summary: no NaN, whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from made_up_predictions import CLASSES, RESULTS, make_predictions
from rich.console import Console

from waferlab.evaluation.metrics import compute_metrics
from waferlab.records import SUMMARY_SCHEMA_VERSION, write_summary
from waferlab.reports.columns import InColumns
from waferlab.reports.tables import Table, results_table, table_markdown, write_per_class_table

ROOT = Path(__file__).resolve().parents[2]


def test_summary_holds_what_numpy_and_paths_mean(tmp_path):
    @dataclasses.dataclass
    class Config:
        seed: int = 3
        output_dir: Path = Path("results/wafers")

    written = write_summary(
        tmp_path / "new" / "experiment_summary.json",
        {
            "config": Config(),
            "accuracy": np.float32(0.5),
            "count": np.int64(7),
            "flag": np.bool_(True),
            "pair": (1, None),
            "matrix": np.eye(2, dtype=int),
            "by_class": {3: "Loc"},
            "schema_version": "a caller's own",
        },
    )
    assert json.loads(written.read_text()) == {
        "schema_version": SUMMARY_SCHEMA_VERSION,
        "config": {"seed": 3, "output_dir": "results/wafers"},
        "accuracy": 0.5,
        "count": 7,
        "flag": True,
        "pair": [1, None],
        "matrix": [[1, 0], [0, 1]],
        "by_class": {"3": "Loc"},
    }
    assert written.read_text().splitlines()[1].startswith('  "schema_version"')


@pytest.mark.parametrize("bad", [float("nan"), np.inf, np.float32("nan"), np.array([0.0, -np.inf])])
def test_summary_refuses_nan_and_names_the_place(tmp_path, bad):
    path = write_summary(tmp_path / "summary.json", {"fine": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"models\[1\]\.macro_f1"):
        write_summary(path, {"models": [{"macro_f1": 0.5}, {"macro_f1": bad}]})
    assert path.read_bytes() == before


def test_summary_refuses_what_json_does_not_know(tmp_path):
    with pytest.raises(TypeError, match=r"config\.classes is a set"):
        write_summary(tmp_path / "summary.json", {"config": {"classes": {1, 2}}})


@pytest.mark.parametrize("stage", ["write", "replace"])
def test_a_failed_write_leaves_the_old_summary_and_no_litter(tmp_path, monkeypatch, stage):
    path = write_summary(tmp_path / "summary.json", {"run": 1})
    before = path.read_bytes()

    def disk_full(*_args):
        raise OSError("no space left on device")

    class Half(io.FileIO):
        def write(self, data):
            super().write(data[: len(data) // 2])
            disk_full()

    if stage == "write":
        monkeypatch.setattr(Path, "open", lambda path, mode: Half(path, mode))
    else:
        monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_summary(path, {"run": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_per_class_table_is_csv_with_dashes_for_a_class_without_maps(tmp_path):
    metrics = compute_metrics(make_predictions(labels=[0, 1] * 60))
    path = write_per_class_table(metrics, path=tmp_path / "per_class.csv")
    rows = list(csv.DictReader(path.open()))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert float(rows[0]["f1"]) == pytest.approx(metrics["per_class"]["Center"]["f1"], abs=1e-4)
    assert float(rows[0]["f1_low"]) <= float(rows[0]["f1"]) <= float(rows[0]["f1_high"])
    assert list(rows[8].values()) == ["none", "0", "-", "-", "-", "", ""]


def test_comparison_table_fits_80_columns_and_shows_intervals():
    console = Console(file=io.StringIO(), width=80)
    console.print(InColumns(results_table([*RESULTS, {"model_type": "vit[small]"}])))
    text = console.file.getvalue()
    assert "0.851 [0.831, 0.866]" in text
    assert "2.4M" in text
    assert "vit[small]" in text, "rich took the brackets for markup"
    assert all(result["model_type"] in text for result in RESULTS)


WIDE = Table(
    ["Model", "Macro F1 (mean)", "Seeds", "Accuracy", "Parameters", "Training (s)", "Latency (ms)", "Epochs"],
    [["torchvision_efficientnet", "0.589 [0.544, 0.635]", "5", "0.852", "4,667,461", "48.3", "10.74", "1.0"]] * 2,
    note="not a column",
)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_table_too_wide_for_the_terminal_comes_in_parts_with_the_name_in_each_and_nothing_cut_off(width):
    console = Console(file=io.StringIO(), width=width)
    console.print(InColumns(WIDE, title="Compared"))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width and text.count("Compared") == 1
    for column, heading in enumerate(WIDE.headings):
        assert heading in text and text.count(WIDE.rows[0][column]) >= 2
    with_figures = [line for line in lines if any(figure in line for figure in WIDE.rows[0][1:])]
    assert all(line.startswith("torchvision_efficientnet") for line in with_figures)
    assert len(with_figures) == (2 if width == 200 else 2 * text.count("Model"))


def test_the_comparison_is_the_same_in_markdown_as_on_the_terminal():
    odd = {"model_type": "vit|small<b>", "macro_f1": 0.9}
    lines = table_markdown(results_table([*RESULTS, odd], chosen=odd["model_type"])).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[4] == "| torchvision_efficientnet | 0.881 | 0.851 [0.831, 0.866] | 2.4M | 41 | 1.25 |"
    assert lines[6] == "| **vit\\|small&lt;b&gt;** | **-** | **0.900** | **-** | **-** | **-** |"


def test_a_class_whose_name_a_spreadsheet_would_compute_is_a_text(tmp_path):
    row = {"support": 1, "precision": 1.0, "recall": 1.0, "f1": 1.0, "f1_interval": None}
    path = write_per_class_table({"per_class": {"=1+1": row}}, path=tmp_path / "per_class.csv")
    assert path.read_text().splitlines()[1].startswith("'=1+1,")
