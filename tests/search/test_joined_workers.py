"""Promises about workers that join a search from elsewhere, on a real PostgreSQL: each trial counts once."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow
import optuna
import pytest
import warm
from conftest import tiny_settings
from optuna.trial import TrialState

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.errors import DatabaseGoneError, ends_one_model
from waferlab.search import workers
from waferlab.search.budget import SearchPlan
from waferlab.search.database import open_database
from waferlab.search.trials import counted_trials

ROOT = Path(__file__).resolve().parents[2]
WAIT = 240  # seconds for what takes some on a quiet machine
MODELS = """
import os, time
from integrated_pipeline import register_model
from made_up import Scripted
from waferlab.models.registry import ModelSpec

class Slow(Scripted):
    def on_train_epoch_start(self):
        time.sleep(float(os.environ["LATER_EPOCHS"]) if self.current_epoch else 0.7)
        super().on_train_epoch_start()

register_model("slow", ModelSpec(Slow, defaults={"learning_rate": 1e-3, "dropout": 0.1}, portfolio=()))
"""
LEAD = """
import json, sys
sys.path.insert(0, "")
import slow_models
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1]))).run_complete_pipeline()
"""


class Fleet:
    """A program that leads a search, and workers that join it."""

    def __init__(self, tiny_npz, tmp_path, server, **more):
        (tmp_path / "slow_models.py").write_text(MODELS)
        self.folder, self.server, self.uri = tmp_path, server, f"sqlite:///{tmp_path}/mlflow.db"
        self.settings = tiny_settings(
            tiny_npz, tmp_path / "lead", model_type="slow", storage=server.url, artifacts=str(tmp_path / "shared"),
            tracking_uri=self.uri, heartbeat=1, enable_optuna=True, search_epochs=3, max_epochs=5, pruner="none",
            **more,
        )  # fmt: skip
        self.started, self.storage = [], open_database(server.url, heartbeat=600)

    def start(self, *command, later_epochs=0.7):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        log = (self.folder / f"{len(self.started)}.log").open("w+")
        begin = subprocess.Popen if "waferlab.search.ray_workers" in command else warm.Popen
        process = begin(
            [sys.executable, *map(str, command)], cwd=self.folder, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0",
                              "LATER_EPOCHS": str(later_epochs)},
        )  # fmt: skip
        process.log = log
        self.started.append(process)
        return process

    def lead(self):
        return self.start("-c", LEAD, json.dumps(self.settings))

    def join(self, *more, **start):
        here = ("--output-dir", self.folder / f"worker{len(self.started)}", "workers=1", "--register", "slow_models")
        return self.start(
            "-m", "waferlab.search.workers", "--storage", self.server.url, "--model", "slow", *here, *more, **start
        )

    def study(self):
        try:
            return optuna.load_study(study_name="tiny/slow", storage=self.storage)
        except KeyError:
            return None

    def trial_of(self, process):
        """The trial that a process is running."""
        study = self.study()
        for trial in study.get_trials(states=(TrialState.RUNNING,)) if study else ():
            if f" {process.pid} " in trial.user_attrs.get("process", "") and trial.intermediate_values:
                return trial
        return None

    def until(self, condition):
        deadline = time.monotonic() + WAIT
        while not (found := condition()):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)
        return found

    def ended(self, process):
        assert process.wait(timeout=WAIT) is not None
        return process.returncode

    def logs(self):
        texts = []
        for process in self.started:
            process.log.flush()
            texts.append(Path(process.log.name).read_text()[-2000:])
        return "\n----\n".join(texts)

    def stop(self):
        for process in self.started:
            process.kill()
            process.wait()


@pytest.fixture
def fleet(tiny_npz, tmp_path, postgres):
    made = []

    def build(**more):
        made.append(Fleet(tiny_npz, tmp_path, postgres, **more))
        return made[-1]

    yield build
    for one in made:
        one.stop()


def test_a_database_that_does_not_come_back_is_a_sentence_and_the_searchs_own_affair_no_models(tmp_path, monkeypatch):
    monkeypatch.setattr("waferlab.search.database.PATIENCE", 0.2)
    file = tmp_path / "study.db"
    storage = open_database(f"sqlite:///{file}", heartbeat=15)
    study = optuna.create_study(storage=storage)
    with contextlib.closing(sqlite3.connect(file)) as other:
        other.execute("drop table trials")
    with pytest.raises(DatabaseGoneError, match=r"study.db' has not answered for 0 s .*What it holds is kept") as gone:
        study.ask()
    assert not ends_one_model(gone.value)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_a_wait_without_an_end_is_refused(seconds, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["workers.py", "--storage", "x", "--model", "y", "--wait", seconds])
    with pytest.raises(SystemExit):
        workers.main()
    assert f"argument --wait: {seconds} are no seconds that end" in capsys.readouterr().err


@pytest.mark.long
def test_a_worker_killed_one_stopped_and_a_database_restarted_lose_no_trial_and_count_none_twice(fleet, postgres):
    fleet = fleet(num_optuna_trials=10)
    early = fleet.join()  # before there is anything to join
    leader = fleet.lead()
    dies, sleeps = (fleet.join(later_epochs=5) for _ in range(2))  # their trials end neither before nor while we look
    killed = fleet.until(lambda: fleet.trial_of(dies))
    dies.kill()
    stopped = fleet.until(lambda: fleet.trial_of(sleeps))
    sleeps.send_signal(signal.SIGSTOP)
    fleet.until(lambda: any(t.user_attrs.get("again") == killed.number for t in fleet.study().trials))
    postgres.stop()
    time.sleep(2)
    postgres.start()
    fleet.until(lambda: any(t.user_attrs.get("again") == stopped.number for t in fleet.study().trials))
    sleeps.send_signal(signal.SIGCONT)
    assert [fleet.ended(process) for process in (leader, early, sleeps)] == [0, 0, 0], fleet.logs()

    study = fleet.study()
    assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
    done = counted_trials(study)
    assert len(done) == 10 and {trial.state for trial in done} == {TrialState.COMPLETE}
    lost = {t.number for t in study.trials if t.state == TrialState.FAIL and "surplus" not in t.user_attrs}
    moved = {t.number for t in study.trials if "surplus" in t.user_attrs}  # as they waited behind one that was lost
    again = {t.user_attrs["again"]: t for t in study.trials if t.user_attrs.get("again", -1) not in {-1, *moved}}
    assert {killed.number, stopped.number} <= lost == again.keys()
    assert again[killed.number].params == killed.params

    summary = json.loads((fleet.folder / "lead/results/tiny/experiment_summary.json").read_text())
    (model,) = summary["models"]
    assert model["weights_from"].endswith("gone on with") and model["epochs"] == 5
    assert len(model["search"]["trials"]) == 10 + len(lost)
    client = mlflow.MlflowClient(fleet.uri)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=1000)
    by_name = {run.info.run_name: run for run in runs}
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED", "FAILED"}
    assert {f"trial {trial.number}" for trial in done} <= by_name.keys()
    above = by_name["slow_optimized"].info.run_id
    for name, run in by_name.items():
        if name.startswith("trial "):
            assert run.data.tags["mlflow.parentRunId"] == above, name
    assert by_name[f"trial {killed.number}"].info.status == "KILLED"


@pytest.mark.long
def test_a_worker_that_is_told_to_end_hands_its_trial_back_at_once(fleet):
    fleet = fleet(num_optuna_trials=4)
    leader, worker = fleet.lead(), fleet.join()
    trial = fleet.until(lambda: fleet.trial_of(worker))
    worker.send_signal(signal.SIGTERM)
    assert fleet.ended(worker) == 143
    assert any(t.user_attrs.get("again") == trial.number for t in fleet.study().trials)
    assert "Its trial runs again" in fleet.logs()
    assert fleet.ended(leader) == 0, fleet.logs()
    assert len(counted_trials(fleet.study())) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "lightning_cnn", "--wait", "0.1"), "No search of lightning_cnn has begun in 0.1 s."),
        (("--model", "slow", "--register", "nowhere"), "--register nowhere"),
    ],
)
def test_what_a_worker_cannot_do_is_one_message_and_status_2(flags, said, tmp_path):
    done = warm.run(
        [sys.executable, "-m", "waferlab.search.workers", "--storage", f"sqlite:///{tmp_path}/study.db", *flags],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and f"error: {said}" in done.stderr


@pytest.mark.long
def test_ray_starts_workers_on_a_cluster(fleet):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    fleet = fleet(num_optuna_trials=12, workers=1)
    launcher = fleet.start(
        "-m", "waferlab.search.ray_workers", "--workers", 2, "--cpus", 1, "--storage", fleet.server.url,
        "--model", "slow", "--register", "slow_models", "--output-dir", fleet.folder / "ray",
    )  # fmt: skip
    fleet.until(lambda: fleet.logs().count("waits for a search of slow") == 2)
    leader = fleet.lead()
    assert [fleet.ended(leader), fleet.ended(launcher)] == [0, 0], fleet.logs()
    trials = counted_trials(fleet.study())
    assert len(trials) == 12 and len({trial.user_attrs["process"] for trial in trials}) == 3


def test_without_ray_a_sentence_says_how_to_have_it_and_nothing_else_needs_it():
    blocked = "import sys; sys.modules['ray'] = None; import waferlab.search.ray_workers as r; sys.argv = ['r', "
    flags = "'--workers', '1', '--storage', 'sqlite://', '--model', 'm']; sys.exit(r.main())"
    done = subprocess.run(
        [sys.executable, "-c", blocked + flags], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2 and "error: Ray is not installed: pip install" in done.stderr


def test_a_worker_joins_one_search_of_several_models_with_the_leaders_settings_and_its_end(
    tiny_npz, tmp_path, monkeypatch
):
    more = {"model_type": ["lightning_cnn", "yolo_inspired"], "time_limit": 100, "storage": "sqlite:///x.db"}
    leader = ExperimentConfig(**tiny_settings(tiny_npz, tmp_path, **more))
    plan = {"trials": 3, "epochs": 2, "seconds": 50.0}
    left = {"config": leader.as_plain(), "plan": plan, "until": time.time() + 40, "run": None}
    monkeypatch.setattr("waferlab.search.database.open_database", lambda *_, **__: None)
    monkeypatch.setattr(workers, "wait_for_search", lambda *_: ("tiny/lightning_cnn", left))
    asked = []

    def search(pipeline, *what, **how):
        asked.append((pipeline._fingerprint(), *what, how))

    monkeypatch.setattr(IntegratedMLPipeline, "search", search)
    flags = ["--storage", "sqlite:///x.db", "--model", "lightning_cnn", "--no-mlflow", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["workers", *flags])
    assert workers.main() == 0
    whole = SearchPlan(**plan, until=left["until"])
    assert asked == [(IntegratedMLPipeline(leader)._fingerprint(), "lightning_cnn", whole, {"leads": False})]


def a_search_of(model, *, storage, experiment="tiny", until=None, trials=2):
    """A study whose leader wants so many trials, by the time until."""
    study = optuna.create_study(study_name=f"{experiment}/{model}", storage=storage)
    left = {"until": until, "plan": {"trials": trials}, "config": {"model_type": model}}
    study.set_user_attr("search", left)
    return study, left


def wanted_is(model, **more):
    return SimpleNamespace(**{"model": model, "experiment": None, "wait": 0.2, "quiet": True} | more)


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """A database for searches, at which workers look often."""
    monkeypatch.setattr(workers, "COMES_AGAIN", 0.05)
    monkeypatch.setattr(workers, "LOOK_EVERY", 0.02)
    return optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'searches.db'}")


def test_a_search_whose_time_is_over_is_that_of_a_leader_that_is_to_come_again(searched, monkeypatch):
    study, left = a_search_of("slow", storage=searched, until=time.time() - 1)
    comes = {**left, "until": time.time() + 60}
    monkeypatch.setattr(workers.time, "sleep", lambda _: study.set_user_attr("search", comes))
    assert workers.wait_for_search(searched, wanted_is("slow", wait=5.0)) == ("tiny/slow", comes)


@pytest.mark.parametrize("until", [None, "later"])
def test_a_search_that_has_its_trials_is_over_though_it_may_have_time_left(searched, until):
    study, _ = a_search_of("quick", storage=searched, until=until and time.time() + 60)
    study.optimize(lambda trial: 1.0, n_trials=1)
    assert workers.wait_for_search(searched, wanted_is("quick"))[0] == "tiny/quick"
    study.optimize(lambda trial: 1.0, n_trials=1)
    assert workers.wait_for_search(searched, wanted_is("quick")) is None


def test_an_earlier_search_of_the_database_does_not_shorten_the_wait_for_the_next(searched, monkeypatch):
    a_search_of("slow", storage=searched, experiment="earlier", until=time.time() - 1)
    looks = iter(range(1000))

    def begins(_):
        if next(looks) == 5:
            a_search_of("slow", storage=searched, experiment="next")

    now = iter(range(0, 100_000, 30))  # each look half a minute after the one before
    monkeypatch.setattr(workers, "COMES_AGAIN", 60.0)
    monkeypatch.setattr(workers.time, "sleep", begins)
    monkeypatch.setattr(workers.time, "monotonic", lambda: next(now))
    assert workers.wait_for_search(searched, wanted_is("slow", wait=600.0))[0] == "next/slow"
    assert workers.wait_for_search(searched, wanted_is("slow", wait=600.0, experiment="earlier")) is None
    assert next(now) < 900  # of a search that is named, one does not wait for another


def test_a_worker_that_comes_when_a_search_is_over_ends_well(searched, monkeypatch, capsys):
    study, left = a_search_of("slow", storage=searched, until=time.time() - 1)
    monkeypatch.setattr("waferlab.search.database.open_database", lambda *_, **__: searched)
    flags = ["--storage", "sqlite:///x.db", "--model", "slow", "--quiet", "--wait", "0.2"]
    monkeypatch.setattr(sys, "argv", ["workers", *flags])
    assert workers.main() == 0
    assert "That search is over." in capsys.readouterr().out
    config = {"model_type": ["slow", "lightning_cnn"]}
    study.set_user_attr("search", {**left, "until": None, "config": config})
    assert workers.main() == 2
    assert "The leader also trains slow, which nothing here registers" in capsys.readouterr().err
