"""Promises about the search: pruned, resumable, shared, never worse than its best trial."""

import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from conftest import tiny_settings

from integrated_pipeline import MODEL_REGISTRY, IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.errors import ConfigError, DamagedFileError, SearchFailedError
from waferlab.search.study import proposed_by, run_again
from waferlab.search.trials import study_seconds, suggest_parameters, trial_line

ROOT = Path(__file__).resolve().parents[2]


settings = partial(tiny_settings, enable_mlflow=False)


def pipeline(tiny_npz, tmp_path, **more):
    made = IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, **more)))
    made.config.results_dir.mkdir(parents=True, exist_ok=True)
    return made


def test_the_summary_tells_every_trial_and_the_weights_are_the_better_ones(tiny_npz, tmp_path):
    summary = pipeline(tiny_npz, tmp_path).run_complete_pipeline()
    (model,) = summary["models"]
    trials = model["search"]["trials"]
    assert [t["number"] for t in trials] == [0, 1, 2]
    assert trials[0]["parameters"]["learning_rate"] == MODEL_REGISTRY["lightning_cnn"].defaults["learning_rate"]
    complete = [t for t in trials if t["state"] == "complete"]
    assert model["search"]["best"]["macro_f1"] == max(t["values"][0] for t in complete)
    better = max(model["search"]["best"]["macro_f1"], *model["history"]["val_macro_f1"])
    assert model["validation"]["macro_f1"] == pytest.approx(better, abs=1e-6)


@pytest.mark.parametrize("resume", [False, True])
def test_a_record_describes_the_weights_that_stay(resume, tiny_npz, tmp_path, monkeypatch):
    """The defaults are trained for one epoch and lose to the trial that had four: its record takes their place."""

    def suggest(trial, model_type, **_):
        return {
            "learning_rate": trial.suggest_float("learning_rate", 3e-3, 6e-3),
            "base_channels": trial.suggest_categorical("base_channels", (16, 32)),
            "batch_size": trial.suggest_categorical("batch_size", (16,)),
        }

    defaults = {"learning_rate": 4e-3, "base_channels": 16, "batch_size": 8}
    monkeypatch.setattr("integrated_pipeline.suggest_parameters", suggest)
    monkeypatch.setattr(IntegratedMLPipeline, "_worth_training", lambda *_: defaults)
    more = {"max_epochs": 1, "search_epochs": 4, "num_optuna_trials": 2}
    (model,) = pipeline(tiny_npz, tmp_path, **more).run_complete_pipeline()["models"]
    if resume:
        (model,) = pipeline(tiny_npz, tmp_path, **more, resume=True).run_complete_pipeline()["models"]
    best = model["search"]["best"]
    assert model["weights_from"] == f"trial {best['number']}"
    weights = torch.load(tmp_path / "checkpoints/tiny/lightning_cnn" / model["checkpoint"], weights_only=True)
    said = {name: model["parameters"][name] for name in ("learning_rate", "base_channels")}
    assert said == {name: weights["hyper_parameters"][name] for name in said}
    assert said["base_channels"] == weights["state_dict"]["network.0.weight"].shape[0]
    assert model["parameters"]["batch_size"] == 16 and model["epochs"] == 4
    assert model["n_parameters"] == sum(
        v.numel()
        for n, v in weights["state_dict"].items()
        if n.startswith("network") and "running" not in n and "num_batches" not in n
    )
    assert max(model["history"]["val_macro_f1"]) == best["macro_f1"]
    assert model["validation"]["macro_f1"] == pytest.approx(best["macro_f1"], abs=1e-6)
    assert model["final_training"]["parameters"]["batch_size"] == 8 and model["final_training"]["epochs"] == 1
    spent = model["search"]["seconds"] + model["final_training"]["train_seconds"]
    assert model["total_seconds"] == pytest.approx(spent)


