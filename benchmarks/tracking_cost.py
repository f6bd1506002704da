"""What tracking costs, and what keeping the search costs, as shares of the wall time.

Measured, each run in a process of its own and in turn: a short search with a final training from the shell's point of
view, as the scripts start it, with MLflow (fresh database, no registration) and without; the ratio says what tracking
costs. Inside the run without it, the seconds that the study's calls to its journal file take are counted; their share
of the search says what keeping it costs.

    python benchmarks/tracking_cost.py --output benchmarks/results/tracking_cost.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measure import as_text, paired_ratio, plain_config, repeats_in_words, take_warm_turns, write_record
from provenance import CNN, SEARCH, TRAINING

MEASURES = (
    *("RunTree", "RunLogger", "Line", "make_database", "study_storage"),
    *(*SEARCH, *TRAINING, *CNN),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", metavar="PATH")
    parser.add_argument("--model", default="lightning_cnn")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5, help="of a trial and of the final training")
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=("tracked", "untracked"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(search_and_train(arguments)))
        return
    ways = {name: partial(in_a_process, name) for name in ("tracked", "untracked")}
    turns = take_warm_turns(ways, repeats=arguments.repeats)
    precision = [turn.pop("precision") for some in turns.values() for turn in some]
    walls = {name: [turn["wall_seconds"] for turn in some] for name, some in turns.items()}
    ratio = paired_ratio(walls["tracked"], walls["untracked"])
    study = paired_ratio(*([turn[key] for turn in turns["untracked"]] for key in ("storage_seconds", "search_seconds")))
    print(f"wall time, tracked over untracked: {as_text(ratio)}")
    print(f"share of the search that keeping the study takes: {as_text(study)}")
    settings = {
        name: getattr(arguments, name) for name in ("data", "model", "trials", "epochs", "image_size", "repeats")
    }
    record = {"benchmark": "tracking_cost", **settings}
    record |= {"wall_tracked_over_untracked": ratio, "study_share_of_search": study, "turns": turns}
    write_record(
        arguments.output,
        record,
        measures=MEASURES,
        repeats=repeats_in_words(arguments.repeats),
        precision=precision,
        search=f"searches of {arguments.trials} trials",
    )


def in_a_process(way: str) -> dict[str, float | str]:
    started = time.monotonic()
    command = [sys.executable, __file__, *sys.argv[1:], f"--one={way}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if done.stderr:  # a run whose tracking broke off costs less than one that worked
        raise RuntimeError(done.stderr)
    return {"wall_seconds": round(time.monotonic() - started, 2), **json.loads(done.stdout.splitlines()[-1])}


def search_and_train(arguments: argparse.Namespace) -> dict[str, float | str]:
    import integrated_pipeline as story
    from waferlab.search import model_search

    with tempfile.TemporaryDirectory() as folder:
        config = plain_config(
            model_type=arguments.model, data=arguments.data, image_size=arguments.image_size, enable_optuna=True,
            num_optuna_trials=arguments.trials, search_epochs=arguments.epochs, max_epochs=arguments.epochs,
            pruner="none", workers=1, registry_name=None, enable_mlflow=arguments.one == "tracked", output_dir=folder,
        )  # fmt: skip
        watch = Stopwatch()
        model_search.study_storage = watch.of_what_gives(model_search.study_storage)
        summary = story.IntegratedMLPipeline(config).run_complete_pipeline()
        return {
            "search_seconds": round(summary["seconds"]["search"], 3),
            "storage_seconds": round(watch.seconds, 4),
            "precision": summary["models"][0]["precision"],
        }


class Stopwatch:
    """Adds up the seconds that calls to a storage take; a call within a call counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def of_what_gives(self, make):
        """The function, whose storages' calls are timed."""

        def timed(*args, **kwargs):
            storage = make(*args, **kwargs)
            for name in dir(storage):
                if not name.startswith("_") and callable(getattr(storage, name)):
                    setattr(storage, name, self._timed(getattr(storage, name)))
            return storage

        return timed

    def _timed(self, call):
        def timed(*args, **kwargs):
            started, self._depth = time.perf_counter(), self._depth + 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - started

        return timed


if __name__ == "__main__":
    main()
