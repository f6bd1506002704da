"""Hydra over the pipeline: groups of options by name, and one run for each combination of values.

    pip install 'hydra-core>=1.3.6'
    python examples/hydra_app.py                                        as examples/conf/config.yaml says
    python examples/hydra_app.py model=yolo budget=search image_size=32
    python examples/hydra_app.py --multirun seed=0,1,2 learning_rate=2e-3,4e-3

Of Hydra only its composition is used. Folders, logs and resuming are the pipeline's: a run lies in
results/<experiment_name>, which a multirun ends with its values, and an interrupted one goes on with resume=true.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, too
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
from waferlab import command_line
from waferlab.config import default_options, known_option

CONF = Path(__file__).resolve().parent / "conf"


def options_of_runs(overrides: Sequence[str]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The swept values of each run, and all of its options."""
    choices = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if not (CONF / override.key_or_group).is_dir():
            known_option(override.key_or_group)
        swept = override.sweep_string_iterator() if override.is_sweep_override() else None
        choices.append([f"{override.key_or_group}={value}" for value in swept] if swept else [override.input_line])
    for chosen in itertools.product(*choices):
        swept = tuple(one for one, among in zip(chosen, choices, strict=True) if len(among) > 1)
        yield swept, OmegaConf.to_container(compose("config", list(chosen)), resolve=True)


def main() -> None:
    """One run, or with --multirun all of them, and a line for each."""
    overrides = [argument for argument in sys.argv[1:] if argument not in ("--multirun", "-m")]
    ConfigStore.instance().store("pipeline", default_options())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        runs = list(options_of_runs(overrides))
    if len(runs) > 1 and len(overrides) == len(sys.argv) - 1:
        raise command_line.ConfigError(f"That makes {len(runs)} runs. To start them, add --multirun.")
    for swept, options in runs:
        options["experiment_name"] = "_".join([options["experiment_name"], *swept])
        summary = IntegratedMLPipeline(ExperimentConfig(**options)).run_complete_pipeline()
        scores = {model["model_type"]: round(model["test"]["macro_f1"], 3) for model in summary["models"]}
        print(f"{options['experiment_name']}: macro F1 {scores}", flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run(main, when_stopped="Finished epochs are kept. To go on: the same with resume=true"))
