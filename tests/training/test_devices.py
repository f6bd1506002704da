"""Promises about a training on several devices: here processes of the CPU, which gloo joins."""

import os
import signal
import sqlite3

import mlflow
import psutil
import pytest
import torch
from conftest import tiny_settings
from made_up import Scripted, pipeline

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.data.datamodule import EpochBatches
from waferlab.errors import ConfigError, RunError
from waferlab.training.callbacks import TimeBudget
from waferlab.training.checkpoints import read_checkpoint
from waferlab.training.devices import from_first, on_each_device

pytestmark = pytest.mark.usefixtures("scripted")


@pytest.fixture(autouse=True)
def no_process_stays():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


def batches(devices=1, **more):
    """Of an epoch, for each device."""
    given = {"n": 37, "batch_size": 8, "shuffle": True} | more
    return [list(EpochBatches(share=(rank, devices), **given)) for rank in range(devices)]


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("weights", [None, torch.arange(1.0, 38.0)])
def test_the_parts_of_all_devices_are_the_batches_of_one(devices, weights):
    (whole,) = batches(sample_weights=weights)
    parts = batches(devices, sample_weights=weights)
    assert {len(part) for part in parts} == {len(whole)}
    for of_devices, batch in zip(zip(*parts, strict=True), whole, strict=True):
        assert sorted(torch.cat(of_devices).tolist()) == sorted(batch.tolist())
        assert min(map(len, of_devices)) >= 8 // devices


@pytest.mark.parametrize(("n", "devices"), [(37, 2), (16, 3), (17, 2)])
def test_each_validation_map_is_answered_by_one_device(n, devices):
    parts = batches(devices, n=n, shuffle=False)
    assert sorted(torch.cat([batch for part in parts for batch in part]).tolist()) == list(range(n))
    for rank, part in enumerate(parts):
        batches_of_it = EpochBatches(n, batch_size=8, shuffle=False, share=(rank, devices))
        assert len(part) == len(batches_of_it) and min(map(len, part)) > 0


def test_batches_too_small_to_be_dealt_out_are_refused():
    with pytest.raises(ConfigError, match="Batches of 8 maps cannot be dealt out to 5 devices"):
        batches(5)


def test_two_devices_learn_what_one_does(tiny_npz, tmp_path):
    """Without what differs by lot, the gradients are those of the whole batch."""
    found = {}
    for devices in (1, 2):
        made = pipeline(tiny_npz, tmp_path / str(devices), devices=devices, max_epochs=3, data_augmentation=False)
        found[devices] = made.train_final_model("scripted", {"optimizer": "sgd", "dropout": 0.0, "learning_rate": 0.05})
    one, two = (read_checkpoint(tmp_path / f"{n}/checkpoints/tiny/scripted/best.ckpt")["state_dict"] for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert found[2].history["val_macro_f1"] == pytest.approx(found[1].history["val_macro_f1"])
    assert found[2].history["train_macro_f1"] == pytest.approx(found[1].history["train_macro_f1"])
    assert found[2].history["val_loss"] == pytest.approx(found[1].history["val_loss"], rel=0.05)
    assert found[2].history["train_loss"] == pytest.approx(found[1].history["train_loss"], rel=0.05)


@pytest.mark.long
def test_a_run_on_two_devices_is_one_run_with_one_champion(tiny_npz, tmp_path):
    """With a search before it, whose trials have a device each; and its best epoch scores again as it did."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    made = IntegratedMLPipeline(ExperimentConfig(**tiny_settings(
        tiny_npz, tmp_path, devices=2, workers=2, enable_optuna=True, num_optuna_trials=2, search_epochs=1,
        max_epochs=3, tracking_uri=uri,
    )))  # fmt: skip
    summary = made.run_complete_pipeline()
    (model,) = summary["models"]
    assert model["epochs"] == 3 and len(model["search"]["trials"]) == 2
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["lightning_cnn_optimized", "tiny", "trial 0", "trial 1"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    (run,) = (run for run in runs if run.info.run_name == "lightning_cnn_optimized")
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "val_macro_f1")] == [1, 2, 3]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from model_versions").fetchone() == (1,)


def on_two(work):
    heard = []
    on_each_device(work, ExperimentConfig(devices=2, accelerator="cpu"), hear=lambda *told: heard.append(told))
    return heard


def test_processes_that_share_a_training_listen_on_this_machine_alone():
    def listen(rank, tell):
        together = torch.ones(1)
        torch.distributed.all_reduce(together)
        listening = [one for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]
        tell("listens", float(together), [one.laddr.ip for one in listening])

    heard = on_two(listen)
    assert len(heard) == 2
    for _, _, together, addresses in heard:
        assert together == 2.0 and {*addresses} == {"127.0.0.1"}


def test_all_devices_end_with_the_same_weights_though_the_schedule_goes_by_the_clock(tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, devices=2, model_type="lightning_cnn")
    data, model = made.data_module(), made.create_model("lightning_cnn")
    data.setup()

    def train(rank, tell):
        made._become_worker(lambda *told: None)
        made._shares_a_training = True
        made.fit("lightning_cnn", model, data, [TimeBudget(1.5)], max_epochs=10_000)
        tell("state", {name: value.double().sum().item() for name, value in model.network.state_dict().items()})

    heard = on_two(train)
    assert len(heard) == 2 and heard[0][2] == pytest.approx(heard[1][2], rel=1e-6)


def test_a_value_is_that_of_the_first_device_and_without_others_one_s_own(tiny_npz, tmp_path):
    made = pipeline(tiny_npz, tmp_path, devices=2)
    data, model = made.data_module(), made.create_model("scripted")
    data.setup()

    def train(rank, tell):
        made._become_worker(lambda *told: None)
        made._shares_a_training = True
        made.fit("scripted", model, data, [Tells(tell, rank)], max_epochs=1)

    class Tells(TimeBudget):
        def __init__(self, tell, rank):
            super().__init__(60)
            self.tell, self.rank = tell, rank

        def on_train_epoch_start(self, trainer, pl_module):
            self.tell("value", from_first(10.0 + self.rank))

    assert from_first(3.0) == 3.0
    assert [value for _, _, value in on_two(train)] == [10.0, 10.0]


def test_where_a_process_is_killed_a_sentence_says_so_and_the_training_goes_on_from_its_last_epoch(tiny_npz, tmp_path):
    start = Scripted.on_train_epoch_start

    def dies(self):
        if self.current_epoch == 2 and self.trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scripted, "on_train_epoch_start", dies)
        with pytest.raises(RunError, match=r"One of the 2 processes .* is gone"):
            pipeline(tiny_npz, tmp_path, devices=2, max_epochs=4).train_final_model("scripted")
    record = pipeline(tiny_npz, tmp_path, devices=2, max_epochs=4, resume=True).train_final_model("scripted")
    assert record.history["epoch"] == [1, 2, 3, 4]


def test_what_goes_wrong_in_a_process_is_raised_in_the_program(tiny_npz, tmp_path, monkeypatch):
    def fails(self):
        raise MemoryError("no more")

    monkeypatch.setattr(Scripted, "on_train_epoch_start", fails)
    with pytest.raises(MemoryError, match="no more"):
        pipeline(tiny_npz, tmp_path, devices=2).train_final_model("scripted")


def test_several_gpus_are_answered_with_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="devices=2 with GPUs is not possible yet"):
        on_each_device(lambda *_: None, ExperimentConfig(devices=2), hear=print)
