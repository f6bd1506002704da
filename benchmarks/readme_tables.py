"""Writes the tables in README.md, the pages of docs/ and benchmarks/README.md from the records in benchmarks/results/.

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`. Below it stands how it was measured, and which of the
code that it measures has changed since. With `--check` nothing is written: the exit status is 1 if a table does not say
what the records say, or not of today's code.

    python benchmarks/readme_tables.py
    python benchmarks/readme_tables.py --check
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import fault_tables
from devices import table_of_devices
from guide import table_of_chapters
from idea import table_of_the_idea
from label_audit import table_of_audit
from measure import NOT_RECORDED, ROOT, interval_holds, rows, score_text
from processors import table_of_processors
from provenance import changed
from recipes import table_of_recipes
from search_tables import busy_machine, portfolio, search_pays
from small_device import table_of_forms
from speed_of_light import table_of_shares
from time_to_f1 import grouped, longest, machine_of, mean_and_deviation, score_of_seeds, table_of_levels, table_of_runs
from workers import table_of_workers

sys.path.insert(0, str(ROOT))
from waferlab.reports.tables import not_ranked

RESULTS = ROOT / "benchmarks/results"
PAGES = tuple(ROOT / page for page in ("README.md", "docs/results.md", "docs/guide/index.md", "benchmarks/README.md"))
DIFFERENCE = "paired by seed, in brackets its interval, corrected for the number of differences of the network"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    arguments = parser.parse_args()
    old = {page: page.read_text() for page in PAGES}
    new = dict(old)
    for name, make in TABLES.items():
        files = [RESULTS / f"{record}.json" for record in RECORDS_OF.get(name, (name,))]
        if not all(file.exists() for file in files):
            fill(new, name, "Not measured yet.")
            continue
        records = [json.loads(file.read_text()) for file in files]
        if "withdrawn" in records[0]:
            fill(new, name, records[0]["withdrawn"])
            continue
        fill(new, name, "\n".join([*make(*records), *([] if name in AS_ABOVE else below(records))]))
    if arguments.check:
        return 0 if new == old else 1
    for page, text in new.items():
        page.write_text(text)
    return 0


def fill(pages: dict[Path, str], name: str, table: str) -> None:
    """Puts a table in its one place."""
    pattern, places = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", 0
    for page, text in pages.items():
        pages[page], found = re.subn(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.S)
        places += found
    if places != 1:
        raise SystemExit(f"The pages have {places} places for the table {name}, wanted 1.")


def below(records: list) -> list[str]:
    """How each record was made, as paragraphs below its table."""
    lines = []
    for record in records:
        if isinstance(record, dict):
            of_several = f"`{record['benchmark']}.py`: " if len(records) > 1 else ""
            lines += ["", of_several + made_by(record["environment"], training_of(record), record["code"])]
            continue
        for runs in by_origin(record):
            code = {name: digest for run in runs for name, digest in run["code"].items()}
            lines += ["", made_by(runs[0]["environment"], training_of_runs(runs), code)]
    return lines


def made_by(made: dict, training: dict, code: dict[str, str | None]) -> str:
    """The code, the machine and the training that a record's figures come from, and whether that is today's code."""
    commit, changes = made.get("commit"), made.get("uncommitted_changes")
    at = {None: "Recorded by commit", False: "Measured at", True: "Measured with uncommitted changes at"}[changes]
    machine = made.get("processor", f"processor {NOT_RECORDED}")
    if made.get("gpu"):
        machine = f"{made['gpu']}, {machine}"
    parts = [
        f"{at} `{commit[:7]}`" if commit else f"Commit {NOT_RECORDED}",
        f"{machine} with {made['cpu_capability']}" if made.get("cpu_capability") else machine,
        count_text(made.get("cpu_cores"), "core"),
        count_text(made.get("torch_threads"), "thread"),
        *([f"precision {' and '.join(training['precision']) or NOT_RECORDED}"] if training["weights"] else []),
        training["repeats"],
        *([f"from {training['weights']}"] if training["weights"] else []),
        *([training["search"]] if training["search"] else []),
    ]
    text = f"*{', '.join(parts)}.*"
    if different := changed(code):
        names = ", ".join(f"`{name}`" for name in different[:3])
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        text += f" **Older code:** since then {names}{more} changed; to be measured anew."
    return text


def count_text(number: int | None, what: str) -> str:
    return f"{what}s {NOT_RECORDED}" if number is None else f"{number} {what}" + ("" if number == 1 else "s")


def training_of(record: dict) -> dict:
    """Repeats, precision, weights and search of a record, as `measure.write_record` puts them."""
    if "training" in record:
        return record["training"]
    if record["mode"] == "pipeline":
        models = record["models"]
        return {
            "repeats": "1 seed",
            "precision": sorted({model["precision"] for model in models}),
            "weights": " or ".join(sorted({weights_of(model) for model in models})),
            "search": search_text([len(model["search"]["trials"]) for model in models if "search" in model]),
        }
    runs = record["runs"]
    return {
        "repeats": f"{len(record['seeds'])} seeds, {record['budget']}",
        "precision": sorted({run["precision"] for run in runs if "precision" in run}),
        "weights": " or ".join(sorted({weights_of(run) for run in runs})),
        "search": search_text([run["trials"] for run in runs if run["trials"]]),
    }


def training_of_runs(runs: list[dict]) -> dict:
    """The same for runs of `time_to_f1.py`, with what they trained."""
    trained = {(run["model_type"], f"{run['minutes']:g} min", f"{run['image_size']} pixels") for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    return {
        "repeats": f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        "precision": sorted({run["precision"] for run in runs}),
        "weights": " or ".join(sorted({weights_of(run) for run in runs})),
        "search": f"no search: {'; '.join(' '.join(what) for what in sorted(trained))}",
    }


def by_origin(runs: list[dict]) -> list[list[dict]]:
    """Runs by commit and machine."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run["environment"], sort_keys=True), []).append(run)
    return list(groups.values())


