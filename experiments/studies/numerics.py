"""How accurate the estimates are, by the number formats of the experts and of the network.

    python -m experiments.studies.numerics
    python -m experiments.studies.numerics --experiment imagenette --data-dir DIR

The experts are measured as they were trained, and also drawn together until their distance from their mean is 1 % of
the length of the mean. They are in float32, bfloat16 or float16. The network has float32 products, or products that are
rounded to TF32 or to bfloat16, or bfloat16 layers. The rounding is emulated. A product that asks for the highest
precision is not rounded. The coefficients are learned under a softmax, or are free (alpha itself). An estimate probes
all directions that the link sees, so an estimate without rounding is the gradient.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.config import CoefficientFields, part
from experiments.protocol.context import Context
from experiments.protocol.data import Examples
from experiments.protocol.expert_training import train_experts
from experiments.protocol.presets import ExpertArguments
from experiments.protocol.training import Problem, cross_entropy
from experiments.reporting.presentation import Report, TableCells, markdown_table, number, page
from experiments.runtime.session import process
from experiments.runtime.stages import Stages
from experiments.studies import frame
from experiments.studies.rounding import with_rounded_products
from glue_jax.directions import dimension
from glue_jax.estimators import Estimate, forward_gradient, spsa_gradient
from glue_jax.links import directions_of
from glue_jax.precision import DEFAULT_RADIUS, SHORT_FACTOR, SOFTMAX_RADIUS
from glue_jax.types import LinkFn, LossFn, StepFn

NEAR = 0.01
"""How far experts that were drawn together are from their mean, over its length (root mean square)."""
RADII = (1e-3, 1e-2, 0.1, 1.0)
"""The radii of SPSA's probes."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
"""The number formats of the experts."""
ARITHMETIC = ("float32", "TF32 products", "bfloat16 products", "bfloat16 layers")
"""The arithmetic of the network."""
LINKS = {"softmax": jax.nn.softmax, "free": glue_jax.unconstrained}
"""The links from beta to alpha."""
BATCHES = 3
"""The minibatches at each of two points: the uniform average, and a softmax of normally distributed logits."""


def measure(context: Context, _: ExpertArguments, stages: Stages) -> dict[str, Any]:
    """Measures what is not measured yet.

    Returns:
        `distance`, that of the experts as they were trained, defined as for `NEAR`; and `rows`. Each row has `link`,
        `experts`, `dtype`, `arithmetic`, `spsa` (the relative error by radius), `tangents`, and the errors with the
        steps' own defaults, `default_spsa` and `default_tangents`.
    """
    trained = glue_jax.stack_experts(train_experts(context)[0])
    near, distance = drawn_together(trained, NEAR)
    banks = {"as trained": trained, f"{100 * NEAR:g} % apart": near}
    fields = {
        **context.bank_fields,
        "seed": context.config.seeds[0],
        **part(context.config, CoefficientFields),
        "code": context.code(_errors, drawn_together),
    }
    cases = [("softmax", *case) for case in itertools.product(banks, DTYPES, ARITHMETIC)]
    # A number format has the same effect under any link, so fewer cases do for this one.
    cases += [
        ("free", experts, next(iter(DTYPES)), arithmetic)
        for experts, arithmetic in itertools.product(banks, ARITHMETIC)
    ]
    bar = context.progress.stage("Number formats", len(cases))
    rows = []
    for link, experts, dtype, arithmetic in cases:
        case = {"link": link, "experts": experts, "dtype": dtype, "arithmetic": arithmetic}
        name = f"numerics/{link}-{experts}-{dtype}-{arithmetic}".replace(" ", "_").replace("%", "percent")
        compute = functools.partial(_errors, context, banks[experts], dtype, arithmetic, link)
        row = stages.run(name, {**fields, **case}, compute)
        rows.append({**case, **row})
        bar.advance()
    return {"distance": distance, "rows": rows}


