"""Promises about records: what is written to JSON comes back as it was, with a text for people beside it."""

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
from made_up import a_record
from search.made_up_trials import a_search

from integrated_pipeline import ExperimentConfig
from waferlab.records import StartingWeights, TrainingRecord, decided_by_time, environment, write_summary

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


def a_result(**more):
    return SimpleNamespace(**{"model_type": "made_up", "epochs": 7, "search": None, "precision": "32-true"} | more)


def test_versions_are_of_what_is_installed_be_it_for_gpus(monkeypatch):
    def installed(package):
        if package in ("onnxruntime", "ultralytics", "ultralytics-gpu"):
            raise PackageNotFoundError(package)
        return f"that of {package}"

    monkeypatch.setattr("waferlab.records.version", installed)
    found = environment()
    assert (found["torch"], found["onnxruntime"]) == ("that of torch", "that of onnxruntime-gpu")
    assert found["ultralytics"] is None


def test_trials_that_still_waited_when_the_time_was_up_are_none():
    trials = [SimpleNamespace(state=state) for state in ("complete", "pruned", "fail", "waiting")]
    assert a_search(trials=trials).begun() == 3


def test_a_summary_says_which_figures_another_run_may_not_repeat():
    fixed = {"time_limit": None, "threads": 1, "precision": "32-true", "workers": 1}
    searched = a_result(search=a_search(trials=[SimpleNamespace(state="complete")] * 3))
    assert decided_by_time(ExperimentConfig(**fixed), [a_result(), searched]) == []
    (said,) = decided_by_time(ExperimentConfig(**fixed | {"time_limit": 60}), [a_result(), searched])
    assert "time_limit=60" in said and "7 of made_up, 7 of made_up epochs and 3 trials" in said
    (said,) = decided_by_time(ExperimentConfig(**fixed), [a_result(search=replace(a_search(), workers=2))])
    assert "workers=1 repeats" in said
    (said,) = decided_by_time(ExperimentConfig(**fixed | {"threads": None}), [a_result()])
    assert "threads=1 repeats" in said
    (said,) = decided_by_time(ExperimentConfig(**fixed | {"precision": "auto"}), [a_result(), a_result(precision="16")])
    assert "took what was quickest here: 16, 32-true." in said
