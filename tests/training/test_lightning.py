"""Promises to those who know Lightning: its Trainer, its loggers, its loaders and its names do what they expect."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from made_up import before_training, pipeline, pipeline_in

from waferlab.config import ExperimentConfig
from waferlab.errors import ConfigError
from waferlab.tracking.runs import Run

ROOT = Path(__file__).resolve().parent.parent.parent


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True
    )


# --- arguments of the Trainer


@pytest.mark.parametrize("start", ["train_final_model", "search"])
def test_any_other_argument_of_the_trainer_reaches_lightning(start, tiny_npz, tmp_path, monkeypatch):
    more = {"gradient_clip_val": 0.5, "limit_train_batches": 3}
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", trainer=more)
    trainer = before_training(monkeypatch, lambda: getattr(made, start)("lightning_cnn")).trainer
    assert (trainer.gradient_clip_val, trainer.limit_train_batches) == (0.5, 3)


def test_an_argument_of_the_trainer_does_its_work(tiny_npz, tmp_path):
    trained = [
        pipeline_in(tmp_path, output_dir=tmp_path / str(limit), trainer={"limit_train_batches": limit})
        .train_final_model("lightning_cnn").history["train_loss"]
        for limit in (1, 1.0)
    ]  # fmt: skip
    assert trained[0] != trained[1]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"gradient_clip": 1.0},
            "'gradient_clip' is no argument of Lightning's Trainer. Did you mean 'gradient_clip",
        ),
        ({"colour": 1}, "'colour' is no argument of Lightning's Trainer.$"),
        ({"precision": "16-mixed"}, "'precision' is an option of its own. Write precision='16-mixed' beside trainer"),
        ({"limit_val_batches": 1}, "'limit_val_batches' is the pipeline's own affair. Leave it out."),
        ({"check_val_every_n_epoch": 2}, "'check_val_every_n_epoch' is the pipeline's own affair. Leave it out."),
        ({"max_epochs": 3}, "'max_epochs' is an option of its own. Write max_epochs=3 beside trainer"),
        ({"max_steps": 10}, "'max_steps' is the pipeline's own affair. Leave it out."),
        ({"use_distributed_sampler": False}, "'use_distributed_sampler' is the pipeline's own affair"),
        ({"callbacks": []}, "'callbacks' is the pipeline's own affair"),
        ({"logger": False, "gradient_clip_val": 1.0}, "'logger' is the pipeline's own affair"),
    ],
)
def test_an_argument_that_the_trainer_cannot_be_given_is_answered_with_what_can(trainer, message):
    with pytest.raises(ConfigError, match=message):
        ExperimentConfig(trainer=trainer)


def test_a_strategy_reaches_lightning_on_one_device_and_is_ours_on_several(tiny_npz, tmp_path, monkeypatch):
    strategy = SingleDeviceStrategy(device="cpu")
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", trainer={"strategy": strategy})
    trainer = before_training(monkeypatch, lambda: made.train_final_model("lightning_cnn")).trainer
    assert trainer.strategy is strategy
    with pytest.raises(ConfigError, match="'strategy' is the pipeline's own affair"):
        ExperimentConfig(trainer={"strategy": "ddp"}, devices=2)


@pytest.mark.parametrize("trainer", [{"limit_train_batches": 0}, {"max_time": "00:00:00:00"}])
def test_a_training_that_ends_before_its_first_epoch_does_is_a_sentence(trainer, tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", trainer=trainer)
    with pytest.raises(ConfigError, match=r"ended before its first epoch did\. Look at what trainer="):
        made.run_complete_pipeline()
    assert not (tmp_path / "results" / "tiny" / "experiment_summary.json").exists()


# --- a Trainer of one's own


def test_models_and_loaders_work_in_a_plain_trainer(tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn")
    data = made.data_module()
    train_loader, val_loader = data.train_dataloader(), data.val_dataloader()
    images, _ = next(iter(val_loader))
    assert images.dtype == torch.uint8
    model = made.create_model("lightning_cnn", {"lr": 0.01})
    trainer = pl.Trainer(
        max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, train_loader, val_loader)
    assert trainer.callback_metrics["val_macro_f1"] > 0.3  # by chance it is a ninth
    by_module, by_loader = (trainer.validate(model, source, verbose=False)[0] for source in (data, val_loader))
    assert by_loader == pytest.approx(by_module)  # bytes are encoded as in the data module


# --- what a training tells its logger and its record


class Kept(Logger):
    """Keeps what it is given, with the epoch that it came in."""

    name = version = None

    def __init__(self):
        super().__init__()
        self.metrics, self.hyperparameters = [], {}

    def log_metrics(self, metrics, step=None):
        self.metrics.append(metrics)

    def log_hyperparams(self, params):
        self.hyperparameters |= params

    def of(self, name):
        return [metrics[name] for metrics in self.metrics if name in metrics]


def test_the_run_of_a_model_gets_each_epochs_metrics_learning_rate_and_hyperparameters(tiny_npz, tmp_path, monkeypatch):
    logger = Kept()
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", max_epochs=3)
    made.model_runs["lightning_cnn"] = wanted = Run("")
    monkeypatch.setattr(made.runs, "logger", lambda run: logger if run is wanted else False)
    history = made.train_final_model("lightning_cnn").history
    for name in ("train_loss", "val_loss", "train_macro_f1", "val_macro_f1", "train_accuracy", "val_accuracy"):
        assert logger.of(name) == pytest.approx(history[name]) and len(history[name]) == 3, name
    validated = [metrics["epoch"] for metrics in logger.metrics if "val_macro_f1" in metrics]
    assert validated == [0, 1, 2]
    (rate,) = {name for metrics in logger.metrics for name in metrics if name.startswith("lr-") and "pg1" in name}
    assert logger.of(rate) == pytest.approx(history["learning_rate"])
    assert logger.hyperparameters["base_channels"] == 16


def test_the_history_has_the_learning_rate_that_each_epoch_began_with(tiny_npz, tmp_path):
    history = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", max_epochs=5, learning_rate=0.01)
    rates = history.train_final_model("lightning_cnn").history["learning_rate"]
    assert rates == pytest.approx([0.01 * share for share in (0.02, 1.0, 1.0, 0.8, 0.4)])


# --- silence

A_RUN = """
import io, json, logging, sys, warnings
sys.path.insert(0, "tests")
from pathlib import Path
from made_up import IntegratedMLPipeline, pipeline_in
from rich.console import Console

