"""Promises about experiments: paired by seed, corrected for their number, resumed without repeating finished work."""

import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from test_reporting import make_ablation, make_comparison

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.errors import ConfigError, RunError
from waferlab.evaluation.statistics import (
    DIFFERENCE_METHOD,
    INTERVAL_METHOD,
    holm_factors,
    mean_interval,
    paired_differences,
)
from waferlab.experiments.ablation import COMPONENTS, ablate, ablation_variants
from waferlab.experiments.comparison import compare_architectures
from waferlab.reports.pages import write_report
from waferlab.reports.tables import ablation_markdown, comparison_markdown

ROOT = Path(__file__).resolve().parents[2]


def pipeline(data, folder, **settings):
    common = {
        "experiment_name": "series", "data": data, "image_size": 16, "max_epochs": 1, "use_pretrained": False,
        "enable_optuna": False, "enable_mlflow": False, "output_dir": folder, "quiet": True,
    }  # fmt: skip
    return IntegratedMLPipeline(ExperimentConfig(**common | settings))


def make_records(scores):
    """Records of a series from the macro F1 of each variant, one a seed."""
    return [
        {"variant": name, "seed": seed, "macro_f1": score, "maps": {"train": 400, "test": 100}}
        for name, values in scores.items()
        for seed, score in enumerate(values)
    ]


def test_holm_corrects_as_in_a_worked_example():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2 and 0.04, which is raised to the 0.06 before it.
    assert holm_factors([0.01, 0.04, 0.03, 0.005]) == pytest.approx([3, 0.06 / 0.04, 2, 4])
    assert holm_factors([None, 0.5, 0.6]) == pytest.approx([None, 2, 1 / 0.6])
    assert holm_factors([0.5, 0.6, 0.7]) == pytest.approx([3, 1.5 / 0.6, 1.5 / 0.7])  # not cut off where p would be 1
    assert holm_factors([0.0, 0.02, 0.0]) == [3, 1, 2]
    assert holm_factors([]) == []


def test_intervals_of_differences_are_corrected_as_their_p_values():
    """Worked by hand: three differences against a reference, so factors 3, 2 and 1 from the smallest p on."""
    gains = {"clear": [0.05, 0.06, 0.07, 0.06], "likely": [0.03, 0.05, 0.03, 0.06], "nothing": [0.03, -0.02, 0.01, 0.0]}
    records = make_records({"reference": [0.8] * 4} | {k: [0.8 + gain for gain in v] for k, v in gains.items()})
    rows = {row["a"]: row for row in paired_differences(records, [(name, "reference") for name in gains])}
    for factor, (name, gain) in zip((3, 2, 1), gains.items(), strict=True):
        error = statistics.stdev(gain) * (1 / 4 + 100 / 400) ** 0.5
        p = 2 * stats.t.sf(abs(statistics.mean(gain)) / error, 3)
        half = stats.t.ppf(1 - 0.05 / factor / 2, 3) * error
        row = rows[name]
        assert (row["p"], row["p_corrected"]) == pytest.approx((p, factor * p))
        assert row["level"] == pytest.approx(1 - 0.05 / factor)
        assert row["interval"] == pytest.approx([statistics.mean(gain) - half, statistics.mean(gain) + half])
    plain = mean_interval(gains["likely"], test_over_train=0.25)["interval"]
    assert plain[0] > 0 > rows["likely"]["interval"][0], "95% would leave out 0 beside a corrected p of 0.05 or more"


