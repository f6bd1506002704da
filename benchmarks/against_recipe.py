"""Our training against the ordinary recipe: Lightning, torchvision transforms, DataLoader.

Measured: seconds from having the files (recipe) or the maps (ours) to the end of the last epoch, on the same network
from random weights, same maps, one channel, image size, batch size, epochs, precision and threads, in turn, after a
turn that is left out; and the seconds until validation macro F1 first reaches what all reach. The recipe flips and
turns each image by torchvision transforms, logs macro F1 and keeps the best checkpoint. It comes in two kinds:

- from files, as tutorials have it: ImageFolder decodes a PNG for each map in each epoch;
- in memory: the maps lie there as one uint8 tensor, resized before the clock starts, so that it decodes nothing.

`--workers` are the recipe's worker processes: with 0 all is done in the training process; with 2 a core does both. Left
out of the clock: imports, writing the PNG files. Ours resizes its maps within the clock.

    python benchmarks/against_recipe.py --data wm811k.npz --output benchmarks/results/against_recipe.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

from measure import (
    ClockedF1,
    against_ours,
    prepare,
    repeats_in_words,
    take_warm_turns,
    write_image_folder,
    write_record,
)
from provenance import BATCHES, FAMILY, TRAINING

MEASURES = (*BATCHES, *TRAINING, "CheckpointFiles", "History", "against_recipe.recipe", "against_recipe.datasets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", help="anything that --data of the scripts takes")
    parser.add_argument("--per-class", type=int, default=600, help="keep at most so many maps of each class")
    parser.add_argument("--models", nargs="+", default=["lightning_cnn", "torchvision_resnet"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--precision", default="32-true", help="of both, as Lightning names it")
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
    write_record(
        arguments.output,
        {"benchmark": "against_recipe", **settings, "maps": maps, "models": rows},
        measures=(*MEASURES, *(name for model in arguments.models for name in FAMILY.get(model, ()))),
        repeats=repeats_in_words(arguments.repeats),
        precision=[arguments.precision],
    )


def compare(arguments: argparse.Namespace, model_type: str) -> dict:
    kinds = ("PNG files", "memory")
    reads = {f"Lightning recipe, {kind}, {n} workers": (kind, n) for kind in kinds for n in arguments.workers}
    ways = {name: partial(recipe, arguments, model_type, *how) for name, how in reads.items()}
    ways["ours"] = partial(ours, arguments, model_type)
    print(model_type)
    row = against_ours(take_warm_turns(ways, repeats=arguments.repeats))
    for name, (kind, _) in reads.items():
        row[name] |= {"reads": kind, "channels": 1}
    return {"model_type": model_type} | row


def ours(arguments: argparse.Namespace, model_type: str) -> dict:
    pipeline = prepare(arguments, arguments.models)
    started = time.monotonic()
    record = pipeline.train_final_model(model_type)
    seconds = time.monotonic() - started
    per_epoch = seconds / record.epochs
    curve = [(per_epoch * epoch, f1) for epoch, f1 in enumerate(record.history["val_macro_f1"], start=1)]
    return {"seconds": seconds, "curve": curve}


def recipe(arguments: argparse.Namespace, model_type: str, reads: str, workers: int) -> dict:
    """What one finds in tutorials, written with care."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader

    pl.seed_everything(arguments.seed, verbose=False)
    pipeline = prepare(arguments, arguments.models)
    network = pipeline.create_model(model_type).network
    train, validation = datasets(pipeline, arguments, reads)
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

    started = time.monotonic()
    clock.__init__()
    options = {"batch_size": arguments.batch_size, "num_workers": workers, "persistent_workers": workers > 0}
    trainer = pl.Trainer(
        max_epochs=arguments.epochs, accelerator="cpu", precision=arguments.precision, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=arguments.folder,
        callbacks=[ModelCheckpoint(arguments.folder / "recipe", monitor="val_macro_f1", mode="max")],
    )  # fmt: skip
    trainer.fit(Recipe(), DataLoader(train, shuffle=True, **options), DataLoader(validation, **options))
    return {"seconds": time.monotonic() - started, "curve": clock.points}


def datasets(pipeline, arguments: argparse.Namespace, reads: str) -> list:
    """The recipe's training and validation maps, from PNG files or from memory; each is transformed when asked for."""
    import torch
    from torch.utils.data import Dataset
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    class InMemory(Dataset):
        def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform) -> None:
            self.images, self.labels, self.transform = images, labels, transform

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self.transform(self.images[index]), self.labels[index]

    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.RandomRotation(15)]
    to_floats = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
    if reads == "memory":
        data = pipeline.data_module(arguments.batch_size)
        sources = (data.train_dataloader().dataset, data.val_dataloader().dataset)
        return [
            InMemory(source.images, source.labels, v2.Compose([*augment, *to_floats]))
            for source, augment in zip(sources, (flips, []), strict=True)
        ]
    grey = [v2.Grayscale(), v2.Resize(arguments.image_size)]
    return [
        ImageFolder(arguments.folder / "images" / part, v2.Compose([*grey, *augment, v2.ToImage(), *to_floats]))
        for part, augment in (("train", flips), ("val", []))
    ]


if __name__ == "__main__":
    main()
