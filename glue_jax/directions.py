"""Random probe directions.

Let d be the dimension of the space that is probed. Every distribution has `E[u u^T] = I/d` on that space. So the radius
is the root mean square length of a probe's step.

| name | a direction u | d |
| --- | --- | --- |
| `rademacher` | entries ±1/√d with equal probability | size of beta |
| `sphere` | uniform on the unit sphere: the paper's normalised Gaussian | size of beta |
| `gaussian` | N(0, I/d) | size of beta |
| `orthogonal` | m directions orthonormal among themselves | size of beta |
| `simplex_orthogonal` | the same among vectors that sum to zero over the experts' axis | K - 1; G(K - 1) for `[G, K]` |

`simplex_orthogonal` leaves out the direction that a softmax does not see. A gradient through a softmax sums to zero
over the experts, so estimates along `simplex_orthogonal` directions are unbiased for it. If m > d, the orthogonal
directions are drawn in independent blocks of d orthonormal ones. The last block may be smaller.
"""

import math
from typing import Any, Literal, Protocol, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from glue_jax.checks import check_counts
from glue_jax.coefficients import check_floating
from glue_jax.types import PyTree

DirectionName = Literal["rademacher", "sphere", "gaussian", "orthogonal", "simplex_orthogonal"]


class DirectionFn(Protocol):
    """Your own distribution: `(key, beta, num_directions) -> u` with `E[u u^T] = I/d`, where d is the size of beta.

    To probe a subspace, learn the coordinates of the subspace, and let `link_fn` lift them.
    """

    def __call__(self, key: jax.Array, beta: PyTree, num_directions: int, /) -> PyTree:
        """Returns directions of beta's structure with leaves `[m, ...]`."""
        ...


Directions: TypeAlias = DirectionName | DirectionFn


def dimension(beta: PyTree, directions: Directions = "rademacher") -> int:
    """Returns d, the dimension of the space that `directions` probe around `beta`.

    Args:
        beta: any pytree of coefficients. For `simplex_orthogonal`, the last axis of a leaf runs over the experts, and a
            leaf of shape `[]` adds one dimension.
        directions: a name from the table of `glue_jax.directions`, or a function. A function is assumed to probe all of
            beta.

    Raises:
        ValueError: if the name is unknown, or if there is nothing to probe (d is 0), as for `simplex_orthogonal` with
            one expert.
    """
    if not callable(directions) and directions not in get_args(DirectionName):
        raise ValueError(f"directions is {directions!r}; expected one of {get_args(DirectionName)} or a function")
    probed = _without_last(beta) if directions == "simplex_orthogonal" else beta
    d = sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(probed))
    if d == 0:
        shapes = jax.tree.map(np.shape, beta)
        raise ValueError(
            f"beta of shape {shapes} leaves {directions} directions nothing to probe (with one expert a softmax has "
            "nothing to learn)"
        )
    return d


def sample_directions(
    key: jax.Array, beta: PyTree, num_directions: int, directions: Directions = "rademacher"
) -> PyTree:
    """Draws m random directions.

    Args:
        key: a `jax.random.key`.
        beta: any pytree of floating-point coefficients.
        num_directions: m, the number of directions.
        directions: a name from the table of `glue_jax.directions`, or a `DirectionFn`.

    Returns:
        A pytree with the structure and the dtypes of beta, and leaves `[m, ...]`.

    Raises:
        ValueError: if `num_directions` is below 1, if the name is unknown, if there is nothing to probe, or if a
            function returns directions of another shape.
        TypeError: if the coefficients are not floating point, or if `num_directions` is no integer.
    """
    check_floating(beta)
    check_counts(num_directions=num_directions)
    dimension(beta, directions)
    if callable(directions):
        return _checked(directions(key, beta, num_directions), beta, num_directions)
    if directions == "simplex_orthogonal":
        reduced = _flat_like(_orthogonal, key, _without_last(beta), num_directions)
        return jax.tree.map(_to_zero_sum, reduced, beta)
    sample = {
        "rademacher": _rademacher,
        "sphere": _sphere,
        "gaussian": _gaussian,
        "orthogonal": _orthogonal,
    }[directions]
    return _flat_like(sample, key, beta, num_directions)


