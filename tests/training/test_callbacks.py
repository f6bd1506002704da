"""Promises about what happens around a training, told with a clock of their own: no second passes here."""

import io
import math
import os
import re
import signal
import threading
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from made_up import Scripted, pipeline
from rich.console import Console

from waferlab.errors import TrainingDivergedError
from waferlab.models.registry import MODEL_REGISTRY, ModelSpec
from waferlab.training import checkpoints
from waferlab.training.callbacks import BestAnswers, EpochLines, History, KeepInterrupt, Patience, TimeBudget
from waferlab.training.checkpoints import CheckpointFiles
from waferlab.training.progress import Bars, ProgressBar, ToldProgress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("waferlab.training.callbacks.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def a_trainer(**more):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    return SimpleNamespace(
        should_stop=False, callbacks=[], max_epochs=10, current_epoch=0, callback_metrics={}, optimizers=[optimizer],
        **more,
    )  # fmt: skip


def a_module():
    return SimpleNamespace(time_progress=0.0, learning_rate=0.004)


# --- time budget


def test_the_time_starts_with_the_training_and_drives_the_schedule_until_it_is_used_up(clock):
    budget, trainer, module = TimeBudget(20), a_trainer(), a_module()
    clock.now += 500  # building the model is not training
    budget.on_fit_start(trainer, module)
    seen = []
    for _ in range(4):
        budget.on_train_batch_start(trainer, module, None, 0)
        seen.append((module.time_progress, trainer.should_stop))
        clock.now += 8
    assert seen == [(0.0, False), (0.4, False), (0.8, False), (1.0, True)]


def test_the_batch_at_the_very_end_of_the_time_is_the_last(clock):
    budget, trainer, module = TimeBudget(20), a_trainer(), a_module()
    budget.on_fit_start(trainer, module)
    clock.now += 20
    budget.on_train_batch_start(trainer, module, None, 0)
    assert trainer.should_stop and module.time_progress == 1.0


def test_a_resumed_training_has_the_rest_of_the_time_only(clock):
    before, trainer, module = TimeBudget(20), a_trainer(), a_module()
    before.on_fit_start(trainer, module)
    clock.now += 15
    kept = before.state_dict()

    clock.now = 5.0  # another day, another process
    resumed = TimeBudget(20)
    resumed.load_state_dict(kept)
    resumed.on_fit_start(trainer, module)
    resumed.on_train_batch_start(trainer, module, None, 0)
    assert module.time_progress == 0.75 and not trainer.should_stop
    clock.now += 5
    resumed.on_train_batch_start(trainer, module, None, 0)
    assert trainer.should_stop and resumed.used() == 20
    assert resumed.state_dict() == {"used": 20}


# --- history


def an_epoch(callback, trainer, epoch, *, rate=0.5, **metrics):
    trainer.current_epoch = epoch
    trainer.optimizers[0].param_groups[0]["lr"] = rate
    callback.on_train_epoch_start(trainer, a_module())
    trainer.callback_metrics = {key: torch.tensor(value) for key, value in metrics.items()}
    trainer.optimizers[0].param_groups[0]["lr"] = 0.0
    callback.on_train_epoch_end(trainer, a_module())


def test_the_history_keeps_the_metrics_and_the_first_learning_rate_of_each_epoch_under_its_number():
    history, trainer = History(), a_trainer()
    first = {"train_loss": 1.5, "val_loss": 2.0, "val_macro_f1": 0.25, "train_macro_f1": 0.5, "val_accuracy": 0.75}
    second = {"train_loss": 1.0, "val_loss": 1.0, "val_macro_f1": 0.5, "train_macro_f1": 0.75, "val_accuracy": 1.0}
    an_epoch(history, trainer, 0, **first, rate=0.125, another_metric=0.1)
    an_epoch(history, trainer, 1, **second, rate=0.25)
    first, second = first | {"learning_rate": 0.125}, second | {"learning_rate": 0.25}
    assert history.epochs == [{"epoch": 1, **first}, {"epoch": 2, **second}]
    series = history.series()
    assert series == {"epoch": [1, 2], **{key: [first[key], second[key]] for key in first}}
    assert next(iter(series)) == "epoch"


