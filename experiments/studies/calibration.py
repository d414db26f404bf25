"""What a radius that nobody tuned costs, and what calibration gives: learning with many radii, and calibrated ones.

    python -m experiments.studies.calibration
    python -m experiments.studies.calibration --experiment cifar10 --seeds 0

Experts are read from `--run-dir`, where the experiment's own command keeps them (give it the same options); those that
are missing are trained. GLUE learns the coefficients, as Config 4 does, with each radius of a sweep around the
experiment's own; and with what `glue_jax.calibrate` proposes to somebody whose guess is 100 or 10,000 times too small
or too large: a search of three decades to either side of the guess.
"""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

import glue_jax
from experiments.models.network import Variables
from experiments.protocol import data
from experiments.protocol.coefficients import coefficients_key, learn_coefficients
from experiments.protocol.config import CoefficientFields, part
from experiments.protocol.context import Context, prepare, take
from experiments.protocol.expert_training import describe_missing, train_experts
from experiments.protocol.presets import ExpertArguments, parse
from experiments.reporting.presentation import STYLE, markdown_table, number, rich_table, spread, write_report
from experiments.runtime.session import exit_on, process, session
from experiments.runtime.stages import Stages, machine
from glue_jax.batches import on_cpu

FACTORS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Of the experiment's own radius: the sweep."""
GUESSES = (1e-4, 1e-2, 100.0, 1e4)
"""Of the experiment's own radius: where calibration starts from."""
TOLERANCE = 0.02
"""What calibrated learning's loss may be above the best of the sweep, relatively."""
_SEARCH = np.logspace(-3, 3, 13)
_IMAGES = 512
# What a seed's key is folded with, beside the protocol's.
_CALIBRATION = 4


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, from a command line to the report.

    Args:
        arguments: the command line; None is the process's.

    Returns:
        The results: `title`, `command`, `machine`, `config`, `rows` (of each radius and seed: `way`, `seed`, `radius`,
        `loss`, the best validation loss, in nats, `steps`) and `verdicts` (of each guess: `way`, `ratio`, calibrated
        learning's loss over the best radius's, means over seeds, and whether it `holds`).
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(markup=False)
    with exit_on(ValueError):
        parsed = parse(ExpertArguments, "studies.calibration", __doc__ or "", words)
        parsed.check(least_experts=2)
    command = shlex.join(["python", "-m", "experiments.studies.calibration", *words])
    with session(parsed.out_dir, console, command) as progress:
        with exit_on(ValueError, OSError, data.DatasetNotFoundError):
            dataset = data.load(parsed.config.dataset, parsed.data_dir, parsed.config.image_size)
            kept, accept = parsed.run_dir / "stages", parsed.accept_stages
            context = prepare(parsed.config, dataset, kept, progress, accept_stages=accept)
        progress.say(
            f"{dataset.name}; {machine()}\n"
            f"{describe_missing(context)}\nthen "
            f"{(len(FACTORS) + len(GUESSES)) * len(parsed.config.seeds)} times at most {parsed.config.alpha_steps} "
            "steps of two probes"
        )
        rows = measure(context, parsed.stages(progress))
        results = {
            "title": f"The radius of SPSA's probes, tuned and calibrated: {parsed.experiment}, preset {parsed.preset}",
            "command": command,
            "machine": "; ".join(sorted({row["machine"] for row in rows})),
            "config": dataclasses.asdict(parsed.config),
            "rows": rows,
            "verdicts": verdicts(rows),
        }
        write_report(parsed.out_dir, results, _markdown(results), {"calibration.png": _figure(results)})
    console.print(rich_table(results["title"], *_table(results), caption=_conclusion(results)))
    console.print(f"report: {parsed.out_dir / 'report.md'}", highlight=False, soft_wrap=True)
    return results


