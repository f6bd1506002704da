"""Promises about experiments: paired by seed, resumed without repeating finished work, told as they came out."""

import contextlib
import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import warm
from made_up_results import result
from mlflow import MlflowClient
from rich.console import Console

from integrated_pipeline import train_and_score
from waferlab.config import ExperimentConfig
from waferlab.errors import ConfigError, DamagedFileError, RunError, TrainingDivergedError
from waferlab.evaluation.statistics import DIFFERENCE_METHOD, INTERVAL_METHOD
from waferlab.experiments.ablation import COMPONENTS, ablate, ablation_variants
from waferlab.experiments.comparison import _comparison_verdict, compare_architectures
from waferlab.experiments.series import TrainingSeries, Variant
from waferlab.records import StartingWeights
from waferlab.reports.tables import ablation_markdown, comparison_markdown
from waferlab.terminal import Terminal
from waferlab.tracking.runs import NoRuns, RunTree

ROOT = Path(__file__).resolve().parents[2]
MODELS = ["lightning_cnn", "vision_transformer"]
MEANS = {"runs": NoRuns(), "terminal": Terminal(Console(quiet=True), quiet=True)}


def configured(data, folder, **settings):
    common = {
        "experiment_name": "series", "data": data, "image_size": 16, "max_epochs": 1, "use_pretrained": False,
        "enable_optuna": False, "enable_mlflow": False, "output_dir": folder, "quiet": True,
    }  # fmt: skip
    return ExperimentConfig(**common | settings)


def made_up(config, maps, split):
    """A training that is as good as its architecture, its seed and the number of its components say."""
    on = sum(getattr(config, option) for option in COMPONENTS.values())
    score = 0.5 + 0.1 * (config.model_type == "lightning_cnn") + 0.02 * config.seed + 0.05 * on
    return result(score, config=config, maps=maps, split=split)


def diverging(config, maps, split):
    """Trainings with seed 1 diverge."""
    if config.seed == 1:
        raise TrainingDivergedError("the training loss is nan after epoch 1.")
    return made_up(config, maps, split)


def test_it_is_said_which_intervals_are_corrected(tiny_npz, tmp_path):
    settings = {"train": made_up, "seeds": (0, 1, 2), **MEANS}
    comparison = compare_architectures(configured(tiny_npz, tmp_path / "a", model_type=MODELS), **settings)
    ablation = ablate(configured(tiny_npz, tmp_path / "b", model_type="lightning_cnn"), **settings)
    assert comparison["interval_method"] == ablation["interval_method"] == INTERVAL_METHOD
    assert comparison["difference_method"] == ablation["difference_method"] == DIFFERENCE_METHOD
    pages = [(tmp_path / name / "results/series/report.html").read_text() for name in "ab"]
    for text in (comparison_markdown(comparison), *pages):
        assert "95% t interval of one mean" in text
        assert "p values and intervals corrected for the number of comparisons (Holm 1979)" in text
    variants = ablation_markdown(ablation)
    assert "the intervals in the verdicts are corrected likewise, those of the means are not" in variants


def test_a_quiet_experiment_prints_its_tables_and_its_verdict_all_the_same(tiny_npz, tmp_path, capsys):
    config = configured(tiny_npz, tmp_path, model_type=MODELS)
    verdict = compare_architectures(config, seeds=(0, 1), train=made_up, **MEANS)["verdict"]
    printed = capsys.readouterr().out
    assert verdict in printed and printed.count("vision_transformer") >= 2 and "seed 0" not in printed


@pytest.mark.long
def test_a_comparison_is_paired_by_seed_and_resumed_without_repeating(tiny_npz, tmp_path):
    def compared(**more):
        config = configured(tiny_npz, tmp_path, model_type=MODELS, **more)
        return compare_architectures(config, seeds=(0, 1), train=train_and_score, **MEANS)

    record = compared()
    assert [(r["variant"], r["seed"]) for r in record["runs"]] == [(m, s) for s in (0, 1) for m in MODELS]
    splits = {seed: {r["split"] for r in record["runs"] if r["seed"] == seed} for seed in (0, 1)}
    assert all(len(of_seed) == 1 for of_seed in splits.values()) and splits[0] != splits[1]
    score = {(r["variant"], r["seed"]): r["macro_f1"] for r in record["runs"]}
    by_hand = np.mean([score[MODELS[0], s] - score[MODELS[1], s] for s in (0, 1)])
    assert record["differences"][0]["difference"] == pytest.approx(by_hand)

    written = {file.name for file in (tmp_path / "results/series").iterdir()}
    pictures = {"critical_difference.png", "seed_comparison.png", "trade_offs.png"}
    assert {"comparison.json", "report.html", *pictures} <= written

    runs = tmp_path / "results/series/runs"
    (runs / "lightning_cnn_seed1/record.json").unlink()
    kept = (runs / "vision_transformer_seed1/record.json").stat().st_mtime_ns
    again = compared(resume=True)
    assert (runs / "vision_transformer_seed1/record.json").stat().st_mtime_ns == kept
    assert (runs / "lightning_cnn_seed1/record.json").exists()
    assert [r["macro_f1"] for r in again["runs"]] == [r["macro_f1"] for r in record["runs"]]
    assert not list(runs.glob("*/checkpoints"))  # weights of dozens of trainings would fill the disk


