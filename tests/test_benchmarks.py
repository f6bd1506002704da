"""Promises about the benchmarks: each runs on small data and writes its record; the README repeats the records."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_tables_of_the_readme_say_what_the_records_say():
    run("readme_tables.py", "--check")


def test_time_to_f1_records_each_run_once(tiny_npz, tmp_path):
    output = tmp_path / "time_to_f1.json"
    flags = ("--data", tiny_npz, "--models", "lightning_cnn", "--minutes", 0.03, "--image-size", 16)
    flags += ("--batch-size", 32, "--work-dir", tmp_path, "--output", output, "--tune-decision")
    run("time_to_f1.py", *flags, "--seeds", 0)
    second = run("time_to_f1.py", *flags, "--seeds", 0, 1)
    assert "done before" in second
    runs = json.loads(output.read_text())
    assert [r["seed"] for r in runs] == [0, 1]
    assert runs[0]["split"] != runs[1]["split"]
    assert all(r["seconds"] > r["train_seconds"] > 1 for r in runs)
    assert all(r["decision"]["seconds"] > r["seconds"] for r in runs)
    assert "| lightning_cnn | 0.03 | 16 | 2 |" in run("time_to_f1.py", "--tables", output)


def test_training_throughput_compares_with_a_loop_that_learns_the_same(tiny_npz, tmp_path):
    output = tmp_path / "throughput.json"
    run(
        "training_throughput.py", "--data", tiny_npz, "--models", "lightning_cnn", "--image-size", 16,
        "--epochs", 1, "--repeats", 1, "--output", output,
    )  # fmt: skip
    (model,) = json.loads(output.read_text())["models"]
    assert model["speed_over_bare_loop"]["turns"] == 1
    assert 0.05 < model["speed_over_bare_loop"]["median"] < 20


@pytest.mark.parametrize("script", ["against_recipe.py", "against_ultralytics.py"])
def test_the_alternatives_run_on_the_same_maps(script, tiny_npz, tmp_path):
    output = tmp_path / "record.json"
    more = ("--models", "lightning_cnn", "--workers", 0) if script == "against_recipe.py" else ()
    run(
        script, "--data", tiny_npz, "--epochs", 1, "--repeats", 1, "--batch-size", 32, "--image-size", 32, *more,
        "--output", output,
    )  # fmt: skip
    record = json.loads(output.read_text())
    runs = record["runs"] if "runs" in record else record["models"][0]["runs"]
    assert len(runs) == 2
    for turns in runs.values():
        (turn,) = turns
        ((seconds, score),) = turn["curve"]  # one epoch, one validation
        assert 0 < seconds <= turn["seconds"] + 0.01
        assert 0 <= score <= 1


def test_scale_measures_each_size_in_its_own_process(tmp_path):
    run("scale.py", "--maps", 450, 900, "--output", tmp_path / "scale.json", "--picture", tmp_path / "scale.png")
    small, large = json.loads((tmp_path / "scale.json").read_text())["sizes"]
    assert (small["maps"], large["maps"]) == (450, 900)
    assert small["peak_memory_gb"] > 0.1
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_tracking_cost_compares_tracked_with_untracked_and_times_the_storage(tiny_npz, tmp_path):
    output = tmp_path / "cost.json"
    flags = ("--data", tiny_npz, "--trials", 2, "--epochs", 1, "--image-size", 16, "--repeats", 1, "--output", output)
    run("tracking_cost.py", *flags)
    record = json.loads(output.read_text())
    assert record["wall_tracked_over_untracked"]["turns"] == 1
    (turn,) = record["turns"]["untracked"]
    assert 0 < turn["storage_seconds"] < turn["search_seconds"] < turn["wall_seconds"]


def test_wafer_pretraining_compares_both_starts_on_the_same_few_maps(tiny_npz, tmp_path):
    from wafer_pretraining import pretrain

    pretrain("lightning_cnn", folder=tmp_path, maps=1152, maps_per_epoch=1152, image_size=16, say=lambda text: None)
    output = tmp_path / "record.json"
    run(
        "wafer_pretraining.py", "--data", tiny_npz, "--seeds", 0, 1, "--per-class", 5, "--validation-per-class", 2,
        "--epochs", 1, "--image-size", 16, "--pretrained-dir", tmp_path, "--output", output,
    )  # fmt: skip
    record = json.loads(output.read_text())
    scratch, tuned = record["runs"][:2]
    assert scratch["maps"] == tuned["maps"] and scratch["maps"]["train"] <= 45
    assert scratch["weights"].startswith("random") and tuned["weights"].startswith("generated")
    (header,) = record["weights"].values()
    assert header["maps_seen"] == "1152"
    (outcome,) = record["outcome"]
    low, high = outcome["interval"]
    assert low <= outcome["difference"] <= high
    second = record["runs"][2:]
    differences = [tuned["macro_f1"] - scratch["macro_f1"], second[1]["macro_f1"] - second[0]["macro_f1"]]
    assert outcome["difference"] == pytest.approx(sum(differences) / 2, abs=1e-4)


def test_pruning_scores_what_was_found_on_the_test_lots_and_a_second_call_adds_to_the_record(tiny_npz, tmp_path):
    output = tmp_path / "pruning.json"
    flags = ("--data", tiny_npz, "--per-class", 5, "--validation-per-class", 2, "--trials", 2, "--epochs", 2)
    flags = (*flags, "--model", "lightning_cnn", "--image-size", 16, "--output", output)
    run("pruning.py", *flags, "--seeds", 0)
    first = json.loads(output.read_text())
    run("pruning.py", *flags, "--seeds", 0, 1)
    both = json.loads(output.read_text())
    assert both["runs"][:2] == first["runs"] and len(both["runs"]) == 4
    assert all(0 < r["test_macro_f1"] <= 1 and r["epochs"] + 2 * r["failed"] <= 4 for r in both["runs"])
    found = both["against_none"]["halving"]
    assert found["seeds"] == [0, 1] and found["times_faster"]["turns"] == 2
    none, halving = ([r["test_macro_f1"] for r in both["runs"] if r["pruner"] == name] for name in ("none", "halving"))
    mean = sum(b - a for a, b in zip(none, halving, strict=True)) / 2
    assert found["test_macro_f1"]["mean"] == pytest.approx(mean, abs=1e-4)
