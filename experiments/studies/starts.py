"""The models that `experiments.studies.target_size` fine-tunes. They are made of experts and a few labelled images."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.coefficients import coefficients_key, learn_coefficients
from experiments.protocol.context import Context
from experiments.protocol.splits import Indices
from experiments.studies.refreshing import REFRESH_IMAGES, refreshed
from experiments.studies.sharing import Coefficients, Sharing, coefficients, learn_by_gauss_newton

LEAST_VALIDATION, MOST_VALIDATION, SHARE = 10, 1000, 5
"""Of n images, n // SHARE validate, but at least LEAST_VALIDATION and at most MOST_VALIDATION."""
SCRATCH = "from scratch"
"""The start without any expert."""
_GAUSS_NEWTON_BATCH = 32
_VALIDATION_BATCH = 256
# A seed's key is folded with this number. The protocol has other numbers.
_INITIALIZATION = 6


class Labelled(NamedTuple):
    """The labelled target images of a user, as rows of the training split.

    Attributes:
        seed: the seed of the user.
        learning: the rows to learn from, `[n - V]`.
        validation: the rows that choose, `[V]`.
    """

    seed: int
    learning: Indices
    validation: Indices

    @property
    def all(self) -> Indices:
        """All n rows."""
        return np.concatenate([self.validation, self.learning])


class Bank(NamedTuple):
    """What every start may use.

    Attributes:
        context: what `experiments.protocol.context.prepare` returned.
        experts: the stacked experts, each leaf `[K, ...]`.
        problem: a function from the parts that have their own coefficients to what is learned. Each result is built
            once.
    """

    context: Context
    experts: Variables
    problem: Callable[[Sharing], Coefficients]

    def refreshed(self, variables: Variables, labelled: Labelled) -> Variables:
        """Returns a model with BatchNorm's statistics estimated on at most 2048 labelled images."""
        return refreshed(self.context.problem, variables, self.context.images(labelled.all[:REFRESH_IMAGES]).images)


def make_bank(context: Context, experts: Variables) -> Bank:
    """Returns what every start may use, from experts with leaves `[K, ...]`."""
    problem = functools.cache(functools.partial(coefficients, context, experts))
    return Bank(context, experts, problem)


def labelled_images(context: Context, seed: int, size: int) -> Labelled:
    """Returns a seed's first `size` target images, in two parts.

    The experiment's own target images of the seed come first, in random order, and then the others.
    """
    target, generator = context.targets[seed], np.random.default_rng([seed, 3])
    others = np.setdiff1d(context.splits.rest, target)
    rows = np.concatenate([generator.permutation(target), generator.permutation(others)])[:size]
    num_validation = min(max(LEAST_VALIDATION, size // SHARE), MOST_VALIDATION)
    return Labelled(seed, learning=rows[num_validation:], validation=rows[:num_validation])


def _best_expert(bank: Bank, labelled: Labelled) -> Variables:
    """The most accurate expert. Among equals it is the one with the lowest loss."""
    images = bank.context.images(labelled.all)
    experts = [jax.tree.map(lambda leaf, i=i: leaf[i], bank.experts) for i in range(bank.context.config.num_experts)]
    judged = [bank.context.evaluate(expert, images) for expert in experts]
    return experts[min(range(len(experts)), key=lambda i: (-judged[i]["accuracy"], judged[i]["loss"]))]


def _uniform(bank: Bank, labelled: Labelled) -> Variables:
    """The uniform average with new statistics."""
    uniform = glue_jax.coefficients.uniform(bank.context.config.num_experts)
    return bank.refreshed(glue_jax.blend(bank.experts, uniform), labelled)


def _glue(bank: Bank, labelled: Labelled) -> Variables:
    """GLUE as in the paper."""
    context, config = bank.context, bank.context.config
    batch_size = min(config.alpha_batch_size, len(labelled.learning))
    result = learn_coefficients(
        context._replace(config=dataclasses.replace(config, alpha_batch_size=batch_size)),
        4,
        coefficients_key(labelled.seed),
        bank.experts,
        context.images(labelled.learning),
        context.images(labelled.validation),
    )
    return glue_jax.blend(bank.experts, result.alpha)


def _glue_refreshed(bank: Bank, labelled: Labelled) -> Variables:
    """GLUE as in the paper, and then new statistics."""
    return bank.refreshed(_glue(bank, labelled), labelled)


def _gauss_newton(sharing: Sharing, bank: Bank, labelled: Labelled) -> Variables:
    """Free coefficients by Gauss-Newton with BatchNorm by the minibatch, and then new statistics."""
    context, problem = bank.context, bank.problem(sharing)
    result = learn_by_gauss_newton(
        context,
        problem,
        labelled.seed,
        context.images(labelled.learning),
        context.images(labelled.validation),
        batch_size=_GAUSS_NEWTON_BATCH,
        validation_batch_size=_VALIDATION_BATCH,
    )
    return bank.refreshed(problem.merge_fn(problem.experts, result.alpha), labelled)


def _scratch(bank: Bank, labelled: Labelled) -> Variables:
    """Fresh weights."""
    key = jax.random.fold_in(jax.random.key(labelled.seed), _INITIALIZATION)
    return jax.jit(bank.context.problem.network.init)(key)


STARTS: Mapping[str, Callable[[Bank, Labelled], Variables]] = {
    "best expert": _best_expert,
    "uniform, refreshed": _uniform,
    "GLUE (SPSA)": _glue,
    "GLUE (SPSA), refreshed": _glue_refreshed,
    "Gauss-Newton, one vector": functools.partial(_gauss_newton, "free"),
    "Gauss-Newton, by layer": functools.partial(_gauss_newton, "free by layer"),
    SCRATCH: _scratch,
}
"""By name: from the experts and the labelled images to the model that fine-tuning starts from."""
