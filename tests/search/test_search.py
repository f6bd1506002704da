"""Promises about whole searches: pruned, gone on with, resumable, shared, as scripted or trained."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import optuna
import pytest
import torch
import warm
from conftest import tiny_settings
from lightning.pytorch.callbacks import ModelCheckpoint
from made_up import Scripted, before_training
from made_up import pipeline as scripted_pipeline
from made_up_trials import Clock, trained
from optuna_integration import PyTorchLightningPruningCallback
from sklearn.metrics import f1_score
from torch import nn

import integrated_pipeline
from integrated_pipeline import MODEL_REGISTRY, IntegratedMLPipeline, ModelSpec, suggest_parameters
from waferlab.config import ExperimentConfig
from waferlab.data.images import encode
from waferlab.errors import (
    ConfigError,
    DamagedFileError,
    RunError,
    SearchFailedError,
    TrainingDivergedError,
    TrialFailedError,
)
from waferlab.records import StartingWeights
from waferlab.search.budget import SearchPlan
from waferlab.search.storage import SystemsLock
from waferlab.search.study import proposed_by, run_again
from waferlab.search.trial_files import TrialFiles
from waferlab.search.trials import counted_trials, pack_answers, trial_seconds, unpack_answers, worth_keeping
from waferlab.training.callbacks import Patience, SeedEachEpoch, TimeBudget
from waferlab.training.checkpoints import load_trained

ROOT = Path(__file__).resolve().parents[2]


settings = partial(tiny_settings, enable_mlflow=False, max_epochs=4)


def pipeline(tiny_npz, tmp_path, **more):
    made = IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, **more)))
    made.config.results_dir.mkdir(parents=True, exist_ok=True)
    return made


def searching(data, folder, **more):
    """A pipeline that searches with the scripted model."""
    return scripted_pipeline(data, folder, **{"enable_optuna": True, "pruner": "none", "max_epochs": 8, **more})


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    spec = ModelSpec(Scripted, defaults={"learning_rate": 1e-3, "dropout": 0.1}, portfolio=())
    monkeypatch.setitem(MODEL_REGISTRY, "scripted", spec)
    monkeypatch.setattr(Scripted, "scripts", [])
    monkeypatch.setattr(Scripted, "seen", {})


def suggest_only(self, trial, model_type):
    self._suggest(trial, model_type)
    trial.set_user_attr("macro_f1", 0.5)
    return 0.5


def test_collections_of_garbage_in_a_run_look_at_what_the_run_made_alone(tiny_npz, tmp_path, monkeypatch):
    looked_at = []

    def interrupted(self, parent):
        looked_at.append(len(gc.get_objects()))  # without what is frozen
        raise KeyboardInterrupt

    monkeypatch.setattr(IntegratedMLPipeline, "_train_all", interrupted)
    before = len(gc.get_objects())
    with pytest.raises(KeyboardInterrupt):
        pipeline(tiny_npz, tmp_path).run_complete_pipeline()
    assert looked_at[0] < before / 10
    assert len(gc.get_objects()) > before / 2  # afterwards all is as it was


# --- what a trial is worth, and what the final training goes on from


@pytest.mark.long
def test_the_summary_tells_every_trial_and_the_weights_are_those_of_the_best_epoch_of_all(tiny_npz, tmp_path):
    summary = pipeline(tiny_npz, tmp_path).run_complete_pipeline()
    (model,) = summary["models"]
    search, history = model["search"], model["history"]["val_macro_f1"]
    assert [t["number"] for t in search["trials"]] == [0, 1, 2]
    assert (
        search["trials"][0]["parameters"]["learning_rate"] == MODEL_REGISTRY["lightning_cnn"].defaults["learning_rate"]
    )
    complete = [t for t in search["trials"] if t["state"] == "complete"]
    assert search["best"]["number"] in [t["number"] for t in complete] and search["workers"] == 1
    assert search["pruned"] == len(search["trials"]) - len(complete)
    assert max(history[: search["trials"][search["best"]["number"]]["epochs"]]) == search["best"]["macro_f1"]
    assert model["validation"]["macro_f1"] == pytest.approx(max(history), abs=1e-6)


class Start(pl.Callback):
    """What a training begins with."""

    def on_train_start(self, trainer, module):
        self.epoch, self.step = trainer.current_epoch, trainer.global_step
        self.weights = {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def starts(monkeypatch):
    """What all trainings began with, in their order."""
    seen, fit = [], pl.Trainer.fit

    def watched(trainer, *args, **kwargs):
        seen.append(Start())
        trainer.callbacks.append(seen[-1])
        return fit(trainer, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", watched)
    return seen


def test_the_final_training_goes_on_from_the_last_weights_of_the_trial_with_its_epochs_and_history(
    starts, tiny_npz, tmp_path
):
    of_the_trial = [0.3, 0.8, 0.4]
    Scripted.scripts = [of_the_trial, [0.1, 0.2, 0.1], [None, None, None, 0.5, 0.9, 0.6]]
    made = searching(tiny_npz, tmp_path, num_optuna_trials=2, search_epochs=3, max_epochs=6)
    record = made.search_and_train("scripted")
    found = record.search
    assert [t.values for t in found.trials] == [pytest.approx([0.8]), pytest.approx([0.2])]
    assert [t.last_macro_f1 for t in found.trials] == [pytest.approx(0.4), pytest.approx(0.1)]
    assert (found.best.number, found.best.best_epoch, found.best.macro_f1) == (0, 2, pytest.approx(0.8))
    assert found.best.record is None  # what it tells is in the record itself

    assert [(start.epoch, start.weights["network.epoch"].item()) for start in starts] == [(0, 0), (0, 0), (3, 3)]
    assert record.weights_from == "trial 0, gone on with"
    assert record.epochs == 6 and record.history["epoch"] == [1, 2, 3, 4, 5, 6]
    assert record.history["val_macro_f1"] == pytest.approx([*of_the_trial, 0.5, 0.9, 0.6])
    assert record.best_epoch == 5 and made.load_model(record).network.epoch == 5


@pytest.mark.parametrize("resume", [False, True])
def test_the_best_epoch_of_a_trial_stays_if_the_final_training_never_beats_it(resume, tiny_npz, tmp_path):
    Scripted.scripts = [[0.3, 0.8, 0.4], [None, None, None, 0.5, 0.79, 0.6]]
    settings = {"num_optuna_trials": 1, "search_epochs": 3, "max_epochs": 6}
    record = searching(tiny_npz, tmp_path, **settings).search_and_train("scripted")
    if resume:
        record = searching(tiny_npz, tmp_path, resume=True, **settings).search_and_train("scripted")
    assert record.best_epoch == 2 and record.epochs == 6 and record.val_macro_f1 == pytest.approx(0.8)
    assert searching(tiny_npz, tmp_path, **settings).load_model(record).network.epoch == 2


def test_a_real_trial_is_gone_on_with_from_exactly_where_it_was(starts, tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, num_optuna_trials=2, pruner="none", search_epochs=2)
    record = made.search_and_train("lightning_cnn")
    left = torch.load(
        tmp_path / f"checkpoints/tiny/lightning_cnn/trials/{record.search.best.number}.state.ckpt", weights_only=True
    )
    final = starts[-1]
    assert len(starts) == 3 and (final.epoch, final.step) == (2, left["global_step"])
    assert left["state_dict"].keys() == final.weights.keys()
    for name, weights in left["state_dict"].items():
        assert torch.equal(final.weights[name], weights), name
    trial = made.studies["lightning_cnn"].trials[record.search.best.number].user_attrs["record"]
    for name, series in trial["history"].items():
        assert record.history[name][:2] == series and len(record.history[name]) == 4, name


def test_the_record_describes_the_parameters_of_the_trial_that_is_gone_on_with(tiny_npz, tmp_path):
    """The second trial leads clearly."""
    Scripted.scripts = [[0.2], [0.6], [None, 0.9]]
    made = searching(tiny_npz, tmp_path, num_optuna_trials=2, search_epochs=1, max_epochs=2)
    made.prepare_data()
    labels = made.maps.labels[made.split.validation]
    answers = {0: np.zeros_like(labels), 1: labels}
    with pytest.MonkeyPatch.context() as patch:  # answers follow no script
        patch.setattr("integrated_pipeline.pack_answers", lambda _: pack_answers(answers[2 - len(Scripted.scripts)]))
        record = made.search_and_train("scripted")
    won = record.search.trials[1].parameters
    assert record.search.best.number == 1 and record.search.best.parameters == won
    assert record.search.why.startswith("trial 1 leads the defaults by")
    assert {name: record.parameters[name] for name in won} == won
    hyper = torch.load(tmp_path / "checkpoints/tiny/scripted/best.ckpt", weights_only=True)["hyper_parameters"]
    assert {name: hyper[name] for name in won if name != "batch_size"} == {
        name: value for name, value in won.items() if name != "batch_size"
    }


def test_a_trial_leaves_the_answers_of_its_best_epoch_to_the_validation_maps(tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, num_optuna_trials=1, pruner="none", search_epochs=2, max_epochs=4)
    made.search("lightning_cnn")
    (trial,) = made.studies["lightning_cnn"].trials
    file, known = made.config.checkpoints_dir / "lightning_cnn/trials/0.ckpt", trial.user_attrs["record"]
    model = load_trained(MODEL_REGISTRY["lightning_cnn"].model, file, expected=known["checkpoint_sha256"])
    data = made.data_module()
    with torch.no_grad():
        said = torch.cat([model(encode(images)) for images, _ in data.val_dataloader()]).argmax(1).numpy()
    assert unpack_answers(trial.user_attrs["answers"]).tolist() == said.tolist()
    labels = made.maps.labels[made.split.validation]
    assert f1_score(labels, said, average="macro") == pytest.approx(trial.value, abs=1e-6)


def test_seconds_of_the_trial_that_is_gone_on_with_are_in_the_record_and_counted_once(tiny_npz, tmp_path, monkeypatch):
    clock, start = Clock(), Scripted.on_train_epoch_start
    monkeypatch.setattr("waferlab.training.callbacks.time", clock)

    def slow_epoch(self):
        clock.now += 100
        start(self)

    monkeypatch.setattr(Scripted, "on_train_epoch_start", slow_epoch)
    Scripted.scripts = [[0.5, 0.6], [None, None, 0.5, 0.9]]
    made = searching(tiny_npz, tmp_path, num_optuna_trials=1, search_epochs=2, max_epochs=4)
    record = made.search_and_train("scripted")
    assert record.train_seconds == 400
    assert record.total_seconds == pytest.approx(record.search.seconds + 200)


def test_the_clock_of_the_final_training_goes_on_from_that_of_the_trial(tiny_npz, tmp_path, monkeypatch):
    made = searching(tiny_npz, tmp_path, num_optuna_trials=1, search_epochs=2)
    found = made.search("scripted", SearchPlan(1, 2, seconds=1000.0))
    seen = before_training(monkeypatch, lambda: made.go_on("scripted", found, seconds=60))
    took = found.best.record.train_seconds
    assert seen.callback(TimeBudget).seconds == 60 + took
    state = torch.load(tmp_path / "checkpoints/tiny/scripted/resume.ckpt", weights_only=True)["callbacks"]
    assert state["TimeBudget"]["used"] == pytest.approx(took, abs=1.0)  # and this much is used


class Rates(pl.Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, *_):
        self.steps.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_learning_rate_of_what_is_gone_on_with_never_rises_again(tiny_npz, tmp_path, monkeypatch):
    rates, fit = [], pl.Trainer.fit

    def watched(trainer, *args, **kwargs):
        rates.append(Rates())
        trainer.callbacks.append(rates[-1])
        return fit(trainer, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", watched)
    monkeypatch.setattr("integrated_pipeline.MAPS_OF_A_TRIALS_EPOCH", 160)  # its epochs are shorter
    made = searching(tiny_npz, tmp_path, num_optuna_trials=1, search_epochs=2, max_epochs=8)
    made.search_and_train("scripted")
    trial, final = (one.steps for one in rates)
    peak, top = max(trial), trial.index(max(trial))
    assert peak == pytest.approx(1e-3) and trial[:top] == sorted(trial[:top]) and set(trial[top:]) == {peak}
    assert len(trial) == 2 * 10 and final[0] == final[1] == peak
    assert final == sorted(final, reverse=True) and final[-1] < 0.02 * peak
    level = len([rate for rate in final if rate == peak]) / (len(final) + len(trial))
    assert len(final) == 6 * (len(made.split.train) // 16) and 0.25 < level < 0.5


def weights_in(folder, name):
    return torch.load(folder / "checkpoints/tiny/scripted" / name, weights_only=True)["state_dict"]


@pytest.mark.parametrize("cut_in", [2, 4])
def test_a_final_training_that_is_cut_off_and_resumed_gives_the_weights_of_an_unbroken_one(
    cut_in, tiny_npz, tmp_path, monkeypatch
):
    """Cut off in its first epoch after those of the trial, or later."""
    settings = {"num_optuna_trials": 2, "search_epochs": 2, "max_epochs": 6}
    start = Scripted.on_train_epoch_start
    unbroken = searching(tiny_npz, tmp_path / "unbroken", **settings).search_and_train("scripted")

    def interrupted(self):
        if self.current_epoch == cut_in:
            raise KeyboardInterrupt
        start(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Scripted, "on_train_epoch_start", interrupted)
        searching(tiny_npz, tmp_path / "broken", **settings).search_and_train("scripted")
    record = searching(tiny_npz, tmp_path / "broken", resume=True, **settings).search_and_train("scripted")
    assert record.search.best.number == unbroken.search.best.number and record.weights_from == unbroken.weights_from
    assert record.history == unbroken.history and record.epochs == 6
    for name in ("best.ckpt", "resume.ckpt"):
        expected, found = (weights_in(tmp_path / run, name) for run in ("unbroken", "broken"))
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_a_final_training_that_goes_on_is_not_begun_from_a_damaged_file(tiny_npz, tmp_path):
    made = searching(tiny_npz, tmp_path, num_optuna_trials=1)
    found = made.search("scripted")
    state = tmp_path / "checkpoints/tiny/scripted/trials/0.state.ckpt"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"0\.state\.ckpt"):
        made.go_on("scripted", found)


def test_a_search_that_does_not_fit_into_the_time_is_left_out_and_the_run_says_why(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr("integrated_pipeline.seconds_a_step", lambda *_, **__: 10.0)
    made, said = pipeline(tiny_npz, tmp_path, time_limit=60, max_epochs=2), []
    monkeypatch.setattr(made, "say", lambda text, **_: said.append(text))
    (model,) = made.run_complete_pipeline()["models"]
    assert model["no_search_because"] == "0 epochs fit into 60 s, and a search pays from 15 on"
    assert f"  no search: {model['no_search_because']}" in said
    assert "search" not in model and model["weights_from"] == "final training" and model["epochs"] == 2


def test_a_run_that_wants_no_search_gives_no_reason_for_it(tiny_npz, tmp_path):
    record = searching(tiny_npz, tmp_path, enable_optuna=False, max_epochs=1).search_and_train("scripted")
    assert record.no_search_because is None and record.search is None


def test_what_searches_leave_is_shared_by_merit_and_models_whose_search_does_not_fit_have_a_part(
    tiny_npz, tmp_path, monkeypatch
):
    """With `favourite_share`: of three models, a search of the scripted one does not pay."""
    monkeypatch.setitem(MODEL_REGISTRY, "quick", ModelSpec(Scripted))
    monkeypatch.setitem(MODEL_REGISTRY, "quicker", ModelSpec(Scripted))
    trainings = {}
    monkeypatch.setattr(
        IntegratedMLPipeline, "_seconds_a_step", lambda self, name, how: 100.0 if name == "scripted" else 1e-6
    )

    def no_more(self, name, params=None, *, seconds=None, trial=None):
        trainings[name] = seconds
        raise TrainingDivergedError("made up")

    monkeypatch.setattr(IntegratedMLPipeline, "train_final_model", no_more)
    names = ["quick", "scripted", "quicker"]
    made = searching(
        tiny_npz, tmp_path, model_type=names, time_limit=3000, favourite_share=0.75, num_optuna_trials=1,
        search_epochs=1,
    )  # fmt: skip
    Scripted.scripts = [[0.5], [0.6]]
    with pytest.raises(RunError, match="No model could be trained"):
        made.run_complete_pipeline()
    assert sum(trainings.values()) == pytest.approx(3000, abs=60)
    assert trainings["quicker"] == pytest.approx(6 * trainings["quick"], rel=0.01)
    assert trainings["scripted"] == pytest.approx(trainings["quick"], rel=0.01)


@pytest.mark.parametrize("rate", [None, 1e-4, 2e-2])
def test_the_portfolio_is_tried_after_the_defaults_around_their_rate_and_as_much_of_it_as_there_are_trials(
    rate, tiny_npz, tmp_path, monkeypatch, recwarn
):
    common = {"batch_size": 32, "dropout": 0.3, "weight_decay": 0.01}
    portfolio = [{"learning_rate": rate, **common} for rate in (2e-3, 3e-3, 4e-3)]
    spec = ModelSpec(Scripted, defaults={"learning_rate": 1e-3, "dropout": 0.1}, portfolio=portfolio)
    monkeypatch.setitem(MODEL_REGISTRY, "scripted", spec)
    monkeypatch.setattr(IntegratedMLPipeline, "optuna_objective", suggest_only)
    found = searching(tiny_npz, tmp_path, num_optuna_trials=3, learning_rate=rate).search("scripted")
    usual = rate or 1e-3
    assert [t.parameters["learning_rate"] for t in found.trials] == pytest.approx([usual, 2 * usual, 3 * usual])
    assert not [one for one in recwarn if "out of range" in str(one.message)]  # which Optuna says of what is outside
    assert [t.state for t in found.trials] == ["complete"] * 3
    assert found.proposed_by == {"the defaults": 1, "the portfolio": 2}


def test_of_an_architecture_that_nobody_has_tuned_other_rates_are_tried_after_the_defaults(
    tiny_npz, tmp_path, monkeypatch, recwarn
):
    monkeypatch.setitem(MODEL_REGISTRY, "scripted", ModelSpec(Scripted, defaults={"learning_rate": 1e-3}))
    monkeypatch.setattr(IntegratedMLPipeline, "optuna_objective", suggest_only)
    found = searching(tiny_npz, tmp_path, num_optuna_trials=5).search("scripted")
    rates = [trial.parameters.pop("learning_rate") for trial in found.trials]
    assert rates == pytest.approx([1e-3, 3e-3, 1e-3 / 3, 8e-3, 1.25e-4])
    assert all(trial.parameters == found.trials[0].parameters for trial in found.trials)
    assert not [one for one in recwarn if "out of range" in str(one.message)]


def test_only_files_of_trials_that_may_be_gone_on_with_are_kept(tiny_npz, tmp_path):
    Scripted.scripts = [[0.3, 0.4], [0.5, 0.6], [0.2, 0.1], [0.4, 0.4]]
    made = searching(tiny_npz, tmp_path, num_optuna_trials=4)
    made.search("scripted")
    kept = sorted(file.name for file in (made.config.checkpoints_dir / "scripted/trials").iterdir())
    assert kept == ["0.ckpt", "0.state.ckpt", "1.ckpt", "1.state.ckpt"]  # the defaults, and the best


def test_values_of_several_objectives_stand_in_their_order(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr("integrated_pipeline.measure_latency", lambda *_, **__: 12.5)
    Scripted.scripts = [[0.4], [0.6]]
    made = searching(
        tiny_npz, tmp_path, objectives=("macro_f1", "latency", "parameters"), num_optuna_trials=2, search_epochs=1
    )
    found = made.search("scripted")
    size = 16 * 9 + 9
    assert [t.values for t in found.trials] == [pytest.approx([f1, 12.5, size]) for f1 in (0.4, 0.6)]
    assert found.objectives == ["macro_f1", "latency", "parameters"]
    (front,) = found.pareto_front
    assert front == {"number": 1, "values": found.trials[1].values, "parameters": found.trials[1].parameters}
    study = made.studies["scripted"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]


def test_two_objectives_give_a_pareto_front_and_no_pruning(tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, objectives=("macro_f1", "parameters"), num_optuna_trials=4)
    found = made.search("lightning_cnn")
    assert found.pruner is None
    assert all(t.state == "complete" for t in found.trials)
    front = [tuple(t["values"]) for t in found.pareto_front]
    everything = [tuple(t.values) for t in found.trials]
    beaten = {p for p in everything for a, b in everything if a >= p[0] and b <= p[1] and (a, b) != p}
    assert {*front} == {*everything} - beaten


# --- what is stopped early, and what fails


class AlwaysPrune(optuna.pruners.BasePruner):
    """Stops each trial but the first at its first report."""

    def prune(self, study, trial):
        return trial.number > 0


def test_pruned_trials_stop_early_and_are_recorded_as_pruned(tiny_npz, tmp_path, monkeypatch):
    made = pipeline(tiny_npz, tmp_path)
    monkeypatch.setattr("waferlab.search.model_search.make_pruner", lambda *_, **__: AlwaysPrune())
    found = made.search("lightning_cnn")
    assert [t.state for t in found.trials] == ["complete", "pruned", "pruned"]
    assert [t.epochs for t in found.trials] == [2, 1, 1]
    assert found.best.number == 0 and found.pruned == 2


GOOD, BAD = [0.5, 0.6, 0.7, 0.8], [0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("pruner", "epochs"),
    [
        ("median", [4, 4, 4, 2]),  # not among the first three, nor after the first epoch
        ("auto", [4, 2, 2, 2]),  # after a third of the epochs
    ],
)  # all of them, told by made-up trials, are in test_study.py
def test_the_chosen_pruner_stops_unpromising_trials(pruner, epochs, tiny_npz, tmp_path):
    first = [0.9, 0.9, 0.9, 0.9] if pruner == "auto" else GOOD
    Scripted.scripts = [first, GOOD, GOOD, BAD]
    made = searching(tiny_npz, tmp_path, pruner=pruner, num_optuna_trials=4, search_epochs=4)
    found = made.search("scripted")
    assert [t.epochs for t in found.trials] == epochs
    assert [t.state for t in found.trials] == ["complete" if n == 4 else "pruned" for n in epochs]
    assert [t.number for t in found.trials if t.values is None] == [i for i, n in enumerate(epochs) if n < 4]


def test_the_sampler_that_was_asked_for_proposes_and_is_named(tiny_npz, tmp_path):
    made = searching(tiny_npz, tmp_path, sampler="random", num_optuna_trials=1, search_epochs=1)
    Scripted.scripts = [[0.5]]
    found = made.search("scripted")
    assert type(made.studies["scripted"].sampler) is optuna.samplers.RandomSampler and found.sampler == "RandomSampler"
    resumed = searching(tiny_npz, tmp_path, sampler="random", num_optuna_trials=1, search_epochs=1, resume=True)
    assert resumed.search("scripted").sampler == "RandomSampler"


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
    assert [t.state for t in found.trials] == ["fail", "fail", "complete"]
    assert "memory" in found.trials[0].reason
    assert "training loss is nan" in found.trials[1].reason


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


# --- what reaches a trial


@pytest.mark.parametrize("what", ["trial", "final training"])
def test_parameters_reach_the_model_and_the_batches(what, tiny_npz, tmp_path, monkeypatch):
    made = searching(tiny_npz, tmp_path, model_type="lightning_cnn")
    made.prepare_data()
    asked = {
        "learning_rate": 0.0123, "batch_size": 64, "dropout": 0.47, "weight_decay": 0.0321, "base_channels": 48,
        "optimizer": "sgd",
    }  # fmt: skip
    study = optuna.create_study()
    study.enqueue_trial(asked)
    start = {
        "trial": lambda: made.optuna_objective(study.ask(), "lightning_cnn"),
        "final training": lambda: made.train_final_model("lightning_cnn", asked),
    }
    seen = before_training(monkeypatch, start[what])
    model = seen.model
    assert (model.learning_rate, model.weight_decay, model.optimizer_name) == (0.0123, 0.0321, "sgd")
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.47]
    assert model.network[0].out_channels == 48
    assert seen.data.batch_size == 64 and len(next(iter(seen.data.train_dataloader()))[0]) == 64
    assert made.data_module().batch_size == made.config.batch_size  # the next training has its own again


def test_a_trial_is_watched_by_the_pruner_and_keeps_the_best_epoch(tiny_npz, tmp_path, monkeypatch):
    seen = before_training(monkeypatch, lambda: searching(tiny_npz, tmp_path).search("scripted"))
    assert seen.callback(PyTorchLightningPruningCallback).monitor == "val_macro_f1"
    best = seen.callback(ModelCheckpoint)
    assert (best.monitor, best.mode, best.save_top_k) == ("val_macro_f1", "max", 1)
    assert not [c for c in seen.trainer.callbacks if isinstance(c, Patience)]  # trials differ in nothing else
    several = searching(tiny_npz, tmp_path, objectives=("macro_f1", "parameters"))
    seen = before_training(monkeypatch, lambda: several.search("scripted"))
    assert not [c for c in seen.trainer.callbacks if isinstance(c, PyTorchLightningPruningCallback)]


def test_the_first_trial_is_the_training_without_a_search(tiny_npz, tmp_path, monkeypatch):
    alone = before_training(
        monkeypatch, lambda: pipeline(tiny_npz, tmp_path, model_type="lightning_cnn").train_final_model("lightning_cnn")
    )
    first = before_training(
        monkeypatch, lambda: searching(tiny_npz, tmp_path, model_type="lightning_cnn").search("lightning_cnn")
    )
    for name in ("learning_rate", "weight_decay", "optimizer_name", "warmup"):
        assert getattr(first.model, name) == getattr(alone.model, name), name
    assert [m.p for m in first.model.modules() if isinstance(m, nn.Dropout)] == [0.1]
    assert first.data.batch_size == alone.data.batch_size
    state, expected = first.model.state_dict(), alone.model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("model_type", MODEL_REGISTRY)
def test_every_architectures_space_can_be_searched_and_each_choice_be_made(model_type, pretrained):
    trial = optuna.create_study().ask()
    params = suggest_parameters(trial, model_type, batch_size=128, pretrained=pretrained)
    assert MODEL_REGISTRY[model_type].suggest(trial, pretrained=pretrained).items() < params.items()
    pipeline = IntegratedMLPipeline(ExperimentConfig(use_pretrained=False, enable_mlflow=False))
    for name, distribution in trial.distributions.items():
        for choice in getattr(distribution, "choices", (params[name],)):
            assert pipeline.create_model(model_type, params | {name: choice}) is not None
    assert np.isfinite(params["learning_rate"])


@pytest.mark.parametrize(("model_type", "smaller"), [("lightning_cnn", 2), ("vision_transformer", 8)])
@pytest.mark.parametrize("rate", [1e-6, 4e-3, 0.5, 3.0])
def test_learning_rates_are_looked_for_around_the_usual_one_whatever_it_is(rate, model_type, smaller):
    trial = optuna.trial.FixedTrial({"learning_rate": rate, "batch_size": 32, "dropout": 0.1, "weight_decay": 1e-4,
                                     "base_channels": 16, "optimizer": "adamw"})  # fmt: skip
    suggest_parameters(trial, model_type, batch_size=32, pretrained=False, learning_rate=rate)
    range = trial.distributions["learning_rate"]
    assert rate / smaller * 0.999 <= range.low <= rate <= range.high <= rate * 8
    if 1e-5 * smaller < rate < 1e-1 / 8:
        assert (range.low, range.high) == pytest.approx((rate / smaller, rate * 8))


@pytest.mark.parametrize(
    "weights", [StartingWeights("random", reason="its host does not answer"), StartingWeights("published", "ResNet18")]
)
def test_a_search_freezes_the_backbone_only_where_pretrained_weights_were_had(weights, tiny_npz, tmp_path, monkeypatch):
    made, create = pipeline(tiny_npz, tmp_path, model_type="torchvision_resnet"), IntegratedMLPipeline.create_model
    asked = []

    def create_model(self, *args, **kwargs):
        model = create(self, *args, **kwargs)
        model.starting_weights = weights
        return model

    def train_trial(self, trial, model_type, params, run):
        asked.append(params)
        return self.create_model(model_type), 0.5

    monkeypatch.setattr(IntegratedMLPipeline, "create_model", create_model)
    monkeypatch.setattr(IntegratedMLPipeline, "_train_trial", train_trial)
    made.search("torchvision_resnet")
    frozen = {params.get("freeze_backbone") for params in asked}
    assert frozen == {None} if weights.kind == "random" else frozen <= {False, True}


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


# --- time


def test_a_search_has_the_rest_of_its_seconds_only_and_a_trial_twice_its_even_share(tiny_npz, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("waferlab.search.budget.time", clock)
    made = searching(tiny_npz, tmp_path, num_optuna_trials=4)
    budgets = []

    def a_trial(trainer, model, *, datamodule, **_):
        budgets.append(next(c for c in trainer.callbacks if isinstance(c, TimeBudget)).seconds)
        clock.now += 30
        raise TrainingDivergedError("made up")

    monkeypatch.setattr("lightning.pytorch.Trainer.fit", a_trial)
    with pytest.raises(SearchFailedError):
        made.search("scripted", SearchPlan(4, 2, seconds=100))
    assert budgets == [50, 50, 40, 10]


def test_a_resumed_search_has_the_seconds_that_earlier_sittings_left(tiny_npz, tmp_path, monkeypatch):
    more = {"num_optuna_trials": 2, "search_epochs": 1}
    Scripted.scripts = [[0.5], [0.5]]
    start = Scripted.on_train_epoch_start

    def interrupted_in_the_second(self):
        if not Scripted.scripts:
            raise KeyboardInterrupt
        start(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Scripted, "on_train_epoch_start", interrupted_in_the_second)
        searching(tiny_npz, tmp_path, **more).search("scripted", SearchPlan(2, 1, seconds=30))

    monkeypatch.setattr("waferlab.search.budget.time", Clock())
    resumed = searching(tiny_npz, tmp_path, resume=True, **more)
    seen = before_training(monkeypatch, lambda: resumed.search("scripted", SearchPlan(2, 1, seconds=30)))
    first, cut_off = resumed.studies["scripted"].trials[:2]
    assert cut_off.params == resumed.studies["scripted"].trials[2].params
    # What was cut off runs again, so its seconds are not counted.
    assert seen.callback(TimeBudget).seconds == pytest.approx(30 - trial_seconds(first))


def test_seconds_of_pruned_and_failed_trials_are_counted_and_a_resumed_search_keeps_them(
    tiny_npz, tmp_path, monkeypatch
):
    def objective(self, trial, model_type):
        time.sleep(0.02)
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 2:
            trial.set_user_attr("reason", "made up")
            raise TrialFailedError("made up")
        return suggest_only(self, trial, model_type)

    with monkeypatch.context() as patch:
        patch.setattr(IntegratedMLPipeline, "optuna_objective", objective)
        first = searching(tiny_npz, tmp_path, num_optuna_trials=4)
        found = first.search("scripted")
    assert [t.state for t in found.trials] == ["complete", "pruned", "fail", "complete"]
    assert all("clock" in t.user_attrs for t in first.studies["scripted"].trials), "dates jump, notes do not"
    assert all(t.seconds >= 0.02 for t in found.trials)
    assert found.seconds == pytest.approx(sum(t.seconds for t in found.trials), abs=1e-5)  # dates have microseconds
    assert [t.reason for t in found.trials] == [None, None, "made up", None]

    monkeypatch.setattr(IntegratedMLPipeline, "train_final_model", lambda *_, **__: trained(0.9))
    resumed = searching(tiny_npz, tmp_path, num_optuna_trials=4, resume=True)
    record = resumed.search_and_train("scripted")
    assert record.search.seconds == found.seconds


@pytest.mark.long
def test_a_time_limit_leaves_the_final_training_its_share(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr("integrated_pipeline.seconds_a_step", lambda *_, **__: 0.01)  # however slow the machine is
    made = pipeline(tiny_npz, tmp_path, time_limit=10, num_optuna_trials=1000, max_epochs=10_000, search_epochs=3)
    (model,) = made.run_complete_pipeline()["models"]
    assert len(model["search"]["trials"]) < 1000
    assert model["epochs"] > 3


def test_a_search_whose_time_is_up_is_not_gone_on_with_for_an_instant(tiny_npz, tmp_path, monkeypatch):
    def three_trials(self, trial, model_type):
        if trial.number == 3:
            run_again(trial.study, trial)  # as the objective does
            raise KeyboardInterrupt
        time.sleep(0.05)
        return suggest_only(self, trial, model_type)

    monkeypatch.setattr(IntegratedMLPipeline, "optuna_objective", three_trials)
    first = searching(tiny_npz, tmp_path, num_optuna_trials=9)
    with pytest.raises(KeyboardInterrupt):
        first.search("scripted")
    done = [trial_seconds(t) for t in first.studies["scripted"].trials[:3]]
    monkeypatch.setattr("waferlab.search.budget.time", Clock())
    resumed = searching(tiny_npz, tmp_path, num_optuna_trials=9, resume=True)
    found = resumed.search("scripted", SearchPlan(9, 2, seconds=sum(done) + 0.4 * sum(done) / len(done)))
    assert sum(trial.state == "complete" for trial in found.trials) == 3


# --- cut off and resumed


CHILD = """
import json, sys
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
pipeline = IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1])))
pipeline.config.results_dir.mkdir(parents=True, exist_ok=True)
pipeline.search("lightning_cnn")
"""


def start_child(config):
    return warm.Popen(
        [sys.executable, "-c", CHILD, json.dumps(config)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def journal(tmp_path):
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "results/tiny/optuna_journal.log"))
    return optuna.storages.JournalStorage(backend)


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_trial_cut_off_runs_again_with_its_parameters(sent, tiny_npz, tmp_path):
    config = settings(tiny_npz, tmp_path, search_epochs=5, max_epochs=10, pruner="none")
    child = start_child(config)
    deadline = time.monotonic() + 120
    running = []
    while not running:
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if (tmp_path / "results/tiny/optuna_journal.log").exists():
            studies = optuna.get_all_study_names(journal(tmp_path))
            if studies:
                study = optuna.load_study(study_name=studies[0], storage=journal(tmp_path))
                running = [t for t in study.trials if t.number == 1 and len(t.params) == 6]
    child.send_signal(sent)
    _, errors = child.communicate(timeout=60)
    # A child that is interrupted ends with a traceback of its own (a chain of them where an error
    # was being handled at that moment); Optuna's logger, which would warn of the trial, adds none.
    assert (b"Traceback" in errors) == (sent == signal.SIGINT) and b"[W " not in errors

    resumed = pipeline(tiny_npz, tmp_path, search_epochs=5, max_epochs=10, pruner="none", resume=True)
    found = resumed.search("lightning_cnn")
    states = [t.state for t in found.trials]
    assert states == ["complete", "fail", "complete", "complete"]
    (again,) = (trial for trial in found.trials if trial.again == 1)
    assert again.parameters == running[0].params


def test_a_trial_that_was_cut_off_later_than_trials_are_long_now_comes_to_its_end(tiny_npz, tmp_path, monkeypatch):
    def begins(self, trainer, module):
        if trainer.current_epoch == 3:
            raise KeyboardInterrupt
        original(self, trainer, module)

    original, more = SeedEachEpoch.on_train_epoch_start, {"num_optuna_trials": 1, "max_epochs": 9}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SeedEachEpoch, "on_train_epoch_start", begins)
        pipeline(tiny_npz, tmp_path, **more).search("lightning_cnn", SearchPlan(1, 4))
    found = pipeline(tiny_npz, tmp_path, resume=True, **more).search("lightning_cnn", SearchPlan(1, 1))
    assert found.trials[-1].state == "complete" and found.trials[-1].epochs == 3


@pytest.mark.long
@pytest.mark.parametrize(("whole", "objectives"), [(0, 1), (1, 1), (3, 1), (1, 2)])
def test_a_trial_goes_on_after_the_last_whole_epoch_of_the_one_that_was_cut_off(
    whole, objectives, tiny_npz, tmp_path, monkeypatch
):
    epochs = []

    def begins(self, trainer, module):
        epochs.append(trainer.current_epoch)
        if stop and len(epochs) == 3 + whole + 1:
            raise KeyboardInterrupt
        original(self, trainer, module)

    def ends(*arguments, **more):
        if stop and len(epochs) == 6:  # all of them are trained, but the trial has not come to its end
            raise KeyboardInterrupt
        return record(*arguments, **more)

    original, record = SeedEachEpoch.on_train_epoch_start, integrated_pipeline.record_training
    monkeypatch.setattr(SeedEachEpoch, "on_train_epoch_start", begins)
    monkeypatch.setattr("integrated_pipeline.record_training", ends)
    more = {"num_optuna_trials": 2, "search_epochs": 3, "max_epochs": 6}
    more["objectives"] = ("macro_f1", "parameters")[:objectives]

    def search(folder, **others):
        made = pipeline(tiny_npz, folder, **more, **others)
        made.search("lightning_cnn")
        return made.studies["lightning_cnn"].trials

    stop = False
    unbroken = search(tmp_path / "unbroken")[1]
    epochs.clear()
    stop = True
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "broken")
    stop = False
    _, cut_off, again = search(tmp_path / "broken", resume=True)
    assert epochs == [
        *range(3),
        *range(min(3, whole + 1)),
        *range(whole, 3),
    ]  # none twice but the one that was cut off
    assert again.user_attrs["again"] == cut_off.number and again.params == unbroken.params
    assert again.values == unbroken.values and again.intermediate_values == unbroken.intermediate_values
    assert len(again.intermediate_values) == (3 if objectives == 1 else 0)
    ours, theirs = (trial.user_attrs["record"] for trial in (again, unbroken))
    assert ours["history"] == theirs["history"] and ours["best_epoch"] == theirs["best_epoch"]
    assert again.user_attrs["answers"] == unbroken.user_attrs["answers"]
    weights, others = (
        torch.load(file, weights_only=True)["state_dict"]
        for file in (tmp_path / f"{folder}/checkpoints/tiny/lightning_cnn/trials/{number}.ckpt"
                     for folder, number in (("broken", 2), ("unbroken", 1)))
    )  # fmt: skip
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


def test_a_search_from_anew_takes_nothing_from_what_an_earlier_one_was_cut_off_in(tiny_npz, tmp_path, monkeypatch):
    Scripted.scripts = [[0.3, 0.4], [0.5, 0.6]]
    made = searching(tiny_npz, tmp_path, num_optuna_trials=2)
    made.search("scripted")
    began = []
    monkeypatch.setattr(TrialFiles, "begin", lambda files, trial: began.append(sorted(files.folder.iterdir())))
    Scripted.scripts = [[0.3, 0.4], [0.5, 0.6]]
    searching(tiny_npz, tmp_path, num_optuna_trials=1).search("scripted")
    assert began == [[]]


@pytest.mark.long
def test_resuming_a_finished_search_runs_no_trial_and_other_settings_are_refused(tiny_npz, tmp_path):
    first = pipeline(tiny_npz, tmp_path).search("lightning_cnn")
    again = pipeline(tiny_npz, tmp_path, resume=True).search("lightning_cnn")
    assert again == first
    with pytest.raises(ConfigError, match="other settings or data"):
        pipeline(tiny_npz, tmp_path, resume=True, seed=1).search("lightning_cnn")
    anew = pipeline(tiny_npz, tmp_path, seed=1).search("lightning_cnn")
    assert len(anew.trials) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 0.5}, {"class_balancing": False}, {"balance_by": "loss"}, {"data_augmentation": False},
        {"time_limit": 50}, {"sampler": "random"}, {"pruner": "halving"}, {"search_epochs": 2}, {"batch_size": 32},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_a_search_is_not_resumed_with_another(other, tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(IntegratedMLPipeline, "optuna_objective", suggest_only)
    common = {"num_optuna_trials": 1, "search_epochs": 1}
    searching(tiny_npz, tmp_path, **common).search("scripted")
    with pytest.raises(ConfigError, match="other settings or data"):
        searching(tiny_npz, tmp_path, resume=True, **common | other).search("scripted")


def test_a_pruned_trial_and_a_failed_one_are_not_run_again(tiny_npz, tmp_path, monkeypatch):
    def objective(self, trial, model_type):
        suggest_only(self, trial, model_type)
        if trial.number == 1:
            raise optuna.TrialPruned
        return 0.5

    with monkeypatch.context() as patch:
        patch.setattr(IntegratedMLPipeline, "optuna_objective", objective)
        first = searching(tiny_npz, tmp_path, num_optuna_trials=3).search("scripted")
    seen = []
    monkeypatch.setattr(IntegratedMLPipeline, "optuna_objective", lambda *_: seen.append(1))
    assert searching(tiny_npz, tmp_path, num_optuna_trials=3, resume=True).search("scripted") == first
    assert not seen


def test_proposals_follow_the_seed(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(IntegratedMLPipeline, "optuna_objective", suggest_only)

    def proposed(run, seed):
        made = searching(tiny_npz, tmp_path / run, seed=seed, num_optuna_trials=4)
        return [t.parameters for t in made.search("scripted").trials]

    first, again, other = proposed("a", 3), proposed("b", 3), proposed("c", 4)
    assert first == again
    assert first[0] == other[0]  # the defaults
    assert all(a != b for a, b in zip(first[1:], other[1:], strict=True))
    assert len({str(p) for p in first}) == 4


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
    assert proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=7, cut_after=4) is None
    found = proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=7, resume=True)
    settings = [str(t.parameters) for t in found.trials if t.state == "complete"]
    assert len(settings) == len(set(settings)) == 7


@pytest.mark.parametrize(("sampler", "last"), [("auto", "TPE"), ("random", "chance")])
def test_the_record_says_who_proposed_each_trial(sampler, last, tiny_npz, tmp_path, monkeypatch):
    asked = []
    relative = optuna.samplers.TPESampler._sample  # what TPE calls once it does more than to draw at random
    monkeypatch.setattr(
        optuna.samplers.TPESampler,
        "_sample",
        lambda self, study, trial, space: asked.append(trial.number) or relative(self, study, trial, space),
    )
    found = proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=6, sampler=sampler)
    said = [trial.proposed_by for trial in found.trials]
    assert said == ["the defaults", *["the portfolio"] * 3, *[last] * 2]
    assert {t.number for t in found.trials if t.proposed_by == "TPE"} == set(asked)
    assert found.proposed_by["the defaults"] == 1


def test_a_last_line_that_a_crash_cut_off_is_mended_and_the_search_goes_on(tiny_npz, tmp_path, monkeypatch):
    assert proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=5, cut_after=3) is None
    journal = tmp_path / "results/tiny/optuna_journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines(keepends=True)[-1][:20])
    found = proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=5, resume=True)
    assert [t.state for t in found.trials] == ["complete"] * 3 + ["fail", "complete", "complete"]
    again = proposals(tiny_npz, tmp_path, monkeypatch, num_optuna_trials=5, resume=True)
    assert again.trials == found.trials


def test_ctrl_c_while_the_journals_lock_is_given_back_is_still_ctrl_c_and_the_lock_is_free(
    tiny_npz, tmp_path, monkeypatch
):
    made, release, done = pipeline(tiny_npz, tmp_path, num_optuna_trials=2), SystemsLock.release, []

    def interrupted(self):
        if made.studies and not done:
            done.append(self)
            raise KeyboardInterrupt
        release(self)

    monkeypatch.setattr(SystemsLock, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.search("lightning_cnn")
    assert done
    assert pipeline(tiny_npz, tmp_path, num_optuna_trials=2, resume=True).search("lightning_cnn").trials


def test_a_full_disk_while_optuna_writes_down_is_an_error_of_the_disk(tiny_npz, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_the_disk(self, trial, model_type):
        monkeypatch.setattr("waferlab.search.storage.WholeLines.append_logs", full)
        return 0.5

    monkeypatch.setattr(IntegratedMLPipeline, "optuna_objective", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        searching(tiny_npz, tmp_path).search("scripted")


def test_a_trial_that_the_disk_had_no_room_for_is_not_to_blame_and_runs_again(tiny_npz, tmp_path, monkeypatch):
    save, written = torch.save, []

    def full(checkpoint, path):
        written.append(path)
        if len(written) == 4:  # of the first trial, whose epochs have two each
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 307968 vs 307864")
        save(checkpoint, path)

    more = {"num_optuna_trials": 2, "search_epochs": 2, "pruner": "none"}
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"could not be written.*0\.state\.ckpt"):
        pipeline(tiny_npz, tmp_path, **more).search("lightning_cnn")
    found = pipeline(tiny_npz, tmp_path, **more, resume=True).search("lightning_cnn")
    assert [trial.state for trial in found.trials if trial.state != "fail"] == ["complete"] * 2
    assert found.proposed_by["a trial that was cut off"] == 1 and not [t for t in found.trials if t.reason]


# --- shared by several processes


@pytest.mark.long
@pytest.mark.parametrize("shared", [True, False])
def test_what_the_best_trial_left_reaches_whoever_goes_on_with_it(shared, tiny_npz, tmp_path, monkeypatch):
    """One process finds the best trial, another one ends the search and trains."""
    more = {"num_optuna_trials": 2, "storage": f"sqlite:///{tmp_path}/study.db", "pruner": "none"}
    if not shared:
        monkeypatch.setattr(ExperimentConfig, "shared_weights_dir", None)
    first = pipeline(tiny_npz, tmp_path / "a", **more).search("lightning_cnn")
    made = pipeline(tiny_npz, tmp_path / "b", **more)
    said = []
    monkeypatch.setattr(made, "say", lambda text, **_: said.append(text))
    (model,) = made.run_complete_pipeline()["models"]
    assert model["search"]["best"]["number"] == first.best.number and len(model["search"]["trials"]) == 2
    history, missed = model["history"]["val_macro_f1"], [text for text in said if "artifacts=" in text]
    assert model["search"]["best"]["goes_on"] is shared and len(history) == 4
    if shared:
        assert model["weights_from"] == f"trial {first.best.number}, gone on with" and not missed
        assert history[:2] == first.best.record.history["val_macro_f1"]
        kept = len(worth_keeping(made.studies["lightning_cnn"], first.trials[0].parameters))
        assert len(list((tmp_path / "study.db_weights").iterdir())) == 2 * kept  # those of beaten trials are gone
    else:
        assert model["weights_from"] == "final training"
        assert len(missed) == 1 and f"trial {first.best.number}, the best, left is not here" in missed[0]
        assert model["total_seconds"] == pytest.approx(model["search"]["seconds"] + model["train_seconds"])


BOTH = CHILD.replace(
    "pipeline.search(",
    """import os, time