@pytest.mark.parametrize(("lead", "trained"), [(0.004, "defaults"), (0.02, "best")])
def test_the_final_training_keeps_the_defaults_unless_they_are_clearly_beaten(
    lead, trained, tiny_npz, tmp_path, monkeypatch
):
    def objective(self, trial, model_type):
        trial.set_user_attr("macro_f1", 0.5 + lead * (trial.number == 1))
        suggest_parameters(trial, model_type, batch_size=16)
        return 0.5 + lead * (trial.number == 1)

    monkeypatch.setattr(IntegratedMLPipeline, "optuna_objective", objective)
    asked = []
    monkeypatch.setattr(
        IntegratedMLPipeline,
        "train_final_model",
        lambda self, name, parameters, **_: (
            asked.append(parameters) or {"history": {"val_macro_f1": [0.4]}, "train_seconds": 1.0}
        ),
    )
    one = pipeline(tiny_npz, tmp_path)
    found = one.search("lightning_cnn")
    one.train_with_the_best("lightning_cnn", found)
    assert found["best"]["number"] == 1
    assert asked == [found["trials"][{"defaults": 0, "best": 1}[trained]]["parameters"]]


def test_only_weights_that_can_still_win_are_kept(tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, num_optuna_trials=4)
    found = made.search("lightning_cnn")
    kept = [file.name for file in (made.config.checkpoints_dir / "lightning_cnn/trials").iterdir()]
    assert kept == [f"{found['best']['number']}.ckpt"]


class AlwaysPrune(optuna.pruners.BasePruner):
    """Stops each trial but the first at its first report."""

    def prune(self, study, trial):
        return trial.number > 0


def test_pruned_trials_stop_early_and_are_recorded_as_pruned(tiny_npz, tmp_path, monkeypatch):
    made = pipeline(tiny_npz, tmp_path)
    monkeypatch.setattr(made, "_pruner", AlwaysPrune)
    found = made.search("lightning_cnn")
    assert [t["state"] for t in found["trials"]] == ["complete", "pruned", "pruned"]
    assert [t["epochs"] for t in found["trials"]] == [2, 1, 1]
    assert found["best"]["number"] == 0


def test_a_trial_without_memory_or_with_nan_fails_with_its_reason_and_the_study_goes_on(
    tiny_npz, tmp_path, monkeypatch
):
    made, calls = pipeline(tiny_npz, tmp_path), []
    build = made.create_model

    def broken(model_type, params=None, **more):
        if params is None:  # asked how a training without a search would start
            return build(model_type)
        calls.append(params)
        if len(calls) == 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory")
        model = build(model_type, params, **more)
        if len(calls) == 2:
            model.loss = NanLoss()
        return model

    monkeypatch.setattr(made, "create_model", broken)
    found = made.search("lightning_cnn")
    assert [t["state"] for t in found["trials"]] == ["fail", "fail", "complete"]
    assert "memory" in found["trials"][0]["reason"]
    assert "training loss is nan" in found["trials"][1]["reason"]


class NanLoss(torch.nn.Module):
    weight = None

    def forward(self, logits, labels):
        return (logits * float("nan")).mean()


def test_a_search_without_one_finished_trial_says_why(tiny_npz, tmp_path, monkeypatch):
    made = pipeline(tiny_npz, tmp_path)
    build = made.create_model

    def no_memory(model_type, params=None, **more):
        if params is None:  # asked how a training without a search would start
            return build(model_type)
        raise MemoryError("not enough memory")

    monkeypatch.setattr(made, "create_model", no_memory)
    with pytest.raises(SearchFailedError, match=r"none of 3 trials.*not enough memory"):
        made.search("lightning_cnn")


def test_two_objectives_give_a_pareto_front_and_no_pruning(tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, objectives=("macro_f1", "parameters"), num_optuna_trials=4)
    found = made.search("lightning_cnn")
    assert found["pruner"] is None
    assert all(t["state"] == "complete" for t in found["trials"])
    front = [tuple(t["values"]) for t in found["pareto_front"]]
    everything = [tuple(t["values"]) for t in found["trials"]]
    for f1, size in front:
        assert not any(a >= f1 and b <= size and (a, b) != (f1, size) for a, b in everything)


