"""What the scripts' command lines have in common: flags, error messages, exit statuses.

Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts have and examples below the help."""
    parser = argparse.ArgumentParser(
        description=description, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        default="synthetic",
        metavar="PATH",
        help="'synthetic' (default), or a path: LSWMD.pkl, MixedWM38 .npz, .npz in our layout, folder of class folders",
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, split, weights and batches (default 0)")
    parser.add_argument(
        "--output-dir", default=".", metavar="DIR", help="folder that holds results/ and checkpoints/ (default: here)"
    )
    parser.add_argument("--resume", action="store_true", help="go on where the same command was cut off")
    parser.add_argument("--quiet", action="store_true", help="print the final table only")
    return parser


def run(work: Callable[[], object]) -> int:
    """Calls `work`; turns a user's mistake into one message and status 2, Ctrl-C into a hint and status 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
    try:
        work()
    except KeyboardInterrupt:
        again = [Path(sys.argv[0]).name, *sys.argv[1:]]
        again += [] if "--resume" in again else ["--resume"]
        print(f"\nStopped. Finished epochs are kept. To go on: python {shlex.join(again)}", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        # The scripts import these late; by the time one of them is raised, its module is loaded.
        from integrated_pipeline import ConfigError
        from training_callbacks import TrainingDivergedError
        from wafer_data import DataError

        if not isinstance(error, ConfigError | DataError | TrainingDivergedError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingDivergedError) else 2
    return 0
