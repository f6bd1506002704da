"""More promises about the search, told with scripted trainings: what is proposed, pruned, kept, timed and recorded."""

import gc
import time

import optuna
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from made_up import Scripted, before_training, pipeline
from optuna_integration import PyTorchLightningPruningCallback
from torch import nn

from integrated_pipeline import MODEL_REGISTRY, IntegratedMLPipeline, ModelSpec
from waferlab.data.maps import CLASS_NAMES
from waferlab.errors import ConfigError, SearchFailedError, TrainingDivergedError, TrialFailedError
from waferlab.evaluation.metrics import compute_metrics
from waferlab.evaluation.predictions import Predictions
from waferlab.experiments.series import TrainingSeries, Variant
from waferlab.search.trials import suggest_parameters
from waferlab.training.callbacks import TimeBudget


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    spec = ModelSpec(Scripted, defaults={"learning_rate": 1e-3, "dropout": 0.1})
    monkeypatch.setitem(MODEL_REGISTRY, "scripted", spec)
    monkeypatch.setattr(Scripted, "scripts", [])
    monkeypatch.setattr(Scripted, "seen", {})


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """Optuna collects garbage after each trial, and all that the imports left would be looked at each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def searching(data, folder, **more):
    return pipeline(data, folder, **{"enable_optuna": True, "pruner": "none", **more})


def search_and_train(made):
    made.prepare_data()
    return made.search_and_train("scripted")


# --- what a trial is worth


def test_a_trial_is_worth_its_best_epoch_and_leaves_the_weights_of_that_one(tiny_npz, tmp_path):
    Scripted.scripts = [[0.3, 0.8, 0.4], [0.5, 0.6, 0.7], [0.1, 0.2, 0.1]]
    made = searching(tiny_npz, tmp_path, num_optuna_trials=2, search_epochs=3, max_epochs=3)
    record = search_and_train(made)
    found = record["search"]
    assert [t["values"] for t in found["trials"]] == [pytest.approx([0.8]), pytest.approx([0.7])]
    assert [t["last_macro_f1"] for t in found["trials"]] == [pytest.approx(0.4), pytest.approx(0.7)]
    best = found["best"]
    assert (best["number"], best["best_epoch"], best["macro_f1"]) == (0, 2, pytest.approx(0.8))
    assert record["weights_from"] == "trial 0"
    assert made.load_model(record).network.epoch == 2


def test_the_final_training_stays_where_its_best_epoch_beats_the_best_trial_though_its_last_does_not(
    tiny_npz, tmp_path
):
    Scripted.scripts = [[0.5, 0.6], [0.2, 0.7, 0.1]]
    made = searching(tiny_npz, tmp_path, num_optuna_trials=1, max_epochs=3)
    record = search_and_train(made)
    assert record["weights_from"] == "final training"
    assert record["best_epoch"] == 2 and made.load_model(record).network.epoch == 2


# --- what is stopped early

GOOD, BAD = [0.5, 0.6, 0.7, 0.8], [0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("pruner", "epochs"),
    [
        ("none", [4, 4, 4, 4]),
        ("median", [4, 4, 4, 2]),  # not among the first three, nor after the first epoch
        ("auto", [4, 4, 4, 2]),
        ("halving", [4, 2, 2, 2]),  # of each three the best goes on after the second epoch
    ],
)
def test_the_chosen_pruner_stops_unpromising_trials(pruner, epochs, tiny_npz, tmp_path):
    first = [0.9, 0.9, 0.9, 0.9] if pruner == "halving" else GOOD
    Scripted.scripts = [first, GOOD, GOOD, BAD]
    made = searching(tiny_npz, tmp_path, pruner=pruner, num_optuna_trials=4, search_epochs=4)
    found = made.search("scripted")
    assert [t["epochs"] for t in found["trials"]] == epochs
    assert [t["state"] for t in found["trials"]] == ["complete" if n == 4 else "pruned" for n in epochs]
    assert [t["number"] for t in found["trials"] if t["values"] is None] == [i for i, n in enumerate(epochs) if n < 4]


def made_with(made):
    """The sampler and the pruner of the study that a search works with."""
    made.prepare_data()
    study = made._open_study(made.config.model_type)
    return study.sampler, study.pruner


@pytest.mark.parametrize(
    ("asked", "trials", "kind"),
    [
        ("auto", 29, optuna.pruners.MedianPruner),
        ("auto", 30, optuna.pruners.HyperbandPruner),
        ("median", 100, optuna.pruners.MedianPruner),
        ("halving", 29, optuna.pruners.SuccessiveHalvingPruner),
        ("hyperband", 4, optuna.pruners.HyperbandPruner),
        ("none", 100, optuna.pruners.NopPruner),
    ],
)
def test_the_study_has_the_pruner_that_was_asked_for(asked, trials, kind, tiny_npz, tmp_path):
    made = searching(tiny_npz, tmp_path, pruner=asked, num_optuna_trials=trials)
    assert type(made_with(made)[1]) is kind


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ("random", optuna.samplers.RandomSampler),
        ("tpe", optuna.samplers.TPESampler),
        ("auto", optuna.samplers.TPESampler),
    ],
)
def test_the_sampler_that_was_asked_for_proposes_and_is_named(asked, kind, tiny_npz, tmp_path):
    made = searching(tiny_npz, tmp_path, sampler=asked, num_optuna_trials=1, search_epochs=1)
    assert type(made_with(made)[0]) is kind
    Scripted.scripts = [[0.5]]
    found = made.search("scripted")
    assert found["sampler"] == kind.__name__
    resumed = searching(tiny_npz, tmp_path, sampler=asked, num_optuna_trials=1, search_epochs=1, resume=True)
    assert resumed.search("scripted")["sampler"] == kind.__name__


def test_proposals_follow_the_seed(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(IntegratedMLPipeline, "optuna_objective", suggest_only)

    def proposed(run, seed):
        made = searching(tiny_npz, tmp_path / run, seed=seed, num_optuna_trials=4)
        return [t["parameters"] for t in made.search("scripted")["trials"]]

    first, again, other = proposed("a", 3), proposed("b", 3), proposed("c", 4)
    assert first == again
    assert first[0] == other[0]  # the defaults
    assert all(a != b for a, b in zip(first[1:], other[1:], strict=True))
    assert len({str(p) for p in first}) == 4


def suggest_only(self, trial, model_type):
    suggest_parameters(trial, model_type, batch_size=self.config.batch_size)
    trial.set_user_attr("macro_f1", 0.5)
    return 0.5


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
    assert not [c for c in seen.trainer.callbacks if isinstance(c, EarlyStopping)]  # trials differ in nothing else
    several = searching(tiny_npz, tmp_path, objectives=("macro_f1", "parameters"))
    seen = before_training(monkeypatch, lambda: several.search("scripted"))
    assert not [c for c in seen.trainer.callbacks if isinstance(c, PyTorchLightningPruningCallback)]


def test_the_winners_parameters_and_batch_size_are_trained_and_recorded(tiny_npz, tmp_path, monkeypatch):
    """The second trial leads clearly; the final training scores higher than both."""
    Scripted.scripts = [[0.2], [0.6], [0.9]]
    made = searching(tiny_npz, tmp_path, num_optuna_trials=2, search_epochs=1, max_epochs=1)
    record = search_and_train(made)
    won = record["search"]["trials"][1]["parameters"]
    assert record["search"]["best"]["number"] == 1 and record["search"]["best"]["parameters"] == won
    assert {name: record["parameters"][name] for name in won} == won
    hyper = torch.load(tmp_path / "checkpoints/tiny/scripted/best.ckpt", weights_only=True)["hyper_parameters"]
    assert {name: hyper[name] for name in won if name != "batch_size"} == {
        name: value for name, value in won.items() if name != "batch_size"
    }


def test_values_of_several_objectives_stand_in_their_order(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr("integrated_pipeline.measure_latency", lambda *_, **__: 12.5)
    Scripted.scripts = [[0.4], [0.6]]
    made = searching(
        tiny_npz, tmp_path, objectives=("macro_f1", "latency", "parameters"), num_optuna_trials=2, search_epochs=1
    )
    found = made.search("scripted")
    size = 16 * 9 + 9
    assert [t["values"] for t in found["trials"]] == [pytest.approx([f1, 12.5, size]) for f1 in (0.4, 0.6)]
    assert found["objectives"] == ["macro_f1", "latency", "parameters"]
    assert found["best"]["number"] == 1 and found["best"]["macro_f1"] == pytest.approx(0.6)
    (front,) = found["pareto_front"]
    assert front == {"number": 1, **{key: found["best"][key] for key in ("values", "parameters")}}
    study = made._studies["scripted"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]


# --- time


def spent(seconds, best=0.5):
    """What a search that took so many seconds reports."""
    found = {"number": 0, "values": [best], "macro_f1": best, "parameters": {}, "checkpoint": None}
    return {"seconds": seconds, "best": found, "trials": []}


def final_training(asked, score=0.9):
    def train(self, name, params=None, *, seconds=None):
        asked[name] = seconds
        return {"model_type": name, "history": {"val_macro_f1": [score]}, "train_seconds": 0.0}

    return train


def test_a_search_gets_its_share_of_the_models_time_and_the_final_training_what_is_left(
    tiny_npz, tmp_path, monkeypatch
):
    searched, trained = {}, {}

    def search(self, name, *, seconds=None):
        searched[name] = seconds
        return spent({"scripted": 30.0, "lightning_cnn": 49.9}[name])

    monkeypatch.setattr(IntegratedMLPipeline, "search", search)
    monkeypatch.setattr(IntegratedMLPipeline, "train_final_model", final_training(trained))
    names = ["scripted", "lightning_cnn"]
    made = searching(tiny_npz, tmp_path, model_type=names, time_limit=100, search_share=0.4)
    made.prepare_data()
    for name in names:
        made.search_and_train(name)
    assert searched == {"scripted": 20, "lightning_cnn": 20}
    assert trained == {"scripted": pytest.approx(20), "lightning_cnn": 1.0}  # never less than a second
    assert made.seconds.keys() == {"search", "training"}

    trained.clear()
    alone = searching(tiny_npz, tmp_path, model_type=names, time_limit=100, enable_optuna=False)
    alone.prepare_data()
    alone.search_and_train("scripted")
    assert trained == {"scripted": 50}


class BeforeTheScores(Exception):
    pass


@pytest.mark.parametrize(
    ("limit", "given"),
    [
        (100, {"scripted": 10, "lightning_cnn": 40, "yolo_inspired": 10}),  # of the 60 that two searches leave
        (20, {"scripted": 0.5, "lightning_cnn": 2, "yolo_inspired": 0.5}),  # nothing is left: a second for each
    ],
)
def test_what_did_best_gets_its_share_of_what_all_searches_left(limit, given, tiny_npz, tmp_path, monkeypatch):
    found = {"scripted": spent(10, 0.4), "lightning_cnn": spent(25, 0.6), "yolo_inspired": spent(5, 0.5)}
    searched, trained = {}, {}

    def search(self, name, *, seconds=None):
        searched[name] = seconds
        return found[name]

    def no_scores(self, records):
        raise BeforeTheScores

    monkeypatch.setattr(IntegratedMLPipeline, "search", search)
    monkeypatch.setattr(IntegratedMLPipeline, "train_final_model", final_training(trained))
    monkeypatch.setattr(IntegratedMLPipeline, "evaluate", no_scores)
    made = searching(
        tiny_npz, tmp_path, model_type=list(found), time_limit=limit, search_share=0.6, favourite_share=2 / 3
    )
    with pytest.raises(BeforeTheScores):
        made.run_complete_pipeline()
    assert searched == pytest.approx(dict.fromkeys(found, 0.6 * limit / 3))
    assert trained == pytest.approx(given)


def test_without_a_time_limit_neither_search_nor_training_has_one(tiny_npz, tmp_path, monkeypatch):
    searched, trained = [], {}
    monkeypatch.setattr(
        IntegratedMLPipeline, "search", lambda self, name, *, seconds=None: searched.append(seconds) or spent(3)
    )
    monkeypatch.setattr(IntegratedMLPipeline, "train_final_model", final_training(trained))
    made = searching(tiny_npz, tmp_path)
    made.prepare_data()
    made.search_and_train("scripted")
    assert searched == [None] and trained == {"scripted": None}


class Clock:
    """Stands for the module `time` in the pipeline: moves only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


