"""The numbers of `experiments.studies.variance` that are not numbers of the experiment."""

import dataclasses

from experiments.protocol.context import Context

TOLERANCE = 0.01
"""A radius is good if the relative error of the directional derivatives is at most this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    examples: int = 256
    """Target images in the batch whose loss is probed."""
    probes: int = 1024
    """Directions that are probed for each point, K and distribution."""
    averaged: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200)
    """Numbers of directions m in an estimate. K - 1 and K are added."""
    subsets: tuple[int, ...] = (2, 5)
    """Numbers of experts to try besides all K. The first experts are taken. A number that is not below K is left
    out.
    """
    radius_directions: int = 64
    """Directions that are probed with each radius."""
    measuring_seed: int = 0
    """Seed of the batch, of the directions and of learning."""

    def __post_init__(self) -> None:
        """Refuses values out of their range. The ValueError has the field, its value, and what was expected."""
        for field in ("examples", "radius_directions"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 1")
        if self.measuring_seed < 0:
            raise ValueError(f"measuring_seed is {self.measuring_seed}; expected at least 0")
        if not self.averaged or min(self.averaged) < 1:
            raise ValueError(f"averaged is {self.averaged}; expected numbers of directions, each at least 1")
        if self.subsets and min(self.subsets) < 2:
            raise ValueError(f"subsets is {self.subsets}; expected numbers of experts, each at least 2")


def check(context: Context, settings: Settings) -> None:
    """Refuses settings that do not fit the experiment, before any work.

    Raises:
        ValueError: if a setting does not fit; the error has the field, its value, and what was expected.
    """
    k, m = context.config.num_experts, max(settings.averaged)
    # This is enough for two estimates, each of whole blocks of at most K.
    if settings.probes < 2 * (m + k):
        raise ValueError(f"probes is {settings.probes}; expected at least {2 * (m + k)} for m = {m} and K = {k}")
    available = len(context.targets[context.config.seeds[0]])
    if settings.examples > available:
        raise ValueError(f"examples is {settings.examples}, but there are {available} target images")
