"""How a recipe learns its coefficients."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.coefficients import alpha_optimizer, coefficients_key
from experiments.protocol.context import Context
from experiments.protocol.data import Examples
from experiments.protocol.expert_training import initial_variables
from experiments.protocol.training import output_loss
from experiments.studies.ablation.prerequisites import Measured
from experiments.studies.ablation.recipes import Recipe
from experiments.studies.refreshing import has_statistics
from glue_jax.directions import dimension
from glue_jax.links import directions_of
from glue_jax.types import LinkFn, LossFn, MergeFn

HEAD = "^params/head/"
"""The layer that a temperature is folded into."""
# The part of a falling learning rate that is left at the last step.
_LAST_RATE = 0.02


class Learner(NamedTuple):
    """The parts of a recipe. They are built once, so a program that is compiled for one seed serves the next.

    Attributes:
        recipe: the recipe.
        experts: the stacked experts. As the recipe says, they are aligned, have an origin, or have no statistics.
        link_fn: the `link_fn` of `glue_jax.learn`.
        merge_fn: the `merge_fn` of `glue_jax.learn`.
        loss_fn: the `loss_fn` of `glue_jax.learn`.
        beta: the start, leaves `[...]`, or several starts, `[S, ...]`. If it is None, `first` learns the start.
        first: the learner of the start.
        num_groups: the number of groups of coefficients. None is one vector for the model.
        num_starts: S, the number of starts.
        start_passes: the passes that the starts took, counted as in `Measured.passes`.
        optimizer: the optimizer of beta. It is None for Gauss-Newton, which has no optimizer.
        max_steps: the largest number of steps.
    """

    recipe: Recipe
    experts: Variables
    link_fn: LinkFn
    merge_fn: MergeFn
    loss_fn: LossFn
    beta: Any
    first: "Learner | None"
    num_groups: int | None
    num_starts: int
    start_passes: int
    optimizer: optax.GradientTransformation | None
    max_steps: int


class Learned(NamedTuple):
    """The result of learning.

    Attributes:
        beta: the best beta by validation.
        alpha: the coefficients of `beta`.
        steps: the number of steps of learning, including those of the first recipe.
        passes: the passes, counted as in `Measured.passes`.
    """

    beta: Any
    alpha: Any
    steps: int
    passes: int


def make_learner(context: Context, recipe: Recipe, measured: Measured) -> Learner:
    """Returns what a recipe learns with."""
    experts, link = measured.experts(recipe.aligned), recipe.link_fn
    merge: MergeFn = glue_jax.blend
    if recipe.task_vectors:
        origin = initial_variables(context.problem, context.config)
        experts = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), origin, experts)
        link = glue_jax.links.task_vector_weights
    if recipe.statistics == "minibatch" and has_statistics(context.problem):
        _, experts = glue_jax.partition(experts, "^batch_stats/")
    num_groups = None
    if groups := recipe.groups(experts, context.config.network):
        merge = functools.partial(merge, groups=groups.rows)
        num_groups = len(groups.names)
    if recipe.temperature:
        link, merge = glue_jax.links.tempered_link(link), glue_jax.links.tempered_merge(merge, head=HEAD)

    def start(weights: jax.Array) -> Any:
        # A softmax selects a single expert only in the limit.
        inside = 0.99 * weights + 0.01 / weights.shape[-1]
        beta = weights if recipe.outside_the_hull else glue_jax.coefficients.weights_to_logits(inside)
        return _by_groups(glue_jax.links.Tempered(beta, jnp.zeros(())) if recipe.temperature else beta, num_groups)

    if recipe.first is not None:
        first = make_learner(context, recipe.first, measured)
        beta, num_starts, start_passes = None, 1, first.start_passes
    else:
        measured.passes = 0
        first, weights = None, recipe.start(measured)
        several = weights.ndim == 2
        num_starts, start_passes = len(weights) if several else 1, measured.passes
        beta = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(start, weights)) if several else start(weights)
    loss = output_loss(context.problem, by_minibatch=recipe.statistics == "minibatch", objective=recipe.objective)
    config, optimizer = context.config, alpha_optimizer(context.config)
    max_steps = min(config.alpha_steps, recipe.most_steps or config.alpha_steps)
    if recipe.step_fn is glue_jax.gauss_newton_step:
        optimizer = None
    elif recipe.learning_rate is not None:
        schedule = optax.cosine_decay_schedule(recipe.learning_rate, max_steps, _LAST_RATE)
        optimizer = optax.adam(schedule, b1=config.alpha_b1, b2=config.alpha_b2)
    return Learner(
        recipe=recipe,
        experts=experts,
        link_fn=link,
        merge_fn=merge,
        loss_fn=loss,
        beta=beta,
        first=first,
        num_groups=num_groups,
        num_starts=num_starts,
        start_passes=start_passes,
        optimizer=optimizer,
        max_steps=max_steps,
    )


def learn_beta(context: Context, learner: Learner, target: Examples, seed: int) -> Learned:
    """Learns the coefficients on a seed's target images."""
    config = context.config
    before = Learned(learner.beta, None, steps=0, passes=0)
    if learner.first is not None:
        before = learn_beta(context, learner.first, target, seed)
        before = before._replace(beta=_by_groups(before.beta, learner.num_groups))
    words: dict[str, Any] = {
        "loss_fn": learner.loss_fn,
        "optimizer": learner.optimizer,
        "step_fn": learner.recipe.step_fn,
        "link_fn": learner.link_fn,
        "merge_fn": learner.merge_fn,
        "validation_data": context.validation,
        "batch_size": config.alpha_batch_size,
        "max_steps": learner.max_steps,
        # Gauss-Newton takes few steps, so they are validated as often as `learn` does by default.
        "validate_every": None if learner.optimizer is None else config.validate_every,
        "patience": config.patience,
    }
    # The number of steps after each chunk. Each start counts anew.
    taken: list[int] = []
    words["callback"] = lambda progress: taken.append(progress.step)
    key = coefficients_key(seed)
    with jax.default_matmul_precision(config.matmul_precision):
        if learner.num_starts > 1:
            result = glue_jax.learn_from_starts(key, learner.experts, target, starts=before.beta, **words)
        else:
            count = glue_jax.num_experts(learner.experts)
            state = glue_jax.init(count, learner.optimizer, beta=before.beta, link_fn=learner.link_fn)
            result = glue_jax.learn(key, learner.experts, target, state=state, **words)
    metrics = result.history.metrics
    steps = len(metrics.loss)
    if learner.optimizer is None:
        # Gauss-Newton takes a pass at beta, one at its proposal, and one along each direction.
        per_step = dimension(result.beta, directions_of(learner.link_fn)) + 2
    else:
        # A step without probes is the full gradient, with one forward pass. Its backward pass is not counted.
        per_step = 1 if metrics.probe_losses is None else metrics.probe_losses[0].size
    of_all_starts = sum(last for last, following in itertools.pairwise([*taken, 0]) if following <= last)
    # Each start is judged before its first step and after each chunk.
    judged = learner.num_starts + len(taken)
    passes = of_all_starts * per_step * config.alpha_batch_size + judged * len(context.validation.labels)
    return Learned(result.beta, result.alpha, before.steps + steps, before.passes + passes)


def _by_groups(beta: Any, num_groups: int | None) -> Any:
    """Returns coefficients, repeated for each group."""
    if num_groups is None:
        return beta
    if isinstance(beta, glue_jax.links.Tempered):
        return beta._replace(coefficients=_by_groups(beta.coefficients, num_groups))
    return jnp.tile(beta[None], (num_groups, 1))
