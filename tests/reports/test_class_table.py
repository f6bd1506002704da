"""A promise about the table of classes that a run leaves."""

import csv

import numpy as np
import pytest

from waferlab.evaluation.metrics import compute_metrics
from waferlab.evaluation.predictions import Predictions
from waferlab.reports.tables import write_per_class_table


def test_the_table_of_classes_has_each_figure_under_its_heading(tmp_path):
    labels = np.repeat([0, 1], [30, 10])
    said = np.concatenate([np.zeros(24), np.ones(6), np.ones(9), np.zeros(1)]).astype(int)
    predictions = Predictions(np.eye(2)[said], labels, np.arange(40) % 5, ("good", "bad"))
    table = write_per_class_table(compute_metrics(predictions), path=tmp_path / "t.csv")
    good, bad = csv.DictReader(table.open())
    assert (good["class"], good["support"]) == ("good", "30") and (bad["class"], bad["support"]) == ("bad", "10")
    assert float(good["precision"]) == pytest.approx(24 / 25) and float(good["recall"]) == pytest.approx(24 / 30)
    assert float(bad["precision"]) == pytest.approx(9 / 15) and float(bad["recall"]) == pytest.approx(9 / 10)
    assert float(bad["f1_low"]) < float(bad["f1"]) < float(bad["f1_high"])