def state():
    names = [name for name in logging.root.manager.loggerDict if name.startswith("lightning")]
    return {name: logging.getLogger(name).level for name in names}, list(warnings.filters)

made = pipeline_in(Path(sys.argv[1]), quiet=False, enable_optuna=True, num_optuna_trials=1, search_epochs=1)
ours = Console(file=io.StringIO())
levels, filters = state()
IntegratedMLPipeline(made.config, console=ours).run_complete_pipeline()
levels_after, filters_after = state()
print(json.dumps({
    "ours": len(ours.file.getvalue()) > 500,
    "levels": levels == {name: levels_after[name] for name in levels} and "lightning.pytorch" in levels,
    "filters": filters == filters_after,
}))
"""


@pytest.mark.long
def test_a_run_prints_its_own_lines_alone_and_leaves_loggers_and_warnings_as_they_were(tiny_npz, tmp_path):
    ran = run(A_RUN, tiny_npz.parent)
    assert ran.stderr == ""
    assert json.loads(ran.stdout) == {"ours": True, "levels": True, "filters": True}  # and there is no other line


BOTH_PACKAGES = """
import sys, types
sys.modules["pytorch_lightning"] = types.ModuleType("pytorch_lightning")  # as after its import
from simple_model import LightningCNN
for _ in range(2):
    LightningCNN(base_channels=8)
"""


@pytest.mark.long
def test_whoever_imports_pytorch_lightning_is_told_once_which_package_is_meant():
    told = run(BOTH_PACKAGES).stderr
    assert told.count("UserWarning") == 1
    assert "imports pytorch_lightning, whose Trainer refuses" in told
    assert "Write `import lightning.pytorch as pl`." in told


# --- names that people know

KNOWN_AS = {"lr": 0.0123, "batch": 8, "dropout_rate": 0.45}


def test_parameters_are_understood_by_the_names_that_people_know(tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn")
    model = made.create_model("lightning_cnn", KNOWN_AS)
    assert (model.learning_rate, model.hparams["dropout"]) == (0.0123, 0.45)
    with pytest.raises(ConfigError, match=r"no parameter 'learn'\. Allowed: .*dropout.*learning_rate"):
        made.create_model("lightning_cnn", {"learn": 0.1})


@pytest.mark.parametrize("names", [KNOWN_AS, {"learning_rate": 0.0123, "batch_size": 8, "dropout": 0.45}])
def test_the_final_training_has_the_parameters_by_either_name(names, tiny_npz, tmp_path, monkeypatch):
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", batch_size=32)
    seen = before_training(monkeypatch, lambda: made.train_final_model("lightning_cnn", names))
    assert seen.data.batch_size == 8 and len(next(iter(seen.data.train_dataloader()))[0]) == 8
    assert (seen.model.learning_rate, seen.model.hparams["dropout"]) == (0.0123, 0.45)


def test_a_training_is_resumed_under_either_name(tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", max_epochs=1)
    record = made.train_final_model("lightning_cnn", KNOWN_AS)
    assert record.parameters["batch_size"] == 8
    resumed = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", max_epochs=1, resume=True)
    ours = {"learning_rate": 0.0123, "batch_size": 8, "dropout": 0.45}
    assert resumed.train_final_model("lightning_cnn", ours) == record


@pytest.mark.parametrize(
    "options",
    [{"accelerator": "tpu"}, {"accelerator": "mps"}, {"devices": [0], "accelerator": "cpu"},
     {"trainer": {"gradient_clip_val": "x"}}],
)  # fmt: skip
def test_what_lightning_refuses_is_a_sentence(options, tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", max_epochs=1, **options)
    with pytest.raises(ConfigError, match=r"Lightning's Trainer refuses this \(.*Look at accelerator"):
        made.train_final_model("lightning_cnn")


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_gradients_are_clipped_in_bfloat16_too(optimizer, tiny_npz, tmp_path):
    more = {"trainer": {"gradient_clip_val": 0.5, "limit_train_batches": 2}, "precision": "bf16-mixed", "max_epochs": 1}
    made = pipeline(tiny_npz, tmp_path, model_type="lightning_cnn", **more)
    assert made.train_final_model("lightning_cnn", {"optimizer": optimizer}).epochs == 1
