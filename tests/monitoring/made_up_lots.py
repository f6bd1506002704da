"""Maps that never were, in lots whose classes, looks and density vary as real ones do: what a model says of them."""

import numpy as np

from waferlab.monitoring.reference import Reference, Sample

NAMES = ("Center", "Loc", "none")


def make_sample(rng, n_lots, *, size=8, spread=0.7, mix=None, look=0.0, density=0.1, grids=6):
    """A sample of so many lots, and the classes of its maps.

    `size` of a lot, or of each; `spread` of lots' effects on the answers; `mix` of the classes in every lot (None: each
    lot its own); `look` moves the features alone; `grids` to choose from, or the only one.
    """
    sizes = np.broadcast_to(size, n_lots)
    lots, n = np.repeat(np.arange(n_lots), sizes), int(sizes.sum())
    mixes = rng.dirichlet(np.ones(3), n_lots) if mix is None else np.tile(mix, (n_lots, 1))
    labels = (rng.random((n, 1)) > np.cumsum(mixes, axis=1)[lots][:, :2]).sum(axis=1)
    logits = rng.normal(size=(n, 3)) + 2 * np.eye(3)[labels] + spread * rng.normal(size=(n_lots, 3))[lots]
    raised = np.exp(logits)
    features = np.hstack([logits, rng.normal(size=(n, 2)) + spread * rng.normal(size=(n_lots, 2))[lots] + look])
    failing = density + 0.03 * rng.normal(size=n_lots)[lots] + 0.02 * rng.normal(size=n)
    sides = (rng.integers(20, 20 + grids, n_lots) if grids else np.full(n_lots, 40))[lots]
    sample = Sample(
        probabilities=(raised / raised.sum(axis=1, keepdims=True)).astype(np.float32),
        features=features.astype(np.float16), lots=lots, density=np.clip(failing, 0, 1).astype(np.float32),
        grids=np.stack([sides, sides], axis=1).astype(np.int16),
    )  # fmt: skip
    return sample, labels


def make_reference(rng, n_lots, **how):
    sample, labels = make_sample(rng, n_lots, **how)
    return Reference(sample, labels, NAMES, np.bincount(labels, minlength=3))
