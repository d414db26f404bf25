"""What a run's results say: by how much GLUE leads, and whether its coefficients mix or select."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

CONFIGS: Mapping[int, str] = {1: "Data size", 2: "Proxy accuracy", 3: "Full gradient", 4: "GLUE (SPSA)"}
"""The paper's four ways to coefficients, by its numbers."""


class Lead(NamedTuple):
    """By how much GLUE (Config 4) leads another Config, in points of test accuracy.

    Attributes:
        mean: over seeds, at each fine-tuning epoch, the prior first, `[epochs + 1]`.
        deviation: the standard deviation over seeds, `[epochs + 1]`; NaN with one seed.
        largest: the epoch of the largest mean.
        num_seeds: how many seeds.
    """

    mean: np.ndarray
    deviation: np.ndarray
    largest: int
    num_seeds: int

    def at(self, epoch: int) -> str:
        """Returns mean and standard deviation at an epoch."""
        deviation = "" if np.isnan(self.deviation[epoch]) else f" ± {self.deviation[epoch]:.1f}"
        return f"{self.mean[epoch].round(1) + 0.0:+.1f}{deviation}"

    def is_clear(self, epoch: int) -> bool:
        """Whether the lead at an epoch is above 0 by two standard errors; never with one seed."""
        return bool(self.mean[epoch] > 2 * self.deviation[epoch] / np.sqrt(self.num_seeds))


def by_config(results: Mapping[str, Any], field: str) -> dict[int, np.ndarray]:
    """Returns a field of the runs, `[seeds, ...]` by Config."""
    return {number: np.array([run[field] for run in results["runs"] if run["config"] == number]) for number in CONFIGS}


def lead(results: Mapping[str, Any], number: int) -> Lead:
    """Returns GLUE's lead over a Config: their seeds are the same, so the lead is taken seed by seed."""
    accuracy = by_config(results, "test_accuracy")
    points = 100 * (accuracy[4] - accuracy[number])
    deviation = points.std(axis=0, ddof=1) if len(points) > 1 else np.full(points.shape[1], np.nan)
    mean = points.mean(axis=0)
    return Lead(mean, deviation, int(np.argmax(mean)), len(points))


def num_mixed(alpha: np.ndarray) -> np.ndarray:
    """Returns how many experts coefficients mix, exp(entropy): K if uniform, 1 if they select one; `[...]`.

    Args:
        alpha: weights, each not negative, sum 1, `[..., K]`.
    """
    logs = np.log(np.where(alpha > 0, alpha, 1.0))
    return np.exp(-(alpha * logs).sum(axis=-1))
