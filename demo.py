"""Shows search, tracking and comparison on generated wafer maps, in two, three or five minutes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from waferlab import command_line

if TYPE_CHECKING:
    from waferlab.config import ExperimentConfig

EXAMPLES = """\
  python demo.py                                     one model, about two minutes
  python demo.py --mode full --start-mlflow          all models, with the MLflow page
  python demo.py --mode quick --data my_maps.npz
  python demo.py --mode quick --resume               go on after Ctrl-C or a crash"""


def main() -> int:
    """Runs demo with the command line's arguments and returns the exit status."""
    parser = command_line.make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--mode",
        choices=("ultra", "quick", "full"),
        default="ultra",
        help="ultra: one model, small search, 2 min (default); quick: all models, 3 min; full: all models, 5 min",
    )
    parser.add_argument("--start-mlflow", action="store_true", help="open the MLflow page before the work starts")
    arguments = parser.parse_args()
    return command_line.run(lambda: search_and_report(arguments))


def search_and_report(arguments: argparse.Namespace) -> None:
    """The work itself; imported late, so that --help and wrong flags answer at once."""
    config = replace(
        {"ultra": ultra, "quick": quick, "full": full}[arguments.mode](),
        enable_mlflow=not arguments.no_mlflow,
        image_size=32,  # in so little time, seeing more maps is worth more than seeing larger ones
        balance_by="loss",  # generated classes are equally frequent: drawing with replacement would only miss some maps
        data=arguments.data,
        max_samples_per_class=None if arguments.data == "synthetic" else 250,
        seed=arguments.seed,
        output_dir=arguments.output_dir,
        resume=arguments.resume,
        quiet=arguments.quiet,
    )
    command_line.run_pipeline(config, start_mlflow=arguments.start_mlflow)


def ultra() -> ExperimentConfig:
    """The small CNN with a search of eight trials."""
    from waferlab.config import ExperimentConfig

    return ExperimentConfig(
        experiment_name="demo_ultra",
        model_type="lightning_cnn",
        num_optuna_trials=8,
        search_epochs=6,
        max_epochs=15,
        time_limit=85,
    )


def quick() -> ExperimentConfig:
    """All four models, three trials each."""
    from waferlab.config import ExperimentConfig

    return ExperimentConfig(
        experiment_name="demo_quick",
        num_optuna_trials=3,
        search_epochs=3,
        max_epochs=8,
        time_limit=130,
    )


def full() -> ExperimentConfig:
    """All four models, six trials each, longer final training."""
    from waferlab.config import ExperimentConfig

    return ExperimentConfig(
        experiment_name="demo_full",
        num_optuna_trials=6,
        search_epochs=4,
        max_epochs=20,
        time_limit=240,
    )


if __name__ == "__main__":
    sys.exit(main())
