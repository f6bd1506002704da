"""Promises about trials side by side: real processes, one study, one tracker, and an end to them whatever happens."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mlflow
import optuna
import psutil
import pytest
import torch
import warm
from conftest import tiny_settings
from made_up import Scripted
from optuna.trial import TrialState
from rich.console import Console

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.search.told import Listener, ToldRuns
from waferlab.search.trial_files import repeated_by
from waferlab.search.workers import workers_for
from waferlab.terminal import Terminal
from waferlab.tracking.runs import NoRuns, Run
from waferlab.training import pace
from waferlab.training import side_by_side as crews
from waferlab.training.side_by_side import how_it_ended, side_by_side

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("scripted")
WAIT = 60  # seconds for what takes one or two on a quiet machine


def searching(tiny_npz, tmp_path, **more):
    """A pipeline that searches in two processes with the scripted model."""
    more = {"model_type": "scripted", "workers": 2, "pruner": "none", "search_epochs": 1, "enable_mlflow": False} | more
    made = IntegratedMLPipeline(ExperimentConfig(**tiny_settings(tiny_npz, tmp_path, **more)))
    made.config.results_dir.mkdir(parents=True, exist_ok=True)
    return made


def until(condition, *, process=None):
    """Waits for a condition, and gives what it gave."""
    deadline = time.monotonic() + WAIT
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to this"
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return found


# --- work that is made up


def heard_of(work, *, crew=2):
    heard = []
    side_by_side(work, workers=crew, hear=lambda *told: heard.append(told))
    return heard


def test_work_is_done_in_processes_of_one_thread_each_and_what_they_tell_is_heard_in_its_order():
    def work(number, tell):
        for what in ("one", "two"):
            tell(what, number, os.getpid(), torch.get_num_threads())

    heard = heard_of(work, crew=3)
    processes = {number: process for number, _, _, process, _ in heard}
    assert len({*processes.values(), os.getpid()}) == 4
    assert sorted(heard) == sorted((n, what, n, processes[n], 1) for n in range(3) for what in ("one", "two"))
    for number in range(3):
        assert [what for worker, what, *_ in heard if worker == number] == ["one", "two"]


def test_what_one_raises_is_raised_here_and_the_others_are_interrupted():
    begun = multiprocessing.get_context("fork").Event()

    def work(number, tell):
        if number == 0:
            begun.wait(WAIT)
            raise LookupError("made up")
        try:
            begun.set()
            time.sleep(WAIT)
        except KeyboardInterrupt:
            tell("interrupted")
            raise

    heard = []
    with pytest.raises(LookupError, match="made up"):
        side_by_side(work, workers=2, hear=lambda *told: heard.append(told))
    assert heard == [(1, "interrupted")]


def test_an_interrupt_that_comes_before_the_work_begins_is_heeded_and_leaves_no_traceback(monkeypatch, capfd):
    monkeypatch.setattr(crews.torch, "set_num_threads", lambda _: time.sleep(0.5))  # as a fork may take a while
    heard, start = [], crews._start

    def start_and_interrupt(work, number):
        started = start(work, number)
        os.kill(started[0].pid, signal.SIGINT)
        return started

    monkeypatch.setattr(crews, "_start", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        side_by_side(lambda *_: time.sleep(WAIT), workers=1, hear=lambda *told: heard.append(told))
    assert heard == [] and capfd.readouterr().err == ""


class CannotBeSent(Exception):
    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def test_an_error_that_cannot_be_sent_comes_in_words():
    def work(number, tell):
        raise CannotBeSent("one", "two")

    with pytest.raises(RuntimeError, match=r"^CannotBeSent: one: two$"):
        heard_of(work, crew=1)


def test_a_process_that_is_killed_is_heard_of_in_words_and_the_others_go_on():
    def work(number, tell):
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        tell("done")

    killed, done = heard_of(work)
    assert done == (1, "done") and killed[:2] == (0, "killed")
    assert "was killed, most likely because the memory did not suffice" in killed[2]


@pytest.mark.parametrize(("status", "words"), [(-signal.SIGSEGV, "ended with SIGSEGV"), (3, "ended with status 3")])
def test_how_a_process_ended_is_said_in_words(status, words):
    assert words in how_it_ended(status)


def test_processes_that_heed_no_interrupt_are_killed_in_the_end(monkeypatch):
    monkeypatch.setattr(crews, "LAST_WORDS", 1.0)
    processes = []

    def work(number, tell):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        tell("here", os.getpid())
        time.sleep(WAIT)

    def hear(number, what, process):
        processes.append(process)
        if len(processes) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, workers=2, hear=hear)
    assert not [process for process in processes if psutil.pid_exists(process)]


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"workers": None}, 5),
        ({"workers": 3}, 3),
        ({"workers": 3, "accelerator": "cpu"}, 3),
        ({"accelerator": "gpu"}, 1),
    ],
)
def test_there_are_as_many_workers_as_cores_or_as_are_wanted_and_one_where_a_gpu_trains(settings, number, monkeypatch):
    monkeypatch.setattr(pace, "cores", lambda: 5)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert workers_for(ExperimentConfig(**settings)) == number
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert workers_for(ExperimentConfig(**settings)) == 1


# --- a search


@pytest.mark.long
def test_two_processes_share_one_study_one_tracker_and_one_terminal(tiny_npz, tmp_path):
    """Exactly as many trials as are wanted; what can be seen of them is as with one worker."""
    made = searching(
        tiny_npz, tmp_path, enable_mlflow=True, num_optuna_trials=5, max_epochs=2, quiet=False,
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
    )  # fmt: skip
    said, printed_by = [], set()
    made.say = made.terminal.say = lambda text, **_: (said.append(text), printed_by.add(os.getpid()))
    start = Scripted.on_train_epoch_start

    def slow_epoch(self):
        time.sleep(0.3)
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scripted, "on_train_epoch_start", slow_epoch)
        (model,) = made.run_complete_pipeline()["models"]
    trials = made.studies["scripted"].trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
    assert len({trial.user_attrs["process"] for trial in trials}) == 2
    assert len({trial.params["learning_rate"] for trial in trials}) == 5
    assert model["search"]["workers"] == 2 and model["epochs"] == 2
    lines = [line.split()[1] for line in said if line.startswith("  trial ")]
    assert len(lines) == 5 and lines[-1] == "5/5" and printed_by == {os.getpid()}

    runs = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    named = {run.info.run_name: run for run in runs}
    above = named["scripted_optimized"]
    assert above.data.tags["mlflow.parentRunId"] == named["tiny"].info.run_id
    for trial in trials:
        run = named[f"trial {trial.number}"]
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == above.info.run_id
        assert float(run.data.params["learning_rate"]) == trial.params["learning_rate"]
        assert run.data.metrics["best_val_macro_f1"] == pytest.approx(trial.value)
        assert {"val_macro_f1", "train_loss"} <= run.data.metrics.keys() and run.data.tags["weights"]
    assert len(runs) == 7


def test_a_bug_in_a_users_model_reaches_whoever_started_the_search(tiny_npz, tmp_path, monkeypatch):
    def wrong(self, batch, batch_idx):
        raise ZeroDivisionError("made up by a user")

    monkeypatch.setattr(Scripted, "training_step", wrong)
    with pytest.raises(ZeroDivisionError, match=r"^made up by a user$"):
        searching(tiny_npz, tmp_path).search("scripted")


class Tree:
    """A tree of runs that notes how they ended."""

    uri, store = "nowhere", "nothing"

    def __init__(self):
        self.ended = {}

    def start(self, name, **_):
        return Run(name)

    def end(self, run, status, *, reason):
        self.ended[run.name] = (status, reason)

    def params(self, *_, **__):
        pass

    tags = metrics = params


@pytest.mark.long
def test_the_trial_of_a_worker_that_is_killed_fails_with_the_reason_and_the_search_goes_on(
    tiny_npz, tmp_path, monkeypatch
):
    """As when two trainings need more memory than there is."""
    start = Scripted.on_train_epoch_start

    def killed(self):
        if self.weight_decay == 0.0123:
            os.kill(os.getpid(), signal.SIGKILL)
        start(self)

    monkeypatch.setattr(Scripted, "on_train_epoch_start", killed)
    made = searching(tiny_npz, tmp_path, num_optuna_trials=4)
    suggest = made._suggest
    monkeypatch.setattr(
        made,
        "_suggest",
        lambda trial, name: suggest(trial, name) | ({"weight_decay": 0.0123} if trial.number == 1 else {}),
    )
    made.runs = tree = Tree()
    found = made.search("scripted")
    assert [trial.state for trial in found.trials] == ["complete", "fail", "complete", "complete"]
    assert "its process was killed" in found.trials[1].reason
    assert tree.ended["trial 1"] == ("KILLED", found.trials[1].reason)
    del tree.ended["trial 1"]
    assert tree.ended == dict.fromkeys(("trial 0", "trial 2", "trial 3"), ("FINISHED", None))


# --- a program that is ended

PROGRAM = """
import json, sys, time
sys.path.insert(0, "tests")
import made_up
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline, ModelSpec, register_model

