"""The promises of reporting.py: pages say what records say, need nothing but themselves, and show on a phone."""

from __future__ import annotations

import ast
import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import optuna
import pytest
from conftest import CHROMIUM
from made_up_predictions import CLASSES, LONG_NAME, assert_is_a_picture, make_predictions

from waferlab.evaluation.conformal import PredictionSets, evaluate_sets
from waferlab.evaluation.metrics import compute_metrics
from waferlab.reports import experiment_figures
from waferlab.reports.experiment_figures import (
    not_told_apart,
    plot_ablation,
    plot_critical_difference,
    plot_seed_comparison,
    plot_trade_offs,
)
from waferlab.reports.model_card import write_model_card
from waferlab.reports.pages import to_html, write_report
from waferlab.reports.run_figures import plot_confusion_matrix, save_study_plots
from waferlab.reports.tables import ablation_markdown, comparison_markdown, markdown
from waferlab.search.study import study_plots

NAMES = (
    "lightning_cnn",
    "torchvision_resnet",
    "torchvision_efficientnet",
    "yolo_inspired",
    "vision_transformer",
    LONG_NAME,
)
HEAD = {
    "created": "2026-05-04T10:11:12+0000",
    "command": "python run_experiment.py --mode comparison --data 'my <b>maps</b>.npz'",
    "verdict": "One is ahead by 0.023. Two are not told apart.",
    "budget": "equal time: 50 s of training for each model and seed",
    "config": {"experiment_name": "wafers", "time_limit": 600, "learning_rate": None, "objectives": ["macro_f1"]},
    "environment": {"python": "3.11.7", "gpu": None, "cpu_cores": 4},
    "data": {"source": "my <b>maps</b>.npz", "maps": 1350, "lots": 117, "notes": ["3 maps | without a die left out"]},
    "interval_method": "95% t interval over 3 seeds (split, weights and batches change with the seed)",
    "difference_method": "mean paired difference over seeds, 95% t interval, p by paired t test, Holm-corrected",
}

ROOT = Path(__file__).resolve().parents[2]


def make_comparison(n_models: int, *, n_seeds: int = 3) -> dict:
    """Macro F1 falls from model to model, by less than the seeds vary where two are not told apart."""
    rng = np.random.default_rng(n_models)
    models, runs = [], []
    for index, name in enumerate(NAMES[:n_models]):
        scores = 0.86 - 0.02 * index**1.3 + 0.01 * rng.normal(size=n_seeds)
        cost = {"train_seconds": 50.25 + index, "n_parameters": 309_561 * 6 ** (index % 3), "latency_ms": 1.234 + index}
        half = 0.0153 if n_seeds > 1 else None
        models.append(
            {
                "model_type": name, "n": n_seeds, "mean": scores.mean(), "std": scores.std() if half else None,
                "interval": [scores.mean() - half, scores.mean() + half] if half else None,
                "accuracy_mean": 0.911 - 0.01 * index, "epochs": 7.5, **cost,
            }
        )  # fmt: skip
        runs += [
            {
                "model_type": name, "seed": seed, "macro_f1": score, "macro_f1_interval": [score - 0.05, score + 0.04],
                "accuracy": score + 0.031, "validation_macro_f1": score + 0.017, "epochs": 7 + seed,
                "weights": "random (not asked for)", **cost,
            }
            for seed, score in enumerate(scores)
        ]  # fmt: skip
    differences = []
    if n_seeds > 1:
        for one, other in itertools.combinations(models, 2):
            gap = one["mean"] - other["mean"]
            differences.append(
                {
                    "a": one["model_type"], "b": other["model_type"], "difference": gap,
                    "interval": [gap - 0.021, gap + 0.021], "p": 0.0004 if abs(gap) > 0.04 else 0.123,
                    "p_corrected": 0.0012 if abs(gap) > 0.04 else 0.246, "significant": bool(abs(gap) > 0.04),
                }
            )  # fmt: skip
    seeds = list(range(n_seeds))
    return {
        "mode": "comparison", **HEAD, "seeds": seeds, "models": models, "runs": runs, "differences": differences
    }  # fmt: skip


