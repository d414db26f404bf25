"""Ways to one model that the coefficients of GLUE are compared with, and may start from.

`weights_to_logits(0.99 * weights + 0.01 / K)` turns weights on the simplex into a start for `init(..., beta=...)`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from glue_jax.batches import batched_mean
from glue_jax.blending import blend
from glue_jax.experts import num_experts
from glue_jax.types import Params, PyTree


def loss_weights(losses: ArrayLike, *, temperature: float = 1.0) -> jax.Array:
    """Returns `softmax(-loss / temperature)` over experts.

    Args:
        losses: of each expert on target validation data, `[K]`.
        temperature: above 0; towards 0 it selects the best expert, far above the losses' spread it is uniform.

    Returns:
        Coefficients on the simplex, float32 `[K]`.

    Raises:
        ValueError: losses that are not a `[K]` of finite numbers, a temperature out of its range.
    """
    array = _checked("losses", losses)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    return jax.nn.softmax(jnp.asarray(-array / temperature, jnp.float32))


def best_expert(losses: ArrayLike) -> jax.Array:
    """Returns the coefficients that select the expert of the lowest loss, float32 `[K]`.

    Args:
        losses: of each expert on target validation data, `[K]`; for accuracies, pass their negatives.

    Raises:
        ValueError: losses that are not a `[K]` of finite numbers.
    """
    array = _checked("losses", losses)
    return jnp.zeros(array.shape, jnp.float32).at[int(array.argmin())].set(1)


def greedy_soup(experts: Params, losses: ArrayLike, loss_fn: Callable[[Params], float | jax.Array]) -> jax.Array:
    """Averages experts one after another, best first, each kept only if it does not make the average worse.

    The greedy soup of Wortsman et al., 2022 (https://arxiv.org/abs/2203.05482, Recipe 1): K evaluations at most.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        losses: of each expert on validation data, `[K]`; they give the order, and may be of another metric.
        loss_fn: `loss_fn(params)`, the loss of a model on that data, lower is better (an error rate in the paper).

    Returns:
        Coefficients on the simplex, float32 `[K]`: equal for those that were kept, 0 for the others.

    Raises:
        ValueError: losses that are not a `[K]` of finite numbers, or another number of them than experts.

    Example:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.array(w)} for w in (0.9, 1.2, 5.0)])
        >>> glue_jax.greedy_soup(experts, [0.1, 0.2, 4.0], lambda params: abs(params["w"] - 1))
        Array([0.5, 0.5, 0. ], dtype=float32)
    """
    array = _checked("losses", losses)
    if len(array) != num_experts(experts):
        raise ValueError(f"losses have shape {array.shape}; expected [K] with K = {num_experts(experts)}")
    order = np.argsort(array, kind="stable")
    kept = [order[0]]
    best = float(loss_fn(blend(experts, _equal(kept, len(array)))))
    for candidate in order[1:]:
        loss = float(loss_fn(blend(experts, _equal([*kept, candidate], len(array)))))
        if loss <= best:
            kept, best = [*kept, candidate], loss
    return _equal(kept, len(array))


def fisher_merge(experts: Params, fishers: PyTree, alpha: jax.typing.ArrayLike, *, epsilon: float = 1e-8) -> Params:
    """Averages experts by alpha and by how much each of their parameters matters (Matena & Raffel, 2022).

    `sum_i alpha_i (F_i + epsilon) theta_i / sum_i alpha_i (F_i + epsilon)`, elementwise
    (https://arxiv.org/abs/2111.09832, Eq. 5). Where there is no Fisher information, as for BatchNorm statistics, it is
    `blend`.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        fishers: the diagonal Fisher information of each, of the experts' structure and shapes (`diagonal_fisher`);
            zeros where there is none.
        alpha: `[K]` on the simplex.
        epsilon: what is added to the Fisher information, above 0.

    Returns:
        The merged model, each leaf `[...]` in the expert's dtype; what is not floating point as `blend` has it.

    Raises:
        ValueError: Fisher information of other structure or shapes than the experts, `epsilon` out of its range.
    """
    if jax.tree.map(jnp.shape, fishers) != jax.tree.map(jnp.shape, experts):
        raise ValueError("fishers are not of the structure and the shapes of experts")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}; expected a finite number above 0")
    weights = jax.tree.map(lambda fisher: fisher + epsilon, fishers)
    weighted = jax.tree.map(lambda leaf, weight: (leaf * weight).astype(weight.dtype), experts, weights)
    return jax.tree.map(
        lambda numerator, denominator, plain: (
            (numerator / denominator).astype(plain.dtype) if _is_inexact(plain) else plain
        ),
        blend(weighted, alpha),
        blend(weights, alpha),
        blend(experts, alpha),
    )


def diagonal_fisher(
    logits_fn: Callable[[Params, PyTree], jax.Array], params: Params, inputs: PyTree, *, batch_size: int = 32
) -> PyTree:
    """Returns the diagonal of a classifier's Fisher information, for `fisher_merge`.

    The mean over inputs of `sum_y p(y) (d log p(y) / d theta)^2`: the expectation over the model's own predictions is
    taken exactly. It needs a gradient for each class of each input. Jit it with `logits_fn` fixed, if it is called for
    several experts.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [B, C]`, each row a function of its own input alone (BatchNorm in
            evaluation mode).
        params: the model.
        inputs: a pytree of arrays `[N, ...]`.
        batch_size: inputs whose gradients are held at once, so many copies of the parameters.

    Returns:
        A pytree of the structure and shapes of `params`; zeros for leaves that are not floating point.
    """
    leaves, treedef = jax.tree.flatten(params)
    learned = [jnp.asarray(leaf) for leaf in leaves if _is_inexact(leaf)]

    def model(learned: list[jax.Array]) -> Params:
        found = iter(learned)
        return jax.tree.unflatten(treedef, [next(found) if _is_inexact(leaf) else leaf for leaf in leaves])

    def of_one(example: PyTree) -> PyTree:
        def log_probabilities(learned: list[jax.Array]) -> jax.Array:
            return jax.nn.log_softmax(logits_fn(model(learned), jax.tree.map(lambda leaf: leaf[None], example))[0])

        values, pull_back = jax.vjp(log_probabilities, learned)

        def add(total: PyTree, of_class: tuple[jax.Array, jax.Array]) -> tuple[PyTree, None]:
            value, one_hot = of_class
            (gradient,) = pull_back(one_hot)
            return jax.tree.map(lambda before, leaf: before + jnp.exp(value) * jnp.square(leaf), total, gradient), None

        classes = values, jnp.eye(values.size, dtype=values.dtype)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, learned), classes)[0]

    def of_batch(_: Params, batch: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.vmap(of_one)(batch))

    found = iter(batched_mean(of_batch, params, inputs, batch_size))
    return jax.tree.unflatten(
        treedef, [next(found) if _is_inexact(leaf) else jnp.zeros(jnp.shape(leaf)) for leaf in leaves]
    )


def _is_inexact(leaf: jax.typing.ArrayLike) -> bool:
    """Whether a leaf is floating point."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def _equal(members: list[int], k: int) -> jax.Array:
    """Equal coefficients of some experts, float32 `[K]`."""
    return jnp.zeros((k,), jnp.float32).at[np.array(members)].set(1 / len(members))


def _checked(name: str, values: ArrayLike) -> np.ndarray:
    """The values as `[K]`, finite."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} are {array.tolist()}; expected [K] finite numbers, one for each expert")
    return array
