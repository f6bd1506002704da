"""Shows search, tracking and comparison on generated wafer maps, in two, three or five minutes."""

from __future__ import annotations

import argparse
import sys

from waferlab import command_line

EXAMPLES = """\
  python demo.py                              # one model, about two minutes
  python demo.py --mode full --start-mlflow   # all models, with the MLflow page
  python demo.py --mode quick --data my_maps.npz
  python demo.py --mode quick --resume        # go on after Ctrl-C or a crash"""

EVERY_MODE = dict(
    image_size=32,  # in so little time, seeing more maps is worth more than seeing larger ones
    balance_by="loss",  # generated classes are equally frequent: drawing with replacement would only miss some maps
    max_samples_per_class=250,  # of a set larger than the generated one
)
PRESETS = {
    "ultra": dict(  # the small CNN alone
        experiment_name="demo_ultra",
        model_type="lightning_cnn",
        num_optuna_trials=8,
        search_epochs=6,
        max_epochs=15,
        time_limit=85,
    ),
    "quick": dict(
        experiment_name="demo_quick",
        num_optuna_trials=3,
        search_epochs=3,
        max_epochs=8,
        time_limit=130,
    ),
    "full": dict(  # twice the trials, longer final trainings
        experiment_name="demo_full",
        num_optuna_trials=6,
        search_epochs=4,
        max_epochs=20,
        time_limit=240,
    ),
}


def main() -> int:
    """Runs demo with the command line's arguments and returns the exit status."""
    parser = command_line.make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--mode",
        choices=PRESETS,
        default="ultra",
        help="ultra: one model, small search, 2 min (default); quick: all models, 3 min; full: all models, 5 min",
    )
    parser.add_argument("--start-mlflow", action="store_true", help="open the MLflow page before the work starts")
    arguments = command_line.parse(parser)
    return command_line.run(lambda: search_and_report(arguments))


def search_and_report(arguments: argparse.Namespace) -> None:
    """The work itself; imported late, so that --help and wrong flags answer at once."""
    from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

    config = ExperimentConfig(**command_line.options_of(arguments, EVERY_MODE | PRESETS[arguments.mode]))
    command_line.run_pipeline(IntegratedMLPipeline(config), start_mlflow=arguments.start_mlflow)


if __name__ == "__main__":
    sys.exit(main())
