"""How real are the generated wafer maps? Trains on generated maps only and tests on real ones.

Measured: macro F1 over the nine classes on the real maps of the odd groups. The generator was calibrated by looking at
the even groups only. The clock covers the training; generating, reading and resizing are left out.

    python benchmarks/generator_realism.py --data wm811k.npz --output benchmarks/results/generator_realism.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Generated maps of each class, in units of --per-class: real maps are mostly none, and few are Near-full.
MIX = (1.0, 0.6, 1.2, 1.0, 1.5, 0.4, 0.6, 1.2, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled real maps with groups")
    parser.add_argument("--per-class", type=int, default=2500, help="generated maps, times the mix (default 2500)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    import lightning.pytorch as pl
    from sklearn.metrics import accuracy_score, f1_score

    from integrated_pipeline import environment, native_precision, predict_probabilities
    from simple_model import LightningCNN
    from wafer_data import CLASS_NAMES, WaferMapDataModule, load_wafer_maps, pack_maps, resize_maps, split_by_lot
    from wafer_generator import generate_wafer_maps

    pl.seed_everything(arguments.seed, verbose=False)
    counts = [round(share * arguments.per_class) for share in MIX]
    drawn, labels, lots = generate_wafer_maps(counts, seed=arguments.seed)
    generated = pack_maps(drawn, labels, groups=lots, source="generated")
    split = split_by_lot(generated, validation_fraction=0.05, test_fraction=0.05, seed=arguments.seed)
    data = WaferMapDataModule(generated, split, image_size=arguments.image_size, batch_size=128, balancing="none")
    model = LightningCNN()
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        precision=native_precision(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - started

    real = load_wafer_maps(arguments.data)
    real = real.select(np.flatnonzero(real.groups % 2 == 1))
    said = predict_probabilities(model, resize_maps(real, arguments.image_size)).argmax(1)
    by_class = f1_score(real.labels, said, labels=range(9), average=None, zero_division=0)
    record = {
        "macro_f1_on_real_maps": float(by_class.mean()),
        "accuracy_on_real_maps": float(accuracy_score(real.labels, said)),
        "f1_by_class": dict(zip(CLASS_NAMES, by_class.tolist(), strict=True)),
        "real_maps": len(real),
        "generated_training_maps": len(split.train),
        "epochs": arguments.epochs,
        "image_size": arguments.image_size,
        "train_seconds": seconds,
        "seed": arguments.seed,
        "environment": environment(),
    }
    print(json.dumps(record, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
