"""The ways to learn coefficients that `experiments.studies.budget` compares. Each is a step with its costs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

import glue_jax
from experiments.studies.cost.programs import flops
from experiments.studies.sharing import Coefficients
from glue_jax.arguments import bare
from glue_jax.links import directions_of
from glue_jax.types import Batch

# The part of a falling learning rate that is left at the last step.
_LAST_RATE = 0.02
# The number of random directions of Gauss-Newton, if there are more.
_SOME = 16
# Gauss-Newton from several starts: their number, and how much of an older loss counts one step later.
_STARTS, _OLDER = 3, 0.8
# This is at least the number of probes of any step.
_ALL_PROBES = 2**30


class Stepper(NamedTuple):
    """A way that has begun.

    Attributes:
        step: `step(state, batch) -> state`, which waits until the step is done.
        state: the state before the first step.
        beta: a function from a state to the coefficients that the way would give.
        compile: a function that compiles what a step runs, and changes nothing.
        flops: the floating-point operations of a step's compiled program. None if the step is no such program.
    """

    step: Callable[[Any, Batch], Any]
    state: Any
    beta: Callable[[Any], Any]
    compile: Callable[[Batch], Any]
    flops: Callable[[Batch], float] | None = None


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to learn coefficients.

    Attributes:
        name: the name in tables and pictures.
        begin: `begin(problem, key, num_steps) -> Stepper`.
        forward: a function from d to the number of forward passes that a step takes on each image of its minibatch.
        backward: the same for backward passes.
        batch_size: the number of images in a minibatch.
        above: the way is for problems with more directions than this.
    """

    name: str
    begin: Callable[[Coefficients, jax.Array, int], Stepper]
    forward: Callable[[int], int]
    backward: int = 0
    batch_size: int = 64
    above: int = 0


def ways(rates: Mapping[str, float], paper_step: Callable[..., Any] | None, paper_adam: Any) -> list[Way]:
    """Returns all ways.

    Args:
        rates: the learning rates of Adam, by `spsa`, `spsa_d`, `forward` and `full`.
        paper_step: the step of SPSA as in the paper (Config 4). None if only the names are wanted.
        paper_adam: the optimizer of Configs 3 and 4.
    """
    spsa, forward = glue_jax.spsa_step, glue_jax.forward_gradient_step
    full = glue_jax.full_gradient_step

    def adam(name: str) -> Callable[[int], Any]:
        return lambda num_steps: optax.adam(
            optax.cosine_decay_schedule(rates[name], num_steps, _LAST_RATE), b1=0.9, b2=0.99
        )

    def as_paper(num_steps: int) -> Any:
        return paper_adam

    return [
        Way("SPSA, as in the paper", functools.partial(_gradient, paper_step, as_paper), lambda d: 2),
        Way("SPSA, m = 1", functools.partial(_gradient, spsa, adam("spsa")), lambda d: 2),
        Way("SPSA, m = d", functools.partial(_spsa_of_all, adam("spsa_d")), lambda d: 2 * d),
        Way("forward gradient, m = 1", functools.partial(_gradient, forward, adam("forward")), lambda d: 1),
        Way("full gradient, as in the paper", functools.partial(_gradient, full, as_paper), lambda d: 1, 1),
        Way("full gradient", functools.partial(_gradient, full, adam("full")), lambda d: 1, 1),
        Way(
            "Gauss-Newton, differences", functools.partial(_gauss_newton, "differences"), lambda d: d + 2, batch_size=16
        ),
        Way("Gauss-Newton, tangents", functools.partial(_gauss_newton, "forward_mode"), lambda d: d + 2, batch_size=16),
        Way(
            f"Gauss-Newton, differences, m = {_SOME}",
            functools.partial(_gauss_newton, "differences", num_directions=_SOME),
            lambda d: _SOME + 2,
            batch_size=16,
            above=_SOME,
        ),
        Way(f"Gauss-Newton, {_STARTS} starts", _gauss_newton_from_starts, lambda d: _STARTS * (d + 2), batch_size=16),
        Way("CMA-ES", _cma, cma_population, batch_size=256),
    ]


def cma_population(d: int) -> int:
    """Returns how many coefficients CMA-ES tries in a generation, by its own default."""
    return 4 + int(3 * np.log(d))


def _gradient(
    step_fn: Any, optimizer_of: Callable[[int], Any], problem: Coefficients, key: jax.Array, num_steps: int
) -> Stepper:
    """Begins a step of the library with an optimizer."""
    optimizer = optimizer_of(num_steps)
    state = glue_jax.init(glue_jax.num_experts(problem.experts), optimizer, beta=problem.beta, link_fn=problem.link_fn)
    return _begun(functools.partial(step_fn, optimizer=optimizer), state, problem, key)


