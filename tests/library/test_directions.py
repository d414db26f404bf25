"""Random probe directions and their second moments."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from glue_jax.directions import DirectionName, dimension, sample_directions

NAMES = get_args(DirectionName)
BETAS = {
    "[K]": jnp.zeros(4),
    "[G, K]": jnp.zeros((2, 3)),
    "tree": {"a": jnp.zeros(3), "t": jnp.zeros(()), "w": jnp.zeros((2, 2))},
}
SAMPLES = 4000


def flat_directions(key, beta, m, directions):
    """Directions as rows `[m, size of beta]`."""
    u = sample_directions(key, beta, m, directions)
    return jax.vmap(lambda one: ravel_pytree(one)[0])(u)


def projection(beta, directions):
    """The projection on the space that is probed, in the flat coordinates of beta."""
    if directions != "simplex_orthogonal":
        return np.eye(sum(leaf.size for leaf in jax.tree.leaves(beta)))

    def project(flat):
        tree = unravel(flat)
        centred = jax.tree.map(lambda leaf: leaf - leaf.mean(axis=-1, keepdims=True) if leaf.ndim else leaf, tree)
        return ravel_pytree(centred)[0]

    flat, unravel = ravel_pytree(beta)
    return np.asarray(jax.vmap(project)(jnp.eye(flat.size)))


CASES = [
    *[("tree", name, 3) for name in NAMES],
    *[(what, name, 11) for what in ("tree", "[K]") for name in ("orthogonal", "simplex_orthogonal")],
    ("[G, K]", "simplex_orthogonal", 1),
    ("[G, K]", "simplex_orthogonal", 6),
]


@functools.cache
def draws(what, name, m):
    """Many independent draws `[SAMPLES, m, size of beta]`."""
    keys = jax.random.split(jax.random.key(0), SAMPLES)
    return np.asarray(jax.jit(jax.vmap(lambda key: flat_directions(key, BETAS[what], m, name)))(keys))


@pytest.mark.parametrize(("what", "name", "m"), CASES)
def test_the_second_moment_is_the_identity_over_d_on_the_space_probed(what, name, m):
    u = draws(what, name, m)
    outer = np.einsum("nmi,nmj->nij", u, u) / m
    # 5 standard errors of the sample, and float32's rounding.
    tolerance = 5 * outer.std(axis=0) / np.sqrt(SAMPLES) + 1e-5
    expected = projection(BETAS[what], name) / dimension(BETAS[what], name)
    assert (np.abs(outer.mean(axis=0) - expected) < tolerance).all()


@pytest.mark.parametrize(("what", "name", "m"), [case for case in CASES if "orthogonal" in case[1]])
def test_orthogonal_directions_are_orthonormal_within_each_block_of_d(what, name, m):
    u = draws(what, name, m)
    d = dimension(BETAS[what], name)
    assert u.shape[:2] == (SAMPLES, m)
    for start in range(0, m, d):
        block = u[:, start : start + d]
        products = np.einsum("nid,njd->nij", block, block)
        np.testing.assert_allclose(products, np.broadcast_to(np.eye(block.shape[1]), products.shape), atol=1e-5)


@pytest.mark.parametrize(("what", "name", "m"), [case for case in CASES if "orthogonal" in case[1] and case[2] == 11])
def test_the_blocks_of_orthogonal_directions_are_independent(what, name, m):
    u = draws(what, name, m)
    d = dimension(BETAS[what], name)
    # Of two independent directions, whatever their signs: E (u . v)² = trace((I/d)²) = 1/d.
    squares = np.sum(u[:, 0] * u[:, d], axis=1) ** 2
    assert abs(squares.mean() - 1 / d) < 5 * squares.std() / np.sqrt(SAMPLES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rademacher", {"[K]": 4, "[G, K]": 6, "tree": 8}),
        ("orthogonal", {"[K]": 4, "[G, K]": 6, "tree": 8}),
        ("simplex_orthogonal", {"[K]": 3, "[G, K]": 4, "tree": 2 + 1 + 2}),
    ],
)
def test_the_dimension_counts_what_is_probed(name, expected):
    assert {what: dimension(beta, name) for what, beta in BETAS.items()} == expected


def test_rademacher_entries_are_plus_or_minus_one_over_root_d():
    u = sample_directions(jax.random.key(0), jnp.zeros(16), 50)
    assert set(np.unique(u)) == {-0.25, 0.25}


def test_sphere_directions_have_length_one():
    u = sample_directions(jax.random.key(0), jnp.zeros((2, 5)), 20, "sphere")
    np.testing.assert_allclose(jnp.linalg.norm(u.reshape(20, 10), axis=1), np.ones(20), rtol=1e-6)


@pytest.mark.parametrize("beta", [jnp.zeros(4), jnp.zeros((2, 3)), jnp.zeros((2, 3, 2))])
def test_simplex_directions_sum_to_zero_over_the_experts(beta):
    u = sample_directions(jax.random.key(1), beta, 5, "simplex_orthogonal")
    np.testing.assert_allclose(jnp.sum(u, axis=-1), np.zeros((5, *beta.shape[:-1])), atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_directions_have_the_structure_and_dtypes_of_beta(name):
    beta = {"a": jnp.zeros(3), "h": jnp.zeros((2, 2), jnp.bfloat16), "t": jnp.zeros(())}
    u = sample_directions(jax.random.key(0), beta, 3, name)
    shapes_and_dtypes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), u)
    assert shapes_and_dtypes == {"a": ((3, 3), "float32"), "h": ((3, 2, 2), "bfloat16"), "t": ((3,), "float32")}


@pytest.mark.parametrize("name", NAMES)
def test_the_key_alone_decides_the_directions(name):
    draw = functools.partial(sample_directions, beta=jnp.zeros(5), num_directions=2, directions=name)
    np.testing.assert_array_equal(draw(jax.random.key(3)), draw(jax.random.key(3)))
    assert not np.allclose(draw(jax.random.key(3)), draw(jax.random.key(4)))


def test_a_function_of_ones_own_gives_the_directions():
    def axes(key, beta, num_directions):
        del key
        return jnp.eye(num_directions, beta.size)

    np.testing.assert_array_equal(sample_directions(jax.random.key(0), jnp.zeros(3), 2, axes), [[1, 0, 0], [0, 1, 0]])
    assert dimension(jnp.zeros(3), axes) == 3


@pytest.mark.parametrize(
    ("directions", "m", "beta", "message"),
    [
        ("rademacher", 0, jnp.zeros(3), "num_directions is 0"),
        ("uniform", 1, jnp.zeros(3), "directions is 'uniform'; expected one of.*rademacher"),
        ("simplex_orthogonal", 1, jnp.zeros(1), r"beta of shape \(1,\) leaves simplex_orthogonal .* nothing"),
        ("rademacher", 1, jnp.zeros(0), r"beta of shape \(0,\) leaves rademacher .* nothing"),
        (lambda key, beta, m: jnp.zeros(3), 1, jnp.zeros(3), r"returned shapes \(3,\); expected \(1, 3\)"),
        (lambda key, beta, m: [jnp.zeros((1, 3))], 1, jnp.zeros(3), r"returned shapes .*; expected \(1, 3\)"),
    ],
)
def test_directions_that_cannot_be_drawn_are_refused(directions, m, beta, message):
    with pytest.raises(ValueError, match=message):
        sample_directions(jax.random.key(0), beta, m, directions)
