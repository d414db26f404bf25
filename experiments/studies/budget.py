"""How many forward passes, seconds and FLOPs each way takes to good coefficients.

    pip install -e '.[experiments,bench]'
    python -m experiments.studies.budget
    python -m experiments.studies.budget --experiment cifar10 --passes 128000

Each way learns the same coefficients from the same target images. It is measured on validation and test images as it
goes. Passes, seconds and FLOPs are those of learning alone, without compilation and without these measurements.

Each way's curve is kept, so a stopped run continues.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import glue_jax
from experiments.protocol.coefficients import alpha_optimizer, coefficients_key, make_steps
from experiments.protocol.config import CoefficientFields, part
from experiments.protocol.context import Context, take
from experiments.protocol.expert_training import train_experts
from experiments.protocol.presets import ExpertArguments
from experiments.reporting.presentation import STYLE, Report, TableCells, grouped, markdown_table, page, spread
from experiments.runtime.session import process
from experiments.runtime.stages import Stages
from experiments.studies import frame
from experiments.studies.frame import slug
from experiments.studies.sharing import Coefficients, Sharing, coefficients
from experiments.studies.ways import Way, ways
from glue_jax.checks import check_counts, check_positive

RATES: Mapping[Sharing, Mapping[str, float]] = {
    "softmax": {"spsa": 0.3, "spsa_d": 0.3, "forward": 0.3, "full": 0.1},
    "free": {"spsa": 0.01, "spsa_d": 0.3, "forward": 0.03, "full": 0.1},
    "free by block": {"spsa": 0.01, "spsa_d": 0.1, "forward": 0.01, "full": 0.1},
    "free by layer": {"spsa": 0.01, "spsa_d": 0.1, "forward": 0.01, "full": 0.3},
}
"""Learning rates of Adam, which falls to a fiftieth by a cosine. Each gives the lowest validation loss on the digits'
first seed (`--seeds 0 --rate`). For the softmax 0.03, 0.1 and 0.3 were tried. For the others 0.003, 0.01, 0.03, 0.1 and
0.3 were tried.
"""
TOLERANCE = 0.01
"""How near to the best loss of all ways counts as there, relatively."""
NEAR = 0.05
"""How near counts as near, relatively."""
_POINTS = 25
# A backward pass takes at least so many times as long as a forward pass. Ways with backward passes take fewer steps.
_BACKWARD = 3
_MOST_IMAGES = 1000
# The costs of a way, and how a table shows them.
_TAKEN: Mapping[str, Callable[[float], str]] = {
    "forward": "{:,.0f}".format,
    "backward": "{:,.0f}".format,
    "learning_seconds": "{:,.1f}".format,
    "flops": lambda count: f"{count / 1e12:.3g} T" if count >= 1e12 else f"{count / 1e9:.3g} G",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(ExpertArguments):
    """What a command line says.

    Attributes:
        passes: the largest number of forward passes of each way. A pass is one model on one image. The full gradient
            takes a quarter of them, because a backward pass takes as long as three forward passes or more.
        sharing: the parts of the network that have their own coefficients.
        ways: the ways whose names contain one of these words. The default is all ways.
        rate: Adam's learning rate for the ways that are not as in the paper. None is the rate in `RATES`.
    """

    passes: int = 128_000
    sharing: tuple[Sharing, ...] = ("softmax",)
    ways: tuple[str, ...] = ()
    rate: float | None = None

    def __post_init__(self) -> None:
        """Refuses values out of their range.

        Raises:
            ValueError: if a value is out of its range; the error has the field, its value, and what was expected.
        """
        check_counts(passes=self.passes)
        if self.rate is not None:
            check_positive("rate", self.rate)
        if not self.sharing or len(set(self.sharing)) < len(self.sharing):
            raise ValueError(f"sharing is {self.sharing}; expected at least one, each given once")
        self.chosen()

    def chosen(self) -> list[str]:
        """Returns the names of the ways that the command line names."""
        return frame.chosen("ways", self.ways, [way.name for way in ways(RATES["softmax"], None, None)])


def measure(context: Context, parsed: Arguments, stages: Stages) -> dict[str, Any]:
    """Runs the ways that are not done yet.

    Returns:
        A dict. `curves` has a curve for each sharing, way and seed. It has `sharing`, `dimension`, `way`, `seed`,
            `machine`, and lists over points: `forward` and `backward` passes, `flops` of the compiled steps (for the
            ways that have some), `learning_seconds`, `validation_loss` and `test_loss` (cross-entropy, nats).
    """
    config = context.config
    experts = glue_jax.stack_experts(train_experts(context)[0])
    fields = {
        **context.bank_fields,
        "code": context.code(_curve, ways, coefficients, _evaluation),
    }
    fields |= {**part(config, CoefficientFields), "test_examples": config.test_examples, "passes": parsed.passes}
    curves = []
    for sharing in parsed.sharing:
        problem = coefficients(context, experts, sharing)
        rates = RATES[sharing] if parsed.rate is None else dict.fromkeys(RATES[sharing], parsed.rate)
        chosen = [
            way
            for way in ways(rates, make_steps(config)[4], alpha_optimizer(config))
            if problem.dimension > way.above and way.name in parsed.chosen()
        ]
        evaluate = _evaluation(context, problem)
        bar = context.progress.stage(f"Ways, {sharing}", len(chosen) * len(config.seeds))
        for way in chosen:
            for seed in config.seeds:
                compute = functools.partial(_curve, context, problem, way, seed, parsed.passes, evaluate)
                depends_on = {**fields, "sharing": sharing, "way": way.name, "seed": seed, "rates": rates}
                curve = stages.run(f"budget/{slug(sharing)}-{slug(way.name)}-seed{seed}", depends_on, compute)
                described = {"sharing": sharing, "dimension": problem.dimension, "way": way.name, "seed": seed}
                curves.append({**described, **curve})
                bar.advance()
    return {"curves": curves}


def _evaluation(context: Context, problem: Coefficients) -> Any:
    """Returns a function from beta to the validation loss and the test loss, on at most so many images."""

    @jax.jit
    def loss(beta: Any, batch: Any) -> jax.Array:
        return problem.loss_fn(problem.merge_fn(problem.experts, problem.link_fn(beta)), batch)

    def evaluate(beta: Any) -> dict[str, float]:
        found = {}
        for name, examples in (("validation", context.validation), ("test", context.test)):
            count = min(len(examples.labels), _MOST_IMAGES)
            size = min(250, count)
            parts = [np.arange(at, min(at + size, count)) for at in range(0, count, size)]
            losses = [float(loss(beta, take(examples, rows))) for rows in parts]
            found[f"{name}_loss"] = float(np.average(losses, weights=[len(rows) for rows in parts]))
        return found

    return evaluate


def _curve(context: Context, problem: Coefficients, way: Way, seed: int, passes: int, evaluate: Any) -> dict[str, Any]:
    """Returns what a way reaches, by passes and seconds."""
    target = context.target(seed)
    size = min(way.batch_size, len(target.labels))
    per_step = way.forward(problem.dimension) * size
    num_steps = max(2, passes // (1 + _BACKWARD * way.backward) // per_step)
    key = coefficients_key(seed)
    minibatches = jax.random.fold_in(key, 0)
    rows = np.asarray(
        glue_jax.batches.minibatch_indices(minibatches, 0, num_steps, num_examples=len(target.labels), batch_size=size)
    )
    points = {0, *np.geomspace(1, num_steps, _POINTS).round().astype(int).tolist()}
    stepper = way.begin(problem, key, num_steps)
    stepper.compile(take(target, rows[0]))
    flops = stepper.flops and stepper.flops(take(target, rows[0]))
    state, seconds, curve = stepper.state, 0.0, []
    for taken in range(num_steps + 1):
        if taken in points:
            found = evaluate(stepper.beta(state)) if taken else evaluate(problem.beta)
            done = {"forward": taken * per_step, "backward": taken * way.backward * size, "learning_seconds": seconds}
            counted = {} if flops is None else {"flops": taken * flops}
            curve.append({**done, **counted, **found})
        if taken < num_steps:
            batch = take(target, rows[taken])
            begin = time.perf_counter()
            state = stepper.step(state, batch)
            seconds += time.perf_counter() - begin
    return {name: [point[name] for point in curve] for name in curve[0]}


def reached(curve: Mapping[str, Any], loss: float) -> dict[str, float] | None:
    """Returns the cost up to the first point with a validation loss of at most `loss`.

    Returns None if there is none.
    """
    there = np.flatnonzero(np.array(curve["validation_loss"]) <= loss)
    return {name: curve[name][there[0]] for name in _TAKEN if name in curve} if there.size else None


def table(curves: Sequence[Mapping[str, Any]]) -> TableCells:
    """Returns a row for each way: its cost to come within `TOLERANCE` of each seed's best validation loss."""
    best = {seed: min(min(c["validation_loss"]) for c in own) for seed, own in grouped(curves, "seed").items()}
    rows = []
    for way, own in grouped(curves, "way").items():
        found = [reached(curve, (1 + TOLERANCE) * best[curve["seed"]]) for curve in own]
        there = [point for point in found if point is not None]
        near = [reached(curve, (1 + NEAR) * best[curve["seed"]]) for curve in own]
        row = [way, f"{len(there)} of {len(own)}"]
        for points, name in [*((there, name) for name in _TAKEN), (near, "forward")]:
            values = [point[name] for point in points if point is not None and name in point]
            row.append(_TAKEN[name](float(np.mean(values))) if len(values) == len(own) else "-")
        for name in ("validation_loss", "test_loss"):
            lasts = [c[name][int(np.argmin(c["validation_loss"]))] for c in own]
            row.append(spread(np.array(lasts), 3))
        rows.append(row)
    head = ["way", "seeds there", "forward passes", "backward passes", "seconds", f"FLOPs to {100 * TOLERANCE:g} %"]
    return [*head, f"forward passes to {100 * NEAR:g} %", "best validation loss", "its test loss"], rows


