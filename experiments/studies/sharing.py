"""What several studies learn: coefficients of the model, or of each of its parts."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.coefficients import coefficients_key
from experiments.protocol.context import Context
from experiments.protocol.data import Examples
from experiments.protocol.training import output_loss
from experiments.studies.ablation.recipes import BLOCKS
from experiments.studies.refreshing import has_statistics
from glue_jax.directions import dimension
from glue_jax.links import directions_of
from glue_jax.types import LinkFn, MergeFn

Sharing = Literal["softmax", "free", "free by block", "free by layer"]
"""What has coefficients of its own: the model, under a softmax with BatchNorm in evaluation mode as in the paper, or
without a softmax and with BatchNorm by the minibatch; or each block or each layer of the model."""


class Coefficients(NamedTuple):
    """What is to be learned. Each way learns the same.

    Attributes:
        experts: the stacked experts, each leaf `[K, ...]`.
        beta: the start.
        link_fn: the `link_fn` of `glue_jax.learn`.
        merge_fn: the `merge_fn` of `glue_jax.learn`.
        loss_fn: the loss, in two parts.
    """

    experts: Variables
    beta: Any
    link_fn: LinkFn
    merge_fn: MergeFn
    loss_fn: glue_jax.OutputLoss

    @property
    def dimension(self) -> int:
        """d, the number of directions that matter."""
        return dimension(self.beta, directions_of(self.link_fn))


def coefficients(context: Context, experts: Variables, sharing: Sharing) -> Coefficients:
    """Returns what is learned.

    Args:
        context: what `experiments.protocol.context.prepare` returned.
        experts: the stacked experts, each leaf `[K, ...]`.
        sharing: the parts of the network that have their own coefficients.
    """
    k = context.config.num_experts
    if sharing == "softmax":
        merge = functools.partial(glue_jax.blend, min_dtype=jnp.float32)
        return Coefficients(experts, jnp.zeros(k), jax.nn.softmax, merge, output_loss(context.problem))
    if has_statistics(context.problem):
        _, experts = glue_jax.partition(experts, "^batch_stats/")
    beta, rows = jnp.full((k,), 1 / k), None
    if sharing != "free":
        if sharing == "free by block":
            groups = glue_jax.merging.group_by_path(experts, BLOCKS[context.config.network])
        else:
            groups = glue_jax.merging.by_layer(experts)
        rows, beta = groups.rows, jnp.full((len(groups.names), k), 1 / k)
    merge = functools.partial(glue_jax.blend, groups=rows, min_dtype=jnp.float32)
    return Coefficients(experts, beta, glue_jax.unconstrained, merge, output_loss(context.problem, by_minibatch=True))


def learn_by_gauss_newton(
    context: Context,
    problem: Coefficients,
    seed: int,
    examples: Examples,
    validation: Examples,
    *,
    batch_size: int,
    validation_batch_size: int,
) -> glue_jax.LearnResult:
    """Learns coefficients by Gauss-Newton, with the number of steps and the patience of the experiment.

    Args:
        context: what `experiments.protocol.context.prepare` returned.
        problem: what is learned.
        seed: the seed of the minibatches.
        examples: the images to learn on.
        validation: the images that validate.
        batch_size: the number of images in a minibatch. If there are fewer images, all of them are the minibatch.
        validation_batch_size: the same for validation.

    Returns:
        What `glue_jax.learn` returns.

    Raises:
        glue_jax.NonFiniteLossError: if a loss is infinite or NaN; the error has the step.
    """
    config = context.config
    with jax.default_matmul_precision(config.matmul_precision):
        return glue_jax.learn(
            coefficients_key(seed),
            problem.experts,
            examples,
            loss_fn=problem.loss_fn,
            state=glue_jax.init(config.num_experts, beta=problem.beta, link_fn=problem.link_fn),
            step_fn=glue_jax.gauss_newton_step,
            link_fn=problem.link_fn,
            merge_fn=problem.merge_fn,
            validation_data=validation,
            batch_size=min(batch_size, len(examples.labels)),
            validation_batch_size=min(validation_batch_size, len(validation.labels)),
            max_steps=config.alpha_steps,
            patience=config.patience,
        )
