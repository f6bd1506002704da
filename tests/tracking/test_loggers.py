"""Promises about the logger that a Trainer is given."""

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from waferlab.tracking.runs import RunTree

ROOT = Path(__file__).resolve().parents[2]


class Tiny(pl.LightningModule):
    """Two weights, a metric an epoch with a name that MLflow does not take, and what a user does by hand."""

    def __init__(self, rate=0.1, *, widths=None):
        super().__init__()
        self.save_hyperparameters()
        self.layer, self.seen = torch.nn.Linear(2, 1), []

    def training_step(self, batch, _):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, _):
        self.log("val_recall@5", float(self.current_epoch))

    def on_train_end(self):
        self.logger.experiment.log_text(self.logger.run_id, "by hand", "text.txt")

    def configure_optimizers(self):
        return {
            "optimizer": (optimizer := torch.optim.SGD(self.parameters(), self.hparams.rate)),
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        }


def fit(module, tree, run, folder):
    batches = DataLoader(torch.ones(6, 2), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=tree.logger(run), default_root_dir=folder, log_every_n_steps=1,
        callbacks=[LearningRateMonitor("epoch"), DeviceStatsMonitor()], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, batches, batches)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    tree = RunTree("tiny", uri=None, folder=folder, warn=pytest.fail)
    run = tree.start("a run")
    fit(Tiny(widths={"first": 3}), tree, run, folder)
    yield tree.client(), run
    tree.close()


def steps_and_values(logged, name):
    client, run = logged
    return [(point.step, point.value) for point in client.get_metric_history(run.id, name)]


def test_the_step_of_a_metric_is_its_epoch_counted_from_one(logged):
    client, run = logged
    assert steps_and_values(logged, "val_recall5") == [(1, 0.0), (2, 1.0)]
    assert "epoch" not in client.get_run(run.id).data.metrics


def test_lightnings_own_monitors_of_rate_and_machine_work(logged):
    client, run = logged
    assert [value for _, value in steps_and_values(logged, "lr-SGD")] == pytest.approx([0.1, 0.05])
    assert any(name.startswith("DeviceStatsMonitor") for name in client.get_run(run.id).data.metrics)


def test_hyperparameters_are_parameters_of_the_run(logged):
    client, run = logged
    assert client.get_run(run.id).data.params == {"rate": "0.1", "widths/first": "3"}


def test_the_trainer_leaves_the_run_open_and_a_module_may_use_mlflows_client(logged):
    client, run = logged
    assert client.get_run(run.id).info.status == "RUNNING"
    assert [file.path for file in client.list_artifacts(run.id)] == ["text.txt"]


def test_a_store_that_cannot_be_had_costs_a_warning_and_not_the_training(tmp_path):
    warnings, database = [], tmp_path / "mlflow.db"
    database.write_text("no database")
    tree = RunTree("tiny", uri=None, folder=tmp_path, warn=warnings.append)
    logger = tree.logger(run := tree.start("a run"))
    fit(Tiny(), tree, run, tmp_path)
    assert logger.run_id is None and logger.experiment_id is None
    tree.close()
    assert len(warnings) == 1 and warnings[0].startswith("warning: goes on without MLflow")


def test_a_training_begins_without_waiting_for_a_store_that_is_slow(tmp_path):
    class Tree:
        uri, asked, experiment_id = "sqlite:///nowhere.db", [], "7"

        def run_id(self, run):
            self.asked.append(run)
            return "5"

        def client(self):
            return "the client"

        def metrics(self, *_, **__):
            pass

        params = metrics

    class Quiet(Tiny):
        def on_train_end(self):
            pass

    logger = RunTree.logger(tree := Tree(), "run")
    batches = DataLoader(torch.ones(6, 2), batch_size=2)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, default_root_dir=tmp_path, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(Quiet(), batches)  # fmt: skip
    assert not tree.asked
    assert logger.experiment.upper() == "THE CLIENT" and (logger.run_id, logger.experiment_id) == ("5", "7")
    assert tree.asked == ["run"]


def test_the_second_of_several_processes_logs_nothing(monkeypatch):
    class Tree:
        uri = "sqlite:///nowhere.db"

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = RunTree.logger(Tree(), None)
    logger.log_metrics({"loss": 1.0, "epoch": 0}, step=3)
    logger.log_hyperparams({"rate": 0.1})
    logger.experiment.log_text("run", "text", "file")
    assert logger.run_id is None


@pytest.mark.long
def test_a_logger_is_lightnings_mlflow_logger_and_is_made_without_importing_mlflow():
    code = """
import sys
from lightning.pytorch.loggers import MLFlowLogger
from waferlab.tracking.runs import RunTree
class Tree:
    uri = "sqlite:///nowhere.db"
assert isinstance(RunTree.logger(Tree(), None), MLFlowLogger)
assert not [name for name in sys.modules if name.split(".")[0] == "mlflow"]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
