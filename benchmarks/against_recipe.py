"""Our training against the ordinary recipe: Lightning, ImageFolder, torchvision transforms, DataLoader.

Measured: seconds from having the files (recipe) or the maps (ours) to the end of the last epoch, on the same network
from random weights, same maps, image size, batch size, epochs and threads, in turn; and the seconds until validation
macro F1 first reaches what both reach. The recipe reads PNG files, flips and turns each image by torchvision
transforms, logs torchmetrics' macro F1 and keeps the best checkpoint. `--workers` are its worker processes: with 0 all
is done in the training process; with 2 a core does both. Left out of the clock: imports and writing the PNG files.

    python benchmarks/against_recipe.py --data wm811k.npz --output benchmarks/results/against_recipe.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

from measure import ClockedF1, as_text, paired_ratio, prepare, take_turns, write_image_folder, write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", help="anything that --data of the scripts takes")
    parser.add_argument("--per-class", type=int, default=600, help="keep at most so many maps of each class")
    parser.add_argument("--models", nargs="+", default=["lightning_cnn", "torchvision_resnet"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="worker processes of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        pipeline = prepare(arguments, arguments.models)
        write_image_folder(pipeline.data_module(arguments.batch_size), arguments.folder / "images")
        rows = [compare(arguments, name) for name in arguments.models]
    settings = {k: getattr(arguments, k) for k in ("data", "per_class", "epochs", "batch_size", "image_size", "seed")}
    maps = {part: len(indices) for part, indices in pipeline.split.parts().items()}
    write_record(arguments.output, {"benchmark": "against_recipe", **settings, "maps": maps, "models": rows})


def compare(arguments: argparse.Namespace, model_type: str) -> dict:
    ways = {f"recipe, {n} workers": partial(recipe, arguments, model_type, n) for n in arguments.workers}
    ways["ours"] = partial(ours, arguments, model_type)
    turns = take_turns(ways, repeats=arguments.repeats)
    level = min(max(score for _, score in run["curve"]) for runs in turns.values() for run in runs)
    row = {"model_type": model_type, "level": level, "runs": turns}
    for name in [name for name in ways if name != "ours"]:
        to_finish = paired_ratio(*([run["seconds"] for run in turns[way]] for way in (name, "ours")))
        to_level = paired_ratio(*([first_time(run["curve"], level) for run in turns[way]] for way in (name, "ours")))
        print(f"{model_type}: {name} over ours, to finish {as_text(to_finish)}, to {level:.3f} {as_text(to_level)}")
        row[name] = {"seconds_to_finish_over_ours": to_finish, "seconds_to_level_over_ours": to_level}
    return row


def first_time(curve: list, level: float) -> float:
    return next(seconds for seconds, score in curve if score >= level)


def ours(arguments: argparse.Namespace, model_type: str) -> dict:
    pipeline = prepare(arguments, arguments.models)
    started = time.monotonic()
    record = pipeline.train_final_model(model_type)
    seconds = time.monotonic() - started
    per_epoch = seconds / record["epochs"]
    curve = [(per_epoch * epoch, f1) for epoch, f1 in enumerate(record["history"]["val_macro_f1"], start=1)]
    return {"seconds": seconds, "curve": curve}


def recipe(arguments: argparse.Namespace, model_type: str, workers: int) -> dict:
    """What one finds in tutorials, written with care."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    pl.seed_everything(arguments.seed, verbose=False)
    network = prepare(arguments, arguments.models).create_model(model_type).network
    clock = ClockedF1()

    class Recipe(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.loss = network, torch.nn.CrossEntropyLoss()

        def training_step(self, batch, batch_idx):
            loss = self.loss(self.network(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def on_validation_epoch_start(self) -> None:
            self.seen = []

        def validation_step(self, batch, batch_idx) -> None:
            self.seen.append((self.network(batch[0]).argmax(1), batch[1]))

        def on_validation_epoch_end(self) -> None:
            predicted, truth = (torch.cat(column) for column in zip(*self.seen, strict=True))
            clock.add(truth, predicted)
            self.log("val_macro_f1", clock.points[-1][1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    grey = [transforms.Grayscale(), transforms.Resize(arguments.image_size)]
    flips = [transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip(), transforms.RandomRotation(15)]
    to_tensor = [transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    images = arguments.folder / "images"
    started = time.monotonic()
    clock.__init__()
    train = ImageFolder(images / "train", transforms.Compose([*grey, *flips, *to_tensor]))
    validation = ImageFolder(images / "val", transforms.Compose([*grey, *to_tensor]))
    options = {"batch_size": arguments.batch_size, "num_workers": workers, "persistent_workers": workers > 0}
    trainer = pl.Trainer(
        max_epochs=arguments.epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=arguments.folder,
        callbacks=[ModelCheckpoint(arguments.folder / "recipe", monitor="val_macro_f1", mode="max")],
    )  # fmt: skip
    trainer.fit(Recipe(), DataLoader(train, shuffle=True, **options), DataLoader(validation, **options))
    return {"seconds": time.monotonic() - started, "curve": clock.points}


if __name__ == "__main__":
    main()