def make_ablation(*, n_seeds: int = 3, components=("pretraining", "augmentation", "balancing", "optuna")) -> dict:
    """Augmentation helps, balancing harms, nothing is shown of the others."""
    gains = {"pretraining": 0.004, "augmentation": 0.0513, "balancing": -0.0317, "optuna": 0.0082}
    rng = np.random.default_rng(0)

    def variant(name: str, used: set[str]) -> dict:
        mean = 0.72 + sum(gains[component] for component in used)
        interval = [mean - 0.012, mean + 0.012] if n_seeds > 1 else None
        scores = (mean + 0.008 * (np.arange(n_seeds) - (n_seeds - 1) / 2)).tolist()
        flags = {component: component in used for component in components}
        return {
            "name": name, "components": flags, "scores": scores, "mean": mean, "interval": interval,
            "std": 0.008 if n_seeds > 1 else None,
        }  # fmt: skip

    everything = set(components)
    variants = [variant("baseline", set())]
    variants += [variant(f"baseline + {component}", {component}) for component in components]
    variants += [variant("everything", everything)]
    variants += [variant(f"everything but {component}", everything - {component}) for component in components]
    effects = []
    for component, context in itertools.product(components, ("alone", "left out")):
        gap = gains[component] + 0.001 * rng.normal()
        shown = abs(gap) > 0.02 and n_seeds > 1
        effects.append(
            {
                "component": component, "context": context, "difference": gap,
                "interval": [gap - 0.0155, gap + 0.0155] if n_seeds > 1 else None,
                "p": (0.0021 if shown else 0.312) if n_seeds > 1 else None,
                "p_corrected": (0.0168 if shown else 1.0) if n_seeds > 1 else None,
                "verdict": ("helps" if gap > 0 else "harms") if shown else "no effect shown",
            }
        )  # fmt: skip
    return {
        "mode": "ablation", **HEAD, "model_type": "lightning_cnn", "components": list(components),
        "seeds": list(range(n_seeds)), "variants": variants, "effects": effects,
    }  # fmt: skip


def make_summary(**changes) -> dict:
    """What a pipeline's run leaves, with two models; the metrics are real ones of made-up predictions."""
    models = []
    leaning = {"prior_strength": 0.55, "offsets": [0.0] * 8 + [-0.707]}
    rules = (leaning, {"prior_strength": 0.0, "offsets": []})  # as `choose_decision` gives them
    for (name, sharpness), rule in zip((("lightning_cnn", 3.0), ("yolo_inspired", 2.0)), rules, strict=True):
        predictions = make_predictions(sharpness=sharpness)
        metrics = json.loads(json.dumps(compute_metrics(predictions)))
        fitted = PredictionSets.fit(make_predictions(sharpness=sharpness, seed=1, n=200))
        models.append(
            {
                "model_type": name, "parameters": {"batch_size": 32, "learning_rate": 0.004, "class_weights": None},
                "weights": f"random ({name} <none found>)", "precision": "bf16-mixed", "n_parameters": 309_561,
                "epochs": 8, "best_epoch": 7, "train_seconds": 41.27, "checkpoint": "best.ckpt", "latency_ms": 2.735,
                "weights_from": "final training", "validation": metrics, "test": metrics,
                "search": {
                    "sampler": "TPESampler", "seconds": 71.94,
                    "best": {"macro_f1": 0.777, "parameters": {"dropout": 0.3}},
                    "trials": [{"state": "complete"}, {"state": "pruned"}, {"state": "complete"}],
                    "workers": 2, "why": "trial 2 leads the defaults by 0.040 [0.010, 0.070]",
                },
                "decision": {
                    "views": 8, "temperature": 1.314, **rule,
                    "validation_macro_f1_before": 0.811, "validation_macro_f1_after": 0.822,
                    "calibration_error_before": 0.0931, "calibration_error_after": 0.0317,
                },
                "sets": json.loads(json.dumps(evaluate_sets(fitted, predictions))),
            }
        )  # fmt: skip
    counts = {part: dict.fromkeys(CLASSES, n) for part, n in (("train", 1501), ("validation", 33), ("test", 44))}
    summary = {
        "mode": "production", **HEAD, "experiment_name": "wafers", "models": models, "best_model": "lightning_cnn",
        "best_model_rule": "highest macro F1 on the validation part", "seconds": {"training": 82.54, "search": 143.88},
        "split": {"fingerprint": "ca70645745bfba0a", "class_counts": counts},
        "config": HEAD["config"] | {"seed": 3, "data": "maps.npz", "tracking_uri": None},
        "registered": {
            "name": "wafer_classifier", "version": "4", "alias": "champion",
            "uri": "models:/wafer_classifier@champion", "verdict": "Better than version 3.",
            "comparison": None, "largest_difference_to_checkpoint": 5.4e-07,
        },
    }  # fmt: skip
    del summary["interval_method"], summary["difference_method"], summary["budget"]
    return summary | changes


