"""Analyses the results of a run: by how much a Config leads, and whether its coefficients mix or select."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.protocol.config import CONFIGS

_LEARNED = (3, 4, 5)

_CONFIDENCE = 0.95


class Lead(NamedTuple):
    """By how much one Config leads another.

    Attributes:
        points: the lead in points of test accuracy, for each seed and each fine-tuning epoch, `[seeds, epochs + 1]`.
            The prior comes first. Both Configs have the same seeds.
    """

    points: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The mean over seeds, `[epochs + 1]`."""
        return self.points.mean(axis=0)

    @property
    def largest_epoch(self) -> int:
        """The epoch with the largest mean."""
        return int(np.argmax(self.mean))

    @property
    def signs(self) -> np.ndarray:
        """Whether the Config is clearly ahead (1), clearly behind (-1) or neither (0) at each epoch, `[epochs + 1]`."""
        return np.array([clear_sign(points) for points in self.points.T])

    def at(self, epoch: int) -> str:
        """Returns mean and standard deviation at an epoch."""
        return signed(self.points[:, epoch])


def configs_of(results: Mapping[str, Any]) -> list[int]:
    """Returns the numbers of the Configs that a run has. An older run has only the paper's four."""
    found = {run["config"] for run in results["runs"]}
    return [number for number in CONFIGS if number in found]


def learned_configs_of(results: Mapping[str, Any]) -> list[int]:
    """Returns the numbers of the Configs of a run whose coefficients are learned."""
    return [number for number in configs_of(results) if number in _LEARNED]


def name_of(number: int) -> str:
    """Returns the name of a Config in tables and figures, for example `3 Full gradient`."""
    return f"{number} {CONFIGS[number]}"


def by_config(results: Mapping[str, Any], field: str) -> dict[int, np.ndarray]:
    """Returns a field of the runs by Config, `[seeds, ...]` each."""
    numbers = configs_of(results)
    return {number: np.array([run[field] for run in results["runs"] if run["config"] == number]) for number in numbers}


def lead(results: Mapping[str, Any], number: int, *, of: int = 4) -> Lead:
    """Returns the lead of the Config `of`, by default GLUE, over the Config `number`."""
    accuracy = by_config(results, "test_accuracy")
    return Lead(100 * (accuracy[of] - accuracy[number]))


def clear_sign(values: np.ndarray) -> int:
    """Returns 1 or -1 if the mean over seeds is above or below 0 by Student's t test (one-sided, 5 %), else 0.

    Args:
        values: the value of each seed, `[seeds]`. For one seed the result is 0.
    """
    count = len(values)
    if count == 1:
        return 0
    error = values.std(ddof=1) / np.sqrt(count)
    mean = values.mean()
    return int(np.sign(mean)) if abs(mean) > stats.t.ppf(_CONFIDENCE, count - 1) * error else 0


def signed(values: np.ndarray) -> str:
    """Returns the mean and the standard deviation over seeds as text. The mean has its sign.

    Args:
        values: the value of each seed, `[seeds]`.
    """
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean().round(1) + 0.0:+.1f}{deviation}"


def num_mixed(alpha: np.ndarray) -> np.ndarray:
    """Returns how many experts coefficients mix, exp(entropy), `[...]`: K if they are uniform, 1 if they select one.

    Args:
        alpha: coefficients that are not negative and have the sum 1, `[..., K]`.
    """
    logs = np.log(np.where(alpha > 0, alpha, 1.0))
    return np.exp(-(alpha * logs).sum(axis=-1))
