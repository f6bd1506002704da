"""Pre-training without a download: a network learns from a stream of generated wafer maps, none of which it sees twice.

    file = pretrain("lightning_cnn", folder=Path("checkpoints/pretrained"))

The network, its default parameters, augmentation and the Trainer are those of every other training; only the maps never
end. The nine classes are those of the real task and equally frequent, so the head is worth keeping too.

No leak: the generated maps that a run is evaluated on (`data="synthetic"`) come from the seed of its configuration,
which is below 2**31. The stream draws from seeds of 2**32 and above, the maps held out to score the pre-training from
2**32 - 1. A call of the generator with another seed draws other lots and other maps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from waferlab.data.datamodule import BatchIndexedMaps, EpochBatches
from waferlab.data.generator import generate_wafer_maps
from waferlab.data.images import augment, encode, resize_maps
from waferlab.data.maps import NUM_CLASSES, pack_maps
from waferlab.errors import ConfigError
from waferlab.models.classifier import WaferClassifier
from waferlab.models.starting_weights import network_digest, write_generated_weights
from waferlab.training.callbacks import EpochLines, History

HELD_OUT_SEED = 2**32 - 1  # the same for all streams, so that their scores can be compared
HELD_OUT_PER_CLASS = 128
MAPS_PER_EPOCH = 5760  # 45 batches, 640 maps of each class
BATCH_SIZE = 128
DEFAULT_MAPS = 200_000


def stream_seed(seed: int, chunk: int) -> int:
    """The generator's seed for a chunk (0..2**32 - 1) of the stream `seed` (0..2**31 - 1); 2**32 or more."""
    return (seed + 1) * 2**32 + chunk


def draw_chunk(generator_seed: int, *, per_class: int, image_size: int) -> BatchIndexedMaps:
    """Generates maps of all classes and resizes them: uint8 [9 * per_class, 1, S, S] with labels int64."""
    drawn, labels, lots = generate_wafer_maps(per_class, seed=generator_seed)
    maps = pack_maps(drawn, labels, groups=lots, source=f"generated (seed {generator_seed})")
    return BatchIndexedMaps(resize_maps(maps, image_size), torch.from_numpy(maps.labels))


class StreamBatches(EpochBatches):
    """As `EpochBatches`, but each epoch is about maps of its own: they are numbered on from those of the one before."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in super().__iter__():
            yield batch + self.epoch * self.n


class GeneratedMaps(Dataset):
    """An endless row of maps, drawn a chunk at a time; the next chunk is drawn in a thread while one is trained on.

    Args:
        seed: of the stream.
        per_class: maps of each class in a chunk.
        image_size: side S of the images.
    """

    def __init__(self, *, seed: int, per_class: int, image_size: int) -> None:
        self.seed, self.per_class, self.image_size = seed, per_class, image_size
        self._chunks: dict[int, Future[BatchIndexedMaps]] = {}
        self._thread = ThreadPoolExecutor(1)

    def __getitem__(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of maps of one chunk by their numbers in the stream."""
        length = NUM_CLASSES * self.per_class
        chunk = int(numbers[0]) // length
        for wanted in (chunk, chunk + 1):
            if wanted not in self._chunks:
                self._chunks[wanted] = self._thread.submit(
                    draw_chunk,
                    stream_seed(self.seed, wanted),
                    per_class=self.per_class,
                    image_size=self.image_size,
                )
        self._chunks = {number: future for number, future in self._chunks.items() if number >= chunk}
        return self._chunks[chunk].result()[numbers - chunk * length]


