"""Experiments whose figures can be quoted: several seeds, error bars, a report as one page.

comparison  every architecture with several seeds and the same budget; paired differences
ablation    what pre-training, augmentation, balancing and search bring, alone and left out
production  search, final training and calibration of every architecture; the best is registered, with a model card
demo        the chain of production on a small budget
pretrain    weights from a stream of generated maps, to checkpoints/pretrained/ in the output folder. A run of the same
            network and image_size that starts there finds them: where ImageNet weights cannot be had, and always with
            pretrained_source="wafer"
"""

from __future__ import annotations

import argparse
import reprlib
import sys
from functools import partial
from typing import TYPE_CHECKING

from waferlab import command_line
from waferlab.errors import ConfigError

if TYPE_CHECKING:
    from waferlab.config import ExperimentConfig

EXAMPLES = """\
  python run_experiment.py --mode comparison
  python run_experiment.py --mode comparison --epochs 20 --seeds 0 1 2      # equal epochs instead of equal time
  python run_experiment.py --mode ablation --models yolo_inspired
  python run_experiment.py --mode production --data my_maps.npz --time-limit 3600 --mlflow-server
  python run_experiment.py --mode production --data my_maps.npz --resume    # go on after Ctrl-C or a crash
  python run_experiment.py --mode comparison image_size=48 learning_rate=2e-3  # any option of a run
  python run_experiment.py --mode production --config results/production/config.yaml  # as an earlier run was
  python run_experiment.py --mode pretrain                                  # the small CNN, 200,000 maps
  python run_experiment.py --mode pretrain --models all --image-size 64     # a network of every family"""

DEMO = dict(
    experiment_name="experiment_demo",
    image_size=32,  # in so little time, seeing more maps is worth more than seeing larger ones
    num_optuna_trials=6,
    search_epochs=5,
    max_epochs=30,
    time_limit=460,
    tune_decision=True,
)
PRODUCTION = dict(
    experiment_name="production",
    num_optuna_trials=12,
    search_epochs=8,
    search_share=0.3,
    favourite_share=0.7,  # the longest final training for what did best in its search
    max_epochs=200,
    early_stopping_patience=40,
    batch_size=64,
    time_limit=2700,
    tune_decision=True,
)
COMPARISON = dict(
    experiment_name="comparison",
    enable_optuna=False,  # default parameters and the same seconds for all
    max_epochs=20,
    time_limit=1080,
)
ABLATION = dict(
    experiment_name="ablation",
    model_type="lightning_cnn",
    num_optuna_trials=6,  # a search is part of its variant's seconds
    search_epochs=5,
    max_epochs=20,
    max_samples_per_class=1000,  # to see each map several times in these seconds
    time_limit=1600,
)
PRETRAIN = dict(model_type="lightning_cnn")  # ten minutes on one core; larger networks need longer for as many maps
PRESETS = {
    "demo": DEMO,
    "comparison": COMPARISON,
    "production": PRODUCTION,
    "ablation": ABLATION,
    "pretrain": PRETRAIN,
}
MOST_MAPS = 10**9  # of pretrain, which would take a year
# What would be without effect, and why.
ENDS_EARLY = dict.fromkeys(("max_epochs", "early_stopping_patience"), "gives each training its seconds; see --epochs")
OF_SERIES = {
    "comparison": {"seed": "takes --seeds"},
    "ablation": {"seed": "takes --seeds"}
    | dict.fromkeys(
        ("use_pretrained", "data_augmentation", "class_balancing", "enable_optuna"), "switches it on and off itself"
    ),
}
PRETRAIN_HEEDS = {
    "model_type", "image_size", "seed", "learning_rate", "accelerator", "devices", "precision", "threads",
    "output_dir", "pretrained_dir", "resume", "quiet",
}  # fmt: skip
SERIES, TRAININGS = {"comparison", "ablation"}, PRESETS.keys() - {"pretrain"}
ONLY_FOR = {  # flags that mean nothing in the other modes
    "data": TRAININGS,
    "trials": TRAININGS,
    "workers": TRAININGS,
    "epochs": TRAININGS,
    "split": TRAININGS,
    "seeds": SERIES,
    "time_limit": TRAININGS,
    "max_samples_per_class": TRAININGS,
    "mlflow_server": TRAININGS,
    "maps": {"pretrain"},
    "image_size": {"pretrain"},
}


def main() -> int:
    """Runs run_experiment with the command line's arguments and returns the exit status."""
    parser = make_parser()
    arguments = command_line.parse(parser)
    for name, modes in ONLY_FOR.items():
        if arguments.mode not in modes and getattr(arguments, name) != parser.get_default(name):
            flag, others = f"--{name.replace('_', '-')}", " or ".join(sorted(modes))
            parser.error(f"--mode {arguments.mode} has no use for {flag}: leave it out, or choose --mode {others}.")
    if arguments.mode in SERIES and arguments.epochs is not None and arguments.time_limit is not None:
        parser.error(f"--mode {arguments.mode} compares at equal epochs or at equal time: leave out one of "
                     "--epochs and --time-limit.")  # fmt: skip
    if arguments.mode == "pretrain":  # which tracks nothing
        return command_line.run(lambda: pretrain_all(arguments))
    return command_line.run(lambda: run_and_report(arguments))


