"""Workers of a search, started by Ray on the machines of its cluster.

    pip install -e ".[ray]"
    python -m waferlab.search.ray_workers --workers 8 --cpus 2 --address auto --storage URL --model lightning_cnn

Ray reserves what a worker needs, starts it, and starts it again elsewhere if its machine is gone. What a worker does,
and all other flags, are those of `python -m waferlab.search.workers`: the study and its pruner stay Optuna's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from waferlab import command_line
from waferlab.errors import ConfigError, RunError

EXAMPLES = """\
  python -m waferlab.search.ray_workers --workers 2 --storage $STORAGE --model lightning_cnn   # on this machine
  python -m waferlab.search.ray_workers --workers 8 --gpus 1 --address auto --storage $STORAGE --model yolo_inspired
  python -m waferlab.search.ray_workers --workers 4 --cpus 2 --address ray://head:10001 --storage $STORAGE \\
      --model my_net --register my_models --data /data/maps.npz"""
STARTS = 3  # of a worker, if its machine is gone


def main() -> int:
    """Starts workers with the command line's arguments and returns the exit status."""
    ours, of_workers = make_parser().parse_known_args()
    return command_line.run(lambda: start(ours, of_workers), when_stopped="Their trials run again: start it anew.")


def make_parser() -> argparse.ArgumentParser:
    """The flags of the launcher; it hands on all others."""
    parser = command_line.Parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--workers", type=int, required=True, metavar="N", help="how many")
    add("--cpus", type=float, default=1, metavar="N", help="cores that each reserves; trials side by side in it (1)")
    add("--gpus", type=float, default=0, metavar="N", help="GPUs that each reserves (0)")
    add("--address", metavar="ADDRESS", help="of a cluster: 'auto', or ray://...; without one, Ray starts here")
    return parser


def start(ours: argparse.Namespace, of_workers: list[str]) -> None:
    """Starts the workers and waits for all of them.

    Raises:
        ConfigError: Ray is not installed, or the cluster can never have as much as a worker wants.
        RunError: a worker failed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError('Ray is not installed: pip install -e ".[ray]" where this project lies.') from error
    here = {"num_cpus": ours.workers * ours.cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(address=ours.address, log_to_driver=True, **({} if ours.address else here))
    try:
        there = ray.cluster_resources()
        for kind, wanted in (("CPU", ours.cpus), ("GPU", ours.gpus)):
            if wanted > there.get(kind, 0):
                raise ConfigError(f"--{kind.lower()}s {wanted:g}: the cluster has {there.get(kind, 0):g}.")
        command = ["-m", "waferlab.search.workers", *of_workers, f"workers={max(1, int(ours.cpus))}"]
        worker = ray.remote(num_cpus=ours.cpus, num_gpus=ours.gpus, max_retries=STARTS)(run_worker)
        statuses = ray.get([worker.remote(command, os.getcwd()) for _ in range(ours.workers)])
    finally:
        ray.shutdown()
    if any(statuses):
        raise RunError(f"{sum(map(bool, statuses))} of {ours.workers} workers failed; what they said is above.")


def run_worker(command: list[str], folder: str) -> int:
    """Runs a worker on a machine of the cluster, in a process of its own, and gives its exit status."""
    here = folder if os.path.isdir(folder) else None
    return subprocess.run([sys.executable, *command], cwd=here, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