def test_a_resumed_series_trains_what_was_made_with_other_settings_anew(tiny_npz, tmp_path):
    asked = []

    def train(config, maps, split):
        asked.append((config.model_type, config.seed))
        return made_up(config, maps, split)

    for settings, seeds in (({}, (0, 1)), ({"resume": True}, (0, 1, 2)), ({"resume": True, "max_epochs": 2}, (0,))):
        config = configured(tiny_npz, tmp_path, model_type="lightning_cnn", **settings)
        compare_architectures(config, seeds=seeds, train=train, **MEANS)
    assert asked == [("lightning_cnn", seed) for seed in (0, 1, 2, 0)]


def test_a_damaged_record_is_named_with_a_remedy_that_works(tiny_npz, tmp_path):
    settings = {"seeds": (0, 1), "train": made_up, **MEANS}
    compare_architectures(configured(tiny_npz, tmp_path, model_type="lightning_cnn"), **settings)
    file = tmp_path / "results/series/runs/lightning_cnn_seed0/record.json"
    file.write_text("")
    again = configured(tiny_npz, tmp_path, model_type="lightning_cnn", resume=True)
    with pytest.raises(
        DamagedFileError, match=r"lightning_cnn_seed0/record.json is damaged .*Delete it; with --resume"
    ):
        compare_architectures(again, **settings)
    file.unlink()
    assert len(compare_architectures(again, **settings)["runs"]) == 2


def test_a_training_of_a_series_that_is_gone_on_with_stays_one_run(tiny_npz, tmp_path):
    def killed(config, maps, split):
        raise KeyboardInterrupt

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for train, resume in ((killed, False), (made_up, True)):
        config = configured(tiny_npz, tmp_path, model_type="lightning_cnn", resume=resume)
        with contextlib.suppress(KeyboardInterrupt):
            runs = RunTree("series", uri=uri, folder=tmp_path, resume=resume, warn=print)
            compare_architectures(config, seeds=(0,), train=train, runs=runs, terminal=MEANS["terminal"])
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("series").experiment_id])
    assert sorted(run.info.run_name for run in found) == ["lightning_cnn, seed 0", "series"]
    assert {run.info.status for run in found} == {"FINISHED"}


def test_a_resumed_series_trains_on_other_maps_anew(tiny_npz, tmp_path):
    asked, data = [], tmp_path / "maps.npz"

    def train(config, maps, split):
        asked.append(len(maps))
        return made_up(config, maps, split)

    for dropped, resume in ((0, False), (0, True), (3, True)):
        with np.load(tiny_npz) as arrays:
            n = len(arrays["labels"]) - dropped
            np.savez(data, **{name: arrays[name][: n + (name == "offsets")] for name in arrays if name != "maps_flat"},
                     maps_flat=arrays["maps_flat"][: arrays["offsets"][n]])  # fmt: skip
        config = configured(data, tmp_path, model_type="lightning_cnn", resume=resume)
        compare_architectures(config, seeds=(0,), train=train, **MEANS)
    assert asked == [n + 3, n]


def test_a_series_that_begins_anew_leaves_nothing_for_a_later_one_to_go_on_from(tiny_npz, tmp_path):
    asked = []

    def train(config, maps, split):
        asked.append(config.seed)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return made_up(config, maps, split)

    def compared(**more):
        config = configured(tiny_npz, tmp_path, model_type="lightning_cnn", **more)
        return compare_architectures(config, seeds=(0, 1), train=train, **MEANS)

    compared()
    with pytest.raises(KeyboardInterrupt):
        compared()
    compared(resume=True)
    assert asked == [0, 1, 0, 0, 1]


