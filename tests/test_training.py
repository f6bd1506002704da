"""Promises about a training: every setting reaches it, its best epoch stays, figures come from where they say."""

import csv
import json
import math
import shutil
from dataclasses import fields, replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_settings
from lightning.pytorch.callbacks import EarlyStopping
from made_up import BeforeTraining, Scripted, before_training, pipeline
from torch import nn

from integrated_pipeline import MODEL_REGISTRY, IntegratedMLPipeline, ModelSpec
from simple_model import LightningCNN
from waferlab.config import ExperimentConfig
from waferlab.data.datamodule import WaferMapDataModule
from waferlab.data.images import encode, resize_maps, symmetries
from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import split_by_lot
from waferlab.errors import ConfigError
from waferlab.evaluation.decision import Decision, choose_decision, fit_temperature
from waferlab.evaluation.metrics import compute_metrics
from waferlab.evaluation.predictions import Predictions
from waferlab.reports.tables import write_per_class_table
from waferlab.tracking.runs import Run
from waferlab.training.callbacks import TimeBudget


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    spec = ModelSpec(Scripted, defaults={"learning_rate": 1e-3, "dropout": 0.1})
    monkeypatch.setitem(MODEL_REGISTRY, "scripted", spec)
    monkeypatch.setattr(Scripted, "scripts", [])
    monkeypatch.setattr(Scripted, "seen", {})
    return Scripted


@pytest.fixture(scope="module")
def trained(tiny_arrays, tmp_path_factory):
    """A small CNN trained for an epoch: its folder with the data, and its record."""
    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "tiny.npz", **tiny_arrays)
    config = ExperimentConfig(**tiny_settings(folder / "tiny.npz", folder, **SMALL))
    return folder, IntegratedMLPipeline(config).train_final_model("lightning_cnn")


SMALL = {"max_epochs": 1, "enable_optuna": False, "enable_mlflow": False, "learning_rate": 0.01}


def as_trained(trained, **more):
    """A pipeline with the settings and the folder of the trained model."""
    folder, _ = trained
    made = IntegratedMLPipeline(ExperimentConfig(**tiny_settings(folder / "tiny.npz", folder, **SMALL | more)))
    made.prepare_data()
    return made


@pytest.fixture
def uneven_npz(tmp_path, tiny_arrays):
    """Of Donut and Scratch every third map only."""
    rare = np.isin(tiny_arrays["labels"], ["Donut", "Scratch"])
    keep = np.flatnonzero(~rare | (np.arange(len(rare)) % 3 == 0))
    path = tmp_path / "uneven.npz"
    maps = np.split(tiny_arrays["maps_flat"], tiny_arrays["offsets"][1:-1])
    some = {name: tiny_arrays[name][keep] for name in ("shapes", "labels", "group")}
    flat = [maps[i] for i in keep]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in flat])])
    np.savez(path, maps_flat=np.concatenate(flat), offsets=offsets, **some)
    return path


# --- the best epoch


def test_the_weights_of_the_best_epoch_stay_not_those_of_the_last(tiny_npz, tmp_path, monkeypatch):
    # A scripted score is not what the weights reach.
    monkeypatch.setattr(IntegratedMLPipeline, "_check_is_what_was_trained", lambda *_: None)
    Scripted.scripts = [[0.2, 0.7, 0.5, 0.4]]
    made = pipeline(tiny_npz, tmp_path, max_epochs=4)
    record = made.train_final_model("scripted")
    assert (record["epochs"], record["best_epoch"]) == (4, 2)
    assert record["history"]["val_macro_f1"] == pytest.approx([0.2, 0.7, 0.5, 0.4])
    assert made.load_model(record).network.epoch == 2
    (result,), _ = made.evaluate([record])
    resumed = pipeline(tiny_npz, tmp_path, max_epochs=4, resume=True)
    assert resumed.load_model(resumed.train_final_model("scripted")).network.epoch == 2
    assert (result["best_epoch"], result["epochs"]) == (2, 4)


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_after_so_many_epochs_without_a_better_score_and_not_before(patience, tiny_npz, tmp_path):
    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    Scripted.scripts = [rising + [0.5] * 20]
    made = pipeline(tiny_npz, tmp_path, max_epochs=20, early_stopping_patience=patience)
    record = made.train_final_model("scripted")
    assert (record["best_epoch"], record["epochs"]) == (6, 6 + patience)
    assert made.load_model(record).network.epoch == 6