RECORDS = {
    "comparison": lambda: make_comparison(6),
    "comparison of one seed": lambda: make_comparison(2, n_seeds=1),
    "ablation": make_ablation,
    "ablation of one seed": lambda: make_ablation(n_seeds=1),
    "production": make_summary,
}


class Parsed(HTMLParser):
    """A page's tags with their attributes, its text, and the cells of its tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text, self.cells, self._open = [], "", [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("wbr", "strong"):  # where a word may break, or is bold: still the cell's text
            return
        self._open = tag
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        if tag != "strong":
            self._open = None

    def handle_data(self, data):
        if self._open not in ("style", "script"):
            self.text += data
        if self._open in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    return plot_seed_comparison(make_comparison(1), path=tmp_path_factory.mktemp("pictures") / "p.png")


@pytest.fixture
def folder(tmp_path, picture):
    """A folder with a picture of each name that a test asks for."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("seed_comparison", "confusion_matrix", "sample_predictions", "ablation"):
        shutil.copy(picture, folder / f"{name}.png")
    return folder


def write_page(record: dict, folder: Path, pictures=("seed_comparison.png",)) -> str:
    return write_report(record, folder=folder, pictures=pictures, path=folder / "report.html").read_text()


# Pictures


@pytest.mark.parametrize("n_seeds", [1, 3])
@pytest.mark.parametrize("n_models", [1, 2, 6])
@pytest.mark.parametrize("plot", ["seed_comparison", "critical_difference", "trade_offs"])
def test_a_comparison_of_any_size_is_drawn_below_one_megabyte(tmp_path, plot, n_models, n_seeds):
    record = make_comparison(n_models, n_seeds=n_seeds)
    path = getattr(experiment_figures, f"plot_{plot}")(record, path=tmp_path / "p.png")
    assert_is_a_picture(path)
    assert path.stat().st_size < 2**20


@pytest.mark.parametrize("record", [make_ablation(), make_ablation(n_seeds=1), make_ablation(components=["balancing"])])
def test_an_ablation_is_drawn_with_harm_and_with_one_seed(tmp_path, record):
    assert_is_a_picture(plot_ablation(record, path=tmp_path / "a.png"))


def test_what_was_not_measured_is_left_out_of_its_panel(tmp_path):
    record = make_comparison(2)
    for model in record["models"]:
        model["latency_ms"] = None
    assert_is_a_picture(plot_trade_offs(record, path=tmp_path / "t.png"))


