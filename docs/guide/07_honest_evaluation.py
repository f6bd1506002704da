# %% [markdown]
# # 7. Honest evaluation
#
# **Goal.** You can put an error bar on a score that holds what it promises, compare two models so that luck does not
# decide, and say what did not help.
#
# A score on a test part is a guess at the score on all wafers to come. How good a guess depends less on the number of
# maps than on the number of lots: the maps of a lot rise and fall together.

# %%
import numpy as np

from waferlab.evaluation.metrics import compare_macro_f1, compute_metrics
from waferlab.evaluation.predictions import Predictions


def answers(lots, maps_a_lot, skill, rng):
    """Made-up answers for three classes: each lot is easier or harder than others, for reasons of its own."""
    labels = rng.integers(3, size=lots * maps_a_lot)
    groups = np.repeat(np.arange(lots), maps_a_lot)
    right = rng.random(len(labels)) < np.clip(skill + rng.normal(0, 0.15, lots), 0.05, 0.95)[groups]
    said = np.where(right, labels, (labels + rng.integers(1, 3, size=len(labels))) % 3)
    return Predictions(np.eye(3)[said] * 0.9 + 0.1 / 3, labels, groups, ("a", "b", "c"))


rng = np.random.default_rng(0)
one = answers(lots=20, maps_a_lot=25, skill=0.8, rng=rng)
scores = compute_metrics(one)
low, high = scores["intervals"]["macro_f1"]
print(f"macro F1 {scores['macro_f1']:.3f} [{low:.3f}, {high:.3f}]")
print(scores["interval_method"])
assert low < scores["macro_f1"] < high

# %% [markdown]
# ## Before: an error bar that counts maps
#
# The usual formula for a share, `sqrt(p (1 - p) / n)`, takes each map for a draw of its own, and 500 maps seem a lot.
# A simulation knows the truth, so it can count how often the interval holds it.

# %%
big = answers(lots=4000, maps_a_lot=25, skill=0.8, rng=rng)
truth = compute_metrics(big)["accuracy"]


def holds(interval):
    return interval[0] <= truth <= interval[1]


by_maps, by_lots = [], []
for _ in range(300):
    some = answers(lots=20, maps_a_lot=25, skill=0.8, rng=rng)
    found = compute_metrics(some)
    half = 1.96 * np.sqrt(found["accuracy"] * (1 - found["accuracy"]) / found["n_samples"])
    by_maps.append(holds((found["accuracy"] - half, found["accuracy"] + half)))
    by_lots.append(holds(found["intervals"]["accuracy"]))
print(f"counting maps, a 95% interval holds the truth in {np.mean(by_maps):.0%} of 300 cases")
print(f"counting lots,                               in {np.mean(by_lots):.0%}")
assert np.mean(by_maps) < 0.80 < 0.90 < np.mean(by_lots)

# %% [markdown]
# **After.** Leave out one lot at a time and see how the score moves: that is the *jackknife*. Its interval is wider,
# and holds the truth as often as it promises.
#
# ## Two models on the same lots
#
# A hard lot is hard for both. So do not compare two intervals: take the difference map by map, and put the interval
# on that.


# %%
def a_little_better(old, share, rng):
    """The same answers, but a share of the wrong ones put right."""
    wrong = old.predicted != old.labels
    mended = wrong & (rng.random(len(wrong)) < share)
    said = np.where(mended, old.labels, old.predicted)
    return Predictions(np.eye(3)[said] * 0.9 + 0.1 / 3, old.labels, old.groups, old.class_names)


better = a_little_better(one, 0.25, rng)
new_low, new_high = compute_metrics(better)["intervals"]["macro_f1"]
comparison = compare_macro_f1(better, one)
print(f"old [{low:.3f}, {high:.3f}], new [{new_low:.3f}, {new_high:.3f}]: the two intervals overlap")
print(
    f"difference {comparison['difference']:+.3f} [{comparison['interval'][0]:+.3f}, {comparison['interval'][1]:+.3f}]"
)
assert new_low < high, "they overlap"
assert comparison["interval"][0] > 0, "and yet the new one is better on the same lots"

# %% [markdown]
# ## The trap: choosing on the test part
#
# Of ten equal models, choose the one that is best on the test part, and report its score there:

# %%
chosen, honest = [], []
for _ in range(200):
    tests = [compute_metrics(answers(20, 25, 0.8, rng))["macro_f1"] for _ in range(10)]
    chosen.append(max(tests))
    honest.append(tests[0])
print(
    f"a model that was not chosen by it scores {np.mean(honest):.3f} on average; the best of ten {np.mean(chosen):.3f}"
)
assert np.mean(chosen) - np.mean(honest) > 0.03

# %% [markdown]
# The difference was made by looking. So epochs, settings, the decision and the best model are chosen on the
# validation part, and the test part is opened once, after all of it.
#
# ## What did not help
#
# An *ablation* takes out one part at a time and sees what is missed; what made no difference is printed as such. [The
# results](../results.md) list two dozen ways to train better that were tried with several seeds each. One of them
# helped.
#
# ## Exercise
#
# You tested eight ideas, and one has p = 0.03. Correct for having looked eight times, by Holm's method: sort the p
# values, multiply the smallest by 8, the next by 7, and so on; none may be smaller than the one before. Is it still
# below 0.05?


# %% tags=["hide-cell"]
def holm(values):
    order = np.argsort(values)
    adjusted, highest = np.empty(len(values)), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, values[place] * (len(values) - rank)))
        adjusted[place] = highest
    return adjusted


p_values = np.array([0.03, 0.2, 0.9, 0.4, 0.06, 0.7, 0.5, 0.3])
print(holm(p_values).round(2))
assert holm(p_values)[0] == 0.24