def drawn_together(experts: Variables, distance: float) -> tuple[Variables, float]:
    """Returns experts that are drawn to a distance from their mean, and the distance that they had.

    Args:
        experts: the stacked experts, each leaf `[K, ...]`.
        distance: the distance of an expert's parameters from the mean, divided by the length of the mean. It is a root
            mean square over experts.
    """
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0, keepdims=True), experts)
    away = jax.tree.map(jnp.subtract, experts, mean)
    k = glue_jax.num_experts(experts)
    found = float(optax.tree.norm(away["params"]) / np.sqrt(k) / optax.tree.norm(mean["params"]))
    return jax.tree.map(lambda centre, leaf: centre + distance / found * leaf, mean, away), found


def _errors(context: Context, experts: Variables, dtype: str, arithmetic: str, link: str) -> dict[str, Any]:
    """Returns the relative errors of the estimates in one case, as root mean squares over points and minibatches."""
    config = context.config
    bank = jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]), experts)
    exact_bank = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), bank)
    target, size = context.target(config.seeds[0]), config.alpha_batch_size
    batches = [jax.tree.map(lambda leaf, at=index: leaf[at * size :][:size], target) for index in range(BATCHES)]
    k, link_fn = config.num_experts, LINKS[link]
    points = [jnp.zeros(k), jax.random.normal(jax.random.key(0), (k,))]
    if link == "free":
        points = [jax.nn.softmax(point) for point in points]
    cases = [
        (index, beta, batch, _exact(exact_bank, beta, batch, loss_fn=context.problem.loss, link_fn=link_fn))
        for beta in points
        for index, batch in enumerate(batches)
    ]

    def error(estimate: Callable[..., jax.Array], **words: Any) -> float:
        words |= {"loss_fn": _loss(context.problem, arithmetic), "link_fn": link_fn}
        squares = [
            float(
                jnp.sum(jnp.square(estimate(bank, jax.random.key(seed), beta, batch, **words) - right))
                / jnp.sum(jnp.square(right))
            )
            for seed, beta, batch, right in cases
        ]
        return float(np.sqrt(np.mean(squares)))

    with warnings.catch_warnings():
        # The warning is about products in bfloat16, which are measured here.
        warnings.filterwarnings("ignore", message="loss_fn multiplies bfloat16")
        return {
            "spsa": [{"radius": r, "error": error(_estimate, estimator=spsa_gradient, radius=r)} for r in RADII],
            "tangents": error(_estimate, estimator=forward_gradient),
            "default_spsa": error(_of_step, step_fn=glue_jax.spsa_step),
            "default_tangents": error(_of_step, step_fn=glue_jax.forward_gradient_step),
        }


def _objective(loss_fn: LossFn, link_fn: LinkFn, bank: Variables, batch: Examples, beta: jax.Array) -> jax.Array:
    """The loss of a blend in float32 at least."""
    return loss_fn(glue_jax.blend(bank, link_fn(beta), min_dtype=jnp.float32), batch)


# Experts are arguments of the programs. As constants of a program they would take long to compile.
@functools.partial(jax.jit, static_argnames=("loss_fn", "link_fn"))
def _exact(bank: Variables, beta: jax.Array, batch: Examples, *, loss_fn: LossFn, link_fn: LinkFn) -> jax.Array:
    """The gradient."""
    with jax.default_matmul_precision("highest"):
        return jax.grad(functools.partial(_objective, loss_fn, link_fn, bank, batch))(beta)


@functools.partial(jax.jit, static_argnames=("loss_fn", "link_fn", "estimator"))
def _estimate(
    bank: Variables,
    key: jax.Array,
    beta: jax.Array,
    batch: Examples,
    *,
    estimator: Callable[..., Estimate],
    loss_fn: LossFn,
    link_fn: LinkFn,
    **words: ArrayLike,
) -> jax.Array:
    """The estimate of an estimator of `glue_jax.estimators`, along all directions."""
    fun = functools.partial(_objective, loss_fn, link_fn, bank, batch)
    return estimator(key, fun, beta, **words, **_all_directions(link_fn, beta)).gradient


