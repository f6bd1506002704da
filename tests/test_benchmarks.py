"""Promises about the benchmarks: each runs on small data and writes its record; pages, records and code agree."""

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from conftest import tiny_settings
from made_up_predictions import assert_is_a_picture

from integrated_pipeline import FINE_TUNING_SHARE, MODEL_REGISTRY
from waferlab.models.classifier import WaferClassifier

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import keep_experiment  # noqa: E402
import label_audit  # noqa: E402
import measure  # noqa: E402
import processors  # noqa: E402
import provenance  # noqa: E402
import readme_tables  # noqa: E402
import speed_of_light  # noqa: E402
import time_to_f1  # noqa: E402

RECORDS = sorted((ROOT / "benchmarks/results").glob("*.json"))
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def run(script, *arguments, root=ROOT, status=0):
    how = warm.run if root == ROOT else subprocess.run  # another folder has code of its own
    done = how([sys.executable, root / "benchmarks" / script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout


# ---------------------------------------------------------------------------------- pages, records and code agree


def test_the_tables_of_the_readme_say_what_the_records_say():
    run("readme_tables.py", "--check")


@pytest.mark.long
def test_a_page_cannot_show_figures_of_other_code_without_saying_so(tmp_path):
    for file in (*ROOT.glob("*.py"), ROOT / "README.md"):
        shutil.copy(file, tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/results.md", tmp_path / "docs")
    shutil.copytree(ROOT / "docs/guide", tmp_path / "docs/guide")
    for room in ("benchmarks", "waferlab"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (tmp_path / "benchmarks/results").glob("*.json"):
        file.write_text(json.dumps(as_if_measured_today(json.loads(file.read_text()))))
    pages = [tmp_path / name for name in ("docs/results.md", "benchmarks/README.md")]
    run("readme_tables.py", root=tmp_path)
    assert not any("Older code" in page.read_text() for page in pages)
    images = tmp_path / "waferlab/data/images.py"
    images.write_text(images.read_text().replace("def encode(", "def encode(  # a comment changes nothing\n"))
    run("readme_tables.py", "--check", root=tmp_path)
    images.write_text(images.read_text().replace("\nDIE_NOISE = 0.01", "\nDIE_NOISE = 0.02"))  # a constant of `augment`
    run("readme_tables.py", "--check", root=tmp_path, status=1)
    run("readme_tables.py", root=tmp_path)
    assert all(
        "**Older code:** since then `augment` changed; to be measured anew" in page.read_text() for page in pages
    )
    run("readme_tables.py", "--check", root=tmp_path)


def as_if_measured_today(record):
    """A record, or several, of today's code as far as it measures definitions that there still are."""
    if isinstance(record, list):
        return [as_if_measured_today(one) for one in record]
    known = provenance._definitions_here()
    return record | {"code": provenance.digests(name for name in record["code"] if name in known)}


SOURCE = """
SCALE = 2

def _helper(x):
    return x * SCALE

def measured(x):
    'Says what it does.'
    return _helper(x) + 1

class Model:
    rate: float = 0.1

    def fit(self, x):
        return self._own(x)

    def _own(self, x):
        return x

register_model("small", Model)
"""
NAMES = ("measured", "Model.fit", "Model.rate", "register_model('small')")


def forget():
    """What was read of another tree."""
    provenance._definitions_here.cache_clear(), provenance._digest_here.cache_clear()


@pytest.fixture
def digests_of(tmp_path, monkeypatch):
    def digests(**files):
        for old in tmp_path.glob("*.py"):
            old.unlink()
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        forget()
        return provenance.digests(NAMES)

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    yield digests
    forget()


def test_comments_docstrings_formatting_and_another_file_leave_a_digest_as_it_is(digests_of):
    before = digests_of(a=SOURCE)
    other = SOURCE.replace("Says what it does.", "Says it otherwise.").replace(
        "_helper(x) + 1", "(_helper( x )  +  1)  # one"
    )
    head, _, tail = other.partition("class Model")
    assert digests_of(a=f"import b\n{head}", b=f"class Model{tail}") == before


@pytest.mark.parametrize(
    ("old", "new", "moved"),
    [
        ("+ 1", "+ 2", "measured"),
        ("x * SCALE", "x + SCALE", "measured"),
        ("SCALE = 2", "SCALE = 3", "measured"),
        ("self._own(x)", "self._own(x) + 1", "Model.fit"),
        ("rate: float = 0.1", "rate: float = 0.2", "Model.rate"),
        ('"small", Model', '"small", Model, dropout=0.3', "register_model('small')"),
    ],
)
def test_what_a_definition_computes_moves_its_digest_and_no_other(digests_of, old, new, moved):
    before, after = digests_of(a=SOURCE), digests_of(a=SOURCE.replace(old, new))
    assert [name for name in NAMES if before[name] != after[name]] == [moved]


def test_a_definition_that_is_gone_counts_as_changed_and_cannot_be_measured(digests_of):
    digests_of(a=SOURCE)
    assert provenance.changed({"measured": "other", "gone": "any", "Model.rate": None}) == [
        "Model.rate",
        "gone",
        "measured",
    ]
    with pytest.raises(KeyError, match="gone: no such definition"):
        provenance.digests(["measured", "gone"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_benchmark_names_definitions_that_there_are(script, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # as dataclasses want it
    spec.loader.exec_module(module)
    without_record = (
        "measure",
        "provenance",
        "readme_tables",
        "search_tables",
        "fault_tables",
        "idea",
        "keep_experiment",
        "mutation",
        "champion",
    )
    assert hasattr(module, "MEASURES") or script.stem in without_record
    provenance.digests(getattr(module, "MEASURES", ()))


def test_the_experiments_are_measured_by_definitions_that_there_are():
    for names in (*provenance.EXPERIMENTS.values(), *provenance.FAMILY.values()):
        provenance.digests(names)


@pytest.mark.parametrize("file", RECORDS, ids=lambda path: path.stem)
def test_every_record_names_its_commit_and_the_code_that_it_measures(file):
    record = json.loads(file.read_text())
    for one in record if isinstance(record, list) else [record]:
        assert len(one["environment"]["commit"]) == 40 and "code" in one
        assert "training" in one or "config" in one or "weights" in one


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.name)
def test_no_record_names_a_folder_of_the_machine_that_made_it(file):
    assert not keep_experiment.FOLDERS.findall(file.read_text())


def test_the_environment_names_the_commit_and_says_where_it_is_not_known(monkeypatch, tmp_path):
    from waferlab.records import _commit_of_this_code, environment

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    _commit_of_this_code.cache_clear()
    here = environment()
    assert here["commit"] == (git.stdout.strip() if git.returncode == 0 else None)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    _commit_of_this_code.cache_clear()
    without = environment()
    _commit_of_this_code.cache_clear()
    assert (without["commit"], without["uncommitted_changes"]) == (None, None)
    assert {"processor", "cpu_cores", "torch_threads"} <= without.keys()


def test_a_record_written_by_a_benchmark_says_all_that_it_depends_on(tmp_path):
    measure.write_record(
        tmp_path / "record.json",
        {"data": "/somewhere/maps.npz"},
        measures=["encode"],
        repeats="3 seeds",
        precision=["32-true"],
    )
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["data"] == "maps.npz"
    assert record["training"] == {
        "repeats": "3 seeds", "precision": ["32-true"], "weights": "random weights", "search": "no search"
    }  # fmt: skip
    assert record["code"] == provenance.digests(["encode"])
    assert {"commit", "uncommitted_changes", "processor", "cpu_cores", "torch_threads"} <= record["environment"].keys()


def test_an_experiment_becomes_a_record_only_if_a_commit_holds_its_code(tmp_path, monkeypatch):
    summary, record = tmp_path / "summary.json", tmp_path / "record.json"
    about = {"mode": "comparison", "config": {"data": "/somewhere/maps.npz", "output_dir": "/somewhere"}}
    monkeypatch.setattr(keep_experiment, "digests", lambda names, at: {"split_by_lot": at})
    monkeypatch.setattr(sys, "argv", ["keep_experiment.py", str(summary), str(record)])
    for made in ({"commit": None, "uncommitted_changes": None}, {"commit": "c" * 40, "uncommitted_changes": True}):
        summary.write_text(json.dumps(about | {"environment": made}))
        with pytest.raises(SystemExit, match="no commit holds its code"):
            keep_experiment.main()
    summary.write_text(json.dumps(about | {"environment": {"commit": "c" * 40, "uncommitted_changes": False}}))
    keep_experiment.main()
    kept = json.loads(record.read_text())
    assert kept["code"] == {"split_by_lot": "c" * 40} and kept["config"] == {"data": "maps.npz"}


def test_a_pipeline_run_is_scored_on_odd_groups_by_its_own_checkpoints(tiny_npz, tmp_path):
    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.config import ExperimentConfig

    settings = tiny_settings(tiny_npz, tmp_path, enable_optuna=False, enable_mlflow=False, max_epochs=1)
    IntegratedMLPipeline(ExperimentConfig(**settings)).run_complete_pipeline()
    summary = json.loads((tmp_path / "results/tiny/experiment_summary.json").read_text())
    keep_experiment.score_odd_groups(summary, str(tiny_npz))
    assert 0 <= summary["models"][0]["test_macro_f1_odd_groups"] <= 1
    summary["models"][0]["test"]["macro_f1"] += 0.1  # of another run
    with pytest.raises(SystemExit, match="its checkpoint scores"):
        keep_experiment.score_odd_groups(summary, str(tiny_npz))


# ------------------------------------------------------------------------------------------------- honest tables


def test_rows_of_other_weights_seconds_or_search_are_not_ranked_against_each_other():
    record = json.loads((ROOT / "benchmarks/results/comparison_real.json").read_text())
    ranked = "\n".join(readme_tables.comparison(record))
    assert "**lightning_cnn**" in ranked and "is better" in ranked and record["verdict"] in ranked
    for change in ({"weights": "ImageNet (x)"}, {"trials": 3}):
        runs = [run | (change if run["model_type"] == "lightning_cnn" else {}) for run in record["runs"]]
        text = "\n".join(readme_tables.comparison(record | {"runs": runs}))
        assert "not ranked against each other" in text
        assert "**" not in text and "better" not in text and record["verdict"] not in text
    longer = [model | {"train_seconds": 10 * place} for place, model in enumerate(record["models"], start=1)]
    assert "differ in seconds" in "\n".join(readme_tables.comparison(record | {"models": longer}))
    by_epochs = readme_tables.comparison(record | {"models": longer, "budget": "equal epochs: at most 10"})
    assert record["verdict"] in "\n".join(by_epochs)
    assert readme_tables.not_ranked([("a", 100.0, 0), ("a", 105.0, 0)]) is None
    assert "differ in seconds" in readme_tables.not_ranked([("a", 100.0, 0), ("a", 150.0, 0)])


def test_the_models_of_a_production_run_stand_as_they_were_trained_with_what_they_started_from():
    record = json.loads((ROOT / "benchmarks/results/production.json").read_text())
    text = "\n".join(readme_tables.production(record))
    places = [text.index(f"| {model['model_type']} |") for model in record["models"]]
    assert places == sorted(places)
    assert "weights of generated wafer maps" in text and "random weights" in text
    assert "not ranked against each other: they differ in weights and seconds" in text


def test_intervals_of_the_old_method_are_not_shown_and_those_of_another_are():
    old = "95% percentile bootstrap over 48 lots, 1000 resamples"
    assert measure.score_text(0.9, [0.8, 0.95], old) == measure.score_text(0.9, [0.8, 0.95], None) == "0.900"
    assert measure.score_text(0.9, [0.8, 0.95], "95% Bayesian bootstrap over 48 lots") == "0.900 [0.800, 0.950]"
    assert "older method" in readme_tables.brackets([old])
    assert readme_tables.brackets(["95% of a kind"]) == "In brackets: 95% of a kind."
    mixed = readme_tables.brackets([old, "95% of a kind"])
    assert mixed.startswith("In brackets: 95% of a kind. Other rows stand without") and "older method" in mixed


def test_the_machine_is_named_as_the_record_has_it():
    made = {"commit": "c" * 40, "uncommitted_changes": True, "processor": "P", "cpu_cores": 4, "torch_threads": 1}
    training = {"repeats": "3 seeds", "precision": [], "weights": "random weights", "search": "no search"}
    assert readme_tables.made_by(made, training, {}) == (
        "*Measured with uncommitted changes at `ccccccc`, P, 4 cores, 1 thread, precision not recorded, 3 seeds, from "
        "random weights, no search.*"
    )


def test_the_score_of_odd_groups_is_that_of_the_maps_whose_group_in_the_file_is_odd(tmp_path):
    labels = np.arange(9).repeat(4)
    groups = np.tile([2, 5, 8, 7], 9)
    answers = np.where(groups % 2 == 1, labels, (labels + 1) % 9)  # right on odd groups only
    np.savez(tmp_path / "maps.npz", group=groups)
    pipeline = SimpleNamespace(config=SimpleNamespace(data=str(tmp_path / "maps.npz")), maps=range(36))
    test = np.arange(36)[::-1]
    predicted = SimpleNamespace(labels=labels[test], predicted=answers[test])
    assert measure.odd_groups_macro_f1(pipeline, predicted, test) == 1.0
    predicted.predicted = labels[test][::-1]
    assert measure.odd_groups_macro_f1(pipeline, predicted, test) < 0.2
    np.savez(tmp_path / "maps.npz", labels=labels)
    assert measure.odd_groups_macro_f1(pipeline, predicted, test) is None


def test_time_to_f1_measures_anew_what_older_code_measured(tmp_path, monkeypatch):
    output = tmp_path / "runs.json"
    key = {"model_type": "lightning_cnn", "minutes": 2.0, "seed": 0, "image_size": 40, "batch_size": 32}
    today = provenance.digests(["encode"])
    output.write_text(json.dumps([key | {"code": today}, key | {"seed": 1, "code": {"encode": "older"}}]))
    measured = []

    def in_own_process(arguments, model_type, minutes, seed):
        measured.append(seed)
        return {"seconds": 1.0, "test_macro_f1": 0.5, "code": today}

    monkeypatch.setattr(time_to_f1, "in_own_process", in_own_process)
    monkeypatch.setattr(time_to_f1, "table_of_runs", lambda runs: [])
    monkeypatch.setattr(time_to_f1, "table_of_levels", lambda runs: [])
    flags = ["--models", "lightning_cnn", "--minutes", "2", "--seeds", "0", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["time_to_f1.py", *flags])
    time_to_f1.main()
    assert measured == [1]
    assert [(run["seed"], run["code"]) for run in json.loads(output.read_text())] == [(0, today), (1, today)]


# ------------------------------------------------------------------------------------------------ each one runs


@pytest.mark.long
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
    assert all(0 <= r["test_macro_f1_odd_groups"] <= 1 and "encode" in r["code"] for r in runs)
    assert all(r["seconds"] > r["train_seconds"] > 0 for r in runs)
    assert all(r["decision"]["seconds"] > r["seconds"] for r in runs)
    assert "| lightning_cnn | 0.03 | 16 | 32 | 2 |" in run("time_to_f1.py", "--tables", output)


def test_training_throughput_compares_with_a_loop_that_learns_the_same(tiny_npz, tmp_path):
    output = tmp_path / "throughput.json"
    run(
        "training_throughput.py", "--data", tiny_npz, "--models", "lightning_cnn", "--image-size", 16,
        "--epochs", 1, "--repeats", 1, "--output", output,
    )  # fmt: skip
    (model,) = json.loads(output.read_text())["models"]
    assert model["speed_over_bare_loop"]["turns"] == 1
    assert model["speed_over_bare_loop"]["median"] > 0


@pytest.mark.long
@pytest.mark.parametrize("script", ["against_recipe.py", "against_ultralytics.py"])
def test_the_alternatives_run_on_the_same_maps(script, tiny_npz, tmp_path):
    output = tmp_path / "record.json"
    more = ("--models", "lightning_cnn", "--workers", 0) if script == "against_recipe.py" else ()
    run(
        script, "--data", tiny_npz, "--epochs", 1, "--repeats", 1, "--batch-size", 24, "--image-size", 32, *more,
        "--output", output,
    )  # fmt: skip
    record = json.loads(output.read_text())
    assert record["training"]["precision"] == ["32-true"] and record["training"]["repeats"] == "1 turn, not warmed up"
    (model,) = record["models"]
    assert len(model["runs"]) == 3
    others = [model[name] for name in model["runs"] if name != "ours"]
    assert [other["reads"] for other in others] == ["PNG files", "memory"]
    assert {other["channels"] for other in others} == {1 if script == "against_recipe.py" else 3}
    for turns in model["runs"].values():
        (turn,) = turns
        ((seconds, score),) = turn["curve"]  # one epoch, one validation
        assert 0 < seconds <= turn["seconds"] + 0.01
        assert 0 <= score <= 1


@pytest.mark.long
def test_scale_measures_each_size_in_its_own_process(tmp_path):
    run("scale.py", "--maps", 450, 900, "--output", tmp_path / "scale.json", "--picture", tmp_path / "scale.png")
    small, large = json.loads((tmp_path / "scale.json").read_text())["sizes"]
    assert (small["maps"], large["maps"]) == (450, 900)
    assert small["peak_memory_gb"] > 0.1
    assert (tmp_path / "scale.png").stat().st_size > 10_000


@pytest.mark.long
def test_tracking_cost_compares_tracked_with_untracked_and_times_the_storage(tiny_npz, tmp_path):
    output = tmp_path / "cost.json"
    flags = ("--data", tiny_npz, "--trials", 2, "--epochs", 1, "--image-size", 16, "--repeats", 1, "--output", output)
    run("tracking_cost.py", *flags)
    record = json.loads(output.read_text())
    assert record["wall_tracked_over_untracked"]["turns"] == 1
    (turn,) = record["turns"]["untracked"]
    assert 0 < turn["storage_seconds"] < turn["search_seconds"] < turn["wall_seconds"]


def test_serving_is_timed_and_fuzzed(tmp_path):
    from deployment.made_up_model import write_model

    model, output = write_model(tmp_path / "model.onnx"), tmp_path / "serving.json"
    flags = ("--requests", 2, "--clients", 1, 2, "--repeats", 1, "--alone")
    run("serving.py", "--model", model, *flags, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert {(row["maps"], row["clients"]) for row in rows} == {(1, 1), (1, 2), (25, 1), (25, 2)}
    assert len({row["server"] for row in rows}) == 2 and all(0 < row["p50_ms"] <= row["p99_ms"] for row in rows)
    run("serving.py", "--model", model, "--fuzz", 40, "--output", output)
    record = json.loads(output.read_text())
    assert record["answered_after_each"] == sum(record["statuses"].values()) == 40
    assert {*record["statuses"]} <= {"200", "400", "413", "415", "422"} and len(record["memory_mib"]) == 11


@pytest.mark.long
def test_transfer_goes_on_where_it_was_interrupted(tiny_npz, tmp_path):
    output = tmp_path / "transfer.json"
    flags = ("--data", tiny_npz, "--models", "lightning_cnn", "--starts", "random", "--per-class", 5, "--seconds", 1)
    flags += ("--image-size", 16, "--output", output)
    run("transfer.py", *flags, "--seeds", 0)
    (first,) = json.loads(output.read_text())["runs"]
    run("transfer.py", *flags, "--seeds", 0, 1)
    record = json.loads(output.read_text())
    assert record["runs"][0] == first and [r["seed"] for r in record["runs"]] == [0, 1]
    assert record["environment"]["torch_threads"] == 1 and record["training"]["precision"] == ["32-true"]
    assert all(r["train_seconds"] > 0 and r["budget"] == "1 seconds" for r in record["runs"])
    (row,) = record["outcome"]
    assert row["scores"]["random"]["seeds"] == 2 and row["against_random"] == {}


def test_transfer_refuses_what_it_would_otherwise_leave_out(monkeypatch, capsys):
    import transfer

    told = {
        "--per-class few": "neither a number of maps nor 'all'",
        "--epochs 1 --rates imagnet=0.1": "wanted a start (random, imagenet, generated, both)",
        "--epochs 1 2": "one number, or one for each of --per-class",
        "": "say how long each training is",
    }
    for wrong, why in told.items():
        monkeypatch.setattr(sys, "argv", ["transfer.py", "--data", "maps.npz", *wrong.split()])
        with pytest.raises(SystemExit) as ended:
            transfer.main()
        assert ended.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.long
def test_transfer_has_all_starts_on_the_same_maps_for_the_same_draws(tiny_npz, tmp_path, monkeypatch):
    import transfer
    from safetensors.torch import load_file

    from waferlab.models.efficientnet_lite import read_published
    from waferlab.models.starting_weights import sum_first_layer
    from waferlab.training import pretraining

    monkeypatch.setattr(pretraining, "pretrain", partial(pretraining.pretrain, maps_per_epoch=1152))
    monkeypatch.setattr(pretraining, "HELD_OUT_PER_CLASS", 4)
    arguments = SimpleNamespace(
        data=str(tiny_npz), pretrained_dir=tmp_path, rates=["random=0.002"], batch_size=16, image_size=16,
        precision="32-true", pretraining_maps=1, score="test",
    )  # fmt: skip
    case = {"model_type": "efficientnet_lite0", "budget": "1 epochs", "seed": 0}
    for start in transfer.MADE:
        assert transfer.pretrain_for(arguments, "efficientnet_lite0", start)["maps_seen"] == "1152"
    runs = {start: transfer.train(arguments, per_class="5", start=start, **case) for start in transfer.STARTS}
    kinds = {start: one["weights"].partition(" (")[0] for start, one in runs.items()}
    made = "generated wafer maps"
    assert kinds == {"random": "random", "imagenet": "ImageNet", "generated": made, "both": made}
    weights, _ = read_published()
    away = []  # from ImageNet's first layer
    for folder in (tmp_path / "from_imagenet", tmp_path):
        (file,) = folder.glob("*.safetensors")
        first = load_file(file)["features.0.1.weight"]
        away.append(float((first - sum_first_layer(weights["features.0.1.weight"])).abs().mean()))
    assert away[0] < away[1] / 3
    assert runs["both"]["pretraining"]["maps_seen"] == "1152" and runs["imagenet"]["pretraining"] is None
    usual = MODEL_REGISTRY["efficientnet_lite0"].defaults["learning_rate"]
    tuned = usual * FINE_TUNING_SHARE
    assert {start: one["learning_rate"] for start, one in runs.items()} == {
        "random": 0.002, "imagenet": usual, "generated": pytest.approx(tuned), "both": pytest.approx(tuned),
    }  # fmt: skip
    (maps,) = {json.dumps(one["maps"]) for one in runs.values()}
    maps = json.loads(maps)
    assert maps["drawn"] == 45 and maps["validation"] > 45 and maps["train"] > 200
    (draws,) = {one["draws"] for one in runs.values()}
    assert maps["validation"] <= draws <= 90  # each of the 45 twice
    whole = transfer.train(arguments, per_class="all", start="random", **case)
    assert whole["maps"]["drawn"] == whole["maps"]["train"] == maps["train"]


def test_fewer_training_maps_of_a_seed_are_some_of_the_more(tiny_maps):
    from waferlab.data.splitting import split_by_lot

    pipeline = SimpleNamespace(maps=tiny_maps, split=split_by_lot(tiny_maps))
    few, more, every = (measure.few_maps(pipeline, n, None, seed=3) for n in (2, 5, None))
    assert set(few.train) < set(more.train) < set(every.train) == set(pipeline.split.train)
    assert len(few.train) == 18 and set(few.validation) == set(pipeline.split.validation)
    assert set(measure.few_maps(pipeline, 2, None, seed=4).train) != set(few.train)


def test_the_table_of_transfer_says_how_much_each_start_differs_from_random_weights():
    import transfer

    def one(start, seed, score, per_class="20"):
        maps = {"train": 700, "test": 150}
        cost = {"maps_seen": "1152", "seconds": "9.4"} if start == "generated" else None
        return {
            "model_type": "net", "per_class": per_class, "budget": "60 seconds", "seed": seed, "start": start,
            "macro_f1": score, "maps": maps, "pretraining": cost,
        }  # fmt: skip

    runs = [one("random", seed, 0.5 + 0.01 * seed) for seed in range(3)]
    runs += [one("imagenet", seed, 0.6 + 0.011 * seed) for seed in range(3)]
    runs += [one("generated", 0, 0.7), one("random", 0, 0.8, "all")]
    few, every = rows = transfer.outcome(runs)
    assert few["against_random"]["imagenet"]["difference"] == pytest.approx(0.101)
    low, high = few["against_random"]["imagenet"]["interval"]
    assert 0.09 < low < 0.101 < high < 0.11
    assert few["against_random"]["generated"]["interval"] is None  # of one seed
    assert (every["per_class"], every["against_random"]) == ("all", {})
    text = "\n".join(readme_tables.transfer({"outcome": rows, "runs": runs}))
    assert "| net | 20 | 60 seconds | 1 to 3 | 0.510 ± 0.010 | 0.611 ± 0.011; +0.101 [+0.09" in text
    assert "| 0.700 | - |" in text and "generated maps: 1,152 generated maps in 9 s" in text


@pytest.mark.long
def test_pruning_scores_what_was_found_on_the_test_lots_and_a_second_call_adds_to_the_record(tiny_npz, tmp_path):
    output = tmp_path / "pruning.json"
    flags = ("--data", tiny_npz, "--per-class", 5, "--validation-per-class", 2, "--trials", 2, "--epochs", 2)
    flags = (*flags, "--model", "lightning_cnn", "--image-size", 16, "--output", output)
    run("pruning.py", *flags, "--seeds", 0)
    first = json.loads(output.read_text())
    run("pruning.py", *flags, "--seeds", 0, 1)
    both = json.loads(output.read_text())
    assert both["runs"][:2] == first["runs"] and len(both["runs"]) == 4
    assert all(0 <= r["test_macro_f1_odd_groups"] <= 1 for r in both["runs"])
    assert both["training"]["search"] == "searches of 2 trials"
    assert all(0 < r["test_macro_f1"] <= 1 and r["epochs"] + 2 * r["failed"] <= 4 for r in both["runs"])
    found = both["against_none"]["auto"]
    assert found["seeds"] == [0, 1] and found["times_faster"]["turns"] == 2
    none, halving = ([r["test_macro_f1"] for r in both["runs"] if r["pruner"] == name] for name in ("none", "auto"))
    mean = sum(b - a for a, b in zip(none, halving, strict=True)) / 2
    assert found["test_macro_f1"]["mean"] == pytest.approx(mean, abs=1e-4)


def test_set_coverage_counts_simulated_lots_and_the_lots_that_a_model_was_not_trained_on(tmp_path):
    import set_coverage

    exact = set_coverage.true_coverage(0.5 / (1 - set_coverage.MARGIN))  # a right answer: log odds above 0
    assert exact == pytest.approx(0.97725, abs=1e-4)  # two standard deviations of them
    run("set_coverage.py", "--repeats", 40, "--lots", 8, 30, "--output", tmp_path / "sets.json")
    record = json.loads((tmp_path / "sets.json").read_text())
    few, many = record["simulated"]
    assert (few["promised"], many["promised"]) == (False, True)
    assert many["by_lot"]["coverage"] > max(0.9 - 3 * many["by_lot"]["standard_error"], many["pooled"]["coverage"])

    rng = np.random.default_rng(0)
    labels, groups = np.tile([0, 1], 800), np.repeat(np.arange(80), 20)
    right = rng.uniform(0.2, 1, 1600)
    said = np.where(np.eye(2)[labels] > 0, right[:, None], 1 - right[:, None])
    parts = {
        part: set_coverage.Predictions(said[some], labels[some], groups[some], ("a", "b"))
        for part, some in (("validation", groups < 40), ("test", groups >= 40))
    }
    for row in set_coverage.divided_again(parts, divisions=20, seed=0).values():
        assert row["lots"] == 80 and row["fits"] == 20
        assert row["interval"][0] < row["coverage"] < row["interval"][1] and abs(row["coverage"] - 0.91) < 0.03


def test_label_audit_answers_each_map_once_goes_on_after_an_interruption_and_draws_the_likeliest(
    tiny_npz, tmp_path, monkeypatch
):
    output, picture, folder = tmp_path / "audit.json", tmp_path / "audit.png", tmp_path / "folds"
    flags = ["--data", tiny_npz, "--folds", 2, "--epochs", 1, "--image-size", 16, "--most", 5, "--folder", folder]
    flags = ["label_audit.py", *map(str, flags), "--picture", str(picture), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", flags)
    label_audit.main()
    first = json.loads(output.read_text())
    assert sum(fold["maps"] for fold in first["folds"]) == first["audit"]["n_samples"] == 360
    assert len(first["suspects"]) == min(5, first["probably_wrong"]) and first["probably_wrong"] > 0
    assert all(one["given"] != one["called"] for one in first["suspects"])
    assert_is_a_picture(picture)
    shutil.rmtree(folder / "checkpoints")
    (folder / "answers_1.npz").unlink()  # interrupted in the second fold
    label_audit.main()
    again = json.loads(output.read_text())
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["fold_1"]
    assert again["folds"][0] == first["folds"][0] and again["audit"]["n_samples"] == 360
    assert "| Loc | 40 |" in "\n".join(label_audit.table_of_audit(again))


def test_what_the_audit_cannot_do_is_a_sentence_before_any_training(tiny_npz, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "folds"
    flags = ["label_audit.py", "--data", str(tiny_npz), "--folds", "1", "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit, match="2"):
        label_audit.main()
    assert "Choose two folds or more" in capsys.readouterr().err and not folder.exists()


def test_the_work_of_a_step_is_counted_by_groups_and_with_or_without_the_borders():
    class OneLayer(WaferClassifier):
        def __init__(self, groups):
            super().__init__()
            layer = torch.nn.Conv2d(4, 4, 3, padding=1, groups=groups)
            self.network = torch.nn.Sequential(
                torch.nn.Conv2d(1, 4, 1),
                layer,
                torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(),
                torch.nn.Linear(4, 9),
            )

    counts = {g: speed_of_light.flop_a_map(OneLayer(g), batch_size=3, pixels=2) for g in (1, 4)}
    others = 2 * (2 * 4 * 4) + 3 * (2 * 4 * 9)  # the first layer has no gradient of the image
    for groups, found in counts.items():
        products = 4 * 4 // groups * 4
        assert found["counted"] == 3 * 2 * products * 9 + others
        assert found["without_borders"] == 3 * 2 * products * 4 + others  # at two by two, four of nine
    assert counts[1]["by_torch"] == counts[1]["counted"] and counts[4]["by_torch"] > counts[4]["counted"]


def test_speed_of_light_sets_steps_against_matrix_products_and_names_the_dearest_operators(tmp_path, monkeypatch):
    output = tmp_path / "speed.json"
    monkeypatch.setattr(speed_of_light, "SIDE", 64)
    monkeypatch.setattr(speed_of_light, "SECONDS", 0.01)
    flags = ["--models", "lightning_cnn", "--image-size", "16", "--batch-size", "2", "4", "--turns", "2", "--profile"]
    monkeypatch.setattr(sys, "argv", ["speed_of_light.py", *flags, "--output", str(output)])
    threads = torch.get_num_threads()
    speed_of_light.main()
    assert torch.get_num_threads() == threads
    record = json.loads(output.read_text())
    assert {(row["batch_size"], row["threads"]) for row in record["rows"]} >= {(2, 1), (4, 1)}
    for row in record["rows"]:
        share = row["mflop_a_map"]["counted"] * row["maps_per_second"][0] / row["peak_gflops"][0] / 1000
        assert row["share_counted"]["low"] - 0.002 <= share <= row["share_counted"]["high"] + 0.002  # rounded
        assert row["mflop_a_map"]["without_borders"] < row["mflop_a_map"]["counted"]
    (dearest,) = record["operators"].values()
    shares = [one["share"] for one in dearest]
    assert len(dearest) == 10 and shares == sorted(shares, reverse=True) and sum(shares) <= 1
    assert any("conv" in one["operator"] for one in dearest)
    page = "\n".join(speed_of_light.table_of_shares(record))
    assert "| lightning_cnn | 2 | 1 | 32-true |" in page and "convolution_backward" in page


def test_ways_are_held_against_the_first_and_the_same_bits_are_called_so():
    first = np.eye(9)[[0, 1, 2, 3]]
    other = first.copy()
    other[0] = np.eye(9)[5] * 0.75 + 0.25 / 9
    rows = processors.compare("a", {"as it is": (0.5, first), "again": (0.5, first), "one thread": (0.25, other)})
    assert [row["same_answer"] for row in rows] == [1, 1, 0.75]
    assert [row["largest_difference"] for row in rows] == pytest.approx([0, 0, 1 - 0.25 / 9])
    _, _, *cells = processors.table_of_processors({"rows": rows})
    assert ["bit for bit" in cell for cell in cells] == [True, True, False]