def weights_of(trained: dict) -> str:
    """What a training started from, without the reason."""
    kind = trained["weights"].partition(" (")[0]
    return "random weights" if kind == "random" else f"weights of {kind}"


def search_text(trials: Sequence[int]) -> str:
    if not trials:
        return "no search"
    few, many = min(trials), max(trials)
    return f"searches of {few if few == many else f'{few} to {many}'} trials"


def brackets(methods: Iterable[str | None]) -> str:
    """What the brackets of a table are, or why there are none."""
    methods = set(methods)
    held = sorted(method for method in methods if interval_holds(method))
    shown = [f"In brackets: {'; '.join(held)}."] if held else []
    if len(held) == len(methods):
        return shown[0]
    rest = "Other rows stand without" if held else "Without"
    older = (
        f"{rest} intervals over lots: those of the record were made by an older method, which held the truth less "
        "often than the 95% it promised."
    )
    return " ".join([*shown, older])


def ratio_text(ratio: dict) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def throughput(record: dict) -> list[str]:
    return rows(
        "model, maps a second (ours), speed over a bare PyTorch loop, over one with PyTorch's own convolutions",
        [
            [m["model_type"], f"{statistics.median(m['ours_maps_per_second']):,.0f}",
             ratio_text(m["speed_over_bare_loop"]),
             ratio_text(m["speed_over_plain_loop"]) if "speed_over_plain_loop" in m else "the same"]
            for m in record["models"]
        ],
    )  # fmt: skip


def against(*records: dict) -> list[str]:
    cells = [
        [name, model["model_type"], f"{other['reads']}, {count_text(other['channels'], 'channel')}",
         ratio_text(other["seconds_to_finish_over_ours"]),
         f"{ratio_text(other['seconds_to_level_over_ours'])} (F1 {model['level']:.2f})"]
        for record in records
        for model in record["models"]
        for name, other in model.items()
        if isinstance(other, dict) and "reads" in other
    ]  # fmt: skip
    heading = "alternative, network, its images, time to finish over ours, "
    return rows(f"{heading}time to the same validation macro F1 over ours", cells)


def start_up(record: dict) -> list[str]:
    everything = record["seconds"] | record["quick_start"]
    return rows(
        "what, seconds (median), from, to",
        [[name, f"{v['median']:.2f}", f"{v['low']:.2f}", f"{v['high']:.2f}"] for name, v in everything.items()],
    )


def scale(record: dict) -> list[str]:
    return rows(
        "maps, generate (s), split (s), resize (s), train one epoch (s), highest memory (GB)",
        [
            [f"{r['maps']:,}", f"{r['generate']:.1f}", f"{r['split']:.1f}", f"{r['resize']:.1f}",
             f"{r['train_one_epoch']:.0f}", f"{r['peak_memory_gb']:.1f}"]
            for r in record["sizes"]
        ],
    )  # fmt: skip


