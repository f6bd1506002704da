r"""Measures how real generated wafer maps are: a CNN trained on them alone is tested on real WM-811K maps.

    python benchmarks/generator_realism.py --data wm811k.npz --per-class 2500 --epochs 6 \
        --output benchmarks/results/generator_realism.json

The figure is the macro F1 over the nine classes on the real maps of the even or the odd groups. Tune the generator on
the even half, report on the odd half.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measure import write_record
from provenance import GENERATOR
from sklearn.metrics import confusion_matrix, f1_score
from torch import nn
from torch.nn import functional as F

from waferlab.data.generator import generate_wafer_maps
from waferlab.data.maps import CLASS_NAMES

MEASURES = (*GENERATOR, *(f"generator_realism.{name}" for name in ("Residual", "create_model", "train", "MIX")))
SIDE = 32
# Maps of each class, in units of --per-class: real maps are mostly none, and few are Near-full.
MIX = (1.0, 0.6, 1.2, 1.0, 1.5, 0.4, 0.6, 1.2, 4.0)


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, inputs, h, w] to [N, outputs, h / stride, w / stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


def create_model() -> nn.Module:
    """A residual network of three stages: 32, 64 and 128 channels."""
    stem = (nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
    stages = (Residual(32, 32, 2), Residual(32, 64, 2), Residual(64, 128, 2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, len(CLASS_NAMES)))
    return nn.Sequential(*stem, *stages, *head)


def to_tensor(maps: Sequence[np.ndarray]) -> torch.Tensor:
    """Resizes maps (area-antialiased) to float32 [N, 1, SIDE, SIDE], 0 no die, 0.5 pass, 1 fail."""
    by_shape = defaultdict(list)
    for index, wafer_map in enumerate(maps):
        by_shape[wafer_map.shape].append(index)
    images = torch.empty(len(maps), 1, SIDE, SIDE)
    for indices in by_shape.values():
        for start in range(0, len(indices), 2048):
            part = indices[start : start + 2048]
            stack = torch.from_numpy(np.stack([maps[i] for i in part]))[:, None].float() / 2
            images[part] = F.interpolate(stack, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return images


def load_real(path: Path, half: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Reads the real maps of the even or the odd groups, and their labels, int64 [N]."""
    data = np.load(path, allow_pickle=False)
    flat, offsets, shapes, labels = data["maps_flat"], data["offsets"], data["shapes"].astype(int), data["labels"]
    rows = np.flatnonzero(data["group"] % 2 == ("even", "odd").index(half))
    maps = [flat[offsets[i] : offsets[i + 1]].reshape(shapes[i]) for i in rows]
    return maps, np.array([CLASS_NAMES.index(labels[i]) for i in rows])


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int, batch: int = 128) -> nn.Module:
    """Trains with AdamW, a one-cycle schedule and the eight symmetries of the square, one for each batch."""
    model = create_model().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps * epochs)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(epochs):
        model.train()
        order, start, total = torch.randperm(len(images)), time.perf_counter(), 0.0
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            turned = torch.rot90(images[rows], int(torch.randint(4, ())), (2, 3))
            turned = turned.flip(3) if torch.rand(()) < 0.5 else turned
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model(turned.contiguous(memory_format=torch.channels_last)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / steps:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    """Returns logits, float32 [N, 9]."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = (part.contiguous(memory_format=torch.channels_last) for part in images.split(1024))
        return torch.cat([model(part).float() for part in parts]).numpy()


def main() -> None:
    """Generates, trains, tests and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="real maps: maps_flat, offsets, shapes, labels, group")
    parser.add_argument("--per-class", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--half", choices=("even", "odd"), default="odd", help="groups of real maps to test on")
    parser.add_argument("--save", type=Path, help="where to keep the logits")
    parser.add_argument("--output", type=Path, help="JSON record to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    maps, labels, _ = generate_wafer_maps([round(share * options.per_class) for share in MIX], seed=1)
    print(f"{len(maps)} generated maps in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    model = train(to_tensor(maps), torch.from_numpy(labels), options.epochs)
    seconds = time.perf_counter() - start
    real_maps, truth = load_real(options.data, options.half)
    logits = predict(model, to_tensor(real_maps))
    if options.save:
        np.savez(options.save, logits=logits, truth=truth)
    guess = logits.argmax(1)
    accuracy = float((guess == truth).mean())
    scores = f1_score(truth, guess, labels=range(9), average=None, zero_division=0)
    print(f"trained on {len(maps)} maps in {seconds:.0f} s; tested on {len(truth)} real maps, {options.half} half")
    print(f"macro F1 {scores.mean():.3f}, accuracy {accuracy:.3f}")
    print("  ".join(f"{name} {score:.3f}" for name, score in zip(CLASS_NAMES, scores, strict=True)))
    print(confusion_matrix(truth, guess, labels=range(9)))
    record = {
        "benchmark": "generator_realism",
        "data": options.data,
        "half": options.half,
        "per_class": options.per_class,
        "epochs": options.epochs,
        "generated_maps": len(maps),
        "real_maps": len(truth),
        "train_seconds": round(seconds, 1),
        "macro_f1": round(float(scores.mean()), 4),
        "accuracy": round(accuracy, 4),
        "per_class_f1": {name: round(float(score), 3) for name, score in zip(CLASS_NAMES, scores, strict=True)},
    }
    write_record(options.output, record, measures=MEASURES, repeats="one seed", precision=["bf16-mixed"])


if __name__ == "__main__":
    main()
