"""Other ways to one model: best expert, loss weights, greedy soup and Fisher merge.

GLUE is compared with these, and can start from them. `weights_to_logits(0.99 * weights + 0.01 / K)` turns weights on
the simplex into a start for `init(..., beta=...)`.
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
    """Returns `softmax(-loss / temperature)` over the experts.

    Args:
        losses: the loss of each expert on target validation data, `[K]`.
        temperature: a number above 0. Near 0, the best expert gets all of the weight. Far above the spread of the
            losses, all experts get the same weight.

    Returns:
        Coefficients on the simplex, float32 `[K]`.

    Raises:
        ValueError: if `losses` is not `[K]` with finite numbers, or if the temperature is out of its range.
        TypeError: if an argument holds no real numbers.
    """
    array = _checked("losses", losses)
    check_positive("temperature", temperature)
    with np.errstate(over="ignore"):
        weights = np.exp((array.min() - array) / temperature)
    return jnp.asarray(weights / weights.sum(), jnp.float32)


def best_expert(losses: ArrayLike) -> jax.Array:
    """Returns the coefficients that select the expert with the lowest loss, float32 `[K]`.

    Args:
        losses: the loss of each expert on target validation data, `[K]`. If you have accuracies, pass their negatives.

    Raises:
        ValueError: if `losses` is not `[K]` with finite numbers.
        TypeError: if `losses` holds no real numbers.
    """
    array = _checked("losses", losses)
    return jnp.zeros(array.shape, jnp.float32).at[int(array.argmin())].set(1)


def greedy_soup(experts: Params, losses: ArrayLike, loss_fn: Callable[[Params], float | jax.Array]) -> jax.Array:
    """Averages experts one after another, the best first. It keeps an expert only if the average does not get worse.

    This is the greedy soup of Wortsman et al., 2022 (https://arxiv.org/abs/2203.05482, Recipe 1). It takes at most K
    evaluations. If the loss of an average is infinite or NaN, the expert that was added last is not kept.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        losses: the loss of each expert on validation data, `[K]`. They only decide the order, so they may be of another
            metric than `loss_fn`.
        loss_fn: `loss_fn(params)`, the loss of a model on that data. Lower is better. The paper uses the error rate.

    Returns:
        Coefficients on the simplex, float32 `[K]`. They are equal for all kept experts, and 0 for the others.

    Raises:
        ValueError: if `losses` is not `[K]` with finite numbers, or if an expert has infinite or NaN weights; the error
            names the expert and the path.
        TypeError: if `losses` or a value of `loss_fn` is no real number.
        FloatingPointError: if the loss of the best expert alone is infinite or NaN, so that nothing can be compared
            with it.

    Examples:
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
    """Averages experts by alpha and by the importance of each of their parameters (Matena & Raffel, 2022).

    Each parameter becomes `sum_i alpha_i (F_i + epsilon) theta_i / sum_i alpha_i (F_i + epsilon)`, elementwise
    (https://arxiv.org/abs/2111.09832, Eq. 5). If the Fisher information F_i is 0 for all experts, as for BatchNorm
    statistics, the result equals `blend`.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        fishers: the diagonal Fisher information of each expert (`diagonal_fisher`), with the structure and shapes of
            `experts`. Use zeros for leaves without Fisher information.
        alpha: coefficients on the simplex, `[K]`.
        epsilon: a number above 0 that is added to the Fisher information.

    Returns:
        The merged model, each leaf `[...]` in the dtype of the experts, computed in at least float32. Leaves that are
        not floating point are the first expert's.

    Raises:
        ValueError: if the Fisher information has another structure or other shapes than the experts.
        ValueError: if the Fisher information is negative or not finite; the error names the path. Traced values are not
            checked.
        ValueError: if the coefficients are not on the simplex, or if `epsilon` is out of its range.
    """
    k = num_experts(experts)
    if jax.tree.map(jnp.shape, fishers) != jax.tree.map(jnp.shape, experts):
        raise ValueError("fishers do not fit; expected the structure and the shapes of the experts")
    check_positive("epsilon", epsilon)
    alpha = jnp.asarray(alpha)
    if alpha.shape != (k,) or not (isinstance(alpha, Tracer) or _is_on_simplex(alpha)):
        raise ValueError(f"alpha is {alpha}; expected [K] with K = {k}, none of them negative and their sum 1")
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

    It is the mean over inputs of `sum_y p(y) (d log p(y) / d theta)^2`. The sum over the classes y is the exact
    expectation under the model's own predictions. It needs one gradient for each class of each input. To call it for
    several experts, jit it with `logits_fn` fixed.

    Args:
        logits_fn: `logits_fn(params, inputs) -> [B, C]`. Each row must depend on its own input alone, so run BatchNorm
            in evaluation mode.
        params: one model.
        inputs: a pytree of arrays `[N, ...]`.
        batch_size: how many inputs are differentiated together. Memory holds as many copies of the parameters.

    Returns:
        A pytree with the structure and shapes of `params`, in at least float32. Leaves that are not floating point
        become zeros.

    Raises:
        ValueError: if the logits are not `[B, C]`, or if the inputs have different lengths.
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
            # Widened first, because the square of a small gradient would be 0 in half precision.
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
    """Returns whether a leaf is floating point."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def _is_on_simplex(alpha: jax.Array) -> bool:
    """Returns whether no coefficient is negative and the sum is 1."""
    return bool((alpha >= 0).all() and abs(jnp.sum(alpha, dtype=jnp.float32) - 1) < 1e-3)


def _equal(members: list[int], k: int) -> jax.Array:
    """Returns equal coefficients for some experts, float32 `[K]`."""
    return jnp.zeros((k,), jnp.float32).at[np.array(members)].set(1 / len(members))


def _checked(name: str, values: ArrayLike) -> np.ndarray:
    """Returns the values as `[K]`, checked to be finite."""
    array = as_numbers(name, values)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} are {array.tolist()}; expected [K], a finite number for each expert")
    return array