def make_parser() -> argparse.ArgumentParser:
    """The flags of all scripts and those of experiments; without a default of their own, a mode's preset counts."""
    parser = command_line.make_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--mode",
        choices=PRESETS,
        default="demo",
        help="demo: 10 min (default); comparison: 20 min; ablation: 30 min; production: 50 min; pretrain: 10 min",
    )
    add(
        "--models",
        action=command_line.Several,
        metavar="NAME",
        help="'all' or names (ablation takes one; pretrain: the small CNN)",
    )
    add("--trials", type=int, metavar="N", help="of each search")
    add("--workers", type=int, metavar="N", help="trials side by side here (default: one a core)")
    add("--epochs", type=int, metavar="N", help="of each final training at most, in the place of seconds")
    add(
        "--seeds",
        action=command_line.Several,
        each=int,
        default=[0, 1, 2, 3, 4],
        metavar="N",
        help="of comparison and ablation (default 0 1 2 3 4)",
    )
    add("--split", choices=("lots", "ordered"), help="lots at random (default), or ordered: the last 20%% are the test")
    add("--time-limit", type=float, metavar="S", help="seconds of all training (comparison, ablation: of everything)")
    add(
        "--max-samples-per-class",
        type=int,
        metavar="N",
        help="use at most N maps of each class (default: all; ablation 1000, to see each several times in its seconds)",
    )
    add("--mlflow-server", action="store_true", help="open the MLflow page before the work starts")
    add("--maps", type=int, metavar="N", help="generated maps to pretrain on (default 200000)")
    add("--image-size", type=int, metavar="S", help="side in pixels of pretrain, as its users' (default 40)")
    return parser


def run_and_report(arguments: argparse.Namespace) -> None:
    """The work of all modes but pretrain; imported late, so that --help and wrong flags answer at once."""
    from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline, train_and_score
    from waferlab.experiments.ablation import ablate
    from waferlab.experiments.comparison import compare_architectures

    pipeline = IntegratedMLPipeline(ExperimentConfig(**_options(arguments)))
    _check_flags(arguments, pipeline.config)
    if arguments.mode not in SERIES:
        command_line.run_pipeline(pipeline, start_mlflow=arguments.mlflow_server)
        return
    experiment = {"comparison": compare_architectures, "ablation": ablate}[arguments.mode]
    with command_line.mlflow_page(pipeline, wanted=arguments.mlflow_server):
        experiment(
            pipeline.config,
            seeds=arguments.seeds,
            train=train_and_score,
            runs=pipeline.open_tracking(),
            terminal=pipeline.terminal,
        )


def _check_flags(arguments: argparse.Namespace, config: ExperimentConfig) -> None:
    """Raises ConfigError for a flag that would be without effect, as a file or an OPTION=VALUE says something else."""
    if not config.enable_optuna and (arguments.trials or arguments.workers):
        flag = "--trials" if arguments.trials else "--workers"
        raise ConfigError(f"{flag} is of a search, and there is none: leave it out, or add enable_optuna=true.")
    if (mode := arguments.mode) not in SERIES:
        return
    if arguments.epochs is not None and config.time_limit is not None:
        raise ConfigError(
            f"--epochs {arguments.epochs} beside time_limit={config.time_limit:g}: {mode} compares at equal epochs or "
            "at equal time. Leave out one of them."
        )
    without_effect = OF_SERIES[mode] | (ENDS_EARLY if config.time_limit is not None else {})
    said = [option.partition("=")[0].strip() for option in arguments.options]
    said += [] if arguments.seed is None else ["seed"]
    if name := next(filter(without_effect.__contains__, said), None):
        raise ConfigError(f"{name}={getattr(config, name)}: {mode} {without_effect[name]}. Leave it out.")


def pretrain_all(arguments: argparse.Namespace) -> None:
    """The work of pretrain, a network after the other."""
    from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
    from waferlab.training.checkpoints import hold_folders
    from waferlab.training.pretraining import DEFAULT_MAPS, pretrain

    if arguments.maps is not None and not 1 <= arguments.maps <= MOST_MAPS:
        raise ConfigError(f"--maps {reprlib.repr(arguments.maps)} is out of range. Allowed: 1 to {MOST_MAPS:,}.")
    for option in arguments.options:
        if (name := option.partition("=")[0].strip()) not in PRETRAIN_HEEDS:
            raise ConfigError(f"{option}: --mode pretrain has no use for {name}. Leave it out.")
    config = ExperimentConfig(**_options(arguments) | {"use_pretrained": False})
    pipeline = IntegratedMLPipeline(config)
    with hold_folders(config.generated_weights_dir):
        for model_type in config.model_types():
            if not config.quiet:
                print(model_type, flush=True)
            file = pretrain(
                model_type,
                make=partial(pipeline.create_model, model_type),
                fit=partial(pipeline.fit, model_type),
                precision=pipeline.precision(model_type),
                folder=config.generated_weights_dir,
                maps=DEFAULT_MAPS if arguments.maps is None else arguments.maps,
                seed=config.seed,
                image_size=config.image_size,
                resume=config.resume,
                say=(lambda text: None) if config.quiet else (lambda text: print(text, flush=True)),
            )
            if config.quiet:
                print(file, flush=True)


def _options(arguments: argparse.Namespace) -> dict[str, object]:
    """The options of a run, as the mode's preset, a file and the command line say."""
    optional = {
        "model_type": arguments.models if arguments.models != ["all"] else "all",
        "num_optuna_trials": arguments.trials,
        "workers": arguments.workers,
        "max_epochs": arguments.epochs,
        "time_limit": arguments.time_limit,
        "split": arguments.split,
        "max_samples_per_class": arguments.max_samples_per_class,
        "image_size": arguments.image_size,
    }
    flags = {name: value for name, value in optional.items() if value is not None}
    if arguments.epochs is not None:
        flags.setdefault("time_limit", None)
    return command_line.options_of(arguments, PRESETS[arguments.mode], **flags)


if __name__ == "__main__":
    sys.exit(main())
