"""Draws the training images for validation, for each expert, and for the target (section 5 of the paper)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Splits(NamedTuple):
    """Indices into the training split.

    Attributes:
        validation: target images that nothing else uses, `[V]`.
        experts: the images of each expert, K arrays `[n]`. The images of two experts may overlap, and so may those of
            an expert and the target.
        rest: all images but the validation images. The images of the experts and of the target are drawn from these.
    """

    validation: Indices
    experts: list[Indices]
    rest: Indices


def draw_splits(
    labels: NDArray[np.int32],
    *,
    seed: int,
    num_validation: int,
    num_experts: int,
    num_examples: int,
    concentration: float,
) -> Splits:
    """Draws the validation images, and then the images of each expert from the others, independently.

    Args:
        labels: the labels of the training split, `[N]`.
        seed: the seed of the draw.
        num_validation: V, the number of validation images.
        num_experts: K, the number of experts.
        num_examples: n, the number of images of each expert.
        concentration: the concentration of the Dirichlet distribution of an expert's class proportions. A small value
            gives skewed proportions.

    Raises:
        ValueError: if there are fewer images than asked for, or if `concentration` is not above 0.
    """
    if num_validation + num_examples > len(labels):
        raise ValueError(
            f"{num_validation} validation images and {num_examples} for an expert exceed the {len(labels)} training "
            "images"
        )
    if not concentration > 0:
        raise ValueError(f"concentration is {concentration}; expected a number above 0")
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    rest = np.sort(order[num_validation:])
    experts = [
        rest[_dirichlet_subset(np.random.default_rng([seed, 1, expert]), labels[rest], num_examples, concentration)]
        for expert in range(num_experts)
    ]
    return Splits(np.sort(order[:num_validation]), experts, rest)


def draw_target(rest: Indices, *, seed: int, num_target: int) -> Indices:
    """Draws the target images, IID from all but the validation images.

    If there are fewer than `num_target`, it takes all.
    """
    generator = np.random.default_rng([seed, 2])
    return np.sort(generator.choice(rest, size=min(num_target, len(rest)), replace=False))


def class_counts(labels: NDArray[np.int32], num_classes: int) -> list[int]:
    """Returns how many of each class there are."""
    return np.bincount(labels, minlength=num_classes).tolist()


def allocate(proportions: NDArray[np.float64], available: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Returns counts of each class near `total * proportions`, none above what is available, with sum `total`.

    The counts are rounded by largest remainders. What a class cannot give is taken from the other classes in
    proportion.

    Args:
        proportions: `[C]`, not negative.
        available: `[C]`.
        total: the sum of the counts, at most the sum of `available`.

    Raises:
        ValueError: if `total` is above the sum of `available`.
    """
    if total > available.sum():
        raise ValueError(f"{total} examples were asked for, but only {available.sum()} are available")
    counts = np.zeros_like(available)
    while (missing := total - counts.sum()) > 0:
        is_open = counts < available
        weights = np.where(is_open, proportions, 0.0)
        if weights.sum() == 0:
            weights = is_open.astype(np.float64)
        ideal = missing * weights / weights.sum()
        added = np.floor(ideal).astype(np.int64)
        largest = np.argsort(added - ideal, kind="stable")[: missing - added.sum()]
        added[largest] += 1
        counts = np.minimum(counts + added, available)
    return counts


def _dirichlet_subset(
    generator: np.random.Generator, labels: NDArray[np.int32], size: int, concentration: float
) -> Indices:
    """Returns the positions of `size` examples, without replacement, with Dirichlet class proportions."""
    available = np.bincount(labels)
    proportions = generator.dirichlet(np.full(len(available), concentration))
    counts = allocate(proportions, available, size)
    chosen = [
        generator.choice(np.flatnonzero(labels == label), size=count, replace=False)
        for label, count in enumerate(counts)
    ]
    return np.sort(np.concatenate(chosen))