def test_a_curve_that_lacks_an_epoch_is_left_out():
    history, trainer = History(), a_trainer()
    an_epoch(history, trainer, 0, train_loss=1.5)
    an_epoch(history, trainer, 1, train_loss=1.0, val_loss=2.0)
    assert history.series() == {"epoch": [1, 2], "train_loss": [1.5, 1.0], "learning_rate": [0.5, 0.5]}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_training_with_epoch_rate_and_remedy(loss):
    history = History()
    with pytest.raises(
        TrainingDivergedError, match=rf"loss is {loss} after epoch 3\. Lower .*\(now 0\.004\) or .*32-true"
    ):
        an_epoch(history, a_trainer(), 2, train_loss=loss)
    assert history.epochs == []


def test_a_validation_loss_that_is_no_number_ends_the_training_before_it_is_written_down():
    history = History()
    with pytest.raises(TrainingDivergedError, match=r"the validation loss is nan after epoch 3\. Lower"):
        an_epoch(history, a_trainer(), 2, train_loss=1.0, val_loss=math.nan)
    assert history.epochs == []


def test_the_history_of_a_resumed_training_goes_on_with_epochs_and_seconds(clock):
    before, trainer = History(), a_trainer()
    clock.now += 100
    before.on_fit_start(trainer, a_module())
    an_epoch(before, trainer, 0, train_loss=1.5)
    clock.now += 7
    kept = before.state_dict()
    assert kept == {"epochs": [{"epoch": 1, "train_loss": 1.5, "learning_rate": 0.5}], "seconds": 7}

    clock.now = 3.0
    resumed = History()
    resumed.load_state_dict(kept)
    clock.now += 50  # loading is not training
    resumed.on_fit_start(trainer, a_module())
    clock.now += 5
    an_epoch(resumed, trainer, 1, train_loss=1.0)
    assert resumed.seconds() == 12
    assert resumed.series() == {"epoch": [1, 2], "train_loss": [1.5, 1.0], "learning_rate": [0.5, 0.5]}


def test_a_line_an_epoch_says_how_far_it_is_how_good_and_how_long_it_takes(clock):
    said = []
    lines, trainer = EpochLines(said.append), a_trainer()
    clock.now += 500  # building the model is not training
    lines.on_fit_start(trainer, a_module())
    for epoch in range(2):
        clock.now += 4
        an_epoch(lines, trainer, epoch, train_loss=1.25, val_macro_f1=0.5)
    assert said == [
        "  epoch 1/10  val macro F1 0.500  train loss 1.250  at most 36 s left",
        "  epoch 2/10  val macro F1 0.500  train loss 1.250  at most 32 s left",
    ]
    budget = TimeBudget(20)
    trainer.callbacks = [lines, budget]
    budget.on_fit_start(trainer, a_module())
    clock.now += 4
    an_epoch(lines, trainer, 2, train_loss=1.25)
    assert said[-1] == "  epoch 3/10  val macro F1 0.000  train loss 1.250  at most 16 s left"
    clock.now += 30
    an_epoch(lines, trainer, 3, train_loss=1.25)
    assert said[-1].endswith("at most 0 s left")


def test_the_seconds_of_all_sittings_are_in_the_record_and_off_the_budget(
    clock, scripted, tiny_npz, tmp_path, monkeypatch
):
    start, settings = Scripted.on_train_epoch_start, {"max_epochs": 2, "time_limit": 10_000}

    def slow_epoch(self):
        if self.current_epoch == 1 and clock.now > 2000:
            raise KeyboardInterrupt
        start(self)
        clock.now += 1500 if self.current_epoch == 0 else 30

    monkeypatch.setattr(Scripted, "on_train_epoch_start", slow_epoch)
    with pytest.raises(KeyboardInterrupt):
        pipeline(tiny_npz, tmp_path, **settings).train_final_model("scripted")
    clock.now = 5.0  # another day, another process
    record = pipeline(tiny_npz, tmp_path, resume=True, **settings).train_final_model("scripted")
    assert (record.epochs, record.train_seconds) == (2, 1530)
    state = torch.load(tmp_path / "checkpoints/tiny/scripted/resume.ckpt", weights_only=True)["callbacks"]
    (budget,) = [value for key, value in state.items() if key.startswith("TimeBudget")]
    assert budget == {"used": 1530}


# --- patience


class Rates(pl.Callback):
    """The learning rate that each epoch begins and the last one ends with."""

    def __init__(self):
        self.epochs, self.last = {}, None

    def on_train_batch_start(self, trainer, module, *_):
        self.last = trainer.optimizers[0].param_groups[0]["lr"]
        self.epochs.setdefault(trainer.current_epoch, self.last)


