"""Promises about records: what is written to JSON comes back as it was, with a text for people beside it."""

import json

import pytest
from made_up import a_record

from waferlab.records import StartingWeights, TrainingRecord, write_summary

WEIGHTS = [
    (StartingWeights("random", reason="not asked for"), "random (not asked for)"),
    (StartingWeights("published", "ResNet18_Weights.IMAGENET1K_V1"), "ResNet18_Weights.IMAGENET1K_V1"),
    (StartingWeights("generated", "generated wafer maps (a.safetensors)"), "generated wafer maps (a.safetensors)"),
]


@pytest.mark.parametrize(("weights", "text"), WEIGHTS, ids=lambda weights: getattr(weights, "kind", ""))
def test_a_record_comes_back_from_json_as_it_was(weights, text, tmp_path):
    record = a_record(weights=weights)
    assert str(record.weights) == text
    written = json.loads(write_summary(tmp_path / "record.json", record.as_json()).read_text())
    assert written["weights"] == text
    assert written["starting_weights"] == {"kind": weights.kind, "name": weights.name, "reason": weights.reason}
    again = TrainingRecord.from_json(written)
    assert again == record and again.weights == weights
    assert again.val_macro_f1 == record.val_macro_f1 == 0.75