def present(results: Mapping[str, Any]) -> Report:
    """All that is shown."""
    figures, tables = {}, {}
    parts = [
        "Forward passes are of one model on one image. Seconds are of learning alone: compilation and what is measured "
        "on the way are left out. *There* is within 1 % of the lowest validation loss that any way reaches with the "
        "same seed. The first point there counts, and neighbouring points are up to a third apart. A tangent counts as "
        "one forward pass, though it takes about the time of two forward passes. FLOPs are those that XLA counts in "
        "the compiled step, times the steps. Figures are means over the seeds; '-' where a seed does not get there, or "
        "where FLOPs were not counted. One column has a wider limit, 5 %: the validation set is finite, so chance may "
        "change a loss by more than 1 %. SPSA and the gradients have a falling learning rate, unless they are as in "
        "the paper. It was chosen on the digits' first seed, and may fail elsewhere.",
    ]
    for sharing, curves in grouped(results["curves"], "sharing").items():
        picture, cells = f"{slug(sharing)}.png", table(curves)
        parts += [f"## {sharing}: {curves[0]['dimension']} directions", f"![validation loss by passes]({picture})"]
        parts.append(markdown_table(*cells))
        figures[picture], tables[sharing] = _figure(curves), cells
    return Report(page(results, *parts), figures, tables)


def _figure(curves: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss by forward passes and by seconds, the mean over seeds of each way."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for index, (way, own) in enumerate(grouped(curves, "way").items()):
            loss = np.mean([curve["validation_loss"] for curve in own], axis=0)
            for axes, name in ((left, "forward"), (right, "learning_seconds")):
                x = np.mean([curve[name] for curve in own], axis=0)
                line = "--" if own[0]["backward"][-1] else "-"
                axes.plot(x[1:], loss[1:], line, color=f"C{index}", label=way if axes is left else None)
        left.set(
            xscale="log",
            yscale="log",
            xlabel="forward passes (dashed: as many backward)",
            ylabel="validation loss, nats",
        )
        for formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
            formatter("{x:g}")
        right.set(xscale="log", xlabel="seconds")
        figure.legend(loc="outside lower center", ncols=3)
    return figure


main = frame.study(Arguments, measure, present, title="Passes and seconds to good coefficients", rows="curves")

if __name__ == "__main__":
    with process():
        main()