CHILD = """
import json, sys
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
pipeline = IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1])))
pipeline.config.results_dir.mkdir(parents=True, exist_ok=True)
pipeline.search("lightning_cnn")
"""


def start_child(config):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(config)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def journal(tmp_path):
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "results/tiny/optuna_journal.log"))
    return optuna.storages.JournalStorage(backend)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_trial_cut_off_runs_again_with_its_parameters(sent, tiny_npz, tmp_path):
    config = settings(tiny_npz, tmp_path, search_epochs=10, pruner="none")
    child = start_child(config)
    deadline = time.monotonic() + 120
    running = []
    while not running:
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.2)
        if (tmp_path / "results/tiny/optuna_journal.log").exists():
            studies = optuna.get_all_study_names(journal(tmp_path))
            if studies:
                study = optuna.load_study(study_name=studies[0], storage=journal(tmp_path))
                running = [t for t in study.trials if t.number == 1 and len(t.params) == 6]
    child.send_signal(sent)
    _, errors = child.communicate(timeout=60)
    # A child that is interrupted ends with a traceback of its own; Optuna's logger adds none.
    assert errors.count(b"Traceback") == (sent == signal.SIGINT) and b"[W " not in errors

    resumed = pipeline(tiny_npz, tmp_path, search_epochs=10, pruner="none", resume=True)
    found = resumed.search("lightning_cnn")
    states = [t["state"] for t in found["trials"]]
    assert states == ["complete", "fail", "complete", "complete"]
    assert found["trials"][2]["parameters"] == running[0].params
    assert found["trials"][2]["again"] == 1


def test_resuming_a_finished_search_runs_no_trial_and_other_settings_are_refused(tiny_npz, tmp_path):
    first = pipeline(tiny_npz, tmp_path).search("lightning_cnn")
    again = pipeline(tiny_npz, tmp_path, resume=True).search("lightning_cnn")
    assert again == first
    with pytest.raises(ConfigError, match="other settings or data"):
        pipeline(tiny_npz, tmp_path, resume=True, seed=1).search("lightning_cnn")
    anew = pipeline(tiny_npz, tmp_path, seed=1).search("lightning_cnn")
    assert len(anew["trials"]) == 3


def proposals(tiny_npz, tmp_path, monkeypatch, *, cut_after=None, resume=False, **more):
    """What a search proposes, trial by trial, without a training; interrupted before trial `cut_after`."""

    def objective(self, trial, model_type):
        trial.set_user_attr("proposed_by", proposed_by(trial))
        params = suggest_parameters(trial, model_type, batch_size=16, pretrained=False)
        if trial.number == cut_after:
            run_again(trial.study, trial)
            raise KeyboardInterrupt
        score = 1 - abs(np.log10(params["learning_rate"]) + 2.4)
        trial.set_user_attr("macro_f1", score)
        return score

    monkeypatch.setattr(IntegratedMLPipeline, "optuna_objective", objective)
    made = pipeline(tiny_npz, tmp_path, resume=resume, **more)
    try:
        return made.search("lightning_cnn")
    except KeyboardInterrupt:
        return None


def test_a_resumed_search_proposes_nothing_a_second_time(tiny_npz, tmp_path, monkeypatch):
    proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=7, cut_after=4)
    found = proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=7, resume=True)
    rates = [t["parameters"]["learning_rate"] for t in found["trials"] if t["state"] == "complete"]
    assert len(rates) == len(set(rates)) == 7