from pathlib import Path
room = Path(sys.argv[2])
(room / str(os.getpid())).touch()
while len([*room.iterdir()]) < 2:  # one alone might have done all trials before the other begins
    time.sleep(0.05)
pipeline.search(""",
)


def share_a_study(tiny_npz, tmp_path, storage):
    (room := tmp_path / "room").mkdir()
    config = settings(tiny_npz, tmp_path, num_optuna_trials=6, storage=storage)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        warm.Popen(
            [sys.executable, "-c", BOTH, json.dumps(config | {"output_dir": str(tmp_path / str(n))}), room],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE,
        )
        for n in range(2)
    ]  # fmt: skip
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors.decode()
    study = optuna.load_study(study_name="tiny/lightning_cnn", storage=storage)
    done = counted_trials(study)
    assert len(done) == 6
    assert len({t.user_attrs["process"] for t in done}) == 2
    assert sum(t.user_attrs["proposed_by"] == "the defaults" for t in done) == 1


@pytest.mark.long
def test_two_processes_share_one_study(tiny_npz, tmp_path):
    share_a_study(tiny_npz, tmp_path, f"sqlite:///{tmp_path / 'shared.db'}")


@pytest.mark.long
def test_two_processes_share_one_study_on_a_database_server(tiny_npz, tmp_path, postgres):
    share_a_study(tiny_npz, tmp_path, postgres.url)