def _spsa_of_all(optimizer_of: Callable[[int], Any], problem: Coefficients, key: jax.Array, num_steps: int) -> Stepper:
    """SPSA along d directions."""
    step_fn = functools.partial(glue_jax.spsa_step, num_directions=problem.dimension)
    return _gradient(step_fn, optimizer_of, problem, key, num_steps)


def _gauss_newton(
    tangents: Any, problem: Coefficients, key: jax.Array, num_steps: int, *, num_directions: int | None = None
) -> Stepper:
    """Gauss-Newton, which has nothing to tune."""
    state = glue_jax.init(glue_jax.num_experts(problem.experts), beta=problem.beta, link_fn=problem.link_fn)
    step_fn = functools.partial(glue_jax.gauss_newton_step, tangents=tangents, num_directions=num_directions)
    return _begun(step_fn, state, problem, key)


def _gauss_newton_from_starts(problem: Coefficients, key: jax.Array, num_steps: int) -> Stepper:
    """Gauss-Newton from the problem's own start and from random starts around it.

    All starts see the same minibatches. The way would give the coefficients of the start with the lowest recent loss.
    """
    tilts = _spread(problem) * jax.random.normal(key, (_STARTS, *jnp.shape(problem.beta)))
    starts = [problem._replace(beta=problem.beta + tilt) for tilt in [jnp.zeros_like(tilts[0]), *tilts[1:]]]
    begun = [_gauss_newton("differences", start, key, num_steps) for start in starts]
    one = begun[0]

    def step(states: list[Any], batch: Batch) -> list[Any]:
        pairs = [(one.step(pair, batch), recent) for pair, recent in states]
        return [(pair, _OLDER * recent + (1 - _OLDER) * float(pair[1].loss)) for pair, recent in pairs]

    def beta(states: list[Any]) -> Any:
        return one.beta(min(states, key=lambda state: state[1])[0])

    count = one.flops
    count_all = count and (lambda batch: _STARTS * count(batch))
    return Stepper(step, [(each.state, 0.0) for each in begun], beta, one.compile, count_all)


def _begun(step_fn: Any, state: glue_jax.GlueState, problem: Coefficients, key: jax.Array) -> Stepper:
    """Returns a step of the library, compiled. Its state is a pair: the state, and the metrics of the step before."""
    words = {"loss_fn": problem.loss_fn, "link_fn": problem.link_fn, "merge_fn": problem.merge_fn}
    step = jax.jit(functools.partial(step_fn, **words))

    def run(pair: tuple[glue_jax.GlueState, Any], batch: Batch) -> tuple[glue_jax.GlueState, Any]:
        return jax.block_until_ready(step(key, pair[0], problem.experts, batch))

    def count(batch: Batch) -> float:
        # XLA counts a loop's body once, so the counted program has all probes vmapped.
        vmapped = {} if bare(step_fn) is glue_jax.full_gradient_step else {"probe_batch_size": _ALL_PROBES}
        counted = jax.jit(functools.partial(step_fn, **words, **vmapped))
        return flops(counted.lower(key, state, problem.experts, batch).compile())

    # The second step compiles anew: the state that a step returns lies where the experts lie.
    first = (state, None)
    return Stepper(run, first, lambda pair: pair[0].beta, lambda batch: run(run(first, batch), batch), count)


def _losses(problem: Coefficients) -> Callable[[ArrayLike, Batch], float]:
    """Returns a function from coefficients, as one vector `[n]`, and a minibatch to the loss."""
    unravel = ravel_pytree(problem.beta)[1]

    @jax.jit
    def loss(flat: jax.Array, batch: Batch) -> jax.Array:
        alpha = problem.link_fn(unravel(flat))
        return problem.loss_fn(problem.merge_fn(problem.experts, alpha), batch)

    return lambda flat, batch: float(loss(jnp.asarray(flat, jnp.float32), batch))


def _spread(problem: Coefficients) -> float:
    """Returns the standard deviation of random starts around the problem's own."""
    return 0.5 if directions_of(problem.link_fn) == "simplex_orthogonal" else 0.1


def _cma(problem: Coefficients, key: jax.Array, num_steps: int) -> Stepper:
    """Begins CMA-ES with its defaults.

    A generation sees one minibatch. The way would give the mean of the distribution.
    """
    import cma

    loss, (flat, unravel) = _losses(problem), ravel_pytree(problem.beta)
    seed = int(jax.random.randint(key, (), 1, 2**31 - 1))
    strategy = cma.CMAEvolutionStrategy(np.asarray(flat), _spread(problem), {"seed": seed, "verbose": -9})

    def step(state: Any, batch: Batch) -> Any:
        tried = state.ask()
        state.tell(tried, [loss(candidate, batch) for candidate in tried])
        return state

    def beta(state: Any) -> Any:
        return unravel(jnp.asarray(state.mean, jnp.float32))

    return Stepper(step, strategy, beta, functools.partial(loss, flat))
