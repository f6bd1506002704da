# %% [markdown]
# # 1. Wafer maps, and what a lot is
#
# **Goal.** You can read a wafer map, you know the nine classes, and you know why the wafers of one lot must never be
# split between training and test.
#
# A silicon wafer carries hundreds of chips, called *dies*, and each is tested at the end of the line. A *wafer map*
# shows the result, one pixel for each die: 0 where there is none (outside of the round wafer), 1 where it passed, 2
# where it failed. The pattern of the failed dies tells an engineer what went wrong: a ring at the edge comes from
# another machine than a scratch.
#
# This guide draws its own maps, so you need no data.

# %%
import numpy as np

from waferlab.data.generator import generate_wafer_maps
from waferlab.data.maps import CLASS_NAMES, pack_maps

drawn, labels, lots = generate_wafer_maps(60, seed=1)  # 60 of each class
first = drawn[0]
print("a map:", first.dtype, first.shape, "with the values", np.unique(first).tolist())
print("its class:", CLASS_NAMES[labels[0]], "- its lot:", lots[0])
assert first.dtype == np.uint8 and set(np.unique(first)) == {0, 1, 2}
assert len(drawn) == 9 * 60

# %% [markdown]
# One map of each class. Dies that failed are red.

# %%
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

dies = ListedColormap(["white", "#b8c9dc", "#c23b22"])
figure, axes = plt.subplots(3, 3, figsize=(6, 6.6), layout="constrained")
for number, (axis, name) in enumerate(zip(axes.flat, CLASS_NAMES, strict=True)):
    axis.imshow(drawn[int(np.flatnonzero(labels == number)[0])], cmap=dies, vmin=0, vmax=2)
    axis.set_title(name)
    axis.axis("off")

# %% [markdown]
# ## Maps have different sizes
#
# A network wants one size, so every map is resized to a square. Each pixel takes the mean of the dies under it: a
# single failed die gets fainter in a large map, but never vanishes.

# %%
from waferlab.data.images import resize_maps

maps = pack_maps(drawn, labels, groups=lots, source="generated")
images = resize_maps(maps, 40)
sizes = sorted({tuple(shape) for shape in maps.shapes.tolist()})
print(f"{len(sizes)} sizes, from {sizes[0]} to {sizes[-1]}; as images {tuple(images.shape)}, {images.dtype}")
assert images.shape == (540, 1, 40, 40)

# %% [markdown]
# ## A lot travels together
#
# Wafers go through the line in *lots* of up to 25, which meet the same machines on the same day, so they fail alike.
# That is what makes a random split wrong.
#
# **Before.** Shuffle all maps, and take 15% of them for the test. How many of these have a *sibling* in training, a
# wafer of the same lot?

# %%
shuffled = np.random.default_rng(0).permutation(len(maps))
cut = int(0.15 * len(maps))
test_at_random, train_at_random = shuffled[:cut], shuffled[cut:]


def with_a_sibling(test, train):
    """The share of test maps whose lot is in the training part, too."""
    return float(np.isin(lots[test], lots[train]).mean())


print(f"at random: {with_a_sibling(test_at_random, train_at_random):.0%} of the test maps have a sibling in training")
assert with_a_sibling(test_at_random, train_at_random) > 0.9

# %% [markdown]
# **After.** Deal out whole lots. The project does it class by class, so that each part holds all nine:

# %%
from waferlab.data.splitting import split_maps

split = split_maps(maps, seed=0)
for name, part in split.parts().items():
    print(f"{name:10} {len(part):4} maps of {len(np.unique(lots[part])):3} lots")
assert with_a_sibling(split.test, split.train) == 0

# %% [markdown]
# ## The trap: a score that is too good
#
# How would you notice? Take the simplest classifier there is: it answers with the class of the most similar map in
# the training part. It can remember, and nothing else. What it sees of a map is a picture of 16 pixels and the map's
# size, which all wafers of a lot have in common.

# %%
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

pictures = resize_maps(maps, 16).reshape(len(maps), -1).numpy()
seen = np.hstack([pictures, 20 * maps.shapes])  # a die more or less weighs as much as 20 of 256 grey levels


def remembered(train, test):
    """Macro F1 of the nearest neighbour."""
    neighbour = KNeighborsClassifier(1).fit(seen[train], labels[train])
    return f1_score(labels[test], neighbour.predict(seen[test]), average="macro")


rng = np.random.default_rng(0)
scores = {"at random": [], "by lot": []}
for seed in range(5):
    shuffled = rng.permutation(len(maps))
    scores["at random"].append(remembered(shuffled[cut:], shuffled[:cut]))
    parts = split_maps(maps, seed=seed)
    scores["by lot"].append(remembered(np.concatenate([parts.train, parts.validation]), parts.test))
for name, some in scores.items():
    print(f"{name:10} macro F1 {np.mean(some):.3f} (five splits: {min(some):.3f} to {max(some):.3f})")
assert np.mean(scores["at random"]) > np.mean(scores["by lot"])

# %% [markdown]
# The same classifier gets a better score from the random split. A model chosen by such a score disappoints in
# production, where every lot is new.
#
# ## Exercise
#
# Some files have no lot numbers, but list the maps in the order in which they were made. Write `blocks(n, size)`,
# which numbers the blocks of `size` neighbours among `n` maps, to stand in for lots. Check it: the 26th of 100 maps
# is in the second block of 25.


# %% tags=["hide-cell"]
def blocks(n, size):
    """[0, 0, ..., 1, 1, ...], int64 [n]."""
    return np.arange(n) // size


assert blocks(100, 25)[25] == 1 and blocks(100, 25)[24] == 0
assert np.bincount(blocks(100, 25)).tolist() == [25, 25, 25, 25]

# %% [markdown]
# The project does not guess. Where maps carry no lot, it takes each as a lot of its own, and says so: give it such
# numbers as `group` if you know that neighbours belong together.