def test_records_without_a_model_or_variant_are_refused(tmp_path):
    for plot in (plot_seed_comparison, plot_critical_difference, plot_trade_offs):
        with pytest.raises(ValueError, match="no model"):
            plot(make_comparison(0), path=tmp_path / "p.png")
    with pytest.raises(ValueError, match="no variant"):
        plot_ablation(make_ablation() | {"variants": []}, path=tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_a_bar_joins_only_models_of_which_no_pair_differs():
    def pair(a: str, b: str, *, significant: bool, p: float | None = 0.5) -> dict:
        return {"a": a, "b": b, "significant": significant, "p": p}

    alike, apart = [("a", "b"), ("b", "c"), ("a", "c"), ("c", "d")], [("a", "d"), ("b", "d")]
    differences = [pair(*names, significant=False) for names in alike] + [pair(*n, significant=True) for n in apart]
    assert sorted(map(sorted, not_told_apart("abcd", differences))) == [["a", "b", "c"], ["c", "d"]]
    untested = [pair("a", "b", significant=False, p=None)]
    assert not_told_apart("ab", untested) == []


@pytest.fixture
def drawn(monkeypatch):
    """The figures of experiments that were drawn, in place of their files."""
    figures = []
    monkeypatch.setattr(experiment_figures, "save", lambda figure, path: figures.append(figure))
    return figures


@pytest.mark.parametrize("n_models", [1, 4, 6])
def test_the_legend_of_the_trade_offs_names_every_model_in_its_colour_and_covers_no_panel(tmp_path, drawn, n_models):
    record = make_comparison(n_models)
    record["models"][0]["latency_ms"] = None  # it has no dot in the last panel
    plot_trade_offs(record, path=tmp_path / "t.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,) = figure.legends
    colours = {
        text.get_text(): line.get_color() for text, line in zip(legend.texts, legend.legend_handles, strict=True)
    }
    dots = [{line.get_color() for line in axes.lines if line.get_marker() == "o"} for axes in figure.axes]
    assert list(colours) == [model["model_type"] for model in record["models"]]
    assert dots[0] == dots[1] == set(colours.values()) and len(dots[0]) == n_models
    assert dots[2] == dots[0] - {colours[record["models"][0]["model_type"]]}
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0


def test_every_seed_is_a_dot_in_the_row_of_its_model(tmp_path, drawn):
    record = make_comparison(4)
    plot_seed_comparison(record, path=tmp_path / "s.png")
    (axes,) = drawn[0].axes
    names = [label.get_text().replace("\n", "") for label in axes.get_yticklabels()]
    dots = {
        names[round(row)]: sorted(score for score, row_of_dot in collection.get_offsets() if row_of_dot == row)
        for collection in axes.collections
        for row in {row for _, row in collection.get_offsets()}
    }
    for model in record["models"]:
        scores = [run["macro_f1"] for run in record["runs"] if run["model_type"] == model["model_type"]]
        assert dots[model["model_type"]] == pytest.approx(sorted(scores))


def made_up_study(*, n_parameters: int) -> optuna.Study:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: sum(trial.suggest_float(f"p{i}", 0, 1) for i in range(n_parameters)), n_trials=5)
    return study


@pytest.mark.parametrize("n_parameters", [1, 3])
def test_a_search_over_any_number_of_parameters_is_drawn(tmp_path, n_parameters):
    pictures = save_study_plots(study_plots(made_up_study(n_parameters=n_parameters)), folder=tmp_path, name="m")
    assert [path.name for path in pictures] == [f"optuna_m_{what}.png" for what in ("history", "slices", "importances")]
    for path in pictures:
        assert_is_a_picture(path)


def test_pictures_leave_matplotlib_as_they_found_it(tmp_path):
    from matplotlib import pyplot, rcParams

    before, figures = dict(rcParams), pyplot.get_fignums()
    plot_ablation(make_ablation(), path=tmp_path / "a.png")
    plot_trade_offs(make_comparison(2), path=tmp_path / "t.png")
    plot_confusion_matrix(make_predictions(), path=tmp_path / "c.png")
    with pytest.raises(ValueError, match="no model"):
        plot_seed_comparison(make_comparison(0), path=tmp_path / "s.png")
    save_study_plots(study_plots(made_up_study(n_parameters=2)), folder=tmp_path, name="m")
    assert dict(rcParams) == before and pyplot.get_fignums() == figures


# Tables


def test_the_comparison_in_markdown_has_a_row_a_model_and_the_best_first():
    record = make_comparison(4)
    lines = comparison_markdown(record).splitlines()
    best = max(record["models"], key=lambda model: model["mean"])
    low, high = best["interval"]
    assert lines[2].startswith(f"| **{best['model_type']}** | **{best['mean']:.3f} [{low:.3f}, {high:.3f}]**")
    assert sum(line.count("|") == 10 for line in lines) == 6
    assert ("is better" if record["differences"][-1]["significant"] else "no difference shown") in lines[-3]


def test_the_ablation_in_markdown_tells_gain_and_verdict():
    table = ablation_markdown(make_ablation())
    rows = {line.split(" | ")[0].strip("| *"): line for line in table.splitlines()}
    assert "| 0.720 [0.708, 0.732] | - | - |" in rows["baseline"]
    assert "+0.051 (+7.1%) | augmentation helps: +0.052 [+0.036, +0.067]" in rows["baseline + augmentation"]
    assert "balancing harms: -0.031" in rows["everything but balancing"]
    assert "no effect of optuna shown: +0.009" in rows["everything but optuna"]


def test_markdown_shows_names_as_they_are():
    record = make_comparison(2)
    record["models"][0]["model_type"] = "a|b<script>![x](http://example.org/x.png)"
    table = comparison_markdown(record | {"differences": []})
    assert "a\\|b&lt;script>" in table.replace("&gt;", ">")
    assert "](http" not in table


def test_a_verdict_is_found_by_what_was_switched_on_not_by_a_name():
    record = make_ablation()
    for number, variant in enumerate(record["variants"]):
        variant["name"] = f"variant {number}"
    rows = ablation_markdown(record).splitlines()[2:-2]
    assert [row.split(" | ")[-1].strip(" |*").split(":")[0] for row in rows] == [
        "-", "no effect of pretraining shown", "augmentation helps", "balancing harms", "no effect of optuna shown",
        "-", "no effect of pretraining shown", "augmentation helps", "balancing harms", "no effect of optuna shown",
    ]  # fmt: skip
    assert rows[0].split(" | ")[2] == "-" and "(+7.1%)" in rows[2], "the baseline is the variant with nothing on"


NASTY = [
    "<script>alert(1)</script>", "a | b", "`code` ``", "[text](http://example.org)", "![x](http://example.org/x.png)",
    "[text]: http://example.org", "*em* **strong** _em_ __init__ ~~x~~", "# heading", "- item", "1. item", "12) item",
    "--- ---", "== ==", "&lt; &amp;", "a\\b \\* \\", "two\nlines\n\n# and a heading", "<http://example.org>", "[",
    "](", "snake_case_name",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("place", ["word {} (F1)", "- {}: x", "> {}", "| a | b |\n| --- | --- |\n| **{}** | {} |"])
def test_text_of_the_data_is_shown_as_it_is(tmp_path, text, place):
    page = Parsed(to_html(f"# T\n\n## S\n\n{place.replace('{}', markdown(text))}\n", folder=tmp_path))
    shown = " ".join(text.split())
    assert (shown in page.cells) if place.startswith("|") else (place.strip("->| ").format(shown) in page.text)
    body = [tag for tag, _ in page.tags[page.tags.index(("main", {})) :]]
    assert not {"a", "img", "script", "em", "code", "h1", "ol", "hr"} & set(body)
    assert body.count("ul") == place.startswith("- ") and body.count("h2") == 1


# Reports


@pytest.mark.parametrize("kind", RECORDS)
def test_no_request_leaves_a_page(folder, kind):
    page = write_page(RECORDS[kind](), folder)
    parsed = Parsed(page)
    assert not {"script", "iframe", "object", "embed", "video", "audio", "form", "base"} & {
        tag for tag, _ in parsed.tags
    }
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action", "background"):
            assert tag == "a" or attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"@import|url\(", page)
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in parsed.tags)