def measure(context: Context, stages: Stages) -> list[dict[str, Any]]:
    """Learns from each radius what is not learned yet.

    Args:
        context: of the run whose experts these are; they are trained where they are missing.
        stages: where the results are kept.

    Returns:
        The `rows` that `main` returns.
    """
    config = context.config
    experts = glue_jax.stack_experts(train_experts(context)[0])
    fields = {
        **context.expert_fields,
        **part(config, CoefficientFields),
        "experts": config.num_experts,
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
    return rows


def calibrated_radius(context: Context, experts: Variables, seed: int, guess: float) -> float:
    """Returns what `glue_jax.calibrate` proposes at the start of learning, the uniform average.

    Args:
        context: of `experiments.protocol.context.prepare`.
        experts: stacked, each leaf `[K, ...]`.
        seed: of target images and directions.
        guess: in the middle, on a logarithmic axis, of the radii that are tried.

    Raises:
        FloatingPointError: none of them changes the loss, as where they are so small that it is rounded away.
    """
    batch = take(context.train, context.targets[seed][:_IMAGES])

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
                # A probe is of many images: so many at once fit wherever a step does.
                probe_batch_size=None if on_cpu(batch) else 2,
            )
    except ValueError as error:
        raise FloatingPointError(
            f"--radius is {config.radius:g}, and no radius within three decades of the guess {guess:g} will do: {error}"
        ) from error
    return found.radius


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns whether calibration reaches what the best radius of the sweep does.

    Args:
        rows: of `measure`.
    """
    best = min(np.mean(losses) for losses in _losses(rows, sweep=True).values())
    ratios = {way: float(np.mean(losses) / best) for way, losses in _losses(rows, sweep=False).items()}
    return [{"way": way, "ratio": ratio, "holds": ratio <= 1 + TOLERANCE} for way, ratio in ratios.items()]


def _learn(context: Context, experts: Variables, seed: int, radius: float) -> dict[str, Any]:
    """The best validation loss with a radius."""
    step = functools.partial(context.step_fns[4], radius=radius)
    result = learn_coefficients(
        context._replace(step_fns={4: step}),
        4,
        coefficients_key(seed),
        experts,
        take(context.train, context.targets[seed]),
        max_steps=context.config.alpha_steps,
    )
    history = result.history
    return {"radius": radius, "loss": float(history.validation_values.min()), "steps": len(history.metrics.loss)}


def _learn_calibrated(context: Context, experts: Variables, seed: int, guess: float) -> dict[str, Any]:
    """The same with the radius that calibration proposes."""
    return _learn(context, experts, seed, calibrated_radius(context, experts, seed, guess))


def _losses(rows: Sequence[Mapping[str, Any]], *, sweep: bool) -> dict[Any, list[float]]:
    """The losses of all seeds, by radius of the sweep, or by way of calibration."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        if (row["way"] == "sweep") == sweep:
            found.setdefault(row["radius"] if sweep else row["way"], []).append(row["loss"])
    return found


def _conclusion(results: Mapping[str, Any]) -> str:
    """What it comes to."""
    return "; ".join(
        f"{verdict['way']}: {100 * (verdict['ratio'] - 1):+.1f} % of the best radius's loss, "
        f"{'within' if verdict['holds'] else 'not within'} {100 * TOLERANCE:.0f} %"
        for verdict in results["verdicts"]
    )


def _table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each radius of the sweep, and for each guess."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(number(row["radius"]) if row["way"] == "sweep" else row["way"], []).append(row)
    return ["radius", "validation loss", "steps", "radii"], [
        [
            name,
            spread(np.array([row["loss"] for row in rows]), 3),
            f"{np.mean([row['steps'] for row in rows]):.0f}",
            ", ".join(dict.fromkeys(number(row["radius"]) for row in rows)),
        ]
        for name, rows in groups.items()
    ]


def _markdown(results: Mapping[str, Any]) -> str:
    """The report."""
    seeds = len(results["config"]["seeds"])
    return (
        "\n\n".join(
            [
                f"# {results['title']}",
                f"    {results['command']}",
                f"Run on {results['machine']}.",
                f"The best validation loss (cross-entropy, nats) that GLUE reaches with a radius, mean over {seeds} "
                "seeds ± standard deviation, and after how many steps learning ended. Seeds decide target images, "
                "minibatches and directions, the same for every radius.",
                "![validation loss by radius](calibration.png)",
                markdown_table(*_table(results)),
                f"{_conclusion(results)}.",
            ]
        )
        + "\n"
    )


def _figure(results: Mapping[str, Any]) -> Figure:
    """The loss by radius, seed by seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for seed in results["config"]["seeds"]:
            rows = [row for row in results["rows"] if row["way"] == "sweep" and row["seed"] == seed]
            radii, losses = [row["radius"] for row in rows], [row["loss"] for row in rows]
            axes.plot(radii, losses, "-", color="black", label=None if axes.lines else "sweep, a line a seed")
        for index, way in enumerate(_losses(results["rows"], sweep=False)):
            rows = [row for row in results["rows"] if row["way"] == way]
            radii, losses = [row["radius"] for row in rows], [row["loss"] for row in rows]
            axes.plot(radii, losses, "<^v>"[index], color=f"C{index}", markersize=9, alpha=0.6, label=way)
        axes.set(xscale="log", xlabel="radius of the probes", ylabel="best validation loss, nats")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    with process():
        main()