def test_an_interval_leaves_out_0_exactly_where_the_corrected_p_is_significant():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        scores = {k: (0.8 + rng.uniform(0, 0.05) + 0.02 * rng.standard_normal(4)).tolist() for k in "abcd"}
        for row in paired_differences(make_records(scores), [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c")]):
            assert (row["interval"][0] > 0 or row["interval"][1] < 0) is row["significant"]
            assert row["significant"] is (row["p_corrected"] < 0.05)
            assert row["p"] <= row["p_corrected"] <= 1
            seen.add((row["significant"], row["p"] < 0.05))
    assert seen == {(True, True), (False, True), (False, False)}


def test_differences_without_spread_or_of_one_seed_are_reported_as_they_are():
    records = make_records({"a": [0.5, 0.75], "b": [0.25, 0.5], "c": [0.5, 0.75], "d": [0.4]})
    ahead, equal, single = paired_differences(records, [("a", "b"), ("a", "c"), ("a", "d")])
    assert (ahead["p"], ahead["p_corrected"], ahead["significant"]) == (0, 0, True)
    assert ahead["interval"] == [0.25, 0.25]
    assert (equal["p"], equal["p_corrected"], equal["interval"], equal["significant"]) == (1, 1, [0, 0], False)
    assert single["difference"] == pytest.approx(0.1)
    assert [single[key] for key in ("interval", "level", "p", "p_corrected")] == [None] * 4
    assert single["significant"] is False


def test_it_is_said_which_intervals_are_corrected(tmp_path):
    methods = {"interval_method": INTERVAL_METHOD, "difference_method": DIFFERENCE_METHOD}
    comparison, ablation = make_comparison(3) | methods, make_ablation() | methods
    pages = [
        write_report(record, folder=tmp_path, pictures=[], path=tmp_path / f"{record['mode']}.html").read_text()
        for record in (comparison, ablation)
    ]
    for text in (comparison_markdown(comparison), *pages):
        assert "95% t interval of one mean" in text
        assert "p values and intervals corrected for the number of comparisons (Holm 1979)" in text
    variants = ablation_markdown(ablation)
    assert "the intervals in the verdicts are corrected likewise, those of the means are not" in variants


def test_intervals_are_wider_than_for_independent_scores():
    values = [0.70, 0.74, 0.71, 0.77, 0.73]
    found = mean_interval(values, test_over_train=0.2)
    naive = stats.t.interval(0.95, 4, statistics.mean(values), stats.sem(values))
    corrected = (0.2 * 5 + 1) ** 0.5
    assert found["interval"][1] - found["mean"] == pytest.approx(corrected * (naive[1] - found["mean"]))
    assert mean_interval(values, test_over_train=0.0)["p"] == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert mean_interval([0.5], test_over_train=0.2) == {"mean": 0.5, "std": None, "interval": None, "p": None}


def test_a_comparison_is_paired_by_seed_and_resumed_without_repeating(tiny_npz, tmp_path):
    models = ["lightning_cnn", "vision_transformer"]
    record = compare_architectures(pipeline(tiny_npz, tmp_path, model_type=models), seeds=(0, 1))
    assert [(r["variant"], r["seed"]) for r in record["runs"]] == [(m, s) for s in (0, 1) for m in models]
    splits = {seed: {r["split"] for r in record["runs"] if r["seed"] == seed} for seed in (0, 1)}
    assert all(len(of_seed) == 1 for of_seed in splits.values()) and splits[0] != splits[1]
    score = {(r["variant"], r["seed"]): r["macro_f1"] for r in record["runs"]}
    by_hand = np.mean([score[models[0], s] - score[models[1], s] for s in (0, 1)])
    assert record["differences"][0]["difference"] == pytest.approx(by_hand)

    written = {file.name for file in (tmp_path / "results/series").iterdir()}
    pictures = {"critical_difference.png", "seed_comparison.png", "trade_offs.png"}
    assert {"comparison.json", "report.html", *pictures} <= written

    runs = tmp_path / "results/series/runs"
    (runs / "lightning_cnn_seed1/record.json").unlink()
    kept = (runs / "vision_transformer_seed1/record.json").stat().st_mtime_ns
    again = compare_architectures(pipeline(tiny_npz, tmp_path, model_type=models, resume=True), seeds=(0, 1))
    assert (runs / "vision_transformer_seed1/record.json").stat().st_mtime_ns == kept
    assert (runs / "lightning_cnn_seed1/record.json").exists()
    assert [r["macro_f1"] for r in again["runs"]] == [r["macro_f1"] for r in record["runs"]]
    assert not list(runs.glob("*/checkpoints"))  # weights of dozens of trainings would fill the disk


def test_an_ablation_switches_what_it_says(tiny_npz, tmp_path, monkeypatch):
    seen = {}
    train = IntegratedMLPipeline.search_and_train

    def spy(self, model_type):
        on = tuple(name for name, option in COMPONENTS.items() if getattr(self.config, option))
        seen[Path(self.config.output_dir).name] = (on, self.config.time_limit)
        return train(self, model_type)

    monkeypatch.setattr(IntegratedMLPipeline, "search_and_train", spy)
    settings = {"num_optuna_trials": 1, "search_epochs": 1, "time_limit": 13}
    record = ablate(pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", **settings), seeds=(0,))
    expected = {f"{name.replace(' ', '_')}_seed0": on for name, on in ablation_variants().items()}
    assert {name: on for name, (on, _) in seen.items()} == expected
    assert {limit for _, limit in seen.values()} == {0.8 * 13 / 10}  # the same for each, searches included
    means = {v["name"]: v["mean"] for v in record["variants"]}
    effects = {(e["component"], e["context"]): e for e in record["effects"]}
    for one in COMPONENTS:
        alone, left_out = effects[one, "alone"], effects[one, "left out"]
        assert alone["difference"] == pytest.approx(means[f"baseline + {one}"] - means["baseline"])
        assert left_out["difference"] == pytest.approx(means["everything"] - means[f"everything but {one}"])
        assert alone["verdict"] == "no effect shown"  # one seed shows nothing
    assert "no pre-trained weights" in record["verdict"]


@pytest.fixture
def diverging(monkeypatch):
    """Trainings with seed 1 diverge."""
    from waferlab.models.classifier import WaferClassifier

    step = WaferClassifier.training_step

    def step_on_nan(self, batch, batch_idx):
        bad = torch.initial_seed() % 10 == 1 and self.current_epoch == 0
        return step(self, (batch[0] * float("nan"), batch[1]) if bad else batch, batch_idx)

    monkeypatch.setattr(WaferClassifier, "training_step", step_on_nan)


def test_a_training_that_diverges_is_named_and_the_others_are_compared(diverging, tiny_npz, tmp_path):
    models = ["lightning_cnn", "vision_transformer"]
    record = compare_architectures(pipeline(tiny_npz, tmp_path, model_type=models), seeds=(0, 1))
    assert [(r["variant"], r["seed"]) for r in record["runs"]] == [(m, 0) for m in models]
    assert [(r["variant"], r["seed"]) for r in record["failed_runs"]] == [(m, 1) for m in models]
    assert [m["n"] for m in record["models"]] == [1, 1]
    assert "lightning_cnn, seed 1, failed (TrainingDivergedError: the training loss is nan" in record["verdict"]


def test_an_ablation_without_all_of_its_trainings_says_which_failed(diverging, tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr("waferlab.experiments.ablation.ablation_variants", lambda: {"baseline": (), "everything": ()})
    with pytest.raises(RunError, match=r"needs all of its trainings\. baseline, seed 1, failed .* --resume"):
        ablate(pipeline(tiny_npz, tmp_path, model_type="lightning_cnn"), seeds=(1, 2))
    with pytest.raises(RunError, match="None of 2 trainings came to its end"):
        ablate(pipeline(tiny_npz, tmp_path, model_type="lightning_cnn"), seeds=(1,))


def test_an_ablation_takes_one_model(tiny_npz, tmp_path):
    with pytest.raises(ConfigError, match="takes one model"):
        ablate(pipeline(tiny_npz, tmp_path), seeds=(0,))


def test_a_time_limit_that_is_too_short_is_named_before_anything_runs(tiny_npz, tmp_path):
    with pytest.raises(ConfigError, match=r"leaves 0\.08 s for each of 10 trainings"):
        ablate(pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", time_limit=1), seeds=(0,))


def test_ctrl_c_keeps_finished_trainings_and_resume_goes_on(tiny_npz, tmp_path):
    command = [
        sys.executable, ROOT / "run_experiment.py", "--mode", "comparison", "--models", "lightning_cnn", "--data",
        tiny_npz, "--epochs", "3", "--seeds", "0", "1", "2", "--output-dir", tmp_path, "--no-mlflow",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "1/3" in line:
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    finished = json.loads((tmp_path / "results/comparison/runs/lightning_cnn_seed0/record.json").read_text())
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "seed 0: macro F1" in done.stdout and "finished before" in done.stdout
    record = json.loads((tmp_path / "results/comparison/comparison.json").read_text())
    assert record["runs"][0]["train_seconds"] == finished["train_seconds"]
    assert len(record["runs"]) == 3