@pytest.mark.parametrize("kind", RECORDS)
def test_all_text_is_escaped(folder, kind):
    page = write_page(RECORDS[kind](), folder)
    assert "<b>" not in page
    assert "my <b>maps</b>.npz" in Parsed(page).text


def test_details_are_folded_pictures_have_captions_and_numbers_stand_right(folder):
    page = Parsed(write_page(make_comparison(2), folder))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("details") == 2 and "▸" not in page.text  # every run; configuration and environment
    assert tags.count("img") == tags.count("figure") == tags.count("figcaption") == 1
    aligned = [attributes.get("style") == "text-align:right" for tag, attributes in page.tags if tag in ("td", "th")]
    right = {cell for cell, is_right in zip(page.cells, aligned, strict=True) if is_right}
    assert {"Macro F1 (mean)", "Seeds", "Seed", "309,561", "p, corrected"} <= right
    assert not {"Model", "lightning_cnn", "Verdict", "no difference shown"} & right


def test_a_summary_that_has_not_been_json_yet_is_shown_too(folder):
    summary = make_summary()
    summary["config"] |= {"output_dir": Path("elsewhere"), "objectives": ("macro_f1", "latency")}
    assert '"elsewhere"' in Parsed(write_page(summary, folder)).cells


def test_the_verdict_stands_first_and_the_command_last(folder):
    text = Parsed(write_page(make_comparison(2), folder)).text
    verdict, command = text.index(HEAD["verdict"]), text.index(HEAD["command"])
    assert verdict < text.index("Result") < command
    assert HEAD["budget"] in text
    assert "3 maps | without a die left out" in text
    assert "cpu_cores" in text


def test_every_figure_of_a_comparison_is_on_its_page(folder):
    record = make_comparison(6)
    cells = " ".join(Parsed(write_page(record, folder)).cells)
    for model in record["models"]:
        low, high = model["interval"]
        for figure in (
            f"{model['mean']:.3f} [{low:.3f}, {high:.3f}]", f"{model['std']:.3f}", f"{model['accuracy_mean']:.3f}",
            f"{model['n_parameters']:,}", f"{model['train_seconds']:.1f}", f"{model['latency_ms']:.2f}",
        ):  # fmt: skip
            assert figure in cells, figure
    for difference in record["differences"]:
        low, high = difference["interval"]
        assert f"{difference['difference']:+.3f} [{low:+.3f}, {high:+.3f}]" in cells
        assert f"{difference['a']} against {difference['b']}" in cells
    for run in record["runs"]:
        low, high = run["macro_f1_interval"]
        assert f"{run['macro_f1']:.3f} [{low:.3f}, {high:.3f}]" in cells
        assert f"{run['validation_macro_f1']:.3f}" in cells


