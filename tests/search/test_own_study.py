"""Promises to whoever has a study of his own: the pipeline's objective works in it, with nothing called before."""

import optuna
import pytest
from conftest import tiny_settings

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig

MODEL = "lightning_cnn"


def made(tiny_npz, tmp_path, **more):
    return IntegratedMLPipeline(ExperimentConfig(**tiny_settings(tiny_npz, tmp_path, enable_mlflow=False, **more)))


def test_the_objective_works_in_a_study_of_ones_own(tiny_npz, tmp_path):
    pipeline = made(tiny_npz, tmp_path, search_epochs=1)
    study = optuna.create_study(direction="maximize")
    study.optimize(lambda trial: pipeline.optuna_objective(trial, MODEL), n_trials=2)
    assert [0 < trial.value <= 1 for trial in study.trials] == [True, True]
    assert study.best_value == max(trial.user_attrs["macro_f1"] for trial in study.trials)
    best = study.best_trial
    record = pipeline.train_final_model(MODEL, best.params)  # what was found is understood as it is
    assert {name: record.parameters[name] for name in best.params} == best.params


def test_a_pruner_of_ones_own_stops_its_trials(tiny_npz, tmp_path):
    pipeline = made(tiny_npz, tmp_path, search_epochs=3)
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=2.0))
    study.optimize(lambda trial: pipeline.optuna_objective(trial, MODEL), n_trials=1)
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.PRUNED and len(trial.intermediate_values) == 1


def test_several_objectives_fill_a_study_of_as_many_directions(tiny_npz, tmp_path):
    pipeline = made(tiny_npz, tmp_path, search_epochs=1, objectives=("macro_f1", "latency", "parameters"))
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"])
    study.optimize(lambda trial: pipeline.optuna_objective(trial, MODEL), n_trials=1)
    macro_f1, latency, parameters = study.trials[0].values
    assert 0 <= macro_f1 <= 1 and latency > 0
    n = sum(p.numel() for p in pipeline.create_model(MODEL, study.trials[0].params).network.parameters())
    assert parameters == pytest.approx(n)
