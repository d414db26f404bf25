"""Whether a run's experts can be averaged at all: from their weights alone, and by the loss on the line between two.

    python -m experiments.studies.similarity
    python -m experiments.studies.similarity --experiment cifar10 --initialization separate --barriers 3

Experts are read from `--run-dir`, where the experiment's own command keeps them (give it the same options); those that
are missing are trained. The first experts' barriers are measured on the validation images, with BatchNorm statistics
that are blended as all else, and with statistics that are estimated anew for each model.
"""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

import glue_jax
from experiments.models.network import Variables
from experiments.models.permutations import SPECS
from experiments.protocol import data
from experiments.protocol.context import Context, prepare, take
from experiments.protocol.expert_training import describe_missing, initial_variables, train_experts
from experiments.protocol.presets import ExpertArguments, parse
from experiments.reporting.presentation import markdown_table, rich_table, write_report
from experiments.runtime.session import exit_on, process, session
from experiments.runtime.stages import machine

_MODULES = r"^params/(.+)/[^/]+$"
_NORMS = r"norm[^/]*/[^/]+$"
_UNRELATED = 0.1
"""Below this mean cosine of all weights but the norms', the command advises to align first."""
_BARRIER = 0.1
"""Above this barrier, in nats, the command advises against an average of experts as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(ExpertArguments):
    """What a command line says.

    Attributes:
        barriers: how many of the experts, the first, have their barriers measured, at most all; 0 is none.
    """

    barriers: int = 3

    def __post_init__(self) -> None:
        """Refuses values out of their range.

        Raises:
            ValueError: with the field, its value, and what was expected.
        """
        if self.barriers < 0 or self.barriers == 1:
            raise ValueError(f"barriers is {self.barriers}; expected 0, or at least 2 experts")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compares a run's experts, from a command line to the report.

    Args:
        arguments: the command line; None is the process's.

    Returns:
        The results: `title`, `command`, `machine`, `advice`, `cosine` (all weights but those of norms, whose scales are
        near 1 in every network; the mean over pairs), `aligned_cosine` (the same after
        `glue_jax.merging.align_experts`), `modules` (a row each) and `barriers`, in nats.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(markup=False)
    with exit_on(ValueError):
        parsed = parse(Arguments, "studies.similarity", __doc__ or "", words)
        parsed.check(least_experts=2)
    command = shlex.join(["python", "-m", "experiments.studies.similarity", *words])
    with session(parsed.out_dir, console, command) as progress:
        with exit_on(ValueError, OSError, data.DatasetNotFoundError):
            dataset = data.load(parsed.config.dataset, parsed.data_dir, parsed.config.image_size)
            kept, accept = parsed.run_dir / "stages", parsed.accept_stages
            context = prepare(parsed.config, dataset, kept, progress, accept_stages=accept)
        progress.say(f"{dataset.name}; {machine()}\n{describe_missing(context)}")
        experts = glue_jax.stack_experts(train_experts(context)[0])
        weights, barriers = _weights(context, experts), _barriers(context, experts, parsed.barriers)
        results = {
            "title": f"Whether experts can be averaged: {parsed.experiment}, preset {parsed.preset}, "
            f"{parsed.config.initialization} initialisation",
            "command": command,
            "machine": machine(),
            "advice": advice(weights["cosine"], weights["aligned_cosine"], barriers),
            **weights,
            "barriers": barriers,
        }
        write_report(parsed.out_dir, results, _markdown(results), {})
    console.print(rich_table(results["title"], *_module_table(results), caption=results["advice"]))
    if results["barriers"]:
        console.print(rich_table("Loss barriers, nats", *_barrier_table(results)))
    console.print(f"report: {parsed.out_dir / 'report.md'}", highlight=False, soft_wrap=True)
    return results


def advice(cosine: float, aligned_cosine: float, barriers: Mapping[str, list[list[float]]]) -> str:
    """Returns what to do with experts.

    Args:
        cosine: of their weights, without those of norms.
        aligned_cosine: the same after alignment.
        barriers: between each two, in nats, with statistics as they are blended and, if there are any, refreshed.
    """
    if cosine < _UNRELATED:
        return (
            f"The experts' weights have next to nothing in common (mean cosine {cosine:.2f}): align them first "
            f"(glue_jax.merging.align_experts brings it to {aligned_cosine:.2f}), and do not use a plain average: "
            "refresh its statistics, or learn free coefficients with minibatch statistics "
            "(`python -m experiments.studies.ablation`)."
        )
    related = f"The experts' weights are related (mean cosine {cosine:.2f})"
    if not barriers:
        return f"{related}; what an average of them is worth, barriers tell (--barriers)."
    highest = {way: float(np.max(found)) for way, found in barriers.items()}
    rises = ", ".join(f"{rise:.2f} nats with {way}" for way, rise in highest.items())
    if next(iter(highest.values())) <= _BARRIER:
        return f"{related}, and between two of them the loss hardly rises ({rises}): average them as they are."
    if min(highest.values()) <= _BARRIER:
        return f"{related}, but between two of them the loss rises by {rises}: refresh an average's statistics."
    return (
        f"{related}, but between two of them the loss rises by {rises}: a plain average is worse than they promise. "
        "Learn free coefficients with minibatch statistics, by layer if need be "
        "(`python -m experiments.studies.ablation`)."
    )


def _weights(context: Context, experts: Variables) -> dict[str, Any]:
    """What the weights alone say."""
    is_common = context.config.initialization == "common"
    origin = initial_variables(context)["params"] if is_common else None
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
    """The barriers between the first experts, with statistics that are blended and estimated anew."""
    if not count:
        return {}
    first = jax.tree.map(lambda leaf: leaf[:count], experts)
    images = take(context.train, context.targets[context.config.seeds[0]]).images[:512]
    statistics = jax.jit(context.problem.minibatch_statistics)

    def loss(variables: Variables) -> float:
        return context.evaluate(variables, context.validation)["loss"]

    def refreshed(variables: Variables) -> float:
        batches = [images[at : at + 256] for at in range(0, len(images), 256)]
        return loss(glue_jax.merging.refresh_statistics(variables, batches, statistics))

    has_statistics = bool(jax.tree.leaves(experts["batch_stats"]))
    ways = {"blended statistics": loss} | ({"statistics refreshed": refreshed} if has_statistics else {})
    return {name: glue_jax.merging.loss_barriers(first, function).tolist() for name, function in ways.items()}


def _mean_of_pairs(cosine: np.ndarray) -> list[float]:
    """The mean over pairs of different experts, `[G]`."""
    first, second = np.triu_indices(cosine.shape[-1], 1)
    return cosine[:, first, second].mean(axis=1).tolist()


def _markdown(results: Mapping[str, Any]) -> str:
    """The report."""
    blocks = [
        f"# {results['title']}",
        f"    {results['command']}",
        f"Run on {results['machine']}.",
        results["advice"],
        "Cosine: of the angle between two experts' weights, the mean over pairs. Distance: from the common "
        "initialisation over its length, where there is one, else from the experts' mean. Learned: the cosine between "
        "two experts' differences from their common initialisation.",
        markdown_table(*_module_table(results)),
    ]
    if results["barriers"]:
        blocks += [
            "The loss's largest rise on the line between two experts, over the line between their losses, in nats on "
            "the validation images: about 0 where their average is as good as they are.",
            markdown_table(*_barrier_table(results)),
        ]
    return "\n\n".join(blocks) + "\n"


def _module_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row a module."""
    return ["module", "cosine", "distance", "learned"], [
        [
            row["module"],
            f"{row['cosine']:.2f}",
            f"{row['distance']:.2f}",
            "-" if row["cosine_from_origin"] is None else f"{row['cosine_from_origin']:.2f}",
        ]
        for row in results["modules"]
    ]


def _barrier_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each two experts."""
    ways = list(results["barriers"])
    count = len(results["barriers"][ways[0]])
    pairs = [(first, second) for first in range(count) for second in range(first + 1, count)]
    return ["experts", *ways], [
        [f"{first}, {second}", *(f"{results['barriers'][way][first][second]:.3f}" for way in ways)]
        for first, second in pairs
    ]


if __name__ == "__main__":
    with process():
        main()