def test_every_figure_of_an_ablation_is_on_its_page(folder):
    record = make_ablation()
    cells = " ".join(Parsed(write_page(record, folder, ["ablation.png"])).cells)
    for variant in record["variants"]:
        low, high = variant["interval"]
        assert f"{variant['mean']:.3f} [{low:.3f}, {high:.3f}]" in cells
        assert all(f"{score:.3f}" in cells for score in variant["scores"])
    for effect in record["effects"]:
        low, high = effect["interval"]
        assert f"{effect['difference']:+.3f} [{low:+.3f}, {high:+.3f}]" in cells
        assert f"{effect['p_corrected']:.3f}" in cells


def test_every_figure_of_a_run_is_on_its_page(folder):
    record = make_summary()
    text = Parsed(write_page(record, folder, ["confusion_matrix.png"])).text
    for model in record["models"]:
        low, high = model["test"]["intervals"]["macro_f1"]
        assert f"{model['test']['macro_f1']:.3f} [{low:.3f}, {high:.3f}]" in text
        assert model["weights"] in text
    for row in record["models"][0]["test"]["per_class"].values():
        assert all(f"{row[key]:.3f}" in text for key in ("f1", "precision", "recall"))
    for figure in (
        "1.314",
        "0.55",
        "0.811 → 0.822",
        "0.093 → 0.032",
        "-0.707",
        "2 complete, 1 pruned",
        "0.777",
        "1,501",
    ):
        assert figure in text, figure
    assert "models:/wafer_classifier@champion, version 4. Better than version 3." in text


def test_report_and_card_show_what_became_of_the_promise_for_each_class(folder):
    summary = make_summary()
    sets = summary["models"][0]["sets"]
    sets["per_class"]["Donut"] |= {"promised": False, "lots_fitted": 8}
    sets["per_class"]["Loc"] |= {"covered": None, "interval": None, "lots": 0, "maps": 0}
    sets |= {"alone": 0.9125, "error_alone": 0.0123, "error": 0.0345, "several": 0.0625, "none": 0.0125}
    _, card = write_model_card(summary, folder=folder)
    for page in (Parsed(write_page(summary, folder)), Parsed(card.read_text())):
        assert (
            "91.2% of the test maps are answered alone, 1.2% of them wrongly (all maps, each answered: 3.5%); of the "
            "rest 71% have several classes in their set, 14% none and 14% one that is not the likeliest."
        ) in page.text
        row = sets["per_class"]["Center"]
        covered = f"{row['covered']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]"
        at = page.cells.index("Promised coverage") - 1
        rows = {page.cells[i]: page.cells[i + 1 : i + 6] for i in range(at + 6, at + 6 * 10, 6)}
        assert rows["Center"] == ["90%", str(row["lots_fitted"]), covered, str(row["lots"]), str(row["maps"])]
        assert rows["Donut"][:2] == ["no promise: 8 of 9 lots", "8"]
        assert rows["Loc"][2:] == ["-", "0", "0"]
    assert "--coverage 0.95" in Parsed(card.read_text()).text


def test_a_run_shows_scores_by_the_size_of_the_grid_if_it_has_them(folder):
    record = make_summary()
    assert "By the size of the grid" not in write_page(record, folder)
    best = next(model for model in record["models"] if model["model_type"] == record["best_model"])
    recall = {"Center": 0.987, "Loc": None}
    best["test"]["by_grid"] = [
        {"longest_side": "up to 30 dies", "n_samples": 1234, "n_groups": 5, "macro_f1": 0.876, "interval": [0.8, 0.9],
         "recall": recall},
    ]  # fmt: skip
    page = write_page(record, folder)
    assert all(
        text in page for text in ("By the size of the grid", "up to 30 dies", "1,234", "0.876 [0.800, 0.900]", "0.987")
    )


@pytest.mark.parametrize(("alone", "error", "said"), [(1.0, 0.0, "alone, 0.0% of them"), (0.0, None, "alone; of the")])
def test_sets_that_answer_all_maps_or_none_are_put_in_words_too(folder, alone, error, said):
    summary = make_summary()
    summary["models"][0]["sets"] |= {"alone": alone, "error_alone": error, "several": 1 - alone, "none": 0.0}
    assert said in Parsed(write_page(summary, folder)).text


