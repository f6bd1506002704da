"""Promises about the measurements of searches: they run on small data, and go on where they were cut off."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import busy_machine  # noqa: E402
import portfolio  # noqa: E402
import search_pays  # noqa: E402
import search_tables  # noqa: E402
import workers  # noqa: E402


def run(script, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)]
    done = warm.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_a_search_is_compared_with_the_same_seconds_without_and_a_second_call_adds_to_the_record(tiny_npz, tmp_path):
    output = tmp_path / "record.json"
    few = ("image_size=16", "batch_size=64", "num_optuna_trials=2", "workers=1", "threads=1")
    flags = ("--data", tiny_npz, "--seconds", 6, "--seeds", 0, "--set", *few, "--output", output)
    run("search_pays.py", *flags)
    record = json.loads(output.read_text())
    (row,) = record["rows"]
    assert [run["way"] for run in record["runs"]] == ["without", "with"]
    searched, why_not = (record["runs"][1][key] for key in ("search", "no_search_because"))
    if searched is None:  # on a machine that is slow just now
        assert "epochs fit into 6 s" in why_not
    else:
        assert searched["trials"] <= 2 and searched["proposed_by"]["the defaults"] == 1
    assert row["with"] - row["without"] == pytest.approx(row["difference"]["mean"], abs=1e-3)
    assert all(run["took"] > 5 for run in record["runs"])
    assert len(run("search_pays.py", *flags).splitlines()) == 1, "only the row: nothing was trained"
    assert json.loads(output.read_text())["runs"] == record["runs"]
    *_, cells = search_tables.search_pays(record)
    assert f"| real, {row['training_maps']} to train on |" in cells


def a_run(seed, way, score, **search):
    case = {"data": "synthetic", "model": "m", "start": "defaults", "seconds": 60, "seed": seed, "way": way}
    found = {"why": "no trial beats the defaults", "trials": 4, "pruned": 1, **search} if search is not None else None
    return case | {"macro_f1": score, "took": 60.0, "search": found if way == "with" else None}


def test_differences_are_paired_by_seed_and_unpaired_seeds_left_out():
    runs = [a_run(0, "without", 0.5), a_run(0, "with", 0.6), a_run(1, "without", 0.7), a_run(2, "with", 0.9)]
    runs += [a_run(3, "without", 0.6), a_run(3, "with", 0.6, why="trial 3 leads the defaults by 0.1 [0, 0.2]")]
    (row,) = search_pays.compare(runs)
    assert row["seeds"] == [0, 3] and row["difference"]["mean"] == pytest.approx(0.05)
    assert (row["without"], row["with"], row["left_the_defaults"]) == (0.55, 0.6, 1)


@pytest.mark.parametrize(
    ("scores", "size", "picked"),
    [
        ({0: (0.5, 0.5), 1: (0.9, 0.1), 2: (0.1, 0.9), 3: (0.6, 0.6)}, 3, [0, 1, 2]),
        ({0: (0.9, 0.9), 1: (0.1, 0.2), 2: (0.5, 0.4)}, 2, [0, 2]),  # none adds to the best
        ({0: (0.5,), 1: (0.6,)}, 5, [0, 1]),
    ],
)
def test_a_portfolio_is_what_adds_most_to_the_best_score_on_each_kind_of_maps(scores, size, picked):
    assert portfolio.pick(scores, size) == picked


@pytest.mark.long
def test_settings_are_tried_and_picked(tiny_npz, tmp_path):
    output = tmp_path / "record.json"
    flags = ("--data", tiny_npz, "--models", "lightning_cnn", "--settings", 2, "--seconds", 1, "--per-class", 6)
    run("portfolio.py", *flags, "--output", output)
    record = json.loads(output.read_text())
    picked = record["picked"]["lightning_cnn"]
    assert picked[0]["setting"] == 0 and len(search_tables.portfolio(record)) == 2 + len(picked)
    first, second = (run["parameters"] for run in record["runs"])
    differ = {name for name in first if first[name] != second[name]}
    assert first["learning_rate"] == 4e-3 and 0 < len(differ) < len(first)


def test_a_busy_process_is_there_for_the_time_of_a_measurement_and_gone_after(monkeypatch):
    import psutil

    def busy():
        return [p for p in psutil.Process().children() if "while True: pass" in p.cmdline()]

    assert busy_machine.under(True, lambda: len(busy())) == 1
    assert not busy() and busy_machine.under(False, lambda: len(busy())) == 0


def test_devices_are_compared_with_two_threads_turn_by_turn():
    import devices

    seconds = {"one thread": (12.0, 9.0), "two threads": (9.0, 6.0), "two devices": (6.0, 3.0)}
    runs = [
        {"model": "m", "way": way, "seed": seed, "seconds": both[seed], "macro_f1": 0.5 + 0.1 * (way == "two devices")}
        for seed in (0, 1) for way, both in seconds.items()
    ]  # fmt: skip
    (row,) = devices.outcome(runs)
    assert row["times_as_quick_as_two_threads"]["two devices"] == {"median": 1.75, "low": 1.5, "high": 2.0, "turns": 2}
    assert row["difference_of_two_devices"]["mean"] == pytest.approx(0.1)
    assert "| m | 10.5 | 7.5 | 4.5 | 1.75 (1.50 to 2.00" in "\n".join(devices.table_of_devices({"outcome": [row]}))


@pytest.mark.long
def test_trials_of_one_length_are_timed():
    arguments = type("Flags", (), {"trials": 2, "epochs": 1, "samples_per_class": 20})
    assert busy_machine.searched(arguments, "lightning_cnn", workers=2, threads=1) > 0


# --- many workers


def a_record_of_workers():
    return {
        "trials": 10,
        "searches": [{"workers": 1, "seconds": [50.0], "trials_an_hour": 720},
                     {"workers": 2, "seconds": [25.0], "trials_an_hour": 1440}],
        "database": [{"clients": 4, "a_second": 20.0, "older_trials": 0, "connections_a_client": 1.0},
                     {"clients": 4, "a_second": 10.0, "older_trials": 1000, "connections_a_client": 2.0}],
        "tracker": [{"clients": 1, "a_second": 1.0}, {"clients": 4, "a_second": 4.0}],
        "weights": {"megabytes_a_trial": 4.0, "megabytes_a_second": 200.0},
    }  # fmt: skip


def test_what_many_workers_ask_for_is_their_trials_over_what_there_is_at_most():
    record = a_record_of_workers()
    rows = {(row["workers"], row["seconds_a_trial"]): row for row in workers.plan(record)}
    assert rows[100, 60.0] == {
        "workers": 100, "seconds_a_trial": 60.0, "connections": 200,
        "database": pytest.approx(100 / 60 / 10, abs=1e-3), "tracker": pytest.approx(100 / 60 / 4, abs=1e-3),
        "weights": pytest.approx(100 / 60 * 4 / 200, abs=1e-3),
    }  # fmt: skip
    assert (1000, 5.0) in rows, "and of trials as long as those that were measured"
    table = "\n".join(workers.table_of_workers(record | {"plan": workers.plan(record)}))
    assert "| 2 | 25.0 | 1,440 |" in table and "| 100 | 60 | 200 | 17% | 42% | 3% |" in table


def count(ready, over, done, asked):
    ready.wait(timeout=60)
    while not over.is_set():
        time.sleep(0.05)
        with done.get_lock():
            done.value += 1


def test_a_crowd_is_counted_from_when_all_are_ready():
    found = workers.crowd(count, 2, SimpleNamespace(seconds=1.0), look=lambda: 7)
    assert found["clients"] == 2 and found["seen"] == 7
    assert 0 < found["a_second"] <= 2 / 0.05
