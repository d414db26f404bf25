"""Figures of the paper, to compare with measured ones."""

from collections.abc import Mapping
from typing import Any

from experiments.protocol.config import Config

EXPERIMENTS: Mapping[str, tuple[str, str]] = {
    "cifar10": ("cifar10", "resnet20"),
    "svhn": ("svhn_cropped", "mobilenetv2"),
    "imagenette": ("imagenette/160px-v2", "vit"),
}
"""Section 5: data set and network of each experiment, in the order of Figure 1's panels."""

EXPERT_ACCURACY: Mapping[str, tuple[float, ...]] = {
    "cifar10": (38.60, 47.62, 50.45, 37.56, 46.36, 38.80, 40.33, 39.41, 42.92, 45.10),
    "svhn": (60.10, 71.79, 77.05, 69.35, 70.97, 55.82, 54.38, 60.54, 54.96, 76.49),
    "imagenette": (33.04, 34.06, 40.51, 29.73, 39.49, 33.89, 32.08, 32.94, 32.99, 38.14),
}
"""Table 1, in percent. Its caption says 'evaluated on the target training dataset'; section 5 says test accuracy."""

LARGEST_LEAD: Mapping[str, Mapping[int, float]] = {
    "cifar10": {1: 6.7, 2: 7.0, 3: 4.5},
    "svhn": {1: 3.8, 2: 3.9},
    "imagenette": {1: 8.5, 2: 9.1},
}
"""Section 5: the points of test accuracy by which GLUE outperforms Configs 1, 2 and 3 'by up to'."""

LARGEST_VARIATION: Mapping[str, float] = {"svhn": 1.4, "imagenette": 0.5}
"""Section 5: the variation between GLUE and Config 3, 'at most', in points."""

MATCHED = 1.4
"""The abstract: 'GLUE either outperforms backpropagation-based full-gradient mixing or matches its performance within
1.4%'."""


def experiment_of(config: Mapping[str, Any]) -> str | None:
    """Returns the paper's experiment with a config's data set and network, or None."""
    pair = (config["dataset"], config["network"])
    return next((name for name, known in EXPERIMENTS.items() if known == pair), None)


def is_at_its_scale(config: Mapping[str, Any]) -> bool:
    """Returns whether a config has the paper's numbers of experts, images and epochs."""
    fields = ("num_experts", "expert_examples", "expert_epochs", "target_examples", "test_examples")
    return all(config[field] == getattr(Config(), field) for field in fields)
