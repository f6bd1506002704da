r"""What pre-trained weights bring: random ones, ImageNet's, those of generated wafer maps, and both in turn.

Measured, for each network, number of real training maps, seed and start: macro F1 on all real maps of the test lots,
and the F1 of each class. All starts of a seed see the same maps for the same time: once the same seconds, once the same
epochs. "Both in turn" is ImageNet's weights trained on generated maps first. The lots are split first; a seed changes
the split, the training maps, of which so many of each class are drawn by lot from the training part (fewer maps are
some of the more), the head's or all initial weights and the batches. Validation and test part stay whole. An epoch
draws as many maps as the validation part has, or the training maps where those are more, so that few of them are not
validated more often than trained on; it is the same for all starts. Each training has one thread, and the same number
of them always runs side by side but at the end. Seconds are those of the training with its validation; left out are
imports, reading, scoring, and the making of the weights, whose cost the record gives. Weights of generated maps are the
same for all seeds, and made first, in --pretrained-dir, where they are not there yet.

    python benchmarks/transfer.py --data wm811k.npz --seconds 120 --epochs 5 --output benchmarks/results/transfer.json
    python benchmarks/transfer.py --data wm811k.npz --models lightning_cnn --starts random generated --epochs 5 \
        --output benchmarks/results/transfer.json

--seconds and --epochs take one number, or one for each of --per-class. A call with the same output file and settings
adds to the record what it does not have yet, so an interrupted one goes on. Learning rates are the product's defaults;
others are chosen with other seeds and `--score validation`, which leaves the test lots closed, and given by --rates.
The interval of a difference is of `waferlab/evaluation/statistics.py`, corrected for all differences of a network that
were measured in the same way; its shares of test and training maps are those of the split, so that it is rather too
wide where only some of the training maps were drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import earlier_runs, few_maps, plain_config, score_on, write_record
from provenance import BATCHES, FAMILY, GENERATED_WEIGHTS, GENERATOR, LITE, ROOT, SCORES, SPLIT, TRAINING

if TYPE_CHECKING:
    import numpy as np

    from integrated_pipeline import IntegratedMLPipeline

STARTS = ("random", "imagenet", "generated", "both")
MADE = ("generated", "both")  # here, where they are not there yet
SETTINGS = ("batch_size", "image_size", "precision", "score", "pretraining_maps", "rates")
CASE = ("model_type", "per_class", "budget", "seed", "start")
MEASURES = (
    *(*SPLIT, *BATCHES, *TRAINING, *SCORES, *GENERATOR, *GENERATED_WEIGHTS),
    *("measure.few_maps", "transfer.train", "transfer.shared_out"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="real maps, anything that --data of the scripts takes")
    parser.add_argument("--models", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    parser.add_argument("--per-class", nargs="+", default=["20", "100", "1000", "all"], metavar="MAPS", type=size)
    parser.add_argument("--seconds", type=float, nargs="+", default=[], help="of each training")
    parser.add_argument("--epochs", type=int, nargs="+", default=[], help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=2, help="trainings side by side (default 2)")
    parser.add_argument("--rates", nargs="*", default=[], metavar="START=RATE", help="learning rates (others: default)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--precision", default="32-true", help="the same for all; 'auto' could differ between them")
    parser.add_argument("--pretraining-maps", type=int, default=200_000, help="generated ones (default 200,000)")
    parser.add_argument("--pretrained-dir", type=Path, default=ROOT / "checkpoints/pretrained")
    parser.add_argument("--score", choices=("test", "validation"), default="test", help="lots to score on")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        case = json.loads(arguments.one)
        print(json.dumps(train(arguments, **case) if "seed" in case else pretrain_for(arguments, **case)))
        return
    if not arguments.seconds and not arguments.epochs:
        parser.error("--seconds, --epochs or both say how long each training is")
    for start, _, rate in (pair.partition("=") for pair in arguments.rates):
        if start not in STARTS or not is_number(rate):
            parser.error(f"--rates {start}={rate}: wanted a start ({', '.join(STARTS)}) and its learning rate")
    for name in ("seconds", "epochs"):
        if len(getattr(arguments, name)) not in (0, 1, len(arguments.per_class)):
            parser.error(f"--{name} takes one number, or one for each of --per-class")
    run_all(arguments)


def size(text: str) -> str:
    """So many training maps of each class, or all of them."""
    if text != "all" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of maps nor 'all'")
    return text


def is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def run_all(arguments: argparse.Namespace) -> None:
    """Makes the weights, then trains what the record has not got, and writes it after each training."""
    settings = {name: getattr(arguments, name) for name in SETTINGS} | {"data": Path(arguments.data).name}
    runs = earlier_runs(arguments.output, settings)
    wanted = [case for case in cases(arguments) if not any(same(case, run) for run in runs)]
    starts = dict.fromkeys((case["model_type"], case["start"]) for case in wanted if case["start"] in MADE)
    for case, header in in_processes(arguments, [{"model_type": name, "start": start} for name, start in starts]):
        print(f"{case}: {header}", flush=True)
    for case, run in in_processes(arguments, wanted):
        runs.append(case | run)
        print(f"{', '.join(str(value) for value in case.values())}: macro F1 {run['macro_f1']:.3f}", flush=True)
        write(arguments, settings, runs)
    for row in outcome(runs):
        print(json.dumps(row))


def same(case: dict[str, Any], run: dict[str, Any]) -> bool:
    return all(case[key] == run[key] for key in CASE)


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is to be trained; all starts of a seed one after the other, and a first seed of everything first."""
    for seed in arguments.seeds:
        for place, per_class in enumerate(arguments.per_class):
            for unit in ("seconds", "epochs"):
                numbers = getattr(arguments, unit)
                for number in numbers[place : place + 1] or numbers[:1]:
                    for model_type in arguments.models:
                        for start in arguments.starts:
                            budget = f"{number:g} {unit}"
                            yield dict(zip(CASE, (model_type, per_class, budget, seed, start), strict=True))


