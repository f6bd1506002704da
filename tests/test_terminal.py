"""Promises about what is printed: plain words, the whole configuration, the way to the run's page."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from integrated_pipeline import ExperimentConfig
from waferlab.records import BestTrial, SearchRecord
from waferlab.reports.tables import Table
from waferlab.terminal import Terminal
from waferlab.tracking.runs import NoRuns, Run


@pytest.fixture
def terminal():
    return Terminal(Console(file=io.StringIO(), width=200, highlight=False))


def printed(terminal):
    return terminal.console.file.getvalue()


def test_the_configuration_is_printed_with_trials_epochs_and_tracking(terminal):
    config = ExperimentConfig(num_optuna_trials=7, search_epochs=3, max_epochs=11, tracking_uri="http://127.0.0.1:1")
    terminal.print_configuration(config)
    assert "7 trials a model, of 3 epochs" in printed(terminal)
    assert "11 epochs, batches of 32" in printed(terminal)
    assert "mlflow at http://127.0.0.1:1" in printed(terminal)


def test_what_is_switched_off_is_printed_as_none(terminal):
    terminal.print_configuration(ExperimentConfig(enable_optuna=False, enable_mlflow=False))
    assert [line.split() for line in printed(terminal).splitlines() if line.endswith("none")] == [
        ["search", "none"],
        ["tracking", "none"],
    ]


def test_a_search_ends_with_a_line_that_says_what_goes_on_and_why(terminal):
    best = BestTrial(number=4, values=[0.75], macro_f1=0.75, best_epoch=2, parameters={}, goes_on=True)
    terminal.print_search(
        SearchRecord(
            study="s", sampler="TPESampler", pruner=None, proposed_by={}, pruned=2, workers=1,
            objectives=["macro_f1"], seconds=12.4, best=best, why="no trial beats the defaults", pareto_front=[],
            trials=[SimpleNamespace(state="complete")] * 6,
        )
    )  # fmt: skip
    assert printed(terminal) == (
        "  6 trials in 12 s, 2 of them stopped early; trial 4 goes on (0.750 on validation): no trial beats the "
        "defaults\n"
    )


def test_a_table_is_printed_without_markup_or_escapes(terminal):
    terminal.print_table(Table(("Model", "F1"), [("a|b & <c> [red]", "0.5")], note="Nadeau & Bengio"))
    assert "a|b & <c> [red]" in printed(terminal) and "Nadeau & Bengio" in printed(terminal)
    assert "---" not in printed(terminal) and "&amp;" not in printed(terminal)


def test_what_others_have_named_moves_no_cursor_and_renames_no_window(capsys):
    terminal = Terminal(Console(file=io.StringIO(), width=200, highlight=False))
    nasty = "lot \x1b]0;owned\x07\x1b[2J\x9b1A\rgone"
    words = r"lot \x1b]0;owned\x07\x1b[2J\x9b1A\x0dgone"
    terminal.say(nasty)
    terminal.print_table(Table((nasty, "maps"), [(nasty, "1")], note=nasty))
    terminal.warn(nasty)
    assert printed(terminal).count(words) == 4 and capsys.readouterr().err == f"{words}\n"
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(printed(terminal))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"tracking_uri": None}, "MLflow: run `mlflow ui` in {folder} and open http://127.0.0.1:5000/#/experiments/3/runs/f0"),
        ({"tracking_uri": "http://10.0.0.1:80/"}, "MLflow: http://10.0.0.1:80/#/experiments/3/runs/f0"),
        ({"tracker": "wandb"}, "Weights & Biases: `wandb sync /w/offline-run-*` sends the runs, if you want it"),
    ],
)  # fmt: skip
def test_the_outcome_ends_with_the_way_to_the_runs_page(terminal, tmp_path, more, expected):
    runs = SimpleNamespace(broken=False, uri="/w", run_link=lambda run: f"#/experiments/3/runs/{run.id}")
    config = {"output_dir": str(tmp_path), "experiment_name": "x", "enable_mlflow": True, "tracker": "mlflow",
              "tracking_uri": None} | more  # fmt: skip
    summary = {"seconds": {}, "best_model": "m", "failed_models": [], "config": config}
    terminal.print_outcome([], summary, runs=runs, run=Run("r", id="f0"))
    assert printed(terminal).splitlines()[-1] == expected.format(folder=tmp_path)


def test_without_tracking_no_page_is_named(terminal, tmp_path):
    config = {"output_dir": str(tmp_path), "experiment_name": "x", "enable_mlflow": False, "tracker": "mlflow"}
    summary = {"seconds": {}, "best_model": "m", "failed_models": [], "config": config}
    terminal.print_outcome([], summary, runs=NoRuns(), run=Run("r"))
    assert "MLflow" not in printed(terminal)


def test_no_bar_is_drawn_where_nobody_watches(terminal):
    assert terminal.progress("a model") is None
    assert list(terminal.watch([1, 2], "batches")) == [1, 2] and printed(terminal) == ""


def test_on_a_terminal_trainings_and_batches_have_a_bar():
    watched = Terminal(Console(file=io.StringIO(), force_terminal=True, width=80))
    assert watched.progress("a model") is not None
    assert list(watched.watch([1, 2], "batches")) == [1, 2]
    assert "batches" in watched.console.file.getvalue()
    quiet = Terminal(Console(file=io.StringIO(), force_terminal=True), quiet=True)
    assert quiet.progress("a model") is None