def test_a_summary_from_before_there_were_sets_is_shown_without_them(folder):
    summary = make_summary()
    del summary["models"][0]["sets"]
    summary["models"][1]["sets"] = None
    for best in ("lightning_cnn", "yolo_inspired"):
        older = summary | {"best_model": best}
        _, card = write_model_card(older, folder=folder)
        for page in (write_page(older, folder), card.read_text()):
            assert "Promised coverage" not in page and "abstains" not in Parsed(page).text.partition("How to use")[0]


@pytest.mark.parametrize("kind", ["comparison of one seed", "ablation of one seed"])
def test_one_seed_has_no_interval_and_the_page_says_so(folder, kind):
    parsed = Parsed(write_page(RECORDS[kind](), folder))
    assert "one seed" in parsed.text
    assert "Bars: none, since it takes several seeds" in parsed.text
    if kind.startswith("ablation"):
        assert not any("[" in cell for cell in parsed.cells if cell != '["macro_f1"]')


def test_a_picture_that_does_not_exist_is_refused_by_name(folder):
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        write_page(make_comparison(2), folder, ["gone.png"])
    assert not (folder / "report.html").exists()


def test_a_failed_write_leaves_the_old_page(folder, monkeypatch):
    before = write_page(make_comparison(2), folder)

    def disk_full(*_args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_page(make_comparison(4), folder)
    assert (folder / "report.html").read_text() == before
    assert not list(folder.glob(".*"))


# Model card


def test_the_model_card_names_weights_interval_and_limits(folder):
    summary = make_summary()

    markdown, page = write_model_card(summary, folder=folder)
    test = summary["models"][0]["test"]
    low, high = test["intervals"]["macro_f1"]
    weakest = min(test["per_class"], key=lambda name: test["per_class"][name]["f1"])
    share = test["per_class"]["none"]["support"] / test["n_samples"]
    for text in (markdown.read_text().replace("&lt;", "<").replace("&gt;", ">"), Parsed(page.read_text()).text):
        assert f"{test['macro_f1']:.3f} [{low:.3f}, {high:.3f}]" in text
        assert "random (lightning_cnn <none found>)" in text
        assert f"Weakest classes: {weakest} (F1 {test['per_class'][weakest]['f1']:.3f})" in text
        assert f"{share:.1%} of the test maps are 'none'" in text
        assert '"models:/wafer_classifier@champion"' in text
        assert "at temperature 1.314" in text
        assert "Seed 3" in text
        assert "ca70645745bfba0a" in text
        assert all(f"{row['f1']:.3f}" in text for row in test["per_class"].values())
    assert "](confusion_matrix.png)" in markdown.read_text()
    assert page.read_text().count("data:image/png;base64,") == 2


def test_the_pages_say_what_the_search_chose_and_why_or_why_there_was_none(folder):
    page, (markdown, _) = (
        Parsed(write_page(make_summary(), folder)).text,
        write_model_card(make_summary(), folder=folder),
    )
    why = "trial 2 leads the defaults by 0.040 [0.010, 0.070]"
    assert f"lightning_cnn, 2 trials at a time: {why}." in page and "2 complete, 1 pruned" in page
    assert f"Parameters found in 3 trials (TPESampler): {why}." in markdown.read_text()
    summary = make_summary()
    for model in summary["models"]:
        del model["search"]
        model["no_search_because"] = "9 epochs fit into 20 s, and a search pays from 15 on"
        model["weights_from"] = "trial 2, gone on with"
    page, (markdown, _) = Parsed(write_page(summary, folder)).text, write_model_card(summary, folder=folder)
    assert "yolo_inspired: no search, as 9 epochs fit into 20 s, and a search pays from 15 on." in page
    assert "- No search for its parameters: 9 epochs fit into 20 s," in markdown.read_text()
    assert "epoch 7 of 8 of trial 2, gone on with, best on validation" in markdown.read_text()


def test_the_model_card_of_the_ultralytics_network_names_its_licence(folder):
    for best, warned in (("yolo_inspired", True), ("lightning_cnn", False)):
        markdown, _ = write_model_card(make_summary(best_model=best), folder=folder)
        assert ("has to follow that licence" in markdown.read_text()) is warned


def test_the_code_on_the_model_card_can_be_compiled(folder):
    for registered, file in ((make_summary()["registered"], None), (None, "model.onnx"), (None, None)):
        summary = make_summary(registered=registered, not_registered_because="nothing is tracked", model_file=file)
        markdown, _ = write_model_card(summary, folder=folder)
        usage = markdown.read_text().split("## How to use it")[1].split("## Data")[0]
        code = "\n".join(line[4:] for line in usage.splitlines() if line.startswith("    "))
        compile(code, "MODEL_CARD.md", "exec")
        assert ("Predictor.load(" in code) is (registered is not None or file is not None)
        assert (f'/{file}")' in code) is (file is not None)
    assert "not registered" in markdown.read_text()


@pytest.mark.parametrize("zero", [None, 0.0], ids=["as it is computed", "as older records have it"])
def test_a_class_without_test_maps_is_named_and_has_no_score(folder, zero):
    summary = make_summary()
    few = make_predictions(labels=[0, 1, 2, 3, 4, 5, 6] * 30)  # no Scratch, no none
    test = summary["models"][0]["test"] = json.loads(json.dumps(compute_metrics(few)))
    for name in CLASSES[7:]:
        test["per_class"][name] |= dict.fromkeys(("precision", "recall", "f1"), zero)
    markdown, card = write_model_card(summary, folder=folder)
    page = Parsed(write_page(summary, folder))
    for text in (markdown.read_text(), Parsed(card.read_text()).text, page.text):
        assert "No test map of Scratch, none: without a score, and in no average." in text
    for text in (markdown.read_text(), Parsed(card.read_text()).text):
        assert "No test map, so nothing is known of: Scratch, none." in text
        assert "9 classes: test macro F1 (over the 7 with test maps)" in text
        assert "Scratch (F1" not in text and "Scratch (0)" not in text
    assert "| Scratch | - | - | - | 0 |" in markdown.read_text()
    at = page.cells.index("Scratch")
    assert page.cells[at : at + 5] == ["Scratch", "-", "-", "-", "0"]
    _, complete = (write_page(make_summary(), folder), write_model_card(make_summary(), folder=folder)[0])
    assert "No test map" not in complete.read_text()


# In a browser

MEASURE = """
<body style="margin:0"><iframe id="phone" style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const page = document.getElementById("phone").contentDocument;
  for (const folded of page.querySelectorAll("details")) folded.open = true;
  const within = "div.scroll *, pre *";
  const outside = e => !e.matches(within) && e.getBoundingClientRect().right > 390;
  const wide = [...page.querySelectorAll("body *")].filter(outside);
  document.title = JSON.stringify({{
    width: page.documentElement.scrollWidth, images: [...page.images].filter(i => i.naturalWidth > 0).length,
    wide: wide.map(e => e.tagName), style: page.defaultView.getComputedStyle(page.body).fontSize,
  }});
}}</script></body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: pages are not measured at phone width")
@pytest.mark.parametrize("kind", ["comparison", "ablation", "production", "card"])
def test_nothing_overflows_a_phone(folder, tmp_path, kind):
    if kind == "card":
        page = write_model_card(make_summary(), folder=folder)[1].read_text()
    else:
        page = write_page(RECORDS[kind](), folder)
    outer = tmp_path / "outer.html"  # a window cannot be as narrow as a phone, a frame in it can
    outer.write_text(MEASURE.format(page=html.escape(page)))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert seen["images"] == page.count("data:image/png;base64,")
    assert seen == {"width": 390, "images": seen["images"], "wide": [], "style": "16px"}


# House rules


def test_reporting_trains_nothing_and_its_import_is_light():
    rooms = ", ".join(f"waferlab.reports.{name}" for name in ("model_card", "run_figures", "experiment_figures"))
    code = f"import sys, {rooms}; print([m for m in sys.modules if '.' not in m])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "lightning", "mlflow", "optuna", "pandas", "sklearn", "scipy", "seaborn", "networkx"}
    own = {"integrated_pipeline", "simple_model"}
    assert not set(ast.literal_eval(output)) & (heavy | own)


def test_a_model_card_is_written_whatever_the_data_are_called(folder):
    summary = make_summary()
    summary["config"] = dict(summary["config"]) | {"data": b"caf\xe9.npz".decode(errors="surrogateescape")}
    summary["data"] = dict(summary["data"]) | {"source": b"caf\xe9.npz".decode(errors="surrogateescape")}
    for page in write_model_card(summary, folder=folder):
        assert page.stat().st_size > 1000
