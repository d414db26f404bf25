"""Whether a run's experts can be averaged. It compares their weights, and the loss on the line between two experts.

    python -m experiments.studies.similarity
    python -m experiments.studies.similarity --experiment cifar10 --initialization separate --barriers 3

The barriers between the first experts are measured on the validation images. BatchNorm's statistics are blended like
everything else, or estimated anew for each model.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import glue_jax
from experiments.models.network import Variables
from experiments.models.permutations import SPECS
from experiments.protocol.context import Context
from experiments.protocol.expert_training import initial_variables, train_experts
from experiments.protocol.presets import ExpertArguments
from experiments.reporting.presentation import Report, TableCells, markdown_table, page
from experiments.runtime.session import process
from experiments.runtime.stages import Stages
from experiments.studies import frame
from experiments.studies.refreshing import has_statistics, refreshed

_MODULES = r"^params/(.+)/[^/]+$"
_NORMS = r"norm[^/]*/[^/]+$"
_UNRELATED = 0.1
"""The command advises to align first where the mean cosine, without the norms' weights, is below this."""
_BARRIER = 0.1
"""The command advises against a plain average where a barrier is above this, in nats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(ExpertArguments):
    """What a command line says.

    Attributes:
        barriers: the number of experts between which barriers are measured. The first experts are taken. 0 measures
            none.
    """

    barriers: int = 3

    def __post_init__(self) -> None:
        """Refuses values out of their range. The ValueError has the field, its value, and what was expected."""
        if self.barriers < 0 or self.barriers == 1:
            raise ValueError(f"barriers is {self.barriers}; expected 0, or at least 2 experts")


def measure(context: Context, parsed: Arguments, stages: Stages) -> dict[str, Any]:
    """Compares the experts. It keeps nothing, because it takes only seconds.

    Returns:
        A dict. `cosine` is that of two experts' weights, a mean over pairs. It leaves out the weights of norms, whose
        scales are near 1 in every network. `aligned_cosine` is the same after `glue_jax.merging.align_experts`.
        `modules` has a row for each module. `barriers` has the barriers between the first E experts in nats, `[E, E]`,
        for blended and for refreshed statistics. `advice` says what to do.
    """
    del stages
    experts = glue_jax.stack_experts(train_experts(context)[0])
    weights, barriers = _weights(context, experts), _barriers(context, experts, parsed.barriers)
    return {"advice": advice(weights["cosine"], barriers), **weights, "barriers": barriers}


def advice(cosine: float, barriers: Mapping[str, list[list[float]]]) -> str:
    """Returns what to do with experts.

    Args:
        cosine: the cosine of their weights, without those of norms.
        barriers: the barriers between each two experts in nats, with blended statistics and, if there are any, with
            refreshed ones.
    """
    if cosine < _UNRELATED:
        return (
            "The experts' weights have next to nothing in common. Align them first (glue_jax.merging.align_experts). "
            "Then refresh the statistics of their average, or learn free coefficients with minibatch statistics "
            "(python -m experiments.studies.ablation)."
        )
    if not barriers:
        return "The experts' weights are related. Barriers tell what their average is worth (--barriers)."
    highest = {way: float(np.max(found)) for way, found in barriers.items()}
    if next(iter(highest.values())) <= _BARRIER:
        return "The experts' weights are related, and the loss hardly rises between two experts: average them."
    if min(highest.values()) <= _BARRIER:
        return (
            "The experts' weights are related. The loss rises between two experts, but not with refreshed statistics: "
            "refresh the statistics of their average."
        )
    return (
        "The experts' weights are related, but the loss rises between two experts: do not use a plain average. Learn "
        "free coefficients with minibatch statistics, by layer if need be (python -m experiments.studies.ablation)."
    )


def _weights(context: Context, experts: Variables) -> dict[str, Any]:
    """What the weights alone say."""
    is_common = context.config.initialization == "common"
    origin = initial_variables(context.problem, context.config)["params"] if is_common else None
    spec = SPECS[context.config.network](**context.config.network_options)
    aligned = glue_jax.merging.align_experts(experts, spec).experts
    params = {"params": experts["params"]}
    found = glue_jax.merging.weight_similarity(
        params, glue_jax.merging.group_by_path(params, _MODULES), origin=None if origin is None else {"params": origin}
    )
    compared = [glue_jax.partition(tree["params"], _NORMS)[1] for tree in (experts, aligned)]
    whole, after = (_mean_of_pairs(glue_jax.merging.weight_similarity(tree).cosine)[0] for tree in compared)
    learned = [None] * len(found.names)
    if found.cosine_from_origin is not None:
        learned = _mean_of_pairs(found.cosine_from_origin)
    return {
        "cosine": whole,
        "aligned_cosine": after,
        "modules": [
            {"module": name, "cosine": cosine, "distance": float(distance.mean()), "cosine_from_origin": of_learned}
            for name, cosine, distance, of_learned in zip(
                found.names, _mean_of_pairs(found.cosine), found.distance, learned, strict=True
            )
        ],
    }


def _barriers(context: Context, experts: Variables, count: int) -> dict[str, list[list[float]]]:
    """Returns the barriers between the first experts, with blended statistics and with refreshed statistics."""
    if not count:
        return {}
    first = jax.tree.map(lambda leaf: leaf[:count], experts)
    images = context.target(context.config.seeds[0]).images[:512]

    def loss(variables: Variables) -> float:
        return context.evaluate(variables, context.validation)["loss"]

    def refreshed_loss(variables: Variables) -> float:
        return loss(refreshed(context.problem, variables, images))

    ways = {"blended statistics": loss}
    if has_statistics(context.problem):
        ways["statistics refreshed"] = refreshed_loss
    return {name: glue_jax.merging.loss_barriers(first, function).tolist() for name, function in ways.items()}


def _mean_of_pairs(cosine: np.ndarray) -> list[float]:
    """The mean over pairs of different experts, `[G]`."""
    first, second = np.triu_indices(cosine.shape[-1], 1)
    return cosine[:, first, second].mean(axis=1).tolist()


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of the results of `main`."""
    tables = {"Cosines of the experts' weights": _module_table(results)}
    blocks = [
        results["advice"],
        "Cosine: of the angle between two experts' weights, the mean over pairs. Distance: from the common "
        "initialisation, divided by its length; without a common initialisation, from the experts' mean. Learned: the "
        "cosine between two experts' differences from their common initialisation.",
        markdown_table(*_module_table(results)),
    ]
    if results["barriers"]:
        tables["Loss barriers, nats"] = _barrier_table(results)
        blocks += [
            "A barrier compares the loss on the line between two experts with the line between their losses. It is the "
            "largest rise, in nats on the validation images. It is about 0 where the average of two experts is as good "
            "as they are.",
            markdown_table(*_barrier_table(results)),
        ]
    return Report(page(results, *blocks), {}, {**tables, "Advice": (["to do"], [[results["advice"]]])})


def _module_table(results: Mapping[str, Any]) -> TableCells:
    """A row for all weights but those of norms, as they are and aligned, and a row for each module."""
    whole = [
        ["all but norms", f"{results['cosine']:.2f}", "-", "-"],
        ["all but norms, aligned", f"{results['aligned_cosine']:.2f}", "-", "-"],
    ]
    names = ("cosine", "distance", "cosine_from_origin")
    return ["module", "cosine", "distance", "learned"], whole + [
        [row["module"], *("-" if row[name] is None else f"{row[name]:.2f}" for name in names)]
        for row in results["modules"]
    ]


def _barrier_table(results: Mapping[str, Any]) -> TableCells:
    """A row for each two experts."""
    barriers = results["barriers"]
    pairs = itertools.combinations(range(len(next(iter(barriers.values())))), 2)
    return ["experts", *barriers], [
        [f"{first}, {second}", *(f"{found[first][second]:.3f}" for found in barriers.values())]
        for first, second in pairs
    ]


main = frame.study(Arguments, measure, present, title="Whether experts can be averaged")

if __name__ == "__main__":
    with process():
        main()
