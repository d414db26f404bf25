"""How much an untuned radius costs, and what calibration gives.

    python -m experiments.studies.calibration
    python -m experiments.studies.calibration --experiment cifar10 --seeds 0

GLUE learns the coefficients, as Config 4 does, with each radius of a sweep around the experiment's own. It also learns
them with the radius that `glue_jax.calibrate` proposes to a user whose guess is wrong by a factor of 100 or 10,000. The
guess is too small or too large. `calibrate` searches three decades to either side of the guess.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.coefficients import coefficients_key, learn_coefficients
from experiments.protocol.config import CoefficientFields, part
from experiments.protocol.context import Context
from experiments.protocol.expert_training import train_experts
from experiments.protocol.presets import ExpertArguments
from experiments.reporting.presentation import STYLE, Report, TableCells, grouped, markdown_table, number, page, spread
from experiments.runtime.session import process
from experiments.runtime.stages import Stages
from experiments.studies import frame
from glue_jax.batches import on_cpu

FACTORS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""The radii of the sweep, as multiples of the experiment's own radius."""
GUESSES = (1e-4, 1e-2, 100.0, 1e4)
"""The guesses that calibration starts from, as multiples of the experiment's own radius."""
_SEARCH = np.logspace(-3, 3, 13)
_IMAGES = 512
# A seed's key is folded with this number. The protocol has other numbers.
_CALIBRATION = 4


def measure(context: Context, _: ExpertArguments, stages: Stages) -> dict[str, Any]:
    """Learns from each radius what is not learned yet.

    Returns:
        A dict. `rows` has a row for each radius and seed, with `way`, `seed`, `radius`, `loss` (the best validation
            loss in nats), `steps` and `machine`.
    """
    config = context.config
    experts = glue_jax.stack_experts(train_experts(context)[0])
    fields = {
        **context.bank_fields,
        **part(config, CoefficientFields),
        "code": context.code(_learn_calibrated),
    }
    bar = context.progress.stage("Radii", (len(FACTORS) + len(GUESSES)) * len(config.seeds))
    rows = []
    for seed in config.seeds:
        for index, factor in enumerate(FACTORS):
            radius = factor * config.radius
            compute = functools.partial(_learn, context, experts, seed, radius)
            row = stages.run(f"calibration/radius{index}-seed{seed}", {**fields, "radius": radius}, compute)
            rows.append({"way": "sweep", "seed": seed, **row})
            bar.advance()
        for index, factor in enumerate(GUESSES):
            guess = factor * config.radius
            compute = functools.partial(_learn_calibrated, context, experts, seed, guess)
            row = stages.run(f"calibration/guess{index}-seed{seed}", {**fields, "guess": guess}, compute)
            rows.append({"way": f"calibrated from {number(guess)}", "seed": seed, **row})
            bar.advance()
    return {"rows": rows}


def calibrated_radius(context: Context, experts: Variables, seed: int, guess: float) -> float:
    """Returns what `glue_jax.calibrate` proposes at the start of learning, the uniform average.

    Args:
        context: what `experiments.protocol.context.prepare` returned.
        experts: the stacked experts, each leaf `[K, ...]`.
        seed: the seed of target images and directions.
        guess: the middle of the radii that are tried, on a logarithmic axis.

    Raises:
        FloatingPointError: if no radius changes the loss, for example because rounding hides the change.
    """
    batch = context.images(context.targets[seed][:_IMAGES])

    @jax.jit
    def loss(beta: jax.Array) -> jax.Array:
        return context.problem.loss(glue_jax.blend(experts, jax.nn.softmax(beta), min_dtype=jax.numpy.float32), batch)

    config = context.config
    try:
        with jax.default_matmul_precision(config.matmul_precision):
            found = glue_jax.calibrate(
                jax.random.fold_in(jax.random.key(seed), _CALIBRATION),
                loss,
                glue_jax.coefficients.weights_to_logits(glue_jax.coefficients.uniform(config.num_experts)),
                radii=[float(radius) for radius in guess * _SEARCH],
                # A probe has many images. If a step fits into memory, so many probes at once fit too.
                probe_batch_size=None if on_cpu(batch) else 2,
            )
    except ValueError as error:
        raise FloatingPointError(
            f"--radius is {config.radius:g}, and no radius within three decades of the guess {guess:g} will do: {error}"
        ) from error
    return found.radius


def _learn(context: Context, experts: Variables, seed: int, radius: float) -> dict[str, Any]:
    """The best validation loss with a radius."""
    result = learn_coefficients(
        context._replace(config=dataclasses.replace(context.config, radius=radius)),
        4,
        coefficients_key(seed),
        experts,
        context.target(seed),
        context.validation,
    )
    history = result.history
    return {"radius": radius, "loss": float(history.validation_values.min()), "steps": len(history.metrics.loss)}


def _learn_calibrated(context: Context, experts: Variables, seed: int, guess: float) -> dict[str, Any]:
    """The best validation loss with the radius that calibration proposes."""
    return _learn(context, experts, seed, calibrated_radius(context, experts, seed, guess))


def table(rows: Sequence[Mapping[str, Any]]) -> TableCells:
    """Returns a row for each radius of the sweep, and for each guess."""
    calibrated = grouped(rows, "way")
    swept = grouped(calibrated.pop("sweep"), "radius")
    best = min(np.mean([row["loss"] for row in own]) for own in swept.values())
    cells = []
    for name, own in {**{number(radius): own for radius, own in swept.items()}, **calibrated}.items():
        losses = np.array([row["loss"] for row in own])
        steps, radii = np.mean([row["steps"] for row in own]), dict.fromkeys(number(row["radius"]) for row in own)
        cells.append(
            [name, spread(losses, 3), f"{100 * (losses.mean() / best - 1):+.1f} %", f"{steps:.0f}", ", ".join(radii)]
        )
    return ["radius", "validation loss", "over the best radius", "steps", "radii"], cells


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of the results of `main`."""
    cells = table(results["rows"])
    markdown = page(
        results,
        "GLUE learns the coefficients with a radius. The table has the best validation loss (cross-entropy, nats), the "
        "mean over seeds ± the standard deviation, and the number of steps after which learning ended. The third "
        "column compares the mean with that of the best radius of the sweep. A seed decides target images, minibatches "
        "and directions. They are the same for every radius.",
        "![validation loss by radius](calibration.png)",
        markdown_table(*cells),
    )
    return Report(markdown, {"calibration.png": _figure(results)}, {results["title"]: cells})


def _figure(results: Mapping[str, Any]) -> Figure:
    """The loss by radius, seed by seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        ways = grouped(results["rows"], "way")
        for rows in grouped(ways.pop("sweep"), "seed").values():
            radii, losses = [row["radius"] for row in rows], [row["loss"] for row in rows]
            axes.plot(radii, losses, "-", color="black", label=None if axes.lines else "sweep, a line a seed")
        for index, (way, rows) in enumerate(ways.items()):
            radii, losses = [row["radius"] for row in rows], [row["loss"] for row in rows]
            axes.plot(radii, losses, "<^v>"[index], color=f"C{index}", markersize=9, alpha=0.6, label=way)
        axes.set(xscale="log", xlabel="radius of the probes", ylabel="best validation loss, nats")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


main = frame.study(
    ExpertArguments, measure, present, title="The radius of SPSA's probes, tuned and calibrated", rows="rows"
)

if __name__ == "__main__":
    with process():
        main()
