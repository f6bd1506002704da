"""From a trained network's probabilities to what is answered: views, prior correction, temperature.

All three are chosen on the validation part, after training and without it; the test part only shows what they bring.
The result goes into the exported file, so that a deployed model answers as the reported one did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

VIEWS = (1, 8)
STRENGTHS = np.arange(-6, 7) / 8
VIEWS_MUST_GAIN = 0.002  # macro F1; eight views cost eight times the time
SHARES_OF_SURE = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the maps, that one view may answer; tried in this order
MAY_DIFFER = 0.001  # of the maps may be answered otherwise than by eight views
RAMP = 0.05  # of the probability, below that at which one view is sure, over which the eight take over
NEVER = -1e4  # a log probability that softmax turns into exactly 0, in float32 as in float64


@dataclass(frozen=True)
class Decision:
    """How the answer is made of the network's probabilities.

    Attributes:
        views: 1, or 8 for the mean over the symmetries of the square: a wafer turned is the same wafer.
        sure_at: with 8 views, the probability of the likeliest class at which the first view answers alone, so that the
            other seven are spent on the maps that need them; None: all eight, always.
        prior_strength: how far `offsets` lean to the frequent classes of the training part (above 0), or to the rare.
        offsets: added to the log probabilities, one a class; empty for none.
        temperature: divides the log probabilities (Guo et al. 2017, arXiv:1706.04599); above 1 means less confident.
        left_out: classes, by number, that the training part had no map of; they get probability 0, the others share 1.
    """

    views: int = 1
    sure_at: float | None = None
    prior_strength: float = 0.0
    offsets: tuple[float, ...] = ()
    temperature: float = 1.0
    left_out: tuple[int, ...] = ()

    def apply(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Probabilities float [N, C], the mean over the views already taken, to those that are answered."""
        scores = probabilities.clamp(min=1e-12).log()
        if self.offsets:
            scores = scores + torch.tensor(self.offsets, dtype=scores.dtype, device=scores.device)
        scores = scores / self.temperature
        if self.left_out:
            never = [NEVER if label in self.left_out else 0.0 for label in range(scores.shape[-1])]
            scores = scores + torch.tensor(never, dtype=scores.dtype, device=scores.device)
        return scores.softmax(-1)

    def blend(self, one: torch.Tensor, eight: torch.Tensor) -> torch.Tensor:
        """The network's probabilities [N, C] of the first view where it is sure, else the mean over eight.

        In between they change over without a jump, so that a difference in rounding stays one in the answer.
        """
        if self.sure_at is None:
            return eight
        unsure = ((self.sure_at - one.amax(-1, keepdim=True)) / RAMP).clamp(0, 1)
        return one + unsure * (eight - one)

    @property
    def needs(self) -> tuple[int, ...]:
        """The numbers of views that the network's probabilities are wanted of."""
        return (self.views,) if self.sure_at is None else VIEWS

    def answered(self, n_classes: int) -> list[int]:
        """The classes, by number, that can be answered."""
        return [label for label in range(n_classes) if label not in self.left_out]

    def of_views(self, by_views: Mapping[int, np.ndarray]) -> np.ndarray:
        """The answered probabilities float32 [N, C], from those of the network by number of views."""
        of_views = torch.from_numpy(by_views[self.views])
        if self.sure_at is not None:
            of_views = self.blend(torch.from_numpy(by_views[1]), of_views)
        return self.apply(of_views).numpy()


def choose_decision(by_views: Mapping[int, np.ndarray], labels: np.ndarray, train_counts: np.ndarray) -> Decision:
    """Chooses on validation: views and prior correction by macro F1, then the temperature by likelihood.

    Of eight views, the largest share of maps is spared seven that changes hardly an answer (`MAY_DIFFER`).

    The correction adds `prior_strength` times the log frequency of each class in training (Menon et al. 2021,
    arXiv:2007.07314): sampling or weighting by the inverse square root of the frequency makes rare classes come too
    often, and how much of that is good for macro F1 is an empirical matter. The score is smoothed over neighbouring
    strengths, since single maps of rare classes make it jump.

    Args:
        by_views: for 1 and 8 views, the network's probabilities on validation, float [N, C].
        labels: int64 [N], true classes.
        train_counts: int64 [C], training maps of each class; a class without any is left out.
    """
    trained = train_counts > 0
    left_out = tuple(np.flatnonzero(~trained).tolist())
    known = {views: Decision(left_out=left_out).apply(torch.from_numpy(p)).numpy() for views, p in by_views.items()}
    # The mean is taken out, so that offsets say how a class stands to the others; a class left out stands nowhere.
    log_frequency = np.log(np.maximum(train_counts, 1) / train_counts.sum())
    log_frequency = np.where(trained, log_frequency - log_frequency[trained].mean(), 0.0)
    smoothed = {views: _smoothed_scores(p, labels, log_frequency) for views, p in known.items()}
    views = 8 if smoothed[8].max() > smoothed[1].max() + VIEWS_MUST_GAIN else 1
    # Among equals, the one nearest to no correction.
    best = max(range(len(STRENGTHS)), key=lambda i: (round(smoothed[views][i], 6), -abs(STRENGTHS[i])))
    strength = float(STRENGTHS[best])
    offsets = tuple((strength * log_frequency).tolist()) if strength else ()
    decision = Decision(views=views, prior_strength=strength, offsets=offsets, left_out=left_out)
    if views == 8:
        decision = replace(decision, sure_at=where_one_view_is_sure(decision, by_views))
    corrected = decision.of_views({count: p.astype(np.float64) for count, p in by_views.items()})
    return replace(decision, temperature=fit_temperature(corrected, labels))


def where_one_view_is_sure(decision: Decision, by_views: Mapping[int, np.ndarray]) -> float | None:
    """Where one view is sure enough to answer for the eight; None if that changes answers however sure it is."""
    by_eight = decision.of_views(by_views).argmax(1)
    for share in SHARES_OF_SURE:
        sure_at = float(np.quantile(by_views[1].max(1), 1 - share))
        answered = replace(decision, sure_at=sure_at).of_views(by_views).argmax(1)
        if (answered != by_eight).mean() <= MAY_DIFFER:
            return sure_at
    return None


def _smoothed_scores(probabilities: np.ndarray, labels: np.ndarray, log_frequency: np.ndarray) -> np.ndarray:
    """Macro F1 over the classes that `labels` hold, at each strength, averaged with its neighbours."""
    from sklearn.metrics import f1_score

    scores = np.log(probabilities.clip(1e-12))
    present = np.unique(labels)
    f1 = [
        f1_score(labels, (scores + s * log_frequency).argmax(1), labels=present, average="macro", zero_division=0)
        for s in STRENGTHS
    ]
    return np.convolve(np.pad(f1, 1, mode="edge"), np.full(3, 1 / 3), mode="valid")


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature, 1/8..8, at which the true classes of float64 [N, C] are likeliest."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    scores, rows = np.log(probabilities.clip(1e-12)), np.arange(len(labels))

    def cost(log_temperature: float) -> float:
        return -log_softmax(scores / np.exp(log_temperature), axis=1)[rows, labels].mean()

    return float(np.exp(minimize_scalar(cost, bounds=(-np.log(8), np.log(8)), method="bounded").x))
