"""What the scripts' command lines have in common: flags, error messages, exit statuses.

Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from waferlab.errors import (
    ConfigError,
    RunError,
    UserError,
    first_line,
    out_of_memory,
    printable,
    refused_by_the_machine,
)
from waferlab.tracking.addresses import command_line_used, without_password

if TYPE_CHECKING:
    from integrated_pipeline import IntegratedMLPipeline


class Parser(argparse.ArgumentParser):
    """A parser that keeps the lines of description and examples, and carries out nothing that stands in an argument."""

    def __init__(self, description: str | None, examples: str, **more: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=f"examples:\n{examples}", formatter_class=layout, **more)

    def error(self, message: str) -> NoReturn:
        """Prints it and ends the program with status 2."""
        super().error(printable(message))


def make_parser(description: str, examples: str) -> Parser:
    """A parser with the flags that every script has and examples below the help."""
    parser = Parser(description, examples)
    add = parser.add_argument
    add("options", nargs="*", metavar="OPTION=VALUE", help="any other option of a run (see waferlab/config.py)")
    add("--config", metavar="FILE", help="YAML of options, such as the config.yaml that a run leaves with its results")
    add(
        "--data",
        metavar="PATH",
        help="'synthetic' (default), or a path: LSWMD.pkl, MixedWM38 .npz, .npz in our layout, folder of class folders",
    )
    add("--seed", type=int, help="of data, split, weights and batches (default 0)")
    add("--output-dir", metavar="DIR", help="folder that holds results/ and checkpoints/ (default: here)")
    add("--no-mlflow", action="store_true", help="do not track with MLflow")
    add("--resume", action="store_true", help="go on where the same command was cut off")
    add("--quiet", action="store_true", help="print the outcome only")
    return parser


class Several(argparse.Action):
    """Values of a flag that takes many, among which OPTION=VALUE of those that come after it may be."""

    def __init__(self, option_strings: list[str], dest: str, *, each: Callable[[str], Any] = str, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs="+", **more)
        self._each = each

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        """Puts the values aside, and the options with those that were found before."""
        try:
            setattr(namespace, self.dest, [self._each(value) for value in values if "=" not in value])
        except ValueError as error:
            parser.error(f"argument {flag}: {error}")
        if not getattr(namespace, self.dest):
            parser.error(f"argument {flag}: expected at least one value")
        after = [value for value in values if "=" in value]
        namespace.options_after_flags = [*getattr(namespace, "options_after_flags", []), *after]


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's arguments, options and flags in any order."""
    arguments = parser.parse_intermixed_args()
    arguments.options = [*arguments.options, *getattr(arguments, "options_after_flags", [])]
    return arguments


def options_of(arguments: argparse.Namespace, preset: Mapping[str, Any], **flags: Any) -> dict[str, Any]:
    """The options of a run: of a preset, over them a file's, over them those of flags, over all OPTION=VALUE.

    Args:
        arguments: of the command line.
        preset: of the script.
        **flags: what flags of the script's own say.

    Raises:
        ConfigError: the file cannot be read, or an option is not known.
    """
    from waferlab.config import parse_options, read_options

    common = {"data": arguments.data, "seed": arguments.seed, "output_dir": arguments.output_dir}
    switched = {
        "enable_mlflow": False if arguments.no_mlflow else None,
        "resume": arguments.resume or None,
        "quiet": arguments.quiet or None,
    }
    said = {name: value for name, value in (common | switched).items() if value is not None}
    of_file = {} if arguments.config is None else read_options(arguments.config)
    return {**preset, **of_file, **flags, **said, **parse_options(arguments.options)}


def run_pipeline(pipeline: IntegratedMLPipeline, *, start_mlflow: bool = False) -> None:
    """Runs the pipeline; with `start_mlflow`, beside the MLflow page."""
    with mlflow_page(pipeline, wanted=start_mlflow):
        pipeline.run_complete_pipeline()


@contextlib.contextmanager
def mlflow_page(pipeline: IntegratedMLPipeline, *, wanted: bool) -> Iterator[None]:
    """The MLflow page is up before the work starts and, in a terminal, stays after it until Ctrl-C.

    Raises:
        ConfigError: the page is wanted without tracking.
        ServerError: the server does not start.
    """
    from waferlab.tracking.server import MlflowServer, page_of

    if not wanted:
        yield
        return
    if not pipeline.config.enable_mlflow:
        raise ConfigError("The MLflow page shows what --no-mlflow switches off. Leave out one of the two.")
    if pipeline.config.tracker != "mlflow":
        raise ConfigError("Runs of Weights & Biases are not on MLflow's page. Leave out the page, or tracker=wandb.")
    folder = Path(pipeline.config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error}). Choose another output_dir.") from error
    tracking = pipeline.open_tracking()
    experiment_id = tracking.experiment_id
    if tracking.uri.startswith(("http://", "https://")):  # a server is there already
        print(f"MLflow: {without_password(tracking.uri)}/{page_of(experiment_id)}", flush=True)
        yield
        return
    server = MlflowServer(tracking.uri)
    try:
        server.wait_until_up()
        print(f"MLflow: {server.link(experiment_id)}", flush=True)
        yield
        if sys.stdout.isatty():
            print(f"\nMLflow stays at {server.link(experiment_id)}\nCtrl-C stops it.", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    finally:
        server.stop()


def run(work: Callable[[], object], *, when_stopped: str | None = None) -> int:
    """Calls `work`; turns a user's mistake into one message and status 2, Ctrl-C into a hint and status 130.

    SIGTERM, and SIGHUP of a terminal that closes, stop it like Ctrl-C, with status 143 and 129.

    Args:
        work: what the script does. A KeyboardInterrupt that it raises anew may say what is kept.
        when_stopped: how to go on; None for a training, which goes on with --resume.
    """
    stopped_by = [signal.SIGINT]

    def stop(number: int, _: object) -> None:
        stopped_by.append(number)
        signal.raise_signal(signal.SIGINT)  # whoever handles Ctrl-C just now handles this

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, stop)
    try:
        work()
    except KeyboardInterrupt as stopped:
        again = command_line_used(folder=True) + ("" if "--resume" in sys.argv else " --resume")
        hint = when_stopped or f"Finished epochs are kept. To go on: {printable(again)}"
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(" ".join(["\nStopped.", *map(str, stopped.args), hint]), file=sys.stderr)
        return 128 + stopped_by[-1]
    except ImportError as error:
        missing = "pip install -r requirements.txt, and of the system what docs/install.md names"
        print(f"error: {printable(str(error))}. Install what is needed: {missing}", file=sys.stderr)
        return 1
    except (UserError, RunError) as error:
        print(f"error: {printable(without_password(str(error)))}", file=sys.stderr)
        return error.exit_status
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        kept = "" if when_stopped else " Finished epochs are kept: repeat the command with --resume then."
        why = printable(first_line(error))
        print(f"error: The memory does not suffice ({why}). Close other programs, raise the limit (ulimit -v), or give "
              f"fewer maps, smaller images or batches.{kept}", file=sys.stderr)  # fmt: skip
        return RunError.exit_status
    except OSError as error:
        if (refused := refused_by_the_machine(error)) is None:
            raise
        kept = "" if when_stopped else " Finished epochs are kept: repeat the command with --resume then."
        with contextlib.suppress(OSError):
            print(f"error: {printable(refused)}.{kept}", file=sys.stderr)
        return RunError.exit_status
    return 0