class Slow(made_up.Scripted):
    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        time.sleep(3600 * json.loads(sys.argv[1])["slow"])

register_model("slow", ModelSpec(Slow, portfolio=()))
IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1])["config"])).run_complete_pipeline()
"""


def start_program(config, *, slow=True):
    arguments = json.dumps({"config": config, "slow": slow})
    return warm.Popen(
        [sys.executable, "-c", PROGRAM, arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
    )  # fmt: skip


def running_trials(tmp_path):
    """Those of the study that train, once there are two."""
    file = tmp_path / "results/tiny/optuna_journal.log"
    if not file.exists():
        return None
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    if "tiny/slow" not in optuna.get_all_study_names(storage):
        return None
    trials = optuna.load_study(study_name="tiny/slow", storage=storage).get_trials(states=(TrialState.RUNNING,))
    training = [trial for trial in trials if "process" in trial.user_attrs]  # which is noted first
    return training if len(training) == 2 else None


@pytest.fixture
def program(tiny_npz, tmp_path):
    """Starts a run whose first two trials never end; gives its process, settings and the processes of the trials."""
    config = tiny_settings(tiny_npz, tmp_path, model_type="slow", workers=2, pruner="none", search_epochs=1,
                           enable_mlflow=True, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")  # fmt: skip
    started = start_program(config)
    trials = until(partial(running_trials, tmp_path), process=started)
    crew = [psutil.Process(int(trial.user_attrs["process"].split()[-2])) for trial in trials]
    assert len({*crew, started.pid}) == 3 and {one.ppid() for one in crew} == {started.pid}
    yield started, config, crew
    for process in (*crew, started):
        if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
            process.kill()


def test_ctrl_c_ends_all_workers_closes_their_runs_and_queues_their_trials_again(program, tmp_path):
    started, config, crew = program
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=WAIT)
    # Python forgets why it ended, and says 1, if a library's handler at exit calls exec, as some do beside IPython.
    assert started.returncode in (130, -signal.SIGINT, 1), errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1  # that of the program itself; workers add none
    assert not [one for one in crew if one.is_running()]

    client = mlflow.MlflowClient(config["tracking_uri"])
    runs = {run.info.run_name: run.info.status for run in client.search_runs(["1"])}
    assert runs == dict.fromkeys(("tiny", "slow_optimized", "trial 0", "trial 1"), "KILLED")
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "results/tiny/optuna_journal.log"))
    )
    trials = optuna.load_study(study_name="tiny/slow", storage=storage).trials
    waiting = [[*repeated_by(trial, trials)][-1] for trial in trials if trial.state == TrialState.WAITING]
    assert [trial.state for trial in trials[:2]] == [TrialState.FAIL] * 2 and sorted(waiting) == [0, 1]


def test_workers_of_a_program_that_is_killed_end_by_themselves(program):
    started, _, crew = program
    started.kill()
    started.communicate(timeout=WAIT)
    until(lambda: not [one for one in crew if one.is_running() and one.status() != psutil.STATUS_ZOMBIE])


def test_the_bar_of_a_worker_that_is_killed_is_taken_away_and_those_of_others_stay():
    terminal = Terminal(Console(file=io.StringIO(), force_terminal=True, width=100))
    listener = Listener(NoRuns(), None, terminal)
    listener.hear(0, "bar", "trial 0", 0.3, "trial 0")
    listener.hear(1, "bar", "trial 1", 0.3, "trial 1")
    listener.hear(0, "killed", "killed by signal 9")
    assert [*listener._bars._tasks] == ["trial 1"] and listener._bars._progress.live.is_started
    listener.hear(1, "killed", "killed by signal 9")
    assert not listener._bars._tasks and not listener._bars._progress.live.is_started


def test_in_a_worker_what_a_model_does_with_the_tracker_itself_is_not_done_and_ends_nothing():
    tree = SimpleNamespace(uri="sqlite:///nowhere.db", store="MLflow")
    logger = ToldRuns(tree, lambda *told: None).logger(Run("trial 0"))
    logger.experiment.log_text(logger.run_id, "text", "file")
    assert logger.run_id is None and logger.experiment_id is None