@functools.partial(jax.jit, static_argnames=("loss_fn", "link_fn", "step_fn"))
def _of_step(
    bank: Variables,
    key: jax.Array,
    beta: jax.Array,
    batch: Examples,
    *,
    loss_fn: LossFn,
    link_fn: LinkFn,
    step_fn: StepFn,
) -> jax.Array:
    """The estimate of a step with its defaults, along all directions."""
    optimizer = optax.sgd(1.0)
    state = glue_jax.init(len(beta), optimizer, beta=beta)
    words = {"loss_fn": loss_fn, "optimizer": optimizer, "link_fn": link_fn}
    words["num_directions"] = _all_directions(link_fn, beta)["num_directions"]
    return beta - step_fn(key, state, bank, batch, **words)[0].beta


def _all_directions(link_fn: LinkFn, beta: jax.Array) -> dict[str, Any]:
    """Returns the keyword arguments of an estimator that probes all directions of a link."""
    directions = directions_of(link_fn)
    return {"directions": directions, "num_directions": dimension(beta, directions)}


@functools.cache
def _loss(problem: Problem, arithmetic: str) -> LossFn:
    """Returns the loss, computed by a network with this arithmetic."""
    if arithmetic == "float32":
        return problem.loss
    if arithmetic != "bfloat16 layers":
        return with_rounded_products(problem.loss, 10 if arithmetic.startswith("TF32") else 7)

    def loss(variables: Variables, batch: Examples) -> jax.Array:
        short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
        logits = problem.network.apply(short, problem.normalize(batch.images).astype(jnp.bfloat16))
        return cross_entropy(logits.astype(jnp.float32), batch.labels)

    return loss


def _table(results: Mapping[str, Any]) -> TableCells:
    """A row for each case."""
    radii = [f"radius {number(entry['radius'])}" for entry in results["rows"][0]["spsa"]]
    headers = ["coefficients", "experts", "their dtype", "the network's arithmetic", *radii]
    return [*headers, "tangents", "`spsa_step`", "`forward_gradient_step`"], [
        [
            *(row[name] for name in ("link", "experts", "dtype", "arithmetic")),
            *(f"{entry['error']:.4f}" for entry in row["spsa"]),
            *(f"{row[name]:.4f}" for name in ("tangents", "default_spsa", "default_tangents")),
        ]
        for row in results["rows"]
    ]


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of the results of `main`."""
    markdown = page(
        results,
        "Rounded products and bfloat16 layers are emulated.",
        "The table has the error of an estimate of the coefficients' gradient, divided by the length of the exact "
        "gradient in float32. It is a root mean square over several minibatches at each of two points. An estimate "
        "probes all directions that the coefficients have: K - 1 directions of sum zero under a softmax, and K "
        "directions of free coefficients (alpha itself).",
        "The experts are measured as they were trained, and drawn together. Distance: from the experts' mean, divided "
        "by the length of the mean, a root mean square over the experts.",
        markdown_table(["experts", "distance"], [["as trained", f"{results['distance']:.2f}"]]),
        "The columns of radii and of tangents take the network's products as they come. The last two columns are the "
        "steps' defaults: `spsa_step` asks for products of the highest precision. Its default radius depends on the "
        "link and on the number format of the network's layers:",
        markdown_table(
            ["default radius", "float32 layers", "bfloat16 layers"],
            [
                [link, number(radius), number(factor * radius)]
                for link, radius, factor in (
                    ("softmax", SOFTMAX_RADIUS, SHORT_FACTOR),
                    ("free", DEFAULT_RADIUS, 1),
                )
            ],
        ),
        markdown_table(*_table(results)),
    )
    return Report(markdown, {}, {results["title"]: _table(results)})


main = frame.study(ExpertArguments, measure, present, title="The error of the slopes by number format", rows="rows")

if __name__ == "__main__":
    with process():
        main()