@pytest.fixture
def rates(monkeypatch):
    """Of each training one."""
    seen, fit = [], pl.Trainer.fit

    def watched(trainer, *args, **kwargs):
        seen.append(Rates())
        trainer.callbacks.append(seen[-1])
        return fit(trainer, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", watched)
    return seen


NO_BETTER = [0.3, 0.5, 0.4, 0.4, 0.6, 0.61, 0.62, 0.63]  # from the second on, and then as the rate falls
PATIENT = {"max_epochs": 12, "early_stopping_patience": 2, "learning_rate": 0.1}


def test_a_training_that_gets_no_better_at_its_peak_lets_the_learning_rate_fall_before_it_ends(
    scripted, rates, tiny_npz, tmp_path
):
    Scripted.scripts = [NO_BETTER]
    record = pipeline(tiny_npz, tmp_path, **PATIENT).train_final_model("scripted")
    assert record.epochs == 8 and record.best_epoch == 8  # after four of twelve: the fall has half of what they are
    begins = [rates[0].epochs[epoch] for epoch in range(8)]
    assert begins[2:5] == pytest.approx([0.1] * 3)
    assert begins[5:] == pytest.approx([0.075, 0.05, 0.025]) and 0 < rates[0].last < 0.002


def test_patience_goes_on_counting_while_the_learning_rate_falls(scripted, tiny_npz, tmp_path):
    Scripted.scripts = [NO_BETTER[:4] + [0.4] * 4]
    assert pipeline(tiny_npz, tmp_path, **PATIENT).train_final_model("scripted").epochs == 4 + 2


@pytest.mark.parametrize("decay", [0.3, 0.5])
def test_a_training_that_is_resumed_while_it_falls_early_ends_as_an_unbroken_one(
    decay, scripted, rates, tiny_npz, tmp_path, monkeypatch
):
    """With a share of 0.3 to fall in, four epochs of 0.7 are no whole number."""
    spec = ModelSpec(Scripted, defaults={"decay": decay})
    monkeypatch.setitem(MODEL_REGISTRY, "scripted", spec)
    start = Scripted.on_train_epoch_start

    def interrupted(self):
        if self.current_epoch == 5 and interrupt:
            raise KeyboardInterrupt
        start(self)

    monkeypatch.setattr(Scripted, "on_train_epoch_start", interrupted)
    interrupt, Scripted.scripts = False, [NO_BETTER] * 3
    unbroken = pipeline(tiny_npz, tmp_path / "unbroken", **PATIENT).train_final_model("scripted")
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        pipeline(tiny_npz, tmp_path / "broken", **PATIENT).train_final_model("scripted")
    interrupt = False
    resumed = pipeline(tiny_npz, tmp_path / "broken", resume=True, **PATIENT).train_final_model("scripted")
    assert unbroken.epochs == math.ceil(4 / (1 - decay)) and resumed.history == unbroken.history
    assert rates[2].epochs[5] == rates[0].epochs[5] and rates[2].last == rates[0].last < 0.01
    expected, found = (
        torch.load(tmp_path / run / "checkpoints/tiny/scripted/resume.ckpt", weights_only=True)["state_dict"]
        for run in ("unbroken", "broken")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- answers


def test_the_answers_of_the_best_epoch_are_kept_in_the_order_of_the_maps():
    answers, trainer = BestAnswers(), a_trainer()
    assert answers.best.tolist() == []
    for score, said in ((0.5, ([1, 2], [3])), (0.7, ([4, 5], [6])), (0.7, ([7, 7], [7])), (0.6, ([8, 8], [8]))):
        for batch in said:
            answers.on_validation_batch_end(trainer, a_module(), torch.tensor(batch), None, 0)
        trainer.callback_metrics = {"val_macro_f1": torch.tensor(score)}
        answers.on_validation_end(trainer, a_module())
    assert answers.best.tolist() == [4, 5, 6] and answers.best.dtype == np.int64


# --- checkpoint files


def test_a_checkpoint_is_one_whole_file_and_torch_is_left_as_it_was(tmp_path):
    file, files = tmp_path / "new" / "folder" / "a.ckpt", CheckpointFiles()
    for setting in (True, False):
        torch.serialization.set_crc32_options(setting)
        try:
            files.save_checkpoint({"weights": torch.arange(3)}, str(file))
            assert torch.serialization.get_crc32_options() is setting
            with pytest.raises(AttributeError):
                files.save_checkpoint({"cannot be stored": lambda: None}, file)
            assert torch.serialization.get_crc32_options() is setting
        finally:
            torch.serialization.set_crc32_options(True)
    assert [f.name for f in file.parent.iterdir()] == ["a.ckpt"]
    assert torch.equal(files.load_checkpoint(file, weights_only=True)["weights"], torch.arange(3))


def test_a_checkpoint_takes_its_place_only_when_it_is_whole(tmp_path, monkeypatch):
    file, files, seen = tmp_path / "a.ckpt", CheckpointFiles(), []
    files.save_checkpoint({"weights": torch.zeros(3)}, file)

    def watched(source, target):
        seen.append((torch.load(source, weights_only=True)["weights"].tolist(), target == file))
        seen.append(torch.load(file, weights_only=True)["weights"].tolist())
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(checkpoints.os, "replace", watched)
    files.save_checkpoint({"weights": torch.ones(3)}, file)
    assert seen == [([1.0] * 3, True), [0.0] * 3]
    assert torch.load(file, weights_only=True)["weights"].tolist() == [1.0] * 3


def test_trainings_write_their_checkpoints_so(scripted, tiny_npz, tmp_path, monkeypatch):
    Scripted.scripts.append([0.5, 0.4])
    written, save = [], CheckpointFiles.save_checkpoint

    def watched(self, checkpoint, path, storage_options=None):
        written.append(str(path))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(CheckpointFiles, "save_checkpoint", watched)
    pipeline(tiny_npz, tmp_path).train_final_model("scripted")
    folder = tmp_path / "checkpoints/tiny/scripted"
    assert sorted(written) == [str(folder / name) for name in ("best.ckpt", "resume.ckpt", "resume.ckpt")]
    kept = {key.split("{")[0] for key in torch.load(folder / "resume.ckpt", weights_only=True)["callbacks"]}
    assert {"History", "Patience", "_Kept"} <= kept


# --- Ctrl-C


@pytest.fixture
def handler():
    """Ctrl-C with a handler of this test's, which is there again at its end."""
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append("ours"))
    yield calls
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_was_swallowed_is_raised_again_at_the_next_batch_and_its_handler_is_given_back(handler):
    keep, trainer, module = KeepInterrupt(), a_trainer(), a_module()
    with pytest.raises(KeyboardInterrupt), keep.heeded():
        keep.on_fit_start(trainer, module)
        keep.on_train_batch_start(trainer, module, None, 0)  # nothing happened: nothing is raised
        with pytest.raises(KeyboardInterrupt):  # as in a destructor, where Python would drop it
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(5)
        with pytest.raises(KeyboardInterrupt):
            keep.on_train_batch_start(trainer, module, None, 1)
        assert handler == []
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Lightning does
        raise SystemExit(1)  # and this, too
    signal.raise_signal(signal.SIGINT)
    assert handler == ["ours"]


def test_the_handler_is_given_back_after_a_training_that_nobody_interrupts(handler):
    keep = KeepInterrupt()
    with keep.heeded():
        keep.on_fit_start(a_trainer(), a_module())
    signal.raise_signal(signal.SIGINT)
    assert handler == ["ours"]


def test_a_training_outside_of_the_main_thread_leaves_the_interrupt_alone(handler):
    keep, errors = KeepInterrupt(), []

    def train():
        try:
            with keep.heeded():
                keep.on_fit_start(a_trainer(), a_module())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert errors == []
    signal.raise_signal(signal.SIGINT)
    assert handler == ["ours"]


# --- the bar


def test_the_bar_shows_the_larger_share_of_steps_and_time_and_goes_away(clock):
    screen = io.StringIO()
    bar = ProgressBar(Console(file=screen, force_terminal=True, width=100, color_system=None), "a model")
    trainer, module = a_trainer(global_step=1, estimated_stepping_batches=4), a_module()
    bar.on_fit_start(trainer, module)
    (task,) = bar._progress.tasks
    assert (task.total, task.completed, task.description) == (1.0, 0, "a model")
    bar.on_train_batch_end(trainer, module, None, None, 0)
    assert task.completed == 0.25 and task.description == "a model  epoch 1/10"
    module.time_progress, trainer.current_epoch = 0.5, 2
    trainer.callback_metrics = {"val_macro_f1": torch.tensor(0.75)}
    bar.on_train_batch_end(trainer, module, None, None, 0)
    assert task.completed == 0.5 and task.description == "a model  epoch 3/10  val macro F1 0.750"
    bar._progress.refresh()
    assert re.search(
        r"  a model  epoch 3/10  val macro F1 0\.750 .*━.*  50% (\d:\d\d|-:--):(\d\d|--)", screen.getvalue()
    )
    assert bar._progress.live.transient is True  # it leaves no line behind
    bar.on_fit_end(trainer, module)
    assert not bar._progress.live.is_started
    bar.on_fit_start(trainer, module)
    bar.on_exception(trainer, module, ValueError())
    assert not bar._progress.live.is_started


@pytest.mark.parametrize(("steps", "share"), [(0, 0), (1, 1)])
def test_a_training_of_one_step_or_none_does_not_stop_the_bar(steps, share):
    bar = ProgressBar(Console(file=io.StringIO()), "a model")
    trainer, module = a_trainer(global_step=steps, estimated_stepping_batches=steps), a_module()
    bar.on_fit_start(trainer, module)
    bar.on_train_batch_end(trainer, module, None, None, 0)
    assert bar._progress.tasks[0].completed == share
    bar.on_fit_end(trainer, module)


def test_another_process_is_told_how_far_a_training_is_a_few_times_a_second(monkeypatch):
    clock, told = SimpleNamespace(now=1000.0), []
    monkeypatch.setattr("waferlab.training.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    progress = ToldProgress("trial 3", lambda *what: told.append(what))
    trainer, module = a_trainer(global_step=1, estimated_stepping_batches=4), a_module()
    progress.on_train_batch_end(trainer, module, None, None, 0)
    clock.now += 0.2
    progress.on_train_batch_end(trainer, module, None, None, 0)  # it was told just now
    clock.now += 0.1
    module.time_progress, trainer.callback_metrics = 0.5, {"val_macro_f1": torch.tensor(0.75)}
    progress.on_train_batch_end(trainer, module, None, None, 0)
    assert told == [
        ("trial 3", 0.25, "trial 3  epoch 1/10"),
        ("trial 3", 0.5, "trial 3  epoch 1/10  val macro F1 0.750"),
    ]
    progress.on_exception(trainer, module, ValueError())
    progress.teardown(trainer, module, "fit")
    assert told[2:] == [("trial 3", 1.0, "")] * 2


def test_each_of_several_trainings_has_a_bar_and_none_is_left_when_they_end():
    bars = Bars(Console(file=io.StringIO(), force_terminal=True, width=100))
    live = bars._progress.live
    bars.update("trial 0", 0.25, "trial 0  epoch 1/4")
    bars.update("trial 1", 0.1, "trial 1  epoch 1/4")
    bars.update("trial 0", 0.5, "trial 0  epoch 2/4")
    shown = {task.description: task.completed for task in bars._progress.tasks}
    assert shown == {"trial 0  epoch 2/4": 0.5, "trial 1  epoch 1/4": 0.1} and live.is_started
    bars.update("trial 0", 1.0, "")
    bars.remove("trial 0")  # it is gone already
    assert [task.description for task in bars._progress.tasks] == ["trial 1  epoch 1/4"] and live.is_started
    bars.update("trial 1", 1.0, "")
    assert not bars._progress.tasks and not live.is_started
    bars.update("trial 2", 0.5, "trial 2  epoch 1/4")
    assert live.is_started
    bars.remove("trial 2")
    assert not live.is_started


def test_epochs_that_do_not_beat_the_trial_that_is_gone_on_with_are_no_better():
    patience, seen = Patience(2, best=0.9), []
    for epoch, score in enumerate((0.80, 0.84, 0.91, 0.85, 0.86)):
        trainer = SimpleNamespace(
            callback_metrics={"val_macro_f1": torch.tensor(score)}, current_epoch=epoch, fast_dev_run=False,
            strategy=SimpleNamespace(reduce_boolean_decision=lambda stop, all: stop), should_stop=False, global_step=0,
            fit_loop=SimpleNamespace(max_epochs=9), state=SimpleNamespace(fn="fit"), sanity_checking=False,
        )  # fmt: skip
        patience._run_early_stopping_check(trainer)
        seen.append((patience.wait_count, trainer.should_stop))
    assert seen == [(1, False), (2, True), (0, False), (1, False), (2, True)]