def test_models_that_started_from_different_weights_are_not_ranked(tiny_npz, tmp_path):
    def train(config, maps, split):
        kind = "generated" if config.model_type == "lightning_cnn" else "random"
        scored = made_up(config, maps, split)
        return replace(scored, weights=StartingWeights(kind, name="made up", reason="made up"))

    config = configured(tiny_npz, tmp_path, model_type=MODELS, use_pretrained=True)
    record = compare_architectures(config, seeds=(0, 1), train=train, **MEANS)
    why = "The rows are not ranked against each other: they differ in weights."
    assert record["verdict"].startswith(f"{why} Compare with use_pretrained=false") and record["differences"] == []
    assert "**" not in comparison_markdown(record) and why in comparison_markdown(record)
    assert not (tmp_path / "results/series/critical_difference.png").exists()


def test_an_ablation_switches_what_it_says(tiny_npz, tmp_path):
    seen = {}

    def train(config, maps, split):
        on = tuple(name for name, option in COMPONENTS.items() if getattr(config, option))
        seen[Path(config.output_dir).name] = (on, config.time_limit)
        return made_up(config, maps, split)

    config = configured(tiny_npz, tmp_path, model_type="lightning_cnn", time_limit=13)
    record = ablate(config, seeds=(0,), train=train, **MEANS)
    expected = {f"{name.replace(' ', '_')}_seed0": on for name, on in ablation_variants().items()}
    assert {name: on for name, (on, _) in seen.items()} == expected
    assert {limit for _, limit in seen.values()} == {0.8 * 13 / 10}  # the same for each, searches included
    means = {v["name"]: v["mean"] for v in record["variants"]}
    assert means["everything"] - means["baseline"] == pytest.approx(4 * 0.05)
    effects = {(e["component"], e["context"]): e for e in record["effects"]}
    for one in COMPONENTS:
        alone, left_out = effects[one, "alone"], effects[one, "left out"]
        assert alone["difference"] == pytest.approx(means[f"baseline + {one}"] - means["baseline"])
        assert left_out["difference"] == pytest.approx(means["everything"] - means[f"everything but {one}"])
        assert alone["verdict"] == "no effect shown"  # one seed shows nothing
    assert "no pre-trained weights" in record["verdict"]


def test_the_training_of_an_experiment_searches_trains_and_scores_on_the_maps_it_is_handed(tiny_npz, tmp_path):
    from waferlab.data.reading import load_wafer_maps
    from waferlab.data.splitting import split_by_lot

    maps = load_wafer_maps(tiny_npz)
    split = split_by_lot(maps, seed=3)
    settings = {"enable_optuna": True, "num_optuna_trials": 1, "search_epochs": 1, "batch_size": 16}
    config = configured("not-read.npz", tmp_path, model_type="lightning_cnn", **settings)
    found = train_and_score(config, maps, split)
    assert len(found.search.trials) == 1 and found.epochs == 1
    assert found.test["n_samples"] == len(split.test) and found.validation["n_samples"] == len(split.validation)


def test_an_experiment_in_order_hands_all_its_trainings_the_last_lots_to_test_on(tiny_npz, tmp_path):
    tested = []

    def train(config, maps, split):
        tested.append(split.test.tolist())
        return made_up(config, maps, split)

    config = configured(tiny_npz, tmp_path, model_type=MODELS, split="ordered")
    compare_architectures(config, seeds=(0, 1), train=train, **MEANS)
    assert len(tested) == 2 * len(MODELS) and all(part == tested[0] for part in tested)


def test_a_training_that_diverges_is_named_and_the_others_are_compared(tiny_npz, tmp_path):
    config = configured(tiny_npz, tmp_path, model_type=MODELS)
    record = compare_architectures(config, seeds=(0, 1), train=diverging, **MEANS)
    assert [(r["variant"], r["seed"]) for r in record["runs"]] == [(m, 0) for m in MODELS]
    assert [(r["variant"], r["seed"]) for r in record["failed_runs"]] == [(m, 1) for m in MODELS]
    assert [m["n"] for m in record["models"]] == [1, 1]
    assert "lightning_cnn, seed 1, failed (TrainingDivergedError: the training loss is nan" in record["verdict"]