def pruning(record: dict) -> list[str]:
    cells = []
    for name, found in record["against_none"].items():
        runs = [run for run in record["runs"] if run["seed"] in found["seeds"]]
        scores = {n: [run["test_macro_f1"] for run in runs if run["pruner"] == n] for n in (name, "none")}
        cells.append(
            [name, str(len(found["seeds"])), ratio_text(found["times_faster"]), ratio_text(found["times_fewer_epochs"]),
             difference_text(found["best_macro_f1"]), *(f"{statistics.mean(some):.3f}" for some in scores.values()),
             difference_text(found["test_macro_f1"])]
        )  # fmt: skip
    return rows(
        "pruner, seeds, times faster, times fewer epochs, best validation F1: difference, test F1 with, without, "
        "difference",
        cells,
    )


def difference_text(difference: dict) -> str:
    low, high = difference["interval"]
    return f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def quick_start(record: dict) -> list[str]:
    whole, tests = record["quick_start"]["quick_start, whole"], record["quick_start_test"]
    scores = sorted({score_text(test["macro_f1"], test["interval"], test.get("interval_method")) for test in tests})
    return [
        f"`python quick_start.py` takes {whole['median']:.1f} s (median of {record['repeats']}, {whole['low']:.1f} to "
        f"{whole['high']:.1f}, {record['environment']['cpu_capability']}): test macro F1 {' or '.join(scores)} on "
        f"{tests[0]['maps']} generated test maps, seed 0. {brackets(test.get('interval_method') for test in tests)}"
    ]


def production(record: dict) -> list[str]:
    models = record["models"]
    table = rows(
        "model, started from, validation F1, test F1, of odd groups, its plain answers, accuracy, trials, "
        "search (s), training (s), epochs, latency (ms)",
        [
            [m["model_type"], weights_of(m), f"{m['validation']['macro_f1']:.3f}",
             tested(m["test"]), odd_text(m.get("test_macro_f1_odd_groups")),
             f"{m['decision']['test_macro_f1_before']:.3f}", f"{m['test']['accuracy']:.3f}",
             *searched(m), f"{m['train_seconds']:,.0f}", str(m["epochs"]), f"{m['latency_ms']:.1f}"]
            for m in models
        ],
    )  # fmt: skip
    trials = [len(m["search"]["trials"]) if "search" in m else 0 for m in models]
    unlike = not_ranked([(weights_of(m), m["train_seconds"], n) for m, n in zip(models, trials, strict=True)])
    notes = [unlike] if unlike else []
    return [*table, "", " ".join([*notes, brackets(m["test"]["interval_method"] for m in models)])]


def searched(model: dict) -> tuple[str, str]:
    """Trials and seconds of its search; dashes where too few epochs fitted for one."""
    if "search" not in model:
        return "-", "-"
    return str(len(model["search"]["trials"])), f"{model['search']['seconds']:,.0f}"


def tested(test: dict) -> str:
    return score_text(test["macro_f1"], (test["intervals"] or {}).get("macro_f1"), test["interval_method"])


def odd_text(score: float | None) -> str:
    return NOT_RECORDED if score is None else f"{score:.3f}"


def champion(record: dict) -> list[str]:
    test = next(m for m in record["models"] if m["model_type"] == record["best_model"])["test"]
    table = rows(
        "class, F1, precision, recall, test maps, most often taken for",
        [
            [name, score_text(c["f1"], c["f1_interval"], test["interval_method"]), f"{c['precision']:.3f}",
             f"{c['recall']:.3f}", f"{c['support']:,}", taken_for(name, list(test["per_class"]), counts)]
            for (name, c), counts in zip(test["per_class"].items(), test["confusion_matrix"], strict=True)
        ],
    )  # fmt: skip
    note = "From the run of the table above."
    return [*table, "", f"{note} {brackets([method])}" if interval_holds(method := test["interval_method"]) else note]


def taken_for(name: str, names: list[str], counts: list[int]) -> str:
    """The two classes that maps of a class were most often called instead of their own."""
    wrong = sorted(((n, other) for n, other in zip(counts, names, strict=True) if n and other != name), reverse=True)
    return ", ".join(f"{other} ({n})" for n, other in wrong[:2]) or "-"