@pytest.mark.parametrize(("sampler", "last"), [("auto", "TPE"), ("random", "chance")])
def test_the_record_says_who_proposed_each_trial(sampler, last, tiny_npz, tmp_path, monkeypatch):
    asked = []
    relative = optuna.samplers.TPESampler._sample  # what TPE calls once it does more than to draw at random
    monkeypatch.setattr(
        optuna.samplers.TPESampler,
        "_sample",
        lambda self, study, trial, space: asked.append(trial.number) or relative(self, study, trial, space),
    )
    found = proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=12, sampler=sampler)
    said = [trial["proposed_by"] for trial in found["trials"]]
    assert said == ["the defaults", *["chance"] * 9, last, last]
    assert {t["number"] for t in found["trials"] if t["proposed_by"] == "TPE"} == set(asked)
    assert found["proposed_by"]["the defaults"] == 1


def test_a_last_line_that_a_crash_cut_off_is_mended_and_the_search_goes_on(tiny_npz, tmp_path, monkeypatch):
    proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=5, cut_after=3)
    journal = tmp_path / "results/tiny/optuna_journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines(keepends=True)[-1][:20])
    found = proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=5, resume=True)
    assert [t["state"] for t in found["trials"]] == ["complete"] * 3 + ["fail", "complete", "complete"]
    again = proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=5, resume=True)
    assert again["trials"] == found["trials"]


def test_a_damaged_line_of_the_journal_is_named_with_the_remedy(tiny_npz, tmp_path, monkeypatch):
    proposals(tiny_npz, tmp_path, monkeypatch)
    journal = tmp_path / "results/tiny/optuna_journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"\0rubbish\n", *lines[4:]]))
    with pytest.raises(DamagedFileError, match=r"Line 4 of .*optuna_journal.log is damaged.*Move the file away"):
        proposals(tiny_npz, tmp_path, monkeypatch, resume=True)


@pytest.mark.parametrize("shared", [True, False])
def test_the_best_trials_weights_reach_whoever_trains_the_winner(shared, tiny_npz, tmp_path, monkeypatch):
    """One process finds the best trial, another one ends the search with a final training that is much shorter."""
    more = {"search_epochs": 4, "num_optuna_trials": 2, "max_epochs": 1, "storage": f"sqlite:///{tmp_path}/study.db"}
    if not shared:
        monkeypatch.setattr(ExperimentConfig, "shared_weights_dir", None)
    first = pipeline(tiny_npz, tmp_path / "a", **more).search("lightning_cnn")
    made = pipeline(tiny_npz, tmp_path / "b", **more)
    said = []
    monkeypatch.setattr(made, "_say", lambda text, **_: said.append(text))
    (model,) = made.run_complete_pipeline()["models"]
    assert model["search"]["best"]["macro_f1"] == first["best"]["macro_f1"] > 0.2
    if shared:
        assert model["weights_from"] == f"trial {first['best']['number']}"
        assert model["validation"]["macro_f1"] == pytest.approx(first["best"]["macro_f1"], abs=1e-6)
        assert len(list((tmp_path / "study.db_weights").iterdir())) == 1  # those of beaten trials are gone
    else:
        assert model["weights_from"] == "final training"
        assert any("artifacts=" in text for text in said)


def share_a_study(tiny_npz, tmp_path, storage):
    config = settings(tiny_npz, tmp_path, num_optuna_trials=6, storage=storage)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(config | {"output_dir": str(tmp_path / str(n))})],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE,
        )
        for n in range(2)
    ]  # fmt: skip
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors.decode()
    study = optuna.load_study(study_name="tiny/lightning_cnn", storage=storage)
    done = [t for t in study.trials if t.state.is_finished()]
    assert 6 <= len(done) <= 7  # both may start a last one
    assert len({t.user_attrs["process"] for t in done}) == 2
    assert sum(t.params["learning_rate"] == 4e-3 for t in done) == 1  # the default trial, once


def test_two_processes_share_one_study(tiny_npz, tmp_path):
    share_a_study(tiny_npz, tmp_path, f"sqlite:///{tmp_path / 'shared.db'}")


