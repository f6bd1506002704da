"""Does relevance point at what the answer rests on? The deletion test, with failing dies for pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

PASS, FAIL = 1, 2


def deletion_curves(
    probabilities_of: Callable[[Sequence[np.ndarray]], np.ndarray],
    one_map: np.ndarray,
    relevance: np.ndarray,
    class_index: int,
    *,
    steps: int = 10,
    draws: int = 5,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """A class's probability while failing dies are made to pass, the most relevant first and in random order.

    Petsiuk, Das & Saenko 2018, "RISE: Randomized Input Sampling for Explanation of Black-box Models",
    arXiv:1806.07421. A die that passes is what a wafer shows where nothing is wrong, so no artificial pixel is needed.

    Args:
        probabilities_of: maps to float32 [N, C].
        one_map: uint8 [rows, columns], 0 no die / 1 pass / 2 fail, with a failing die.
        relevance: float32 of the map's shape.
        class_index: whose probability is followed.
        steps: in equal shares of the failing dies.
        draws: random orders, of which the mean is taken.
        seed: of the orders.

    Returns:
        Two float32 [steps + 1], the first at no die taken away, the last at all of them.

    Raises:
        ValueError: no die of the map fails.
    """
    failing = np.flatnonzero(one_map == FAIL)
    if not len(failing):
        raise ValueError("no die of the map fails, so none can be taken away. Leave such maps out.")
    rng = np.random.default_rng(seed)
    orders = [failing[np.argsort(-relevance.ravel()[failing], kind="stable")]]
    orders += [rng.permutation(failing) for _ in range(draws)]
    counts = np.rint(np.linspace(0, len(failing), steps + 1)).astype(int)
    edited = np.repeat(one_map.reshape(1, -1), len(orders) * len(counts), axis=0)
    for row, (order, count) in enumerate((order, count) for order in orders for count in counts):
        edited[row, order[:count]] = PASS
    curves = probabilities_of(list(edited.reshape(-1, *one_map.shape)))[:, class_index].reshape(len(orders), -1)
    return curves[0], curves[1:].mean(axis=0)


def area_between(by_relevance: np.ndarray, at_random: np.ndarray) -> float:
    """What lies between two curves over shares from 0 to 1, above 0 where relevance takes the answer away sooner."""
    return float(np.trapezoid(at_random - by_relevance, dx=1 / (len(at_random) - 1)))