def in_processes(arguments: argparse.Namespace, todo: Iterable[dict[str, Any]]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each case with what came of it in a process of one thread, as they finish, so many side by side."""
    flags = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in SETTINGS if name != "rates"]
    flags += [f"--data={arguments.data}", f"--pretrained-dir={arguments.pretrained_dir}", "--rates", *arguments.rates]

    def run(case: dict[str, Any]) -> dict[str, Any]:
        command = [sys.executable, __file__, *flags, "--one", json.dumps(case)]
        single = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=single, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(arguments.processes) as pool:
        running = {pool.submit(run, case): case for case in todo}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:  # whatever went wrong: what has not begun does not begin
            pool.shutdown(cancel_futures=True)


def configured(arguments: argparse.Namespace, model_type: str, start: str, **more: Any) -> IntegratedMLPipeline:
    """A pipeline that starts from these weights, with one thread."""
    from integrated_pipeline import IntegratedMLPipeline

    config = plain_config(
        model_type=model_type, data=arguments.data, use_pretrained=start != "random",
        pretrained_source="imagenet" if start == "imagenet" else "wafer",
        pretrained_dir=weights_folder(arguments, start), batch_size=arguments.batch_size,
        image_size=arguments.image_size, precision=arguments.precision, threads=1, **more,
    )  # fmt: skip
    return IntegratedMLPipeline(config)


def weights_folder(arguments: argparse.Namespace, start: str) -> Path:
    return arguments.pretrained_dir / "from_imagenet" if start == "both" else arguments.pretrained_dir


def pretrain_for(arguments: argparse.Namespace, model_type: str, start: str) -> dict[str, str]:
    """Makes the weights of a start where they are not there yet; what their file says of itself."""
    from waferlab.models.starting_weights import read_header
    from waferlab.training.pretraining import pretrain

    with tempfile.TemporaryDirectory() as folder:
        before = configured(arguments, model_type, "imagenet" if start == "both" else "random", output_dir=folder)

        def make():
            model = before.create_model(model_type)
            insist(model.starting_weights, before.config.use_pretrained)
            return model

        file = pretrain(
            model_type, make=make, fit=partial(before.fit, model_type), precision=before.precision(model_type),
            folder=weights_folder(arguments, start), maps=arguments.pretraining_maps,
            image_size=arguments.image_size, resume=True, say=partial(print, flush=True),
        )  # fmt: skip
    return read_header(file)


def cost(arguments: argparse.Namespace, start: str, weights: Any) -> dict[str, str] | None:
    """What the file of generated weights that a training started from says of its making."""
    from waferlab.models.starting_weights import read_header

    if weights.kind != "generated":
        return None
    header = read_header(weights_folder(arguments, start) / weights.name.partition("(")[2].rstrip(")"))
    return {name: header[name] for name in ("maps_seen", "seconds", "validation_macro_f1")}


def insist(weights: Any, pretrained: bool) -> None:
    if pretrained and weights.kind == "random":
        raise SystemExit(f"There is no such start: {weights}")


def train(
    arguments: argparse.Namespace, model_type: str, per_class: str, budget: str, seed: int, start: str
) -> dict[str, Any]:
    """One training in an empty folder, scored."""
    number, unit = budget.split()
    length = {"max_epochs": int(number)} if unit == "epochs" else {"max_epochs": 100_000, "time_limit": float(number)}
    with tempfile.TemporaryDirectory() as folder:
        rate = dict(pair.split("=") for pair in arguments.rates).get(start)
        length["learning_rate"] = None if rate is None else float(rate)
        pipeline = configured(arguments, model_type, start, seed=seed, output_dir=folder, **length)
        pipeline.prepare_data()
        whole = pipeline.split
        few = few_maps(pipeline, None if per_class == "all" else int(per_class), None, seed=seed)
        pipeline.split = replace(few, train=shared_out(few.train, len(few.validation)))
        pipeline.data_module().setup()
        record = pipeline.train_final_model(model_type)
        insist(record.weights, pipeline.config.use_pretrained)
        scored = getattr(whole, arguments.score)
        score = score_on(pipeline, record, scored)
    return {
        "macro_f1": round(score["macro_f1"], 4),
        "macro_f1_odd_groups": score["macro_f1_odd_groups"],
        "accuracy": round(score["accuracy"], 4),
        "per_class_f1": {name: round(row["f1"], 3) for name, row in score["per_class"].items()},
        "best_epoch": record.best_epoch,
        "epochs": record.epochs,
        "draws": record.epochs * (len(pipeline.split.train) // arguments.batch_size) * arguments.batch_size,
        "train_seconds": round(record.train_seconds, 1),
        "learning_rate": record.parameters["learning_rate"],
        "weights": str(record.weights),
        "pretraining": cost(arguments, start, record.weights),
        "precision": record.precision,
        "maps": {"train": len(whole.train), "drawn": len(few.train), "validation": len(few.validation),
                 "test": len(scored)},
    }  # fmt: skip


def shared_out(part: np.ndarray, at_least: int) -> np.ndarray:
    """The training maps as often as it takes, each equally often, for an epoch of so many draws or more."""
    import numpy as np

    return np.tile(part, -(-at_least // len(part)))


def write(arguments: argparse.Namespace, settings: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    runs.sort(key=lambda run: [str(run[key]) for key in CASE])
    families = {name for run in runs for name in {"efficientnet_lite0": LITE, **FAMILY}.get(run["model_type"], ())}
    write_record(
        arguments.output,
        {"benchmark": "transfer", **settings, "outcome": outcome(runs), "runs": runs},
        measures=(*MEASURES, *sorted(families)),
        repeats=f"{len({run['seed'] for run in runs})} seeds",
        precision=[run["precision"] for run in runs],
        weights="weights as the columns say",
    )


def outcome(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each network, budget and number of maps: scores of each start, and differences to random weights."""
    from waferlab.evaluation.statistics import paired_differences

    rows: list[dict[str, Any]] = []
    kinds = dict.fromkeys((run["model_type"], run["budget"].split()[1]) for run in runs)
    for model_type, unit in kinds:
        ours = [
            run | {"variant": (run["per_class"], run["budget"], run["start"])}
            for run in runs
            if run["model_type"] == model_type and run["budget"].endswith(unit)
        ]
        seeds = {variant: {run["seed"] for run in ours if run["variant"] == variant} for variant in variants(ours)}
        pairs = [(variant, (*variant[:2], "random")) for variant in seeds if variant[2] != "random"]
        pairs = [(a, b) for a, b in pairs if seeds[a] & seeds.get(b, set())]
        found = paired_differences(ours, pairs) if pairs else []
        for per_class, budget in sorted({variant[:2] for variant in seeds}, key=by_size):
            scores = {
                start: [run["macro_f1"] for run in ours if run["variant"] == (per_class, budget, start)]
                for start in STARTS
            }
            rows.append(
                {
                    "model_type": model_type, "per_class": per_class, "budget": budget,
                    "scores": {start: spread(values) for start, values in scores.items() if values},
                    "against_random": {
                        row["a"][2]: {key: row[key] for key in ("difference", "interval", "level", "p_corrected")}
                        for row in found if row["a"][:2] == (per_class, budget)
                    },
                }
            )  # fmt: skip
    return rows


def variants(runs: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys(run["variant"] for run in runs))


def by_size(row: tuple[str, str]) -> tuple[float, str]:
    return (float("inf") if row[0] == "all" else float(row[0]), row[1])


def spread(values: list[float]) -> dict[str, Any]:
    deviation = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(statistics.mean(values), 4), "deviation": deviation, "seeds": len(values)}


if __name__ == "__main__":
    main()