@pytest.fixture
def postgres(tmp_path_factory):
    """A real PostgreSQL server on 127.0.0.1, where one is installed; its Optuna storage URL."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("initdb") or "").parent]
    if not (programs[-1] / "initdb").exists():
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: the path of a socket has a limit
    user = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        shutil.chown(folder, "nobody", "nogroup")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, quiet = folder / "data", {"stdout": subprocess.DEVNULL, "cwd": folder, "check": True}
    subprocess.run([*user, programs[-1] / "initdb", "-D", data, "-U", "optuna", "-A", "trust", "-N"], **quiet)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [*user, programs[-1] / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-l", folder / "log", "-o", options, "start"], **quiet)
    try:
        yield f"postgresql+psycopg://optuna@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
        shutil.rmtree(folder)


def test_two_processes_share_one_study_on_a_database_server(tiny_npz, tmp_path, postgres):
    share_a_study(tiny_npz, tmp_path, postgres)


def test_a_time_limit_leaves_the_final_training_its_share(tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, time_limit=10, num_optuna_trials=1000, max_epochs=10_000, search_epochs=3)
    (model,) = made.run_complete_pipeline()["models"]
    assert model["search"]["seconds"] < 9
    assert len(model["search"]["trials"]) < 1000
    assert model["epochs"] > 3


def test_a_search_whose_time_is_up_is_not_gone_on_with_for_an_instant(tiny_npz, tmp_path, monkeypatch):
    train = IntegratedMLPipeline.optuna_objective

    def three_trials(self, trial, model_type):
        if trial.number == 3:
            raise KeyboardInterrupt
        return train(self, trial, model_type)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IntegratedMLPipeline, "optuna_objective", three_trials)
        pipeline(tiny_npz, tmp_path, num_optuna_trials=9).search("lightning_cnn")
    resumed = pipeline(tiny_npz, tmp_path, num_optuna_trials=9, resume=True)
    resumed.prepare_data()
    done = [t.duration.total_seconds() for t in resumed._open_study("lightning_cnn").trials if t.duration]
    found = resumed.search("lightning_cnn", seconds=sum(done) + 0.4 * sum(done) / len(done))
    assert sum(trial["state"] == "complete" for trial in found["trials"]) == 3


def test_what_did_best_in_its_search_gets_the_longest_final_training(tiny_npz, tmp_path, monkeypatch):
    models = ["torchvision_resnet", "lightning_cnn", "yolo_inspired"]
    made = pipeline(
        tiny_npz, tmp_path, model_type=models, favourite_share=0.7, time_limit=100, search_epochs=1, num_optuna_trials=1
    )
    scores = {"torchvision_resnet": 0.1, "lightning_cnn": 0.3, "yolo_inspired": 0.2}
    monkeypatch.setattr(made, "optuna_objective", lambda trial, name: fake_trial(trial, scores[name]))

    given: dict[str, float] = {}

    def no_training(name, params, *, seconds):
        given[name] = seconds
        return {"history": {"val_macro_f1": [1.0]}, "train_seconds": 1.0}

    monkeypatch.setattr(made, "train_final_model", no_training)
    made.prepare_data()
    made._train_all()
    spent = sum(study_seconds(study) for study in made._studies.values())
    assert sum(given.values()) == pytest.approx(100 - spent, abs=0.1)
    assert given["lightning_cnn"] == pytest.approx(0.7 * (100 - spent), abs=0.1)
    assert given["torchvision_resnet"] == given["yolo_inspired"]


def fake_trial(trial, score):
    trial.suggest_float("learning_rate", 1e-3, 1e-2)
    trial.set_user_attr("macro_f1", score)
    return score


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sampler": "luck"}, "Allowed: auto, tpe, random"),
        ({"pruner": "shears"}, "Allowed: auto, median, halving, hyperband, none"),
        ({"objectives": ("latency",)}, "Name 'macro_f1' first"),
        ({"objectives": ("macro_f1", "beauty")}, "Name 'macro_f1' first"),
        ({"search_share": 1.5}, "search_share=1.5"),
        ({"favourite_share": 1.0}, "favourite_share=1.0"),
    ],
)
def test_a_wrong_search_setting_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ExperimentConfig(**wrong)


def test_every_architectures_space_can_be_searched():
    for model_type, spec in MODEL_REGISTRY.items():
        trial = optuna.create_study().ask()
        params = suggest_parameters(trial, model_type, batch_size=128)
        assert set(spec.search_space) < set(params)
        config = ExperimentConfig(use_pretrained=False, enable_mlflow=False)
        assert IntegratedMLPipeline(config).create_model(model_type, params) is not None
        assert np.isfinite(params["learning_rate"])


@pytest.mark.parametrize("weights", ["random (its host does not answer)", "torchvision ResNet18_Weights"])
def test_a_search_freezes_the_backbone_only_where_pretrained_weights_were_had(weights, tiny_npz, tmp_path, monkeypatch):
    made, create = pipeline(tiny_npz, tmp_path, model_type="torchvision_resnet"), IntegratedMLPipeline.create_model
    asked = []

    def create_model(self, *args, **kwargs):
        model = create(self, *args, **kwargs)
        model.weights_source = weights
        return model

    def train_trial(self, trial, model_type, params, run):
        asked.append(params)
        return self.create_model(model_type), 0.5

    monkeypatch.setattr(IntegratedMLPipeline, "create_model", create_model)
    monkeypatch.setattr(IntegratedMLPipeline, "_train_trial", train_trial)
    made.search("torchvision_resnet")
    frozen = {params.get("freeze_backbone") for params in asked}
    assert frozen == {None} if weights.startswith("random") else frozen <= {False, True}


def test_ctrl_c_while_the_journals_lock_is_given_back_is_still_ctrl_c(tiny_npz, tmp_path, monkeypatch):
    made, unlink, done = pipeline(tiny_npz, tmp_path, num_optuna_trials=2), os.unlink, []

    def interrupted(path, *args, **kwargs):
        unlink(path, *args, **kwargs)
        if made._studies and str(path).endswith(".rename") and not done:
            done.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.search("lightning_cnn")
    assert done


@pytest.mark.parametrize(("last", "stopped"), [(0.45, False), (0.35, True)])
def test_halving_lets_the_best_third_go_on(last, stopped, tiny_npz, tmp_path):
    study = optuna.create_study(direction="maximize", pruner=pipeline(tiny_npz, tmp_path, pruner="halving")._pruner())
    for value in (0.5, 0.4, 0.3, 0.2, 0.1, last):
        trial = study.ask()
        trial.report(value, step=1)
        is_stopped = trial.should_prune()
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert is_stopped is stopped  # second of six is among the best third, third of six is not


@pytest.mark.parametrize(("deadline", "left"), [(None, 20), (5.2, 5), (-3, 0)])
def test_the_line_of_a_trial_says_how_long_the_search_will_take(deadline, left, monkeypatch):
    study, start = optuna.create_study(direction="maximize"), datetime.datetime(2026, 1, 1)
    for seconds in (8, 12):  # ten on average, and two of four are left
        study.add_trial(optuna.trial.create_trial(value=0.5))
        trial = study.trials[-1]
        trial.datetime_start, trial.datetime_complete = start, start + datetime.timedelta(seconds=seconds)
        study._storage._studies[study._study_id].trials[-1] = trial
    monkeypatch.setattr("waferlab.search.trials.time.monotonic", lambda: 1000.0)
    limit = None if deadline is None else 1000.0 + deadline
    line = trial_line(study, study.trials[-1], wanted=4, deadline=limit)
    assert line.startswith("  trial 2/4  complete  0.500  best 0.500") and line.endswith(f"about {left} s left")