def comparison(record: dict) -> list[str]:
    """The models, their differences and the verdict; nothing of a ranking where it would not be fair."""
    from waferlab.reports.tables import comparison_markdown

    table = comparison_markdown(record).strip()
    trials = {run["model_type"]: run["trials"] for run in record["runs"]}
    started = {run["model_type"]: weights_of(run) for run in record["runs"]}
    equal_epochs = record["budget"].startswith("equal epochs")  # whose seconds are meant to differ
    names = [(m["model_type"], 1.0 if equal_epochs else m["train_seconds"]) for m in record["models"]]
    unlike = not_ranked([(started[name], seconds, trials[name]) for name, seconds in names])
    if unlike:
        table = table.partition("\n| Models ")[0].strip().replace("**", "")
    return [*table.splitlines(), "", unlike or record["verdict"]]


def comparison_models(record: dict) -> list[str]:
    """Without the table of differences, which the verdict sums up."""
    *table, _, verdict = comparison(record)
    first, _, _ = "\n".join(table).partition("\n| Models ")
    return [*first.strip().splitlines(), "", verdict]


def runs_of_minutes(runs: list[dict]) -> list[str]:
    alone = [group[0] for group in grouped(runs).values() if len(group) == 1]
    more = [run["decision"]["seconds"] - run["seconds"] for run in runs if run.get("decision")]
    shown = [f"{run['model_type']} {run['minutes']:g} min on {machine_of(run)}" for run in longest(runs)]
    notes = [
        "Rows of different machines, minutes, pixels or batches are not ranked against each other.",
        f"The picture shows one seed of each model's longest training: {'; '.join(shown)}.",
    ]
    if more:
        notes.append(f"To tune the decision took {min(more):.0f} to {max(more):.0f} s more.")
    if alone:
        notes.append(f"Of one seed: {brackets(run.get('interval_method') for run in alone)}")
    return [*table_of_runs(runs), "", " ".join(notes)]


def headline(runs: list[dict], audit: dict) -> list[str]:
    """For the README: the small CNN on the kind of machine that most have, and how high a score can be at all."""
    cells = []
    for (machine, model_type, minutes, _, _), some in grouped(runs).items():
        if model_type == "lightning_cnn" and machine.startswith("AVX2") and all(run.get("decision") for run in some):
            score = mean_and_deviation([run["decision"]["test_macro_f1"] for run in some])
            cells.append([f"{minutes:g} minutes", score, str(len(some)), machine.partition(",")[0]])
    perfect = audit["audit"]["perfect"]
    low, high = perfect["macro_f1_interval"]
    return [
        *rows("training, macro F1 on test lots, seeds, machine", cells),
        "",
        f"± is the standard deviation over seeds, each with a split of its own. Labels are people's judgement: a "
        f"classifier that is always right would score about {perfect['macro_f1']:.3f} [{low:.3f}, {high:.3f}] against "
        "these.",
    ]


def levels(runs: list[dict]) -> list[str]:
    return [*table_of_levels(runs), "", "From the runs of the table above."]


def ablation(record: dict) -> list[str]:
    from waferlab.reports.tables import ablation_markdown

    return [*ablation_markdown(record).strip().splitlines(), "", record["verdict"]]


def tracking_cost(record: dict) -> list[str]:
    share = record["study_share_of_search"]
    return rows(
        "search, wall time with MLflow over without, share of the search that the study takes",
        [[f"{record['model']}, {record['trials']} trials", ratio_text(record["wall_tracked_over_untracked"]),
          f"{share['median']:.1%} ({share['low']:.1%} to {share['high']:.1%})"]],
    )  # fmt: skip


def inference(record: dict) -> list[str]:
    def cells(name: str, views: str, ways: dict) -> list[str]:
        ratio = ways["onnxruntime"]["median"] / ways["pytorch"]["median"]
        return [name, views, *(rate_text(ways[way]) for way in ("onnxruntime", "pytorch")), f"{ratio:.2f}"]

    found = record["families"].items()
    return rows(
        "model, views, exported file (maps/s), PyTorch (maps/s), ratio",
        [cells(name, views, ways) for name, by_views in found for views, ways in by_views.items()],
    )


def rate_text(rate: dict) -> str:
    return f"{rate['median']:,.0f} ({rate['low']:,.0f} to {rate['high']:,.0f})"


