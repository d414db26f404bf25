"""The cost of finding a prior, in passes of one model on one image, and in seconds."""

from collections.abc import Mapping
from typing import Any

from experiments.protocol.config import Config


def prior_cost(
    config: Config, images: Mapping[str, Any], number: int, weights: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, int | float]:
    """Returns the cost of the coefficients of a Config and a seed.

    Args:
        config: the config of the run.
        images: the numbers of `validation`, `target` and `test` images.
        number: the number of the Config.
        weights: the coefficients, as `experiments.protocol.run.kept` returns them.
        measured: what `experiments.protocol.expert_training.measured_experts` returned. Config 2 needs a part of it.

    Returns:
        `forward_passes` of steps and of validations; `backward_passes`; and `prior_seconds`, compilation included.
    """
    num_validation, seconds = images["validation"], weights.get("seconds", 0.0)
    if number == 2:
        # The experts were measured on three sets of images. Config 2 needs only the validation images.
        seconds = measured["seconds"] * num_validation / (num_validation + images["target"] + images["test"])
    forward, backward = passes_of(config, num_validation, number, weights)
    return {"forward_passes": forward, "backward_passes": backward, "prior_seconds": seconds}


def passes_of(config: Config, num_validation: int, number: int, weights: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the forward passes and the backward passes. Each validation takes `num_validation` images."""
    if "validation_steps" not in weights:
        # Config 2 judges each expert.
        return config.num_experts * num_validation if number == 2 else 0, 0
    # Config 5 computes the outputs at beta, at its proposal, and along K - 1 directions.
    models = {3: 1, 4: 2 * config.num_directions, 5: config.num_experts + 1}[number]
    validated_at = weights["validation_steps"]
    images = validated_at[-1] * config.alpha_batch_size
    return models * images + len(validated_at) * num_validation, images if number == 3 else 0