def basis(beta: PyTree, directions: DirectionName = "orthogonal") -> PyTree:
    """Returns an orthonormal basis of the space that `directions` probe around `beta`. It is always the same basis.

    Args:
        beta: any pytree of floating-point coefficients.
        directions: a name from the table of `glue_jax.directions`.

    Returns:
        A pytree with the structure and the dtypes of beta, and leaves `[d, ...]`, where d is
        `dimension(beta, directions)`.

    Raises:
        ValueError: if the name is unknown, or if there is nothing to probe.
        TypeError: if the coefficients are not floating point.
    """
    check_floating(beta)
    d = dimension(beta, directions)

    def unit_vectors(key: None, m: int, d: int, dtype: Any) -> jax.Array:
        return jnp.eye(m, d, dtype=dtype)

    if directions == "simplex_orthogonal":
        return jax.tree.map(_to_zero_sum, _flat_like(unit_vectors, None, _without_last(beta), d), beta)
    return _flat_like(unit_vectors, None, beta, d)


def _flat_like(sample: Any, key: Any, tree: PyTree, num_directions: int) -> PyTree:
    """Draws directions as rows `[m, d]`, and returns them with the structure and the dtypes of `tree`."""
    flat, unravel = ravel_pytree(tree)
    dtype = jnp.promote_types(flat.dtype, jnp.float32)
    return jax.vmap(unravel)(sample(key, num_directions, flat.size, dtype).astype(flat.dtype))


def _rademacher(key: jax.Array, m: int, d: int, dtype: Any) -> jax.Array:
    """Returns rows whose entries have one size and random signs."""
    return jax.random.rademacher(key, (m, d), dtype) / math.sqrt(d)


def _gaussian(key: jax.Array, m: int, d: int, dtype: Any) -> jax.Array:
    """Returns rows of independent normal entries."""
    return jax.random.normal(key, (m, d), dtype) / math.sqrt(d)


def _sphere(key: jax.Array, m: int, d: int, dtype: Any) -> jax.Array:
    """Returns rows of independent normal entries, each row normalised."""
    normal = jax.random.normal(key, (m, d), dtype)
    return normal / jnp.linalg.norm(normal, axis=1, keepdims=True)


def _orthogonal(key: jax.Array, m: int, d: int, dtype: Any) -> jax.Array:
    """Returns orthonormal rows, in independent blocks of d."""
    if min(m, d) == 1:
        return _sphere(key, m, d, dtype)
    blocks = -(-m // d)
    normal = jax.random.normal(key, (blocks, d, min(m, d)), dtype)
    q, r = jnp.linalg.qr(normal)
    # QR's own signs would favour some directions over their opposites.
    q *= jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    return q.mT.reshape(-1, d)[:m]


def _without_last(beta: PyTree) -> PyTree:
    """Returns coordinates for the vectors that sum to zero. There is one fewer along the last axis."""
    return jax.tree.map(lambda leaf: leaf if np.ndim(leaf) == 0 else leaf[..., 1:], beta)


def _to_zero_sum(reduced: jax.Array, beta: jax.Array) -> jax.Array:
    """Returns vectors `[m, ..., K]` that sum to zero, from coordinates `[m, ..., K-1]`. Lengths stay the same."""
    if np.ndim(beta) == 0:
        return reduced
    basis = jnp.asarray(_zero_sum_basis(beta.shape[-1]), reduced.dtype)
    return jnp.matmul(reduced, basis, precision=jax.lax.Precision.HIGHEST)


def _zero_sum_basis(k: int) -> np.ndarray:
    """Returns Helmert's orthonormal basis of the vectors that sum to zero, as rows `[K-1, K]`."""
    rows = np.arange(1, k)[:, None]
    columns = np.arange(k)[None, :]
    helmert = np.where(columns < rows, 1.0, np.where(columns == rows, -rows, 0.0))
    return helmert / np.sqrt(rows * (rows + 1.0))


def _checked(sampled: PyTree, beta: PyTree, num_directions: int) -> PyTree:
    """Returns a function's directions in beta's dtypes. Refuses directions of another shape."""
    shapes = jax.tree.map(np.shape, sampled)
    expected = jax.tree.map(lambda leaf: (num_directions, *np.shape(leaf)), beta)
    if shapes != expected:
        raise ValueError(f"the directions function returned shapes {shapes}; expected {expected}")
    return jax.tree.map(lambda u, leaf: jnp.asarray(u, jnp.result_type(leaf)), sampled, beta)