def inference_champion(record: dict) -> list[str]:
    if "champion" not in record:
        return ["Not measured yet."]
    one = record["champion"]
    table = rows(
        "form, all cores (maps/s), one thread (maps/s), macro F1, difference, other class",
        [[name, rate_text(form["maps_per_second"]), rate_text(form["one_thread"]), f"{form['macro_f1']:.4f}",
          f"{form['against_eight_views']['difference']:+.4f} [{form['against_eight_views']['interval'][0]:+.4f}, "
          f"{form['against_eight_views']['interval'][1]:+.4f}]", f"{form['other_class']:.2%}"]
         for name, form in one["forms"].items()],
    )  # fmt: skip
    sure = one["answered_by_one_view"]
    note = f"{one['test_maps']:,} test maps of {one['test_lots']} lots. In brackets: 95% paired jackknife over lots."
    return [*table, "", note + ("" if sure is None else f" One view is sure of {sure:.1%} of the maps.")]


def predicting(record: dict) -> list[str]:
    first, whole = record["first_answer_seconds"], record["whole"]
    return rows(
        "first answer (s), maps, file inflated (MB), maps a second, highest memory (MB)",
        [[f"{first['median']:.2f} ({first['low']:.2f} to {first['high']:.2f})", f"{record['maps']:,}",
          f"{record['file']['inflated_megabytes']:,.0f}", f"{whole['maps_per_second']:,.0f}",
          f"{whole['peak_memory_mb']:,.0f}"]],
    )  # fmt: skip


def explaining(record: dict) -> list[str]:
    from waferlab.reports.tables import with_interval

    table = rows(
        "predicted class, area between the curves, maps, lots",
        [[name, with_interval(one["area"], one["area_interval"]), str(one["maps"]), str(one["lots"])]
         for name, one in record["classes"].items()],
    )  # fmt: skip
    return [*table, "", f"{record['seconds_a_map']:.2f} s a map. In brackets: 95% jackknife over lots, t interval."]


def serving(record: dict) -> list[str]:
    table = rows(
        "server, maps in a request, clients, p50 (ms), p99 (ms), requests a second",
        [[r["server"], str(r["maps"]), str(r["clients"]),
          *(f"{r[key]:.1f}" for key in ("p50_ms", "p99_ms", "requests_a_second"))] for r in record["rows"]],
    )  # fmt: skip
    up = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in record["up_seconds"].items())
    return [*table, "", f"Maps of {record['map_size'][0]}x{record['map_size'][1]}. Until a server is up: {up}."]


def serving_fuzz(record: dict) -> list[str]:
    statuses = ", ".join(f"{status}: {number:,}" for status, number in record["statuses"].items())
    memory = f"{record['memory_mib'][0]}, {max(record['memory_mib'])}, {record['memory_mib'][-1]}"
    return rows(
        "senseless requests, answers by status, then answered as before, memory before; highest; after (MiB)",
        [[f"{record['fuzzed']:,}", statuses, f"{record['answered_after_each']:,}", memory]],
    )


def image_sizes(runs: list[dict]) -> list[str]:
    """Of each family, a row for each size."""
    cells = []
    for (_, model_type, minutes, pixels, _), some in sorted(grouped(runs).items(), key=lambda item: item[0][1:]):
        cells.append([
            model_type, f"{minutes:g}", str(pixels), str(len(some)),
            f"{statistics.mean(run['validation_macro_f1'] for run in some):.3f}", score_of_seeds(some),
            f"{statistics.mean(run['epochs'] for run in some):.0f}",
            f"{statistics.mean(run['latency_ms'] for run in some):.1f}",
        ])  # fmt: skip
    table = rows("model, minutes, pixels, seeds, validation F1, test F1, epochs, latency (ms)", cells)
    single = [some[0].get("interval_method") for some in grouped(runs).values() if len(some) == 1]
    return [*table, *(["", brackets(single)] if single else [])]


