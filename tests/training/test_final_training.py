"""Promises about a training: every setting reaches it, its best epoch stays, figures come from where they say."""

import shutil
from dataclasses import fields, replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_up import BeforeTraining, Scripted, as_trained, before_training, pipeline

from integrated_pipeline import IntegratedMLPipeline
from simple_model import LightningCNN
from waferlab.config import ExperimentConfig
from waferlab.data.datamodule import WaferMapDataModule
from waferlab.data.images import encode, resize_maps, symmetries
from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import split_by_lot
from waferlab.deployment.promotion import NotRegistered
from waferlab.errors import ConfigError
from waferlab.evaluation.metrics import compute_metrics
from waferlab.evaluation.predictions import Predictions
from waferlab.models.muon import Muon
from waferlab.models.registry import MODEL_REGISTRY
from waferlab.records import ModelResult
from waferlab.training.callbacks import Patience, TimeBudget
from waferlab.training.pace import QuickestThreads

pytestmark = pytest.mark.usefixtures("scripted")


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
    monkeypatch.setattr("waferlab.evaluation.inference._check_is_what_was_trained", lambda *_: None)
    Scripted.scripts = [[0.2, 0.7, 0.5, 0.4]]
    made = pipeline(tiny_npz, tmp_path, max_epochs=4)
    record = made.train_final_model("scripted")
    assert (record.epochs, record.best_epoch) == (4, 2)
    assert record.history["val_macro_f1"] == pytest.approx([0.2, 0.7, 0.5, 0.4])
    assert made.load_model(record).network.epoch == 2
    (result,), _ = made.evaluate([record])
    resumed = pipeline(tiny_npz, tmp_path, max_epochs=4, resume=True)
    assert resumed.load_model(resumed.train_final_model("scripted")).network.epoch == 2
    assert (result.best_epoch, result.epochs) == (2, 4)


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_after_so_many_epochs_without_a_better_score_and_not_before(patience, tiny_npz, tmp_path):
    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    Scripted.scripts = [rising + [0.5] * 20]
    made = pipeline(tiny_npz, tmp_path, max_epochs=10, early_stopping_patience=patience)
    record = made.train_final_model("scripted")
    assert (record.best_epoch, record.epochs) == (6, 6 + patience)  # its learning rate falls from the fifth on
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
    assert record.history["epoch"] == [1, 2, 3, 4, 5]  # three without a better one after the second
    assert record.history["val_macro_f1"] == pytest.approx(scores[:5])
    assert record.best_epoch == 2 and resumed.load_model(record).network.epoch == 2


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
            first = record.model_type == names[0]
            test, predicted = scores("test", not first)
            validation, _ = scores("validation", first)
            results.append(ModelResult(**vars(record), validation=validation, test=test, latency_ms=1.0))
            predictions.append(predicted)
        return results, predictions

    train = IntegratedMLPipeline.train_final_model
    monkeypatch.setattr(IntegratedMLPipeline, "evaluate", made_up_scores)
    monkeypatch.setattr(
        IntegratedMLPipeline,
        "train_final_model",
        lambda self, name, *_, **__: replace(train(self, "scripted"), model_type=name),
    )
    monkeypatch.setattr(
        IntegratedMLPipeline,
        "register_best",
        lambda self, result, *_, **__: registered.append(result.model_type) or NotRegistered("not asked for"),
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
    assert share[True] == pytest.approx(roots[[1, 7]].sum() / roots.sum(), abs=0.03)
    assert share[False] == pytest.approx(counts[[1, 7]].sum() / counts.sum(), abs=0.03)


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
    assert (final.model.to_go_on, trial.model.to_go_on) == (False, True)
    for seen in (final, trial):
        assert seen.trainer.accumulate_grad_batches == 2
        assert seen.trainer.precision == "bf16-mixed"
        assert seen.data.batch_size == 8 and len(next(iter(seen.data.train_dataloader()))[0]) == 8
        assert seen.data.images("train").shape[2:] == (20, 20)
    stopping = final.callback(Patience)
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


def rates_of(model, tiny_npz, tmp_path, *more, **limits):
    """The learning rate of each step, and the steps that an epoch has."""
    maps = load_wafer_maps(tiny_npz)
    data = WaferMapDataModule(maps, split_by_lot(maps), image_size=16, batch_size=8)
    rates = Rates()
    trainer = pl.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[*more, rates], limit_val_batches=0, **limits,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return rates.steps, len(data.split.train) // 8


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("decay", [0.3, 0.5])
def test_the_learning_rate_rises_stays_and_falls_to_zero(optimizer, decay, tiny_npz, tmp_path):
    model = Scripted(learning_rate=0.3, optimizer=optimizer, warmup=0.2, decay=decay)
    rates, an_epoch = rates_of(model, tiny_npz, tmp_path, max_epochs=3)
    assert len(rates) == 3 * an_epoch
    for step, rate in enumerate(rates):
        progress = step / len(rates)
        expected = min(1, max(0.02, progress / 0.2), (1 - progress) / decay)
        assert rate == pytest.approx(0.3 * expected, rel=1e-6, abs=1e-9), step
    assert rates[0] < 0.1 * max(rates) and max(rates) == pytest.approx(0.3) and rates[-1] < 0.05 * max(rates)
    level = sum(rate == max(rates) for rate in rates) / len(rates)
    assert level == pytest.approx(1 - 0.2 - decay, abs=0.03)


def test_the_learning_rate_of_what_is_to_be_gone_on_with_stays_at_its_peak(tiny_npz, tmp_path):
    model = Scripted(learning_rate=0.3, warmup=0.2)
    model.to_go_on = True
    rates, _ = rates_of(model, tiny_npz, tmp_path, max_epochs=2)
    risen = round(0.2 * len(rates)) + 1
    assert set(rates[risen:]) == {0.3} and rates[:risen] == sorted(rates[:risen]) and rates[0] < 0.01


def test_the_pipelines_trainings_follow_the_schedule(tiny_npz, tmp_path, monkeypatch):
    rates, fit = Rates(), pl.Trainer.fit

    def watched(trainer, *args, **kwargs):
        trainer.callbacks.append(rates)
        return fit(trainer, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", watched)
    pipeline(tiny_npz, tmp_path, learning_rate=0.1).train_final_model("scripted")
    steps, top = len(rates.steps), int(np.argmax(rates.steps))
    assert max(rates.steps) == pytest.approx(0.1) and 0.1 < top / steps < 0.2
    assert rates.steps[:top] == sorted(rates.steps[:top]) and set(rates.steps[top : steps // 2]) == {0.1}
    assert rates.steps[steps // 2 :] == sorted(rates.steps[steps // 2 :])[::-1]
    assert rates.steps[-1] < 0.007 and rates.steps[0] < 0.01


class NearTheEnd(pl.Callback):
    def on_train_batch_start(self, trainer, module, *_):
        module.time_progress = 0.9


def test_the_schedule_follows_the_time_where_that_is_further_than_the_steps(tiny_npz, tmp_path):
    rates, _ = rates_of(Scripted(learning_rate=1.0), tiny_npz, tmp_path, NearTheEnd(), max_steps=4)
    assert rates[1:] == pytest.approx([0.1 / 0.5] * 3)


@pytest.mark.parametrize("wrong", [{"warmup": 1.0}, {"warmup": -0.1}, {"decay": 0.0}, {"decay": 1.5}])
def test_a_share_of_the_schedule_that_is_none_is_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Scripted(**wrong)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD), ("muon", Muon)],
)
def test_the_asked_optimizer_is_taken(name, kind):
    model = LightningCNN(base_channels=8, optimizer=name, learning_rate=0.07)
    model._trainer = type("AnyTrainer", (), {"estimated_stepping_batches": 10})()
    optimizer = model.configure_optimizers()["optimizer"]
    assert type(optimizer) is kind and optimizer.defaults["lr"] == 0.07
    if name == "sgd":
        assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["nesterov"]


# --- precision and threads


@pytest.mark.parametrize("quicker", ["32-true", "bf16-mixed"])
def test_of_two_precisions_the_quicker_is_taken_as_measured_once_for_each_model(
    quicker, tiny_npz, tmp_path, monkeypatch
):
    measured = []

    def seconds_a_step(model, batch, *, precision, accelerator):
        measured.append((type(model), tuple(batch[0].shape), precision))
        return 0.1 if precision == quicker else 0.2

    monkeypatch.setattr("integrated_pipeline.possible_precisions", lambda _: ("32-true", "bf16-mixed"))
    monkeypatch.setattr("integrated_pipeline.seconds_a_step", seconds_a_step)
    made = pipeline(tiny_npz, tmp_path, precision="auto", max_epochs=1)
    assert [made.precision("scripted") for _ in range(2)] == [quicker] * 2
    assert measured == [(Scripted, (16, 1, 16, 16), precision) for precision in ("32-true", "bf16-mixed")]
    assert made.train_final_model("scripted").precision == quicker and len(measured) == 2


def test_where_one_precision_is_possible_or_asked_for_nothing_is_measured(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr("integrated_pipeline.seconds_a_step", None)
    monkeypatch.setattr("integrated_pipeline.possible_precisions", lambda _: ("bf16-mixed",))
    assert pipeline(tiny_npz, tmp_path, precision="auto").precision("scripted") == "bf16-mixed"
    monkeypatch.setattr("integrated_pipeline.possible_precisions", None)
    assert pipeline(tiny_npz, tmp_path, precision="32-true").precision("scripted") == "32-true"


@BOTH
@pytest.mark.parametrize("asked", [None, 2])
def test_trainings_have_the_threads_that_are_asked_for_or_the_quickest(what, asked, tiny_npz, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    seen = before_training(monkeypatch, start_of(pipeline(tiny_npz, tmp_path, threads=asked), what))
    chosen_as_it_goes = [c for c in seen.trainer.callbacks if isinstance(c, QuickestThreads)]
    assert (taken, len(chosen_as_it_goes)) == (([2], 0) if asked else ([], 1))


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
    "split": "ordered",
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
    "trainer": {"gradient_clip_val": 1.0},
}
MAY_CHANGE = {
    "model_type": "lightning_cnn",  # each model has a folder of its own
    "pretrained_dir": "elsewhere",  # the source is recorded, and weights that were begun with are in the checkpoint
    "storage": "sqlite:///other.db",
    "artifacts": "elsewhere",
    "heartbeat": 30,
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
    "threads": 3,  # sums are rounded elsewhere
    "workers": 3,
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
    assert as_trained(trained, resume=True).train_final_model("lightning_cnn") == record
    with pytest.raises(BeforeTraining):
        monkeypatch.setattr(pl.Trainer, "fit", lambda trainer, model, **_: raise_before(trainer, model))
        folder = trained[0] / "anew"
        as_trained(trained, output_dir=folder).train_final_model("lightning_cnn")


def raise_before(trainer, model):
    raise BeforeTraining(trainer, model, None)
