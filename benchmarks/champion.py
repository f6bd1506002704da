"""Trains the champion that the benchmarks of deployment run: the small CNN on real maps, a fixed number of epochs.

No search and no time limit, so that a busy machine changes how long it takes and not what comes out. The decision is
tuned on validation, as in production. It is registered in mlflow.db in the output folder, and its file, the reference
for monitoring and the explanation lie in checkpoints/champion/ there. With --resume a finished training is only
exported anew.

    python benchmarks/champion.py --data wm811k.npz --output-dir champion
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    """Trains, scores, exports and registers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="real maps, as run_experiment.py takes them")
    parser.add_argument("--output-dir", default="champion", help="folder for everything (default: champion)")
    parser.add_argument("--epochs", type=int, default=12, help="default 12")
    parser.add_argument("--split", default="lots", choices=("lots", "ordered"), help="default lots")
    parser.add_argument("--resume", action="store_true", help="go on, or export a finished training anew")
    arguments = parser.parse_args()

    from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

    config = ExperimentConfig(
        experiment_name="champion",
        model_type="lightning_cnn",
        data=arguments.data,
        split=arguments.split,
        output_dir=arguments.output_dir,
        max_epochs=arguments.epochs,
        batch_size=64,
        enable_optuna=False,
        tune_decision=True,
        resume=arguments.resume,
    )
    IntegratedMLPipeline(config).run_complete_pipeline()


if __name__ == "__main__":
    main()
