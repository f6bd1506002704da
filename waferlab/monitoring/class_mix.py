"""How many maps of each class a batch holds, estimated without labels, and answers corrected for it.

If only the shares of the classes have changed and not how maps of each class look, the shares that make the batch's
answers most likely can be found by expectation maximisation (Saerens, Latinne & Decaestecker 2002, "Adjusting the
outputs of a classifier to new a priori probabilities", Neural Computation 14). It needs calibrated probabilities: a
temperature and a bias for each class, fitted on validation, do best (Alexandari, Kundaje & Shrikumar 2020, arXiv
1901.06852).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from waferlab.evaluation.metrics import jackknife_interval

LEAST_PROBABILITY = 1e-9  # whose logarithm still says something
KEEPS_BIASES_FINITE = 1e-4  # weight of their squares beside the mean loss, for classes without a map
STEPS, CLOSE_ENOUGH = 1000, 1e-6
HALF_A_MAP = 0.5  # less than that in all of a batch is none
MOST_GROUPS = 50  # that lots are joined into for a jackknife


@dataclass(frozen=True, eq=False)
class Calibration:
    """Probabilities to calibrated ones: softmax(sharpness * log p + bias).

    Attributes:
        sharpness: above 0, one over the temperature.
        bias: float64 [C].
        prior: float64 [C], the shares of the true classes on the maps that it was fitted on.
    """

    sharpness: float
    bias: np.ndarray
    prior: np.ndarray

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """float64 [N, C], from the model's answers, float [N, C]."""
        return _softmax(self.sharpness * _log(probabilities) + self.bias)

    def likelihoods(self, probabilities: np.ndarray) -> np.ndarray:
        """float64 [N, C], how likely each map is in each class, up to a factor for the map; 0 for unknown classes."""
        known = self.prior > 0
        return np.where(known, self.apply(probabilities), 0) / np.where(known, self.prior, 1)


def fit_calibration(probabilities: np.ndarray, labels: np.ndarray) -> Calibration:
    """By the likelihood of the true classes, int64 [N], of answers float [N, C]; bias-corrected temperature scaling."""
    from scipy.optimize import minimize

    logs, n, c = _log(probabilities), *probabilities.shape
    truth = np.eye(c)[labels]

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        sharpness, bias = np.exp(values[0]), values[1:]
        found = _softmax(sharpness * logs + bias)
        error = (found - truth) / n
        cost = -np.log(np.maximum((found * truth).sum(1), 1e-300)).mean() + KEEPS_BIASES_FINITE / 2 * (bias**2).sum()
        slope = sharpness * (error * logs).sum()
        return float(cost), np.concatenate([[slope], error.sum(0) + KEEPS_BIASES_FINITE * bias])

    found = minimize(loss, np.zeros(c + 1), jac=True, method="L-BFGS-B", bounds=[(-3, 3), *[(-20, 20)] * c]).x
    return Calibration(float(np.exp(found[0])), found[1:], truth.mean(axis=0))


def estimate_mix(likelihoods: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The most likely shares of the classes, float64 [B, C], for each of B weightings of the maps, float [N, B].

    Args:
        likelihoods: float64 [N, C], of `Calibration.likelihoods`.
        weights: not negative, with a positive sum in each column.
    """
    total = weights.sum(axis=0)[:, None]
    known = (likelihoods > 0).any(axis=0)
    mix = np.broadcast_to(known / max(1, known.sum()), (len(total), len(known)))
    for _ in range(STEPS):
        of_maps = np.maximum(likelihoods @ mix.T, 1e-300)
        better = mix * ((weights / of_maps).T @ likelihoods) / total
        done, mix = np.abs(better - mix).max() < CLOSE_ENOUGH, better
        if done:
            break
    return mix


def mix_with_intervals(
    likelihoods: np.ndarray, lots: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The shares of the classes in a batch, float64 [C], and their 95% intervals over its lots, [C, 2].

    Jackknife over lots, joined into groups where they are many; a t interval on the arcsine scale. It says how much the
    batch's lots differ, not whether classes look as they did. None for a single lot.

    Args:
        likelihoods: float64 [N, C].
        lots: int64 [N].
        weights: float [N], above 0, how many maps each stands for; None is 1 each.
    """
    _, lot = np.unique(lots, return_inverse=True)
    group = lot % MOST_GROUPS
    n_groups = int(group.max()) + 1
    everything = np.ones((len(lots), 1)) if weights is None else weights.astype(np.float64)[:, None]
    without = everything * (group[:, None] != np.arange(n_groups))
    if n_groups == 1:
        return estimate_mix(likelihoods, everything)[0], None
    mixes = estimate_mix(likelihoods, np.hstack([everything, without]))
    none = np.where(mixes * everything.sum() < HALF_A_MAP, 0, mixes)
    return mixes[0], jackknife_interval(none[0], none[1:])


def corrected_for_mix(probabilities: np.ndarray, reference_prior: np.ndarray, estimated_mix: np.ndarray) -> np.ndarray:
    """Probabilities float64 [N, C] as they are where classes have other shares (Saerens et al. 2002, equation 4).

    Args:
        probabilities: float [N, C], calibrated where classes have the shares `reference_prior`.
        reference_prior: float [C], sums to 1; a class that is 0 there stays as it is.
        estimated_mix: float [C], sums to 1.
    """
    known = reference_prior > 0
    factor = np.where(known, estimated_mix, 1) / np.where(known, reference_prior, 1)
    weighted = probabilities * factor
    return weighted / np.maximum(weighted.sum(axis=1, keepdims=True), 1e-300)


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(np.float64), LEAST_PROBABILITY))


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)
