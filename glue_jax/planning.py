"""`plan`: which step learns the coefficients cheapest, measured for your model, experts, minibatch and device."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from glue_jax import theory
from glue_jax.arguments import bare
from glue_jax.blending import blend, merge_for_learning
from glue_jax.checks import check_callable, check_counts
from glue_jax.directions import dimension
from glue_jax.estimators import scalar_valued
from glue_jax.experts import num_experts
from glue_jax.gauss_newton import gauss_newton_step
from glue_jax.links import apply_link, directions_of
from glue_jax.objectives import OutputLoss
from glue_jax.plans import LeftOut, Plan, PlannedStep, reasons
from glue_jax.precision import multiplies_short_floats
from glue_jax.states import init, opt_state_of
from glue_jax.steps import forward_gradient_step, full_gradient_step, spsa_step
from glue_jax.timing import Program, compile_and_run, median_seconds, temporary_bytes
from glue_jax.types import Batch, GlueState, LearnResult, LinkFn, LossFn, MergeFn, Params, PyTree, StepFn

# For the first-order steps. Any optimizer will do, because it only updates d numbers.
_OPTIMIZER = optax.adam(1e-2, b1=0.9, b2=0.99)
_FULL, _DIFFERENCES = "full gradient", "Gauss-Newton by differences"


def plan(
    experts: Params,
    batch: Batch,
    *,
    loss_fn: LossFn,
    state: GlueState | LearnResult | None = None,
    link_fn: LinkFn = jax.nn.softmax,
    merge_fn: MergeFn = blend,
    repeats: int = 5,
) -> Plan:
    """Times the steps on the device of the arrays, and says which one makes progress cheapest.

    A step with a noisy estimate makes less progress, so the plan divides the time of a step by its progress. The plan
    also says whether one SPSA step is faster than one full-gradient step (the paper's Eq. 10).

    The call compiles about twenty programs. This takes some minutes for a large network. Many coefficients take longer,
    because some of the timed steps look along d directions. d is the number of directions in which the blend can
    change. Each step is timed with its default directions, radius and precision. A program has one step, as with
    `learn` on a CPU. On an accelerator `learn` runs several steps in one program, which the plan does not time. The
    repeats take turns: each step is timed once, then each a second time, and so on.

    The plan compares steps by their progress. Suppose that the gradient g of a loss is L-Lipschitz. Suppose that an
    estimate has mean g and mean squared error V ||g||^2. A step subtracts eta times the estimate. In expectation this
    lowers the loss by at least `eta ||g||^2 - L/2 eta^2 (1 + V) ||g||^2`. The best eta gives `||g||^2 / (2 L (1 + V))`,
    which is 1/(1 + V) of the progress with the exact gradient. So 1 + V steps count as one step with the exact
    gradient:

    - `full_gradient_step` has V = 0. It is the unit.
    - `spsa_step` and `forward_gradient_step` have the V of `glue_jax.theory.relative_variance`. One direction has
      V = d - 1, so d steps count as one. m = d orthogonal directions have V = 0.
    - `gauss_newton_step` counts as one step with the exact gradient. That is an assumption. The step is worth less at
      first, when its damping is large. It is worth more near the minimum, because it also uses the curvature. No timing
      tells how much, since that depends on the problem. The printed plan says how much a Gauss-Newton step must be
      worth to be the cheapest.

    The plan ignores the noise of minibatches. It assumes that each step has its best learning rate for plain gradient
    descent.

    For Eq. (10) the plan measures a blend, a forward pass, a backward pass, and the inner products that turn a gradient
    for the model into a gradient for alpha. Both passes use the current `jax.default_matmul_precision`. The steps
    themselves choose their precision. On an accelerator SPSA and Gauss-Newton use the highest precision, which takes
    more time there. The other steps use the current one.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        batch: one minibatch, a pytree of arrays `[B, ...]`. Use the size that you will learn with.
        loss_fn: as for `learn`. Gauss-Newton is measured if it is a `glue_jax.OutputLoss`.
        state: the point at which to measure: a state from `init` or a step, or a result of `learn`. Only its beta
            matters. With None it is the link's own start.
        link_fn: as for `learn`.
        merge_fn: as for `learn`.
        repeats: how often each program is timed. The plan takes the median.

    Returns:
        The plan. `learn(..., step_fn=plan.best.step_fn)` uses its recommendation. It needs an `optimizer` unless the
        best step is Gauss-Newton. Steps that do not run are listed in `left_out`, with the reason. A step is left out
        if it does not fit into the device's memory, or if JAX lacks a derivative for it. Except for SPSA, a step is
        also left out if its gradient is 0 or not finite. For example, the gradient of the error rate is 0.

    Raises:
        ValueError: before any timing, if an argument is out of its range, if the coefficients do not fit the experts,
            or if the loss is no finite scalar.
        ValueError: if no step runs.
        TypeError: if an argument has the wrong type, or if `plan` is called under a transformation of JAX.

    Warns:
        UserWarning: if `loss_fn` multiplies short floats, as for `spsa_step`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])
        >>> loss_fn = lambda params, batch: jnp.mean((params["w"] - batch) ** 2)
        >>> plan = glue_jax.plan(experts, jnp.array([0.2, 0.5, 0.7]), loss_fn=loss_fn)
        >>> plan.dimension
        1
        >>> plan.best in plan.steps
        True
    """
    check_callable(loss_fn=loss_fn, link_fn=link_fn, merge_fn=merge_fn)
    check_counts(repeats=repeats)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((experts, batch, state))):
        raise TypeError(
            "plan was called under a transformation of JAX, such as jit: call it outside, because it measures times"
        )
    experts, batch = jax.tree.map(jnp.asarray, (experts, batch))
    beta = _beta_of(state, experts, link_fn)
    d = dimension(beta, directions_of(link_fn))
    functions = {"loss_fn": loss_fn, "link_fn": link_fn, "merge_fn": merge_fn}
    merge = merge_for_learning(merge_fn)

    def objective(beta: PyTree) -> jax.Array:
        return loss_fn(merge(experts, apply_link(link_fn, beta)), batch)

    jax.eval_shape(scalar_valued(objective), beta)
    programs, left_out = _parts(experts, batch, beta, **functions), []
    candidates: dict[int, PlannedStep] = {}
    for number, candidate in enumerate(_candidates(d, link_fn, loss_fn)):
        if candidate.name == _DIFFERENCES and multiplies_short_floats(objective, beta):
            program = "loss_fn multiplies bfloat16 or float16 arrays, which rounds the differences of outputs away"
        else:
            program = _step_program(candidate.step_fn, experts, batch, beta, functions)
        if isinstance(program, str):
            left_out.append(LeftOut(candidate.name, candidate.probe_batch_size, program))
        else:
            programs[number] = program
            candidates[number] = candidate._replace(temporary_bytes=temporary_bytes(program.function))
    if not candidates:
        raise ValueError("no step runs here:\n" + "\n".join(reasons(left_out)))
    if not any(step.name == _FULL for step in candidates.values()):
        programs.pop("backward", None)
    seconds = median_seconds(programs, repeats, between=programs["forward"])
    steps = tuple(step._replace(seconds=seconds[number]) for number, step in candidates.items())
    return Plan(
        best=min(steps, key=lambda step: step.progress_seconds),
        steps=steps,
        left_out=tuple(left_out),
        device=_device_of(experts),
        dimension=d,
        **_parts_of_eq_9(seconds),
    )


def _beta_of(state: Any, experts: Params, link_fn: LinkFn) -> PyTree:
    """Returns the coefficients to measure at."""
    if state is None:
        return init(num_experts(experts), link_fn=link_fn).beta
    if not isinstance(state, GlueState | LearnResult):
        raise TypeError(f"state is a {type(state).__name__}; expected a GlueState or a LearnResult")
    return jax.tree.map(jnp.asarray, state.beta)


def _candidates(d: int, link_fn: LinkFn, loss_fn: LossFn) -> Iterator[PlannedStep]:
    """Yields the steps to measure, each with several sizes between one at a time and all at once."""
    yield PlannedStep(_FULL, full_gradient_step, None, forward_passes=1, tangents=0, backward_passes=1, steps=1.0)

    def of_sizes(
        name: str, step_fn: StepFn, count: int, *, models: int = 0, shared: int = 0, m: int | None = None
    ) -> Iterator[PlannedStep]:
        # There are `count` models or tangents. Tangents that are computed together share a forward pass.
        for size in _sizes(count):
            yield PlannedStep(
                name,
                functools.partial(step_fn, probe_batch_size=size),
                size,
                forward_passes=models or shared + -(-count // size),
                tangents=0 if models else count,
                backward_passes=0,
                assumed=bare(step_fn) is gauss_newton_step,
                steps=1.0 if m is None else 1 + theory.relative_variance(d, m, directions_of(link_fn)),
            )

    for m in sorted({1, d}):
        step_fn = functools.partial(spsa_step, num_directions=m)
        yield from of_sizes(f"SPSA, {_directions(m)}", step_fn, 2 * m, models=2 * m, m=m)
    step_fn = functools.partial(forward_gradient_step, num_directions=d)
    yield from of_sizes(f"forward gradient, {_directions(d)}", step_fn, d, m=d)
    if isinstance(loss_fn, OutputLoss):
        step_fn = functools.partial(gauss_newton_step, tangents="differences")
        yield from of_sizes(_DIFFERENCES, step_fn, d + 2, models=d + 2)
        step_fn = functools.partial(gauss_newton_step, tangents="forward_mode")
        yield from of_sizes("Gauss-Newton in forward mode", step_fn, d, shared=1)


def _sizes(count: int) -> list[int]:
    """Returns how many models or tangents are computed together: one, some, all."""
    return sorted({1, round(math.sqrt(count)), count})


def _directions(m: int) -> str:
    """Returns the number of directions in words."""
    return f"{m} direction{'s' if m > 1 else ''}"


def _parts(
    experts: Params, batch: Batch, beta: PyTree, *, loss_fn: LossFn, link_fn: LinkFn, merge_fn: MergeFn
) -> dict[Any, Program]:
    """Returns the programs for the terms of Eq. (9). A program that needs a missing derivative is left out."""
    merge, alpha = merge_for_learning(merge_fn), apply_link(link_fn, beta)

    def forward(params: Params, batch: Batch) -> jax.Array:
        return loss_fn(params, batch)

    def backward(leaves: list[jax.Array], params: Params, batch: Batch) -> Any:
        loss = scalar_valued(lambda leaves: loss_fn(_with_floating(params, leaves), batch), differentiable=True)
        return jax.value_and_grad(loss)(leaves)

    def inner_products(experts: Params, alpha: PyTree, leaves: list[jax.Array]) -> PyTree:
        _, pull_back = jax.vjp(lambda alpha: _floating(merge(experts, alpha)), alpha)
        return pull_back(leaves)

    blended = compile_and_run("blend", merge, experts, alpha)
    if isinstance(blended, str):
        raise ValueError(f"one blend of the experts does not run: {blended}")
    params = blended.result
    evaluated = compile_and_run("forward", forward, params, batch)
    if isinstance(evaluated, str):
        raise ValueError(f"the loss of one blend does not run: {evaluated}")
    if not jnp.isfinite(evaluated.result):
        raise ValueError(f"loss_fn returned {evaluated.result} for the blend on this batch; expected a finite loss")
    programs = [
        blended,
        evaluated,
        compile_and_run("backward", backward, _floating(params), params, batch),
        # A gradient has the shapes of the parameters, and costs the same.
        compile_and_run("inner_products", inner_products, experts, alpha, _floating(params)),
    ]
    return {program.name: program._replace(result=None) for program in programs if not isinstance(program, str)}


def _parts_of_eq_9(seconds: dict[Any, float]) -> dict[str, Any]:
    """Returns the fields of a plan that belong to Eq. (9) and (10)."""
    forward, gamma, products, cheaper = seconds["forward"], None, None, None
    if {"backward", "inner_products"} <= seconds.keys():
        gamma, products = (seconds["backward"] - forward) / forward, seconds["inner_products"]
        cheaper = theory.spsa_is_cheaper(forward, gamma, seconds["blend"], products)
    return {
        "forward": forward,
        "blend": seconds["blend"],
        "backward_ratio": gamma,
        "inner_products": products,
        "spsa_is_cheaper": cheaper,
    }


def _step_program(
    step_fn: StepFn, experts: Params, batch: Batch, beta: PyTree, functions: dict[str, Any]
) -> Program | str:
    """Returns the program of a step, or the reason why there is none."""
    kind = bare(step_fn)
    optimizer = None if kind is gauss_newton_step else _OPTIMIZER
    words = functions if optimizer is None else {**functions, "optimizer": optimizer}
    state = GlueState(jnp.zeros((), jnp.int32), beta, opt_state_of(beta, optimizer, functions["link_fn"]))
    step = functools.partial(step_fn, **words)
    program = compile_and_run(kind.__name__, step, jax.random.key(0), state, experts, batch)
    if isinstance(program, str):
        return program
    norm = float(program.result[1].gradient_norm)
    # SPSA is exempt: along other directions, or with a larger radius, it sees the slope of a metric that counts.
    if kind is not spsa_step and not 0 < norm < math.inf:
        return f"its gradient has norm {norm:g} on this batch (loss_fn may count, or have an infinite slope)"
    return program._replace(result=None)


def _device_of(experts: Params) -> str:
    """Returns the devices of the experts, in words."""
    devices = list(jax.tree.leaves(experts)[0].devices())
    return f"{len(devices)} x {devices[0].device_kind}" if len(devices) > 1 else devices[0].device_kind


def _floating(params: Params) -> list[jax.Array]:
    """Returns the leaves of a model that have a derivative."""
    return [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _with_floating(params: Params, leaves: list[jax.Array]) -> Params:
    """Returns the model with new floating-point leaves."""
    new = iter(leaves)
    return jax.tree.map(lambda leaf: next(new) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, params)