def transfer(record: dict) -> list[str]:
    """Each start's scores and its paired difference to random weights."""
    words = {"random": "random", "imagenet": "ImageNet", "generated": "generated maps", "both": "both in turn"}

    def cell(row: dict, start: str) -> str:
        found, difference = row["scores"].get(start), row["against_random"].get(start)
        if found is None:
            return "-"
        text = f"{found['mean']:.3f}" + ("" if found["deviation"] is None else f" ± {found['deviation']:.3f}")
        if difference is None or difference["interval"] is None:
            return text
        return f"{text}; {difference['difference']:+.3f} [{', '.join(f'{v:+.3f}' for v in difference['interval'])}]"

    def seeds(row: dict) -> str:
        return " to ".join(map(str, sorted({found["seeds"] for found in row["scores"].values()})))

    table = rows(
        f"network, real maps a class, each training, seeds, {', '.join(words.values())}",
        [
            [row["model_type"], row["per_class"], row["budget"], seeds(row), *(cell(row, start) for start in words)]
            for row in record["outcome"]
        ],
    )
    made = {(run["model_type"], run["start"]): run["pretraining"] for run in record["runs"] if run["pretraining"]}
    costs = [
        f"{name}, {words[start]}: {int(cost['maps_seen']):,} generated maps in {float(cost['seconds']):,.0f} s"
        for (name, start), cost in sorted(made.items())
    ]
    return [*table, "", f"After the semicolon: the difference to random weights, {DIFFERENCE}. {'; '.join(costs)}."]


def lswmd_conversion(record: dict) -> list[str]:
    return [
        f"A generated file of {record['rows']:,} rows is converted in {record['convert_seconds']:.0f} s with "
        f"{record['peak_resident_bytes'] / 1e9:.1f} GB of memory at the peak, once; after that the copy loads in "
        f"{record['load_copy_seconds']:.1f} s."
    ]


def generator_realism(record: dict) -> list[str]:
    return [
        f"A small CNN trained on {record['generated_maps']:,} of them alone reaches macro F1 {record['macro_f1']:.3f} "
        f"(accuracy {record['accuracy']:.3f}) on {record['real_maps']:,} real maps, those of {record['half']} groups."
    ]


def interval_coverage(record: dict) -> list[str]:
    def cell(one: dict, score: str = "coverage") -> str:
        return " / ".join(f"{one[way][score]:.3f}" for way in ("product", "percentile"))

    return rows(
        "test part, macro F1, its mean width, F1 of a class, accuracy, difference of two models",
        [
            [s["name"], cell(s["scores"]["macro_f1"]), cell(s["scores"]["macro_f1"], "mean_width"),
             cell(s["scores"]["class_f1"]), cell(s["scores"]["accuracy"]), cell(s["differences"][0])]
            for s in record["settings"]
            if "scores" in s
        ],
    )  # fmt: skip


def set_coverage(record: dict) -> list[str]:
    def cells(row: dict) -> list[str]:
        ways = (row["pooled"], row["by_lot"])
        means = [f"{way['coverage']:.3f} ± {way['standard_error']:.3f}" for way in ways]
        return [
            str(row["lots"]),
            "yes" if row["promised"] else "no",
            *means,
            f"{ways[1]['of_the_worst_5_percent']:.3f}",
        ]

    heading = f"lots, {record['coverage']:.0%} promised, all maps pooled, each lot the same weight (ours)"
    return rows(f"{heading}, of the worst 5% of fits", [cells(row) for row in record["simulated"]])


def set_coverage_real(record: dict) -> list[str]:
    from waferlab.reports.tables import sets_in_words, with_interval

    if "real" not in record:
        return ["Not measured yet."]
    real = record["real"]
    both = zip(real["test"]["per_class"].items(), real["divided_again"].values(), strict=True)
    table = rows(
        "class, lots fitted on, coverage on the test part, its lots, coverage over all divisions, its lots, divisions",
        [
            [name, str(row["lots_fitted"]) + ("" if row["promised"] else " (no promise)"),
             with_interval(row["covered"], row["interval"]), str(row["lots"]),
             with_interval(again["coverage"], again["interval"]), str(again["lots"]), str(again["fits"])]
            for (name, row), again in both
        ],
    )  # fmt: skip
    return [*table, "", f"{sets_in_words(real['test'])} In brackets: 95% intervals over lots."]


def monitoring(record: dict) -> list[str]:
    ways = record["false_alarms"]
    kinds = [("verdict: any alarm", "verdict"), *((name, f"{key}, alone") for key, name in monitored_signals(record))]
    batch, reference = f"{record['lots_in_batch']} lots", f"{record['reference']['lots']} lots"
    return [
        *rows(
            f"alarms of, {', '.join(ways)}",
            [[label, *(alarm_text(found[key]) for found in ways.values())] for label, key in kinds],
        ),
        "",
        f"Batches of {batch} out of {record['test']['lots']}, reference of {reference}; signals alone: p below 0.05, "
        "without correction. In brackets: 95% interval for the number of batches, as if they shared no lots.",
    ]


