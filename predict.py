"""Classifies wafer maps with the registered champion: rows, a summary, pictures; or answers over HTTP."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from waferlab import command_line

EXAMPLES = """\
  python predict.py tomorrow.npz
  python predict.py lot_417/ --output lot_417.parquet --coverage 0.95
  python predict.py labelled.npz --report --explain --output-dir checked
  python predict.py one_wafer.png --model checkpoints/demo_ultra/lightning_cnn/model.onnx
  python predict.py tomorrow.npz --monitor
  python predict.py --serve --port 8000 --shadow models:/wafer_defect_classifier@challenger"""
CHAMPION = "models:/wafer_defect_classifier@champion"
# Flags that mean nothing to a server.
FOR_MAPS = ("output", "output_dir", "image_levels", "report", "explain", "monitor", "quiet")
PORT = 8000


def main() -> int:
    """Runs predict with the command line's arguments and returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args()
    check(parser, arguments)
    work = serve if arguments.serve else classify
    hint = "The same command starts from the first map." if not arguments.serve else "Nobody is answered any more."
    return command_line.run(lambda: work(arguments), when_stopped=hint)


def make_parser() -> argparse.ArgumentParser:
    """All flags, with examples below the help."""
    parser = command_line.Parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "maps", nargs="?", metavar="MAPS",
        help="'synthetic', an image, a folder of images or of class folders, LSWMD.pkl, MixedWM38 .npz, .npz in our "
        "layout; labels are not needed",
    )  # fmt: skip
    add("--model", default=CHAMPION, metavar="MODEL", help=f"a .onnx file, or models:/name@alias (default {CHAMPION})")
    add(
        "--tracking-uri", metavar="URI",
        help="of the registry (default: $MLFLOW_TRACKING_URI, else ./mlflow.db), and of what --monitor finds (default: "
        "mlflow.db in the output folder)",
    )  # fmt: skip
    add("--output", default="predictions.csv", metavar="FILE", help=".csv, .parquet or .jsonl (default %(default)s)")
    add("--output-dir", default=".", metavar="DIR", help="folder for the output and all beside it (default: here)")
    add("--coverage", type=float, default=0.9, help="that prediction sets promise, 0.50 to 0.99 (default 0.9)")
    add("--image-levels", default="auto", choices=("auto", "three", "binary"), help="how images are read")
    add("--report", action="store_true", help="score the answers against the labels")
    add("--explain", action="store_true", help="draw what the model looked at on some maps")
    add("--monitor", action="store_true", help="say whether these maps are like those it was validated on")
    add("--serve", action="store_true", help="answer over HTTP on 127.0.0.1 instead, until Ctrl-C")
    add("--port", type=int, help=f"of --serve (default {PORT})")
    add("--host", metavar="ADDRESS", help="of --serve: where to listen, in a container 0.0.0.0 (default 127.0.0.1)")
    add("--shadow", metavar="MODEL", help="of --serve: a model that answers in the shadow, to be compared")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="of one call of the model (default: one a core; with --serve 1)",
    )
    add(
        "--provider",
        default="cpu",
        choices=("cpu", "cuda", "tensorrt"),
        help="what computes, or an error (default cpu)",
    )
    add("--quiet", action="store_true", help="print the outcome only")
    return parser


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with status 2 where flags do not go together or a number is out of range."""
    if arguments.serve:
        if arguments.maps is not None:
            parser.error(f"--serve takes its maps over HTTP: leave out {arguments.maps}")
        for name in FOR_MAPS:
            if getattr(arguments, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} does not go with --serve: it is about MAPS")
    else:
        if arguments.maps is None:
            parser.error("give MAPS to classify, or --serve")
        for name in ("port", "host", "shadow"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name} is for --serve alone")
    if arguments.port is not None and not 0 <= arguments.port <= 65535:
        parser.error(f"--port {arguments.port}: allowed are 0 (any free one) to 65535")
    if arguments.threads is not None and not 1 <= arguments.threads <= 1024:
        parser.error(f"--threads {arguments.threads}: allowed are 1 to 1024")


def classify(arguments: argparse.Namespace) -> None:
    """Answers all maps; imported late, so that --help and wrong flags answer at once."""
    from rich.console import Console

    from waferlab.deployment.batch import BatchOptions, answer_maps
    from waferlab.deployment.predictor import Predictor

    options = BatchOptions(
        output=Path(os.path.expanduser(arguments.output_dir), os.path.expanduser(arguments.output)),
        coverage=arguments.coverage,
        image_levels=arguments.image_levels,
        report=arguments.report,
        explain=arguments.explain,
        monitor=arguments.monitor,
        tracking_uri=arguments.tracking_uri,
    )
    where = {"tracking_uri": arguments.tracking_uri, "provider": arguments.provider}
    predictor = Predictor.load(arguments.model, threads=arguments.threads, **where)
    console = Console(highlight=False)
    answer_maps(predictor, arguments.maps, options=options, console=console, quiet=arguments.quiet)


def serve(arguments: argparse.Namespace) -> None:
    """Answers over HTTP until Ctrl-C."""
    from waferlab.deployment import service
    from waferlab.deployment.answering import THREADS
    from waferlab.deployment.predictor import Predictor

    where = {"threads": arguments.threads or THREADS, "tracking_uri": arguments.tracking_uri}
    where["provider"] = arguments.provider
    service.serve(
        Predictor.load(arguments.model, **where),
        host=arguments.host or "127.0.0.1",
        port=PORT if arguments.port is None else arguments.port,
        shadow=None if arguments.shadow is None else Predictor.load(arguments.shadow, **where),
        coverage=arguments.coverage,
    )


if __name__ == "__main__":
    sys.exit(main())
