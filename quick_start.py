"""Shows the whole chain once: ResNet18, five epochs, metrics with error bars, pictures. About 30 seconds."""

from __future__ import annotations

import argparse
import sys

from waferlab import command_line

EXAMPLES = """\
  python quick_start.py
  python quick_start.py --data my_maps.npz --output-dir first_look
  python quick_start.py --seed 3 --quiet
  python quick_start.py model_type=yolo_inspired image_size=40"""

PRESET = dict(
    experiment_name="quick_start",
    model_type="torchvision_resnet",
    max_epochs=5,
    image_size=32,  # half the time of 40 pixels, and after 5 epochs no lower score on validation
    balance_by="loss",  # generated classes are equally frequent: drawing with replacement would only miss some maps
    enable_optuna=False,
    max_samples_per_class=150,  # as many as are generated
)


def main() -> int:
    """Runs quick_start with the command line's arguments and returns the exit status."""
    arguments = command_line.parse(command_line.make_parser(__doc__, EXAMPLES))
    return command_line.run(lambda: train_and_report(arguments))


def train_and_report(arguments: argparse.Namespace) -> None:
    """The work itself; imported late, so that --help and wrong flags answer at once."""
    from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

    config = ExperimentConfig(**command_line.options_of(arguments, PRESET))
    command_line.run_pipeline(IntegratedMLPipeline(config))


if __name__ == "__main__":
    sys.exit(main())