def test_an_ablation_without_all_of_its_trainings_says_which_failed(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr("waferlab.experiments.ablation.ablation_variants", lambda: {"baseline": (), "everything": ()})
    config = configured(tiny_npz, tmp_path, model_type="lightning_cnn")
    with pytest.raises(RunError, match=r"needs all of its trainings\. baseline, seed 1, failed .* --resume"):
        ablate(config, seeds=(1, 2), train=diverging, **MEANS)
    with pytest.raises(RunError, match="None of 2 trainings came to its end"):
        ablate(config, seeds=(1,), train=diverging, **MEANS)


def test_an_error_that_is_not_one_trainings_own_ends_the_series(tiny_npz, tmp_path):
    def broken(config, maps, split):
        raise RuntimeError("a mistake in the code")

    with pytest.raises(RuntimeError, match=r"^a mistake in the code"):
        config = configured(tiny_npz, tmp_path, model_type="lightning_cnn")
        compare_architectures(config, seeds=(0, 1), train=broken, **MEANS)


def test_the_seconds_of_an_experiments_training_hold_its_search(tiny_npz, tmp_path):
    def train(config, maps, split):
        return result(0.5, config=config, maps=maps, split=split, train_seconds=20.0, total_seconds=320.0)

    config = configured(tiny_npz, tmp_path)
    series = TrainingSeries(config, [Variant("one", "lightning_cnn")], [0], train=train, **MEANS)
    with series.open():
        (record,) = series.train_all()
    assert record["train_seconds"] == 320.0


def test_the_record_of_a_training_names_what_it_started_from_for_people_and_for_programs(tiny_npz, tmp_path):
    weights = StartingWeights("generated", "generated wafer maps (a.safetensors)")

    def train(config, maps, split):
        return result(0.5, config=config, maps=maps, split=split, weights=weights)

    config = configured(tiny_npz, tmp_path, model_type="lightning_cnn")
    (run,) = compare_architectures(config, seeds=(0,), train=train, **MEANS)["runs"]
    assert (run["weights"], run["starting_weights"]) == (weights.name, asdict(weights))


def test_an_ablation_takes_one_model(tiny_npz, tmp_path):
    with pytest.raises(ConfigError, match="takes one model"):
        ablate(configured(tiny_npz, tmp_path), seeds=(0,), train=made_up, **MEANS)


def test_a_time_limit_that_is_too_short_is_named_before_anything_runs(tiny_npz, tmp_path):
    with pytest.raises(ConfigError, match=r"leaves 0\.08 s for each of 10 trainings"):
        config = configured(tiny_npz, tmp_path, model_type="lightning_cnn", time_limit=1)
        ablate(config, seeds=(0,), train=pytest.fail, **MEANS)


@pytest.mark.long
def test_ctrl_c_keeps_finished_trainings_and_resume_goes_on(tiny_npz, tmp_path):
    command = [
        sys.executable, ROOT / "run_experiment.py", "--mode", "comparison", "--models", "lightning_cnn", "--data",
        tiny_npz, "--epochs", "3", "--seeds", "0", "1", "2", "--output-dir", tmp_path, "--no-mlflow",
    ]  # fmt: skip
    process = warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "1/3" in line:
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    finished = json.loads((tmp_path / "results/comparison/runs/lightning_cnn_seed0/record.json").read_text())
    done = warm.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "seed 0: macro F1" in done.stdout and "finished before" in done.stdout
    record = json.loads((tmp_path / "results/comparison/comparison.json").read_text())
    assert record["runs"][0]["train_seconds"] == finished["train_seconds"]
    assert len(record["runs"]) == 3


def test_a_seed_that_cannot_be_is_named_before_anything_is_trained(tiny_npz, tmp_path):
    config = configured(tiny_npz, tmp_path, model_type=MODELS)
    with pytest.raises(ConfigError, match="seed=-1 is out of range"):
        compare_architectures(config, seeds=(0, -1), train=pytest.fail, **MEANS)


def test_trainings_of_an_experiment_share_no_study(tiny_npz, tmp_path):
    config = configured(tiny_npz, tmp_path, model_type="lightning_cnn", storage=f"sqlite:///{tmp_path}/study.db")
    with pytest.raises(ConfigError, match=r"has one of its own\. Leave it out"):
        ablate(config, seeds=(0,), train=pytest.fail, **MEANS)


def test_models_without_a_seed_in_common_are_not_compared():
    models = [{"model_type": name, "mean": mean, "n": 2, "interval": None} for name, mean in (("a", 0.9), ("b", 0.8))]
    said = _comparison_verdict(models, [])
    assert "no seed in common with b" in said and "larger than chance" not in said
    third = [*models, {"model_type": "c", "mean": 0.5, "n": 2, "interval": None}]
    said = _comparison_verdict(third, [{"a": "a", "b": "c", "significant": True}])
    assert "no seed in common with b" in said and "Its lead over the others is larger than chance" in said
