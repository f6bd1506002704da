"""Experiments whose figures can be quoted: several seeds, error bars, a report as one page.

comparison  every architecture with several seeds and the same budget; paired differences
ablation    what pre-training, augmentation, balancing and search bring, alone and left out
production  search, final training and calibration of every architecture; the best is registered, with a model card
demo        the chain of production on a small budget
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from waferlab import command_line

if TYPE_CHECKING:
    from waferlab.config import ExperimentConfig

EXAMPLES = """\
  python run_experiment.py --mode comparison
  python run_experiment.py --mode comparison --epochs 20 --seeds 0 1 2       equal epochs instead of equal time
  python run_experiment.py --mode ablation --models yolo_inspired
  python run_experiment.py --mode production --data my_maps.npz --time-limit 3600 --mlflow-server
  python run_experiment.py --mode production --data my_maps.npz --resume     go on after Ctrl-C or a crash"""


def main() -> int:
    """Runs run_experiment with the command line's arguments and returns the exit status."""
    parser = command_line.make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--mode",
        choices=("demo", "comparison", "production", "ablation"),
        default="demo",
        help="demo: 10 min (default); comparison: 20 min; ablation: 30 min; production: 50 min",
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="'all' or names (ablation takes one)")
    parser.add_argument("--trials", type=int, metavar="N", help="of each search")
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="of each final training; without --time-limit, nothing else ends it"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        metavar="N",
        help="of comparison and ablation (default 0 1 2 3 4)",
    )
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds for the whole experiment")
    parser.add_argument(
        "--max-samples-per-class",
        type=int,
        metavar="N",
        help="use at most N maps of each class (default: all; ablation 1000, to see each several times in its seconds)",
    )
    parser.add_argument("--mlflow-server", action="store_true", help="open the MLflow page before the work starts")
    arguments = parser.parse_args()
    return command_line.run(lambda: run_and_report(arguments))


def run_and_report(arguments: argparse.Namespace) -> None:
    """The work itself; imported late, so that --help and wrong flags answer at once."""
    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.experiments.ablation import ablate
    from waferlab.experiments.comparison import compare_architectures

    preset = {"demo": demo, "comparison": comparison, "production": production, "ablation": ablation}[arguments.mode]
    pipeline = IntegratedMLPipeline(replace(preset(), **_chosen(arguments)))
    with command_line.mlflow_page(pipeline, wanted=arguments.mlflow_server):
        match arguments.mode:
            case "comparison":
                compare_architectures(pipeline, seeds=arguments.seeds)
            case "ablation":
                ablate(pipeline, seeds=arguments.seeds)
            case _:
                pipeline.run_complete_pipeline()


def _chosen(arguments: argparse.Namespace) -> dict[str, object]:
    """The fields of the configuration that the command line sets."""
    chosen = {
        "data": arguments.data,
        "seed": arguments.seed,
        "output_dir": arguments.output_dir,
        "enable_mlflow": not arguments.no_mlflow,
        "resume": arguments.resume,
        "quiet": arguments.quiet,
    }
    optional = {
        "model_type": arguments.models if arguments.models != ["all"] else "all",
        "num_optuna_trials": arguments.trials,
        "max_epochs": arguments.epochs,
        "time_limit": arguments.time_limit,
        "max_samples_per_class": arguments.max_samples_per_class,
    }
    chosen |= {name: value for name, value in optional.items() if value is not None}
    if arguments.epochs is not None and arguments.time_limit is None:
        chosen["time_limit"] = None
    return chosen


def demo() -> ExperimentConfig:
    """All four models, small searches, decision tuned: about ten minutes."""
    from waferlab.config import ExperimentConfig

    return ExperimentConfig(
        experiment_name="experiment_demo",
        image_size=32,  # in so little time, seeing more maps is worth more than seeing larger ones
        num_optuna_trials=6,
        search_epochs=5,
        max_epochs=30,
        time_limit=460,
        tune_decision=True,
    )


def production() -> ExperimentConfig:
    """A full search for every architecture, then the final trainings, the longest for what did best in its search."""
    from waferlab.config import ExperimentConfig

    return ExperimentConfig(
        experiment_name="production",
        num_optuna_trials=12,
        search_epochs=8,
        search_share=0.3,
        favourite_share=0.7,
        max_epochs=200,
        early_stopping_patience=40,
        batch_size=64,
        time_limit=2700,
        tune_decision=True,
    )


def comparison() -> ExperimentConfig:
    """Every architecture with its default parameters and the same seconds."""
    from waferlab.config import ExperimentConfig

    return ExperimentConfig(experiment_name="comparison", enable_optuna=False, max_epochs=20, time_limit=1080)


def ablation() -> ExperimentConfig:
    """Each component on and off, for the small CNN; searches are part of a variant's seconds."""
    from waferlab.config import ExperimentConfig

    return ExperimentConfig(
        experiment_name="ablation",
        model_type="lightning_cnn",
        num_optuna_trials=6,
        search_epochs=5,
        max_epochs=20,
        max_samples_per_class=1000,
        time_limit=1600,
    )


if __name__ == "__main__":
    sys.exit(main())