def test_a_search_has_the_rest_of_its_seconds_only_and_a_trial_twice_its_even_share(tiny_npz, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("integrated_pipeline.time", clock)
    made = searching(tiny_npz, tmp_path, num_optuna_trials=4)
    budgets = []

    def a_trial(trainer, model, *, datamodule, **_):
        budgets.append(next(c for c in trainer.callbacks if isinstance(c, TimeBudget)).seconds)
        clock.now += 30
        raise TrainingDivergedError("made up")

    monkeypatch.setattr("lightning.pytorch.Trainer.fit", a_trial)
    with pytest.raises(SearchFailedError):
        made.search("scripted", seconds=100)
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
        searching(tiny_npz, tmp_path, **more).search("scripted", seconds=30)

    monkeypatch.setattr("integrated_pipeline.time", Clock())
    resumed = searching(tiny_npz, tmp_path, resume=True, **more)
    seen = before_training(monkeypatch, lambda: resumed.search("scripted", seconds=30))
    first, cut_off = resumed._studies["scripted"].trials[:2]
    assert cut_off.params == resumed._studies["scripted"].trials[2].params
    # What was cut off runs again, so its seconds are not counted.
    assert seen.callback(TimeBudget).seconds == pytest.approx(30 - first.duration.total_seconds(), abs=1e-3)


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
        found = searching(tiny_npz, tmp_path, num_optuna_trials=4).search("scripted")
    assert [t["state"] for t in found["trials"]] == ["complete", "pruned", "fail", "complete"]
    assert all(t["seconds"] >= 0.02 for t in found["trials"])
    assert found["seconds"] == pytest.approx(sum(t["seconds"] for t in found["trials"]))
    assert [t.get("reason") for t in found["trials"]] == [None, None, "made up", None]

    trained = {}
    monkeypatch.setattr(IntegratedMLPipeline, "train_final_model", final_training(trained))
    resumed = searching(tiny_npz, tmp_path, num_optuna_trials=4, resume=True)
    record = search_and_train(resumed)
    assert record["search"]["seconds"] == found["seconds"]


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


def test_the_seconds_of_an_experiments_training_hold_its_search(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(
        IntegratedMLPipeline,
        "search_and_train",
        lambda self, name: {
            "model_type": name,
            "train_seconds": 20.0,
            "total_seconds": 320.0,
            "epochs": 2,
            "search": spent(300.0),
            "precision": "32-true",
        },
    )

    def scores(self, records):
        labels = self.maps.labels[self.split.test]
        predicted = Predictions(torch.eye(9)[labels], labels, self.maps.groups[self.split.test], CLASS_NAMES)
        metrics = compute_metrics(predicted)
        more = {"n_parameters": 1, "latency_ms": 1.0, "weights": "random (made up)", "parameters": {}}
        return [{**r, "validation": metrics, "test": metrics, **more} for r in records], [predicted]

    monkeypatch.setattr(IntegratedMLPipeline, "evaluate", scores)
    series = TrainingSeries(searching(tiny_npz, tmp_path), [Variant("one", "scripted")], [0])
    (record,) = series.run()
    assert record["train_seconds"] == 320.0


# --- what may go on


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
