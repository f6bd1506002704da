"""A split of wafer maps, served to Lightning in batches.

Maps are resized once into one uint8 tensor. After that a batch is a single indexing operation; encoding and
augmentation run on the whole batch, on whatever device it was sent to. There are no worker processes: with maps this
small, starting them costs more than they give.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from waferlab.data.images import augment, encode, resize_maps
from waferlab.data.maps import NUM_CLASSES, WaferMaps
from waferlab.data.splitting import Split
from waferlab.errors import ConfigError


class BatchIndexedMaps(Dataset):
    """Maps and labels, indexed by a whole batch at once."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[indices], self.labels[indices]


class EpochBatches(Sampler[torch.Tensor]):
    """Batches of indices, reshuffled each epoch from (seed, epoch), so that a resumed run sees the same batches.

    Args:
        n: number of maps.
        batch_size: maps a batch; when shuffling, a last incomplete batch is left out (batch norm dislikes tiny ones).
        shuffle: a new order each epoch; else in order, every map once.
        seed: of the order.
        sample_weights: float [n] or None; with weights, maps are drawn with replacement in proportion to them.
        share: (i, k), to be the i-th of k that deal the maps out among them: when shuffling, a part of each batch.

    Raises:
        ConfigError: a part of a batch would be a single map or none.
    """

    def __init__(
        self, n: int, *, batch_size: int, shuffle: bool, seed: int = 0, sample_weights: torch.Tensor | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        first, step = share
        if shuffle and step > 1 and min(n, batch_size) < 2 * step:
            raise ConfigError(
                f"Batches of {min(n, batch_size)} maps cannot be dealt out to {step} devices, of which each needs two. "
                "Raise batch_size, or lower devices."
            )
        self.n, self.batch_size, self.shuffle, self.seed = n, batch_size, shuffle, seed
        self.sample_weights, self._share = sample_weights, slice(first, None, step)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        n = self.n if self.shuffle else len(range(self.n)[self._share])
        drop_last = self.shuffle and n >= self.batch_size
        return n // self.batch_size if drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
            if self.sample_weights is None:
                order = torch.randperm(self.n, generator=generator)
            else:
                order = torch.multinomial(self.sample_weights, self.n, replacement=True, generator=generator)
        else:
            order = torch.arange(self.n)[self._share]
        for batch in range(len(self)):
            maps = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield maps[self._share] if self.shuffle else maps


class WaferMapDataModule(pl.LightningDataModule):
    """Serves one split of wafer maps: batches are (float32 [B, 1, S, S] in -1..1, int64 [B]).

    Encoding and augmentation happen after the transfer, on the batch, on the device; augmentation in training only.

    Args:
        maps: all maps.
        split: which of them are for what.
        image_size: side S of the square images.
        batch_size: maps a training batch.
        augmentation: the eight symmetries and light die noise.
        balancing: "sampler" (rare classes drawn more often), "loss" (see `class_weights`) or "none"; both weigh by
            the inverse square root of the class frequency. No map is ever thrown away. The sampler spends less time
            on the many maps without a pattern: on real maps it scored higher at equal training time.
        seed: of the batch order.
    """

    def __init__(
        self,
        maps: WaferMaps,
        split: Split,
        *,
        image_size: int = 40,
        batch_size: int = 32,
        augmentation: bool = True,
        balancing: str = "sampler",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.maps, self.split = maps, split
        self.image_size, self.batch_size = image_size, batch_size
        self.augmentation, self.balancing, self.seed = augmentation, balancing, seed
        self._parts: dict[str, BatchIndexedMaps] = {}  # the same mapping in all that `with_batch_size` gives

    def setup(self, stage: str | None = None) -> None:
        """Resizes all maps, once for all stages and batch sizes; whoever asks for images or batches sees to it."""
        if not self._parts:
            images, labels = resize_maps(self.maps, self.image_size), torch.from_numpy(self.maps.labels)
            for name, indices in self.split.parts().items():
                part = torch.from_numpy(indices)
                self._parts[name] = BatchIndexedMaps(images[part], labels[part])

    def _part(self, name: str) -> BatchIndexedMaps:
        self.setup()
        return self._parts[name]

    def with_batch_size(self, batch_size: int) -> WaferMapDataModule:
        """The same maps, held in memory once, in training batches of another size."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    def images(self, part: str) -> torch.Tensor:
        """The resized maps of a part, uint8 [N, 1, S, S], as `resize_maps` gives them."""
        return self._part(part).images

    @property
    def class_weights(self) -> list[float] | None:
        """Nine loss weights when balancing by loss: inverse square root frequency, 1 for the average training map."""
        if self.balancing != "loss":
            return None
        counts, weights = self._balance()
        return (weights * counts.sum() / (weights * counts).sum()).tolist()

    def _balance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Float [9] each: training maps of each class, and their inverse square roots; 0 where there are none."""
        counts = torch.bincount(self._part("train").labels, minlength=NUM_CLASSES).float()
        return counts, torch.where(counts > 0, counts.rsqrt(), 0.0)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        weights = None
        if self.balancing == "sampler":
            weights = self._balance()[1][self._part("train").labels]
        return self._loader("train", batch_size=self.batch_size, shuffle=True, sample_weights=weights)

    def val_dataloader(self) -> DataLoader:
        """The validation maps in order."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader:
        """The test maps in order."""
        return self._loader("test")

    def _loader(
        self, part: str, *, batch_size: int = 256, shuffle: bool = False, sample_weights: torch.Tensor | None = None
    ) -> DataLoader:
        dataset, trainer = self._part(part), self.trainer
        batches = EpochBatches(
            len(dataset), batch_size=batch_size, shuffle=shuffle, seed=self.seed, sample_weights=sample_weights,
            share=(0, 1) if trainer is None else (trainer.global_rank, trainer.world_size),
        )  # fmt: skip
        # A generator of its own: a loader's iterator draws from the global one, at other moments in a resumed run.
        return DataLoader(dataset, sampler=batches, batch_size=None, generator=torch.Generator())

    def on_after_batch_transfer(self, batch: tuple[torch.Tensor, torch.Tensor], dataloader_idx: int):
        """Encodes and, in training, augments a batch on its device."""
        images, labels = batch
        images = encode(images)
        if self.augmentation and self.trainer is not None and self.trainer.training:
            images = augment(images)
        return images, labels