def monitored_signals(record: dict) -> list[tuple[str, str]]:
    """Keys and words of the signals."""
    return signals_in(next(iter(record["false_alarms"].values())))


def signals_in(found: dict) -> list[tuple[str, str]]:
    return [(key, key.replace("_", " ")) for key in found if key != "verdict" and not key.endswith(", alone")]


def alarm_text(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['share']:.1%} [{low:.1%}, {high:.1%}]"


def monitoring_shifts(record: dict) -> list[str]:
    signals = monitored_signals(record)
    return rows(
        f"change, strength, any alarm, {', '.join(name for _, name in signals)}",
        [
            [s["shift"], f"{s['strength']:.0%}", alarm_text(s["alarms"]["verdict"]),
             *(f"{s['alarms'][key]['share']:.0%}" for key, _ in signals)]
            for s in record["shifts"]
        ],
    )  # fmt: skip


def monitoring_ordered(record: dict) -> list[str]:
    last = record["ordered"]
    alarms = last["alarms"]
    loudest = [f"{name} {alarms[key]['share']:.0%}" for key, name in signals_in(alarms)]
    return [
        *rows(
            "answers, macro F1, accuracy",
            [[name, f"{score:.3f}", f"{last['accuracy'][name]:.3f}"] for name, score in last["macro_f1"].items()],
        ),
        "",
        f"{last['maps']:,} maps of the last {last['lots']} lots. Of {alarms['verdict']['n']} batches of "
        f"{record['lots_in_batch']} lots or four fifths of them, {alarm_text(alarms['verdict'])} alarm "
        f"({', '.join(loudest)}).",
    ]


TABLES: dict[str, Callable[..., list[str]]] = {
    "interval_coverage": interval_coverage,
    "set_coverage": set_coverage,
    "set_coverage_real": set_coverage_real,
    "production": production,
    "champion": champion,
    "comparison_generated": comparison_models,
    "comparison_real": comparison,
    "comparison_epochs": comparison,
    "idea": table_of_the_idea,
    "ablation": ablation,
    "ablation_few": ablation,
    "runs": runs_of_minutes,
    "levels": levels,
    "headline": headline,
    "training_throughput": throughput,
    "speed_of_light": table_of_shares,
    "against": against,
    "start_up": start_up,
    "quick_start": quick_start,
    "image_sizes": image_sizes,
    "tracking_cost": tracking_cost,
    "inference": inference,
    "inference_champion": inference_champion,
    "small_device": table_of_forms,
    "predicting": predicting,
    "serving": serving,
    "serving_fuzz": serving_fuzz,
    "explaining": explaining,
    "scale": scale,
    "recipes": table_of_recipes,
    "recipes_long": table_of_recipes,
    "muon": table_of_recipes,
    "muon_long": table_of_recipes,
    "transfer": transfer,
    "transfer_cnn": transfer,
    "pruning": pruning,
    "search_pays": search_pays,
    "portfolio": portfolio,
    "busy_machine": busy_machine,
    "devices": table_of_devices,
    "processors": table_of_processors,
    "guide": table_of_chapters,
    "workers": table_of_workers,
    **{name: getattr(fault_tables, name) for name in ("kills", "writes", "stops", "scarce", "fuzz", "soak")},
    "lswmd_conversion": lswmd_conversion,
    "generator_realism": generator_realism,
    "label_audit": table_of_audit,
    "monitoring": monitoring,
    "monitoring_shifts": monitoring_shifts,
    "monitoring_ordered": monitoring_ordered,
}
RECORDS_OF = {
    "champion": ("production",),
    "idea": ("comparison_generated", "pruning", "ablation", "ablation_few"),
    "inference_champion": ("inference",),
    "set_coverage_real": ("set_coverage",),
    "quick_start": ("start_up",),
    "search_pays": tuple(f"search_pays{of}" for of in ("", "_wrong", "_600", "_real", "_resnet")),
    "runs": ("time_to_f1",),
    "levels": ("time_to_f1",),
    "headline": ("time_to_f1", "label_audit"),
    "against": ("against_ultralytics", "against_recipe"),
    "monitoring_shifts": ("monitoring",),
}
# What they say of themselves stands below another table.
AS_ABOVE = ("champion", "headline", "idea", "levels", "set_coverage_real", "inference_champion", "monitoring_shifts")


if __name__ == "__main__":
    sys.exit(main())