def test_a_resumed_training_goes_on_with_its_history_its_best_epoch_and_its_patience(tiny_npz, tmp_path):
    scores = [0.1, 0.8, 0.3, 0.4, 0.5, 0.6]

    class Cut(Exception):
        pass

    def cut_off_in_epoch_4(self):
        raise Cut

    Scripted.scripts = [scores]
    first = pipeline(tiny_npz, tmp_path, max_epochs=6, early_stopping_patience=3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        start = Scripted.on_train_epoch_start
        patch.setattr(
            Scripted,
            "on_train_epoch_start",
            lambda self: start(self) if self.current_epoch < 3 else cut_off_in_epoch_4(self),
        )
        first.train_final_model("scripted")
    Scripted.scripts = [scores]
    resumed = pipeline(tiny_npz, tmp_path, max_epochs=6, early_stopping_patience=3, resume=True)
    record = resumed.train_final_model("scripted")
    assert record["history"]["epoch"] == [1, 2, 3, 4, 5]  # three without a better one after the second
    assert record["history"]["val_macro_f1"] == pytest.approx(scores[:5])
    assert record["best_epoch"] == 2 and resumed.load_model(record).network.epoch == 2


def test_the_best_model_is_the_one_that_validation_prefers_where_test_prefers_another(tiny_npz, tmp_path, monkeypatch):
    """The first model is right on all validation maps and on no test map, the second the other way round."""
    names = ["lightning_cnn", "scripted"]
    made = pipeline(tiny_npz, tmp_path, model_type=names)
    registered = []

    def made_up_scores(self, records):
        def scores(part, right):
            answers = self.maps.labels[self.split.parts()[part]] + (not right)
            predicted = Predictions(
                np.eye(9)[answers % 9], answers - (not right), self.maps.groups[self.split.parts()[part]], CLASS_NAMES
            )
            return compute_metrics(predicted), predicted

        results, predictions = [], []
        for record in records:
            first = record["model_type"] == names[0]
            test, predicted = scores("test", not first)
            parts = {"validation": scores("validation", first)[0], "test": test}
            results.append({**record, **parts, "latency_ms": 1.0})
            predictions.append(predicted)
        return results, predictions

    train = IntegratedMLPipeline.train_final_model
    monkeypatch.setattr(IntegratedMLPipeline, "evaluate", made_up_scores)
    monkeypatch.setattr(
        IntegratedMLPipeline,
        "train_final_model",
        lambda self, name, *_, **__: train(self, "scripted") | {"model_type": name},
    )
    monkeypatch.setattr(
        IntegratedMLPipeline, "register_best", lambda self, result, *_, **__: registered.append(result["model_type"])
    )
    summary = made.run_complete_pipeline()
    assert {m["model_type"]: m["test"]["macro_f1"] for m in summary["models"]} == {names[0]: 0.0, names[1]: 1.0}
    assert summary["best_model"] == names[0]
    assert registered == [names[0]]
    assert summary["verdict"].startswith(names[0])


# --- what reaches a training


def start_of(made, what):
    """Starts the final training, or the first trial of a search."""
    return (lambda: made.train_final_model(made.config.model_type)) if what == "final training" else (
        lambda: made.search(made.config.model_type)
    )  # fmt: skip


BOTH = pytest.mark.parametrize("what", ["final training", "trial"])


@BOTH
def test_balancing_by_loss_weighs_the_loss_by_the_inverse_root_of_the_frequency(
    what, uneven_npz, tmp_path, monkeypatch
):
    for on in (True, False):
        made = pipeline(uneven_npz, tmp_path, model_type="lightning_cnn", balance_by="loss", class_balancing=on)
        seen = before_training(monkeypatch, start_of(made, what))
        counts = torch.bincount(torch.from_numpy(made.maps.labels[made.split.train]), minlength=9).float()
        assert counts.max() > 2 * counts.min()
        weights = counts.rsqrt() * counts.sum() / counts.sqrt().sum() if on else None
        model = seen.model.eval()  # no dropout: the loss can be computed by hand
        images, labels = torch.rand(45, 1, 16, 16), torch.arange(45) % 4  # not balanced, so that smoothing shows
        with pytest.warns(UserWarning, match="self.log"):
            loss = unattached(model).training_step((images, labels), 0)
        expected = F.cross_entropy(model(images), labels, weight=weights, label_smoothing=0.05)
        torch.testing.assert_close(loss, expected)
        drawn = labels_of_an_epoch(seen.data)
        assert len(drawn) == 16 * (len(made.split.train) // 16)  # every map once, but for a last small batch
        assert drawn.bincount(minlength=9).le(counts).all()


def unattached(model):
    model._trainer = None
    return model


def labels_of_an_epoch(data):
    loader = data.train_dataloader()
    return torch.cat([labels for _, labels in loader])


@BOTH
def test_balancing_by_sampling_draws_rare_classes_more_often_and_leaves_the_loss_alone(
    what, uneven_npz, tmp_path, monkeypatch
):
    share = {}
    for on in (True, False):
        made = pipeline(uneven_npz, tmp_path, model_type="lightning_cnn", class_balancing=on)
        seen = before_training(monkeypatch, start_of(made, what))
        assert seen.model.loss.weight is None
        loader, drawn = seen.data.train_dataloader(), []
        for epoch in range(10):
            loader.sampler.set_epoch(epoch)
            drawn += [labels for _, labels in loader]
        drawn = torch.cat(drawn)
        share[on] = torch.isin(drawn, torch.tensor([1, 7])).float().mean().item()
    counts = np.bincount(made.maps.labels[made.split.train], minlength=9)
    roots = np.sqrt(counts)
    assert share[True] == pytest.approx(roots[[1, 7]].sum() / roots.sum(), abs=0.02)
    assert share[False] == pytest.approx(counts[[1, 7]].sum() / counts.sum(), abs=0.02)


@pytest.mark.parametrize("augmentation", [True, False])
def test_training_maps_are_augmented_if_asked_for_and_validation_maps_never(augmentation, tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, max_epochs=2, data_augmentation=augmentation)
    made.train_final_model("scripted")
    originals = {part: as_bytes(encode(made.data_module().images(part))) for part in ("train", "validation")}
    trained, validated = as_bytes(torch.cat(Scripted.seen["fit"])), as_bytes(torch.cat(Scripted.seen["val"]))
    assert validated == originals["validation"] * 2
    as_they_are = np.mean([one in set(originals["train"]) for one in trained])
    # One of eight views is the map as it is; most of those have a noisy die.
    assert as_they_are < 0.2 if augmentation else as_they_are == 1
    if augmentation:
        turned = {v for view in symmetries(encode(made.data_module().images("train"))) for v in as_bytes(view < 0)}
        outlines = as_bytes(torch.cat(Scripted.seen["fit"]) < 0)
        assert np.mean([one in turned for one in outlines]) > 0.5  # noise moves no edge of the wafer


def as_bytes(images):
    return [one.numpy().tobytes() for one in images]


@BOTH
def test_the_parts_are_what_the_split_says_and_the_test_part_is_not_served(what, tiny_npz, tmp_path, monkeypatch):
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", seed=1)
    data = before_training(monkeypatch, start_of(made, what)).data
    split, images = split_by_lot(made.maps, seed=1), resize_maps(made.maps, 16)
    assert made.split.fingerprint == split.fingerprint != split_by_lot(made.maps, seed=0).fingerprint
    loaders = {"train": data.train_dataloader(), "validation": data.val_dataloader(), "test": data.test_dataloader()}
    for part, loader in loaders.items():
        assert torch.equal(loader.dataset.images, images[split.parts()[part]]), part
        assert loader.dataset.labels.tolist() == made.maps.labels[split.parts()[part]].tolist(), part


def test_settings_of_the_data_reach_the_reader(tmp_path):
    made = pipeline("synthetic", tmp_path, samples_per_class=30, max_samples_per_class=20, seed=3)
    made.prepare_data()
    expected = load_wafer_maps("synthetic", samples_per_class=30, max_samples_per_class=20, seed=3)
    assert made.maps.class_counts.tolist() == [20] * 9
    assert made.maps.digests().tolist() == expected.digests().tolist()


def test_the_trainer_is_what_the_configuration_asks_for(tiny_npz, tmp_path, monkeypatch):
    made = pipeline(
        tiny_npz, tmp_path, model_type="lightning_cnn", max_epochs=7, search_epochs=3, accumulate_grad_batches=2,
        precision="bf16-mixed", accelerator="cpu", early_stopping_patience=4, batch_size=8, image_size=20,
    )  # fmt: skip
    final, trial = (before_training(monkeypatch, start_of(made, what)) for what in ("final training", "trial"))
    assert (final.trainer.max_epochs, trial.trainer.max_epochs) == (7, 3)
    for seen in (final, trial):
        assert seen.trainer.accumulate_grad_batches == 2
        assert seen.trainer.precision == "bf16-mixed"
        assert seen.data.batch_size == 8 and len(next(iter(seen.data.train_dataloader()))[0]) == 8
        assert seen.data.images("train").shape[2:] == (20, 20)
    stopping = final.callback(EarlyStopping)
    assert (stopping.monitor, stopping.mode, stopping.patience) == ("val_macro_f1", "max", 4)


def test_a_learning_rate_of_the_configuration_takes_the_place_of_the_models_own(tiny_npz, tmp_path, monkeypatch):
    own, asked = (
        before_training(
            monkeypatch,
            start_of(pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", learning_rate=rate), "final training"),
        ).model.learning_rate
        for rate in (None, 0.0123)
    )
    assert (own, asked) == (MODEL_REGISTRY["lightning_cnn"].defaults["learning_rate"], 0.0123)


@BOTH
def test_the_seed_decides_the_first_weights_and_the_batches(what, tiny_npz, tmp_path, monkeypatch):
    def weights_and_labels(seed, drawn_before):
        torch.rand(drawn_before)  # must not matter
        made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", seed=seed, class_balancing=False)
        seen = before_training(monkeypatch, start_of(made, what))
        return seen.model.network[0].weight.detach().clone(), next(iter(seen.data.train_dataloader().sampler)).tolist()

    first, again, other = weights_and_labels(4, 1), weights_and_labels(4, 2), weights_and_labels(5, 3)
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert not torch.equal(first[0], other[0]) and first[1] != other[1]


def test_a_models_training_gets_its_share_of_the_time_limit(tiny_npz, tmp_path, monkeypatch):
    def budget(**more):
        made = pipeline(tiny_npz, tmp_path, model_type=["lightning_cnn", "scripted"], time_limit=90)
        return before_training(monkeypatch, lambda: made.train_final_model("scripted", **more)).callback(TimeBudget)

    assert budget().seconds == 45
    assert budget(seconds=12.5).seconds == 12.5
    without = pipeline(tiny_npz, tmp_path)
    seen = before_training(monkeypatch, start_of(without, "final training"))
    assert not [c for c in seen.trainer.callbacks if isinstance(c, TimeBudget)]


# --- the schedule


class Rates(pl.Callback):
    """The learning rate of each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, *_):
        self.steps.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_learning_rate_warms_up_and_falls_to_zero_along_a_cosine(optimizer, tiny_npz, tmp_path):
    maps = load_wafer_maps(tiny_npz)
    data = WaferMapDataModule(maps, split_by_lot(maps), image_size=16, batch_size=8)
    rates, model = Rates(), Scripted(learning_rate=0.3, optimizer=optimizer, warmup=0.2)
    trainer = pl.Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[rates], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    steps = len(rates.steps)
    assert steps == 3 * (len(data.split.train) // 8)
    for step, rate in enumerate(rates.steps):
        progress = step / steps
        if progress < 0.2:
            expected = max(0.02, progress / 0.2)
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))
        assert rate == pytest.approx(0.3 * expected, rel=1e-6, abs=1e-9), step
    assert rates.steps[0] < 0.1 * max(rates.steps) and max(rates.steps) > 0.29 and rates.steps[-1] < 0.002


def test_the_pipelines_trainings_follow_the_schedule(tiny_npz, tmp_path, monkeypatch):
    rates, fit = Rates(), pl.Trainer.fit

    def watched(trainer, *args, **kwargs):
        trainer.callbacks.append(rates)
        return fit(trainer, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", watched)
    pipeline(tiny_npz, tmp_path, learning_rate=0.1).train_final_model("scripted")
    top = int(np.argmax(rates.steps))
    assert max(rates.steps) == pytest.approx(0.1, rel=0.02)
    assert 0.1 < top / len(rates.steps) < 0.2
    assert rates.steps[:top] == sorted(rates.steps[:top]) and rates.steps[top:] == sorted(rates.steps[top:])[::-1]
    assert rates.steps[-1] < 0.002 and rates.steps[0] < 0.01


def test_the_schedule_follows_the_time_where_that_is_further_than_the_steps(tiny_npz, tmp_path):
    maps = load_wafer_maps(tiny_npz)
    data = WaferMapDataModule(maps, split_by_lot(maps), image_size=16, batch_size=8)

    class NearTheEnd(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            module.time_progress = 0.9

    rates, model = Rates(), Scripted(learning_rate=1.0)
    trainer = pl.Trainer(
        max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[NearTheEnd(), rates], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    late = 0.5 * (1 + math.cos(math.pi * (0.9 - 0.15) / 0.85))
    assert rates.steps[1:] == pytest.approx([late] * 3)


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_the_asked_optimizer_is_taken(name, kind):
    model = LightningCNN(base_channels=8, optimizer=name, learning_rate=0.07)
    model._trainer = type("AnyTrainer", (), {"estimated_stepping_batches": 10})()
    optimizer = model.configure_optimizers()["optimizer"]
    assert type(optimizer) is kind and optimizer.defaults["lr"] == 0.07
    if name == "sgd":
        assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["nesterov"]


# --- what may change when a run is resumed

# Each field with another value than its default. A new field belongs in one of the two tables, after a thought on
# whether a training that was begun with one value may end with the other.
CHANGES_THE_TRAINING = {
    "experiment_name": "other",
    "use_pretrained": False,
    "pretrained_source": "wafer",
    "max_epochs": 49,
    "batch_size": 64,
    "num_optuna_trials": 21,
    "search_epochs": 9,
    "search_share": 0.5,
    "favourite_share": 0.5,
    "sampler": "random",
    "pruner": "halving",
    "objectives": ("macro_f1", "latency"),
    "enable_optuna": False,
    "data_augmentation": False,
    "class_balancing": False,
    "balance_by": "loss",
    "samples_per_class": 149,
    "max_samples_per_class": 10,
    "image_levels": "binary",
    "image_size": 48,
    "seed": 1,
    "learning_rate": 0.001,
    "early_stopping_patience": 14,
    "time_limit": 60,
    "accelerator": "cpu",
    "devices": 1,
    "precision": "32-true",
    "accumulate_grad_batches": 2,
}
MAY_CHANGE = {
    "model_type": "lightning_cnn",  # each model has a folder of its own
    "pretrained_dir": "elsewhere",  # the source is recorded, and weights that were begun with are in the checkpoint
    "storage": "sqlite:///other.db",
    "artifacts": "elsewhere",
    "enable_mlflow": False,
    "tracker": "wandb",
    "tracking_uri": "http://127.0.0.1:5000",
    "registry_name": "other",
    "data": "other.npz",  # the fingerprint of the split knows each map
    "pretrained_wait": 1.0,
    "tune_decision": True,  # chosen after the training
    "output_dir": "elsewhere",
    "resume": True,
    "quiet": True,
}


def test_every_setting_is_known_to_change_a_training_or_not_to():
    assert {f.name for f in fields(ExperimentConfig)} == {*CHANGES_THE_TRAINING, *MAY_CHANGE}
    assert not CHANGES_THE_TRAINING.keys() & MAY_CHANGE.keys()


@pytest.mark.parametrize(("name", "value"), [*CHANGES_THE_TRAINING.items(), *MAY_CHANGE.items()])
def test_a_resumed_training_depends_on(name, value):
    config = ExperimentConfig()
    assert getattr(config, name) != value
    changed = replace(config, **{name: value}).training_fingerprint() != config.training_fingerprint()
    assert changed == (name in CHANGES_THE_TRAINING)


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 0.02}, {"class_balancing": False}, {"balance_by": "loss"}, {"data_augmentation": False},
        {"time_limit": 100}, {"seed": 7}, {"max_samples_per_class": 39},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
@pytest.mark.parametrize("state", ["finished", "cut off"])
def test_a_training_is_not_resumed_with_another(other, state, trained, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(trained[0] / "checkpoints", folder / "checkpoints")
    left = folder / "checkpoints/tiny/lightning_cnn"
    if state == "cut off":
        (left / "finished.json").unlink()
    before = {file.name: file.read_bytes() for file in left.iterdir() if file.is_file()}
    made = as_trained(trained, output_dir=folder, resume=True, **other)
    with pytest.raises(ConfigError, match="other settings or data"):
        before_training(monkeypatch, start_of(made, "final training"))
    assert {file.name: file.read_bytes() for file in left.iterdir() if file.is_file()} == before


def test_a_finished_training_is_taken_over_with_the_same_settings_and_begun_anew_without_resume(trained, monkeypatch):
    _, record = trained
    assert as_trained(trained, resume=True).train_final_model("lightning_cnn") == json.loads(json.dumps(record))
    with pytest.raises(BeforeTraining):
        monkeypatch.setattr(pl.Trainer, "fit", lambda trainer, model, **_: raise_before(trainer, model))
        folder = trained[0] / "anew"
        as_trained(trained, output_dir=folder).train_final_model("lightning_cnn")


def raise_before(trainer, model):
    raise BeforeTraining(trainer, model, None)


# --- from the weights to the answer

LEAN = Decision(views=8, prior_strength=0.5, offsets=tuple(np.linspace(-1, 1, 9).tolist()), temperature=2.5)


def answered_by_hand(model, images, decision):
    """The formula of the documentation, in double precision: mean over views, offsets, temperature."""
    with torch.inference_mode():
        views = list(symmetries(images))[: decision.views]
        mean = torch.stack([model(encode(view)).double().softmax(-1) for view in views]).mean(0)
    scores = mean.log() + torch.tensor(decision.offsets or (0.0,) * 9)
    return (scores / decision.temperature).softmax(-1).numpy()


@pytest.mark.parametrize("chosen", [LEAN, Decision(temperature=0.6), None], ids=["all", "temperature", "not tuned"])
def test_scores_are_those_of_the_answers_with_views_offsets_and_temperature(chosen, trained, monkeypatch):
    made = as_trained(trained, tune_decision=chosen is not None)
    monkeypatch.setattr("integrated_pipeline.choose_decision", lambda *_, **__: chosen)
    (result,), (predicted,) = made.evaluate([trained[1]])
    model = made.load_model(trained[1])
    for part in ("validation", "test"):
        answers = answered_by_hand(model, made.data_module().images(part), chosen or Decision())
        indices = made.split.parts()[part]
        by_hand = Predictions(answers, made.maps.labels[indices], made.maps.groups[indices], CLASS_NAMES)
        expected = compute_metrics(by_hand)
        for name in ("accuracy", "macro_f1", "expected_calibration_error", "roc_auc_ovr"):
            # In float32 two answers can tie that do not in float64, which moves the area under the curve a little.
            assert result[part][name] == pytest.approx(expected[name], abs=1e-3), (part, name)
        assert result[part]["confusion_matrix"] == expected["confusion_matrix"]
    np.testing.assert_allclose(predicted.probabilities, answers, atol=1e-5)
    assert predicted.class_names == CLASS_NAMES
    if chosen:
        plain = answered_by_hand(model, made.data_module().images("test"), Decision())
        assert np.abs(plain - answers).max() > 0.02  # what was chosen makes a difference here
        kept = result["decision"]
        assert (kept["views"], kept["temperature"]) == (chosen.views, chosen.temperature)
        assert tuple(kept["offsets"]) == chosen.offsets


def test_the_decision_is_chosen_from_validation_answers_and_training_counts(trained, monkeypatch):
    made, asked = as_trained(trained, tune_decision=True), []
    monkeypatch.setattr(
        "integrated_pipeline.choose_decision", lambda *given: asked.append(given) or choose_decision(*given)
    )
    made.evaluate([trained[1]])
    ((by_views, labels, counts),) = asked
    model, images = made.load_model(trained[1]), made.data_module().images("validation")
    for views in (1, 8):
        np.testing.assert_allclose(by_views[views], answered_by_hand(model, images, Decision(views=views)), atol=1e-5)
    assert labels.tolist() == made.maps.labels[made.split.validation].tolist()
    assert counts.tolist() == np.bincount(made.maps.labels[made.split.train], minlength=9).tolist()


def test_the_chosen_temperature_fits_the_answers_that_it_is_applied_to():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [800, 400, 200, 100])
    scores = rng.normal(0, 1, (len(labels), 4))
    scores[np.arange(len(labels)), labels] += 1.5
    sharp = torch.from_numpy(3 * scores).softmax(-1).numpy()
    decision = choose_decision({1: sharp, 8: sharp}, labels, np.bincount(labels))
    assert decision.temperature > 1.5
    answered = decision.apply(torch.from_numpy(sharp)).numpy()
    assert fit_temperature(answered, labels) == pytest.approx(1, abs=0.01)  # nothing is left to correct
    assert answered[np.arange(len(labels)), labels].mean() < sharp[np.arange(len(labels)), labels].mean()


def chosen_by_hand(by_views, labels, counts):
    """What the documentation of `choose_decision` says, in plain loops; views, strength and offsets."""
    strengths = [i / 8 for i in range(-6, 7)]
    trained = [c for c, count in enumerate(counts) if count > 0]
    logs = [math.log(max(count, 1) / sum(counts)) for count in counts]
    mean = sum(logs[c] for c in trained) / len(trained)
    shares = [logs[c] - mean if c in trained else 0.0 for c in range(len(counts))]
    smoothed = {}
    for views, probabilities in by_views.items():
        possible = np.maximum(probabilities, 1e-12) * [c in trained for c in range(len(counts))]
        log_possible = np.log(np.maximum(possible / possible.sum(1, keepdims=True), 1e-12))
        scores = []
        for strength in strengths:
            said = (log_possible + strength * np.array(shares)).argmax(1)
            f1 = [
                2 * ((said == c) & (labels == c)).sum() / ((said == c).sum() + (labels == c).sum())
                for c in sorted(set(labels.tolist()))
            ]
            scores.append(np.mean(f1))
        padded = [scores[0], *scores, scores[-1]]
        smoothed[views] = [sum(padded[i : i + 3]) / 3 for i in range(len(scores))]
    views = 8 if max(smoothed[8]) - max(smoothed[1]) > 0.002 else 1
    top = max(round(score, 6) for score in smoothed[views])
    best = [strength for strength, score in zip(strengths, smoothed[views], strict=True) if round(score, 6) == top]
    strength = min(best, key=abs)
    offsets = [strength * share for share in shares]
    return views, strength, offsets if strength else []


@pytest.mark.parametrize("seed", range(12))
def test_views_and_prior_correction_are_chosen_as_documented(seed):
    """Few maps of some classes, of one none in validation, of one none in training; answers that lean either way."""
    rng = np.random.default_rng(seed)
    counts = rng.permutation([3000, 400, 90, 30, 1, 0])
    labels = rng.choice(6, 150, p=np.sqrt(counts) / np.sqrt(counts).sum())
    scores = rng.normal(0, 1, (150, 6)) + rng.uniform(-0.6, 0.6) * np.log(np.maximum(counts, 1))
    scores[np.arange(150), labels] += 1.5
    by_views = {views: softmax(scores + rng.normal(0, noise, (150, 6))) for views, noise in ((1, 0.5), (8, 0.4))}
    by_views[1][:9] = np.eye(6)[rng.integers(6, size=9)]  # probabilities of exactly 0, as float32 has them
    decision = choose_decision(by_views, labels, counts)
    views, strength, offsets = chosen_by_hand(by_views, labels, counts)
    assert (decision.views, decision.prior_strength) == (views, strength)
    np.testing.assert_allclose(decision.offsets, offsets, rtol=1e-12, atol=1e-12)
    assert decision.left_out == tuple(np.flatnonzero(counts == 0))
    answered = Decision(offsets=decision.offsets, left_out=decision.left_out).apply(torch.from_numpy(by_views[views]))
    assert decision.temperature == pytest.approx(fit_temperature(answered.numpy(), labels), rel=1e-6)


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


@pytest.mark.parametrize(("gain", "views"), [(19, 1), (21, 8)])
def test_eight_views_must_gain_two_thousandths(gain, views):
    labels = np.arange(10_000) % 2

    def right_but_for(errors):  # as many of one class as of the other, so that macro F1 is the share of right answers
        said = np.where(np.arange(10_000) < errors, 1 - labels, labels)
        return 0.8 * np.eye(2)[said] + 0.1

    by_views = {1: right_but_for(200), 8: right_but_for(200 - gain)}
    assert choose_decision(by_views, labels, np.array([50, 50])).views == views


def test_a_correction_is_computed_in_the_precision_of_the_answers():
    probabilities = softmax(np.random.default_rng(0).normal(size=(20, 3)))
    decision = Decision(offsets=(1 / 3, -1 / 7, 0.1), temperature=1.3)
    expected = softmax((np.log(probabilities) + np.array(decision.offsets)) / 1.3)
    answered = decision.apply(torch.from_numpy(probabilities))
    assert answered.dtype == torch.float64
    np.testing.assert_allclose(answered.numpy(), expected, rtol=1e-12)
    assert decision.apply(torch.from_numpy(probabilities).float()).dtype == torch.float32
    certain = decision.apply(torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.isfinite(certain).all() and certain[0, 0] > 0.99


def test_a_temperature_stays_between_an_eighth_and_eight():
    labels = np.arange(40) % 4
    always_right, always_wrong = np.eye(4)[labels], np.eye(4)[(labels + 1) % 4]
    assert fit_temperature(0.5 * always_right + 0.125, labels) == pytest.approx(1 / 8, rel=1e-3)
    assert fit_temperature(always_wrong, labels) == pytest.approx(8, rel=1e-3)


def test_one_map_whose_class_was_given_no_chance_does_not_decide_the_temperature():
    labels = np.arange(4000) % 4
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (4000, 4)) + 1.5 * np.eye(4)[labels]
    probabilities = softmax(scores)
    before = fit_temperature(probabilities, labels)
    probabilities[0] = np.eye(4)[(labels[0] + 1) % 4]
    assert fit_temperature(probabilities, labels) == pytest.approx(before, rel=0.05)


def test_the_exported_file_gets_the_decision_and_the_weights_of_the_record(trained, monkeypatch):
    class Exported(Exception):
        pass

    asked = {}

    def export(model, path, **more):
        asked.update(more, model=model)
        raise Exported

    made = as_trained(trained, tune_decision=True)
    monkeypatch.setattr("integrated_pipeline.choose_decision", lambda *_, **__: LEAN)
    monkeypatch.setattr("integrated_pipeline.export_onnx", export)
    (result,), (predicted,) = made.evaluate([trained[1]])
    made.config.enable_mlflow = True
    made._model_runs["lightning_cnn"] = Run("")
    assert "Exported" in made.register_best(result, predicted).reason
    assert asked["decision"] == LEAN and asked["image_size"] == 16
    answers = answered_by_hand(asked["model"], made.data_module().images("test"), LEAN)
    np.testing.assert_allclose(predicted.probabilities, answers, atol=1e-5)


class CountingModel(nn.Module):
    """Remembers how many maps each call brought."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        self.calls.append(tuple(images.shape))
        return torch.arange(9.0).expand(len(images), 9)


@pytest.mark.parametrize("views", [1, 8])
def test_the_latency_of_an_answer_counts_all_the_views_that_it_takes(views, trained, monkeypatch):
    made, model = as_trained(trained, tune_decision=True), CountingModel()
    monkeypatch.setattr(made, "load_model", lambda record: model)
    monkeypatch.setattr(made, "_check_is_what_was_trained", lambda *_: None)
    monkeypatch.setattr("integrated_pipeline.choose_decision", lambda *_, **__: Decision(views=views))
    (result,), _ = made.evaluate([trained[1]])
    one_at_a_time = [shape for shape in model.calls if shape[0] <= 8]
    assert one_at_a_time and set(one_at_a_time) == {(views, 1, 16, 16)}
    assert result["latency_ms"] > 0


# --- what is written


def test_the_table_of_classes_has_each_figure_under_its_heading(tmp_path):
    labels = np.repeat([0, 1], [30, 10])
    said = np.concatenate([np.zeros(24), np.ones(6), np.ones(9), np.zeros(1)]).astype(int)
    predictions = Predictions(np.eye(2)[said], labels, np.arange(40) % 5, ("good", "bad"))
    table = write_per_class_table(compute_metrics(predictions), path=tmp_path / "t.csv")
    good, bad = csv.DictReader(table.open())
    assert (good["class"], good["support"]) == ("good", "30") and (bad["class"], bad["support"]) == ("bad", "10")
    assert float(good["precision"]) == pytest.approx(24 / 25) and float(good["recall"]) == pytest.approx(24 / 30)
    assert float(bad["precision"]) == pytest.approx(9 / 15) and float(bad["recall"]) == pytest.approx(9 / 10)
    assert float(bad["f1_low"]) < float(bad["f1"]) < float(bad["f1_high"])