class GeneratedStream(pl.LightningDataModule):
    """Serves the stream in batches, float32 [B, 1, S, S] in -1..1 and int64 [B], and the maps held out for scoring.

    Args:
        seed: of the stream.
        image_size: side S of the images.
        maps_per_epoch: a multiple of 1,152, so that an epoch is whole batches and equal classes.
    """

    def __init__(self, *, seed: int, image_size: int, maps_per_epoch: int) -> None:
        super().__init__()
        self.seed, self.maps_per_epoch = seed, maps_per_epoch
        self.stream = GeneratedMaps(seed=seed, per_class=maps_per_epoch // NUM_CLASSES, image_size=image_size)
        self.held_out = draw_chunk(HELD_OUT_SEED, per_class=HELD_OUT_PER_CLASS, image_size=image_size)

    def train_dataloader(self) -> DataLoader:
        """Batches of maps that no epoch before has had."""
        batches = StreamBatches(self.maps_per_epoch, batch_size=BATCH_SIZE, shuffle=True, seed=self.seed)
        return DataLoader(self.stream, sampler=batches, batch_size=None, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader:
        """The held-out maps in order."""
        batches = EpochBatches(len(self.held_out), batch_size=256, shuffle=False)
        return DataLoader(self.held_out, sampler=batches, batch_size=None, generator=torch.Generator())

    def on_after_batch_transfer(self, batch: tuple[torch.Tensor, torch.Tensor], dataloader_idx: int):
        """Encodes and, in training, augments a batch on its device."""
        images, labels = batch
        images = encode(images)
        return (augment(images) if self.trainer.training else images), labels


def generator_digest() -> str:
    """Eight hex digits that change when the generator draws other maps."""
    drawn, _, _ = generate_wafer_maps(3, seed=HELD_OUT_SEED)
    return hashlib.sha256(b"".join(wafer_map.tobytes() for wafer_map in drawn)).hexdigest()[:8]


def pretrain(
    model_type: str,
    *,
    make: Callable[[], WaferClassifier],
    fit: Callable[..., None],
    precision: str | int,
    folder: Path,
    maps: int = DEFAULT_MAPS,
    seed: int = 0,
    image_size: int = 40,
    maps_per_epoch: int = MAPS_PER_EPOCH,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Trains a network with its default parameters on generated maps and keeps its weights after the last epoch.

    The same arguments give the same tensors on the same machine, with the same number of threads. The file appears
    when it is whole; what a run that was cut off had reached is in a checkpoint beside it.

    Args:
        model_type: a registered name.
        make: builds the network with its default parameters and random weights.
        fit: trains it, called as `fit(model, data, callbacks, max_epochs=..., resume_from=...)`.
        precision: that `fit` computes in.
        folder: where the weights go, as <model type>-<digest of all they depend on>.safetensors.
        maps: to train on, rounded up to whole epochs.
        seed: of the stream, the initial weights and the augmentation.
        image_size: side in pixels to which maps are resized.
        maps_per_epoch: from one score and checkpoint to the next; a multiple of 1,152, so that an epoch is whole
            batches and equal classes.
        resume: go on where the same training was cut off.
        say: prints a line.

    Returns:
        The file. When it is there already, nothing is trained.

    Raises:
        ConfigError: an argument out of range.
        TrainingDivergedError: the loss is no longer a number.
        KeyboardInterrupt: interrupted; finished epochs are kept for `resume=True`.
    """
    if maps < 1:
        raise ConfigError(f"maps={maps!r} is out of range. Allowed: a whole number from 1.")
    epochs = -(-maps // maps_per_epoch)
    pl.seed_everything(seed, verbose=False)
    model = make()
    settings = {
        "model_type": model_type,
        "image_size": image_size,
        "seed": seed,
        "maps_seen": epochs * maps_per_epoch,
        "maps_per_epoch": maps_per_epoch,
        "batch_size": BATCH_SIZE,
        "learning_rate": model.learning_rate,
        "precision": precision,
        "generator": generator_digest(),
    }
    file = folder / f"{model_type}-{_digest(settings | {'network': network_digest(model.network)})}.safetensors"
    history, partial = History(), folder / f"{file.stem}.partial.ckpt"
    if file.exists():
        partial.unlink(missing_ok=True)  # of one that was killed between its last two steps
        say(f"  made before: {file}")
        return file
    fit(
        model,
        GeneratedStream(seed=seed, image_size=image_size, maps_per_epoch=maps_per_epoch),
        [history, EpochLines(say), ModelCheckpoint(folder, filename=partial.stem, enable_version_counter=False)],
        max_epochs=epochs,
        resume_from=partial if resume and partial.exists() else None,
    )
    score = history.epochs[-1]["val_macro_f1"]
    outcome = {"seconds": round(history.seconds(), 1), "validation_macro_f1": round(score, 4)}
    write_generated_weights(file, model.network, header=settings | outcome)
    partial.unlink()
    say(f"  macro F1 {score:.3f} on held-out generated maps after {history.seconds():.0f} s: {file}")
    return file


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
