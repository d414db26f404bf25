"""Ways to one model that the coefficients of GLUE are compared with, and may start from.

`weights_to_logits(0.99 * weights + 0.01 / K)` turns weights on the simplex into a start for `init(..., beta=...)`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike

from glue_jax.batches import mean_over_batches
from glue_jax.blending import blend
from glue_jax.checks import as_number, as_numbers, check_callable, check_positive
from glue_jax.experts import num_experts
from glue_jax.paths import by_path, check_finite
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
    check_positive("temperature", temperature)
    with np.errstate(over="ignore"):
        weights = np.exp((array.min() - array) / temperature)
    return jnp.asarray(weights / weights.sum(), jnp.float32)


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

    The greedy soup of Wortsman et al., 2022 (https://arxiv.org/abs/2203.05482, Recipe 1): K evaluations at most. An
    average whose loss is infinite or not a number is worse than any other, so its last expert is not kept.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        losses: of each expert on validation data, `[K]`; they give the order, and may be of another metric.
        loss_fn: `loss_fn(params)`, the loss of a model on that data, lower is better (an error rate in the paper).

    Returns:
        Coefficients on the simplex, float32 `[K]`: equal for those that were kept, 0 for the others.

    Raises:
        ValueError: losses that are not a `[K]` of finite numbers, or another number of them than experts; experts with
            infinite or NaN weights, by expert and path.
        FloatingPointError: a loss of the best expert alone that is infinite or not a number: nothing can be compared
            with it.

    Example:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.array(w)} for w in (0.9, 1.2, 5.0)])
        >>> glue_jax.merging.greedy_soup(experts, [0.1, 0.2, 4.0], lambda params: abs(params["w"] - 1))
        Array([0.5, 0.5, 0. ], dtype=float32)
    """
    array = _checked("losses", losses)
    if len(array) != num_experts(experts):
        raise ValueError(f"losses have shape {array.shape}; expected [K] with K = {num_experts(experts)}")
    # Even with the coefficient 0, a NaN expert would make every average NaN.
    check_finite("experts", experts, stacked=True)
    check_callable(loss_fn=loss_fn)

    def loss_of(members: list[int]) -> float:
        return as_number("the value of loss_fn", loss_fn(blend(experts, _equal(members, len(array)))))

    order = np.argsort(array, kind="stable")
    kept = [order[0]]
    best = loss_of(kept)
    if not math.isfinite(best):
        raise FloatingPointError(f"loss_fn returned {best} for expert {kept[0]} alone; expected a finite number")
    for candidate in order[1:]:
        loss = loss_of([*kept, candidate])
        if math.isfinite(loss) and loss <= best:
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
        The merged model, computed in at least float32, each leaf `[...]` in the expert's dtype; what is not floating
        point as `blend` has it.

    Raises:
        ValueError: Fisher information of other structure or shapes than the experts, or that is negative or not finite,
            by expert and path; coefficients that are not on the simplex; `epsilon` out of its range. Traced values are
            not looked at.
    """
    k = num_experts(experts)
    if jax.tree.map(jnp.shape, fishers) != jax.tree.map(jnp.shape, experts):
        raise ValueError("fishers are not of the structure and the shapes of experts")
    check_positive("epsilon", epsilon)
    alpha = jnp.asarray(alpha)
    if alpha.shape != (k,) or not (isinstance(alpha, Tracer) or _is_on_simplex(alpha)):
        raise ValueError(f"alpha is {alpha}; expected [K] with K = {k}, none negative and with sum 1")
    check_finite("fishers", fishers, stacked=True)
    for path, fisher in by_path(fishers).items():
        if not isinstance(fisher, Tracer) and (lowest := float(jnp.min(fisher, initial=0))) < 0:
            raise ValueError(f"fishers hold {lowest} at {path}; expected Fisher information, which is never negative")

    def merge(leaf: jax.Array, fisher: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if not _is_inexact(leaf):
            return leaf[0]
        weight = jnp.asarray(fisher, jnp.promote_types(leaf.dtype, jnp.float32)) + epsilon
        return (blend(leaf.astype(weight.dtype) * weight, alpha) / blend(weight, alpha)).astype(leaf.dtype)

    return jax.tree.map(merge, experts, fishers)


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
        A pytree of the structure and shapes of `params`, at least float32; zeros for leaves that are not floating
        point.

    Raises:
        ValueError: logits that are not `[B, C]`, and inputs of different lengths.
    """
    leaves, treedef = jax.tree.flatten(params)
    learned = [jnp.asarray(leaf) for leaf in leaves if _is_inexact(leaf)]

    def model(learned: list[jax.Array]) -> Params:
        found = iter(learned)
        return jax.tree.unflatten(treedef, [next(found) if _is_inexact(leaf) else leaf for leaf in leaves])

    def of_one(example: PyTree) -> PyTree:
        def log_probabilities(learned: list[jax.Array]) -> jax.Array:
            logits = logits_fn(model(learned), jax.tree.map(lambda leaf: leaf[None], example))
            if jnp.ndim(logits) != 2:
                raise ValueError(f"logits_fn returned shape {jnp.shape(logits)} for one input; expected [1, C]")
            return jax.nn.log_softmax(logits[0])

        values, pull_back = jax.vjp(log_probabilities, learned)

        def add(total: PyTree, of_class: tuple[jax.Array, jax.Array]) -> tuple[PyTree, None]:
            value, one_hot = of_class
            (gradient,) = pull_back(one_hot)
            # In half precision a small gradient's square is 0.
            return [
                before + jnp.exp(value).astype(before.dtype) * jnp.square(leaf.astype(before.dtype))
                for before, leaf in zip(total, gradient, strict=True)
            ], None

        classes = values, jnp.eye(values.size, dtype=values.dtype)
        zeros = [jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in learned]
        return jax.lax.scan(add, zeros, classes)[0]

    def of_batch(batch: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.vmap(of_one)(batch))

    found = iter(mean_over_batches(of_batch, inputs, batch_size))
    return jax.tree.unflatten(
        treedef, [next(found) if _is_inexact(leaf) else jnp.zeros(jnp.shape(leaf)) for leaf in leaves]
    )


def _is_inexact(leaf: jax.typing.ArrayLike) -> bool:
    """Whether a leaf is floating point."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def _is_on_simplex(alpha: jax.Array) -> bool:
    """Whether no coefficient is negative, and their sum is 1."""
    return bool((alpha >= 0).all() and abs(jnp.sum(alpha, dtype=jnp.float32) - 1) < 1e-3)


def _equal(members: list[int], k: int) -> jax.Array:
    """Equal coefficients of some experts, float32 `[K]`."""
    return jnp.zeros((k,), jnp.float32).at[np.array(members)].set(1 / len(members))


def _checked(name: str, values: ArrayLike) -> np.ndarray:
    """The values as `[K]`, finite."""
    array = as_numbers(name, values)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} are {array.tolist()}; expected [K] finite numbers, one for each expert")
    return array
