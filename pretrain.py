"""Pre-trains networks on a stream of generated wafer maps: weights to start from where none can be downloaded."""

from __future__ import annotations

import argparse
import sys

from waferlab import command_line

EXAMPLES = """\
  python pretrain.py                                     the small CNN, 200,000 maps, ten minutes on one core
  python pretrain.py --models lightning_cnn torchvision_resnet --maps 100000
  python pretrain.py --models all --image-size 64
  python pretrain.py --resume                            go on after Ctrl-C or a crash

Weights go to checkpoints/pretrained/ in the output folder. Every run that starts there finds them: where ImageNet
weights cannot be had, and always with pretrained_source="wafer"."""


def main() -> int:
    """Runs pretrain with the command line's arguments and returns the exit status."""
    parser = command_line.make_plain_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--models", nargs="+", default=["lightning_cnn"], metavar="NAME", help="model types, or 'all' (lightning_cnn)"
    )
    parser.add_argument("--maps", type=int, default=200_000, help="generated maps to train on (default 200000)")
    parser.add_argument("--image-size", type=int, default=40, help="side in pixels, as the runs will use (default 40)")
    arguments = parser.parse_args()
    return command_line.run(lambda: pretrain_all(arguments))


def pretrain_all(arguments: argparse.Namespace) -> None:
    """The work itself; imported late, so that --help and wrong flags answer at once."""
    from waferlab.config import ExperimentConfig
    from waferlab.training.pretraining import pretrain

    models = "all" if arguments.models == ["all"] else arguments.models
    config = ExperimentConfig(model_type=models, output_dir=arguments.output_dir)
    for model_type in config.model_types():
        if not arguments.quiet:
            print(model_type, flush=True)
        file = pretrain(
            model_type,
            folder=config.generated_weights_dir,
            maps=arguments.maps,
            seed=arguments.seed,
            image_size=arguments.image_size,
            resume=arguments.resume,
            say=(lambda text: None) if arguments.quiet else (lambda text: print(text, flush=True)),
        )
        if arguments.quiet:
            print(file, flush=True)


if __name__ == "__main__":
    sys.exit(main())
